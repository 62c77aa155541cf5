"""Image classification with and without token reordering: ``python -m tokendyn.experiments.imagenet``."""
