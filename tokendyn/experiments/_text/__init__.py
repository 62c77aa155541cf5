"""Text for experiments: tokenizers, sources, and streams of tokens in memory-mapped files."""
