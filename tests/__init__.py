"""The tests; packages only so that the self-test can import the machinery that it tests."""
