"""Draws the pictures of the language studies from what was measured: ``python docs/study_figures.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tables import paired_by_seed

from tokendyn.experiments._drawing import COLOURS, STYLE, draw_band

DOCS = Path(__file__).parent
PAIRS = (
    ("chunk_order", "free"),
    ("group_order", "free"),
    ("window_order", "free, again"),
    ("chunk_order_shared_layers", "shared_layers"),
    ("chunk_order_no_norm", "no_norm"),
    ("chunk_order_no_convolution", "no_convolution"),
    ("mamba_published_order", "free"),
    ("h3_published_order", "h3"),
    ("transformer_published_order", "transformer"),
)
SIGNS = (("free", "no_norm"), ("negative", "negative:norm=none"), ("positive", "positive:norm=none"))


def read(name: str) -> dict[str, Any]:
    return json.loads((DOCS / "_measured" / f"{name}.json").read_text(encoding="utf-8"))["arms"]


def orders() -> Figure:
    """What each order changes of the held-out loss, honest ones on a scale of their own."""
    arms = read("orders")
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels: list[Axes] = list(figure.subplots(1, 2, width_ratios=(3, 2)).flat)
    for panel, future in zip(panels, (False, True), strict=True):
        pairs = [pair for pair in PAIRS if set(pair) <= set(arms) and arms[pair[0]]["reads_future"] == future]
        for place, (one, other) in enumerate(reversed(pairs)):
            difference = paired_by_seed(arms[one], arms[other], "loss")
            low, high = difference["interval95"] or (difference["mean"],) * 2
            colour = COLOURS[5 if future else 0]
            panel.plot([low, high], [place, place], color=colour, linewidth=2)
            panel.plot(difference["values"], [place] * len(difference["values"]), "o", color=colour, markersize=4)
        panel.axvline(0, color="#888888", linewidth=1)
        panel.set_yticks(range(len(pairs)), [f"{one}\nminus {other}" for one, other in reversed(pairs)], fontsize=7)
        panel.set_ylim(-0.6, len(pairs) - 0.4)
        panel.set_xlabel("nats a token")
        panel.set_title(
            "Sees the future: no likelihoods" if future else "Causal: loss, seed by seed, and 95 % interval"
        )
    return figure


def token_norms() -> Figure:
    """log2 of the norm of the residual stream by block, measured and as the dynamics have it."""
    arms = read("orders")
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels: list[Axes] = list(figure.subplots(1, 4).flat)
    for place, (key, title) in enumerate((("norms", "measured"), ("norms_ode", "predicted"))):
        for column, norm in enumerate(("with norm", "without norm")):
            panel = panels[2 * column + place]
            for colour, names in zip(COLOURS, SIGNS, strict=False):
                name = names[column]
                if name in arms:
                    runs = arms[name]["norms"][key]
                    draw_band(panel, list(range(len(runs[0]))), runs, colour, "-", names[0])
            panel.set_title(f"{norm}, {title}")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            panel.set_xlabel("block")
    panels[0].set_ylabel("log2 of the token norm")
    panels[0].legend(loc="lower right")
    return figure


def main() -> None:
    with matplotlib.rc_context(STYLE):
        for draw in (orders, token_norms):
            draw().savefig(DOCS / "images" / f"{draw.__name__}.png", dpi=150)


if __name__ == "__main__":
    main()
