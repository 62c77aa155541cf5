"""The papers' figures of token dynamics, and those that correct or extend them.

``python -m tokendyn.experiments.figures`` draws them all into ``figures/``, as PNG and SVG, each with the numbers it
was drawn from (JSON). The parameters of the published figures are lost from our copies of the papers; stand-ins show
the same regimes.
"""
