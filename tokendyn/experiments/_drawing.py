"""What the figures of all studies share: colours, look, curves over seeds, and how they are saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokendyn.experiments._files import write_with

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#888888")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "svg.hashsalt": "tokendyn",
    "svg.fonttype": "none",
}


def draw_band(
    panel: Axes, steps: Sequence[float], values: Sequence[Sequence[float]], colour: str, dashes: str, label: str
) -> None:
    """The mean over seeds, ``values`` (seeds, steps), and if there are several their range."""
    table = np.array(values)
    panel.plot(steps, table.mean(axis=0), dashes, color=colour, label=label, linewidth=1.6)
    if len(table) > 1:
        panel.fill_between(steps, table.min(axis=0), table.max(axis=0), color=colour, alpha=0.15, linewidth=0)


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``name.png`` and ``name.svg`` into ``folder``; their paths."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    write_with(paths[0], lambda place: figure.savefig(place, dpi=150))
    figure.set_layout_engine("none")  # as it was just laid out, which takes longer than drawing
    write_with(paths[1], lambda place: figure.savefig(place, metadata={"Date": None}))
    return paths
