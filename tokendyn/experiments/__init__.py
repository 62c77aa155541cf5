"""Experiments: the papers' tables and figures as commands, on one trainer.

``python -m tokendyn.experiments.imagenet`` trains image models with and without token reordering,
``python -m tokendyn.experiments.wikitext103`` language models with spectra of chosen signs, and orders of their
tokens, ``python -m tokendyn.experiments.text_classification`` classifiers of texts with and without reordering.
The modules that start with an underscore are shared by all experiments: configuration (:mod:`._config`,
:mod:`._cli`), the run folder (:mod:`._files`, :mod:`._records`, :mod:`._checkpoint`, :mod:`._environment`), the
trainer (:mod:`._trainer`), the study of arms and seeds (:mod:`._study`), arms that are orders of tokens
(:mod:`._order_arms`, :mod:`._order_report`) and text (:mod:`._text`).
"""
