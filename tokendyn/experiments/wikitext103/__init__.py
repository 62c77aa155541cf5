"""Language models and the spectrum of their input-output matrices: ``python -m tokendyn.experiments.wikitext103``."""
