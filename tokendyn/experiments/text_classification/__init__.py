"""Text classification with and without reordering: ``python -m tokendyn.experiments.text_classification``."""
