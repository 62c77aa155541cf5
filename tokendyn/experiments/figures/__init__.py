"""The papers' figures of token dynamics, and those that correct or extend them.

``python -m tokendyn.experiments.figures`` draws them all into ``figures/``, as PNG and SVG, each with the numbers it
was drawn from (JSON). The parameters are our own, chosen to show the regimes of the published figures.
"""
