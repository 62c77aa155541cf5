"""The backends: ``numpy``, ``torch``, ``jax``; in each, ``ops`` implements the table of operations."""
