"""Learning curves of a study that compares orders of tokens, and what the orders did meanwhile."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from tokendyn.experiments._drawing import COLOURS, draw_band
from tokendyn.experiments._run_folder import RunRecord

LINES = ("-", "--", ":", "-.")


def arms_with_orders(arms: Sequence[str], runs: Sequence[RunRecord]) -> list[str]:
    """The arms whose orders were measured."""
    return [arm for arm in arms if any("orders" in line for run in runs if run.arm == arm for line in run.metrics)]


def draw_curves(
    figure: Figure | SubFigure, arms: Sequence[str], runs: Sequence[RunRecord], place_of: Callable[[str], str]
) -> None:
    """Held-out accuracy and loss over training, and where there are orders the tokens that a sorted place averages and
    the variance between tokens that the order keeps: means and ranges over seeds. ``place_of`` names a module."""
    measures = bool(arms_with_orders(arms, runs))
    panels: list[Axes] = list(np.atleast_1d(figure.subplots(1, 4 if measures else 2)))
    for arm, colour in zip(arms, itertools.cycle(COLOURS), strict=False):
        lines = [[line for line in run.metrics if line["split"] == "held_out"] for run in runs if run.arm == arm]
        steps = [line["step"] for line in lines[0]]
        draw_band(panels[0], steps, [[100 * line["accuracy"] for line in run] for run in lines], colour, "-", arm)
        draw_band(panels[1], steps, [[line["loss"] for line in run] for run in lines], colour, "-", arm)
        for module, dashes in zip(lines[0][-1].get("orders", {}), LINES, strict=False):
            with_orders = [[line for line in run if "orders" in line] for run in lines]
            steps = [line["step"] for line in with_orders[0]]
            for panel, key in ((panels[2], "effective_tokens"), (panels[3], "variance_kept")):
                values = [[line["orders"][module][key] for line in run] for run in with_orders]
                draw_band(panel, steps, values, colour, dashes, "")
    seeds = len({run.seed for run in runs})
    panels[0].set_title("Held-out accuracy, %\n" + (f"mean and range of {seeds} seeds" if seeds > 1 else "one seed"))
    panels[0].legend(loc="lower right")
    panels[1].set_title("Held-out loss\n")
    low, high = panels[1].get_ylim()
    if low <= 0 or high / low > 4:
        panels[1].set_yscale("log")
        panels[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panels[1].yaxis.set_major_formatter("{x:g}")
        panels[1].yaxis.set_minor_locator(NullLocator())
    if measures:
        tokens = max(o["tokens"] for run in runs for line in run.metrics for o in line.get("orders", {}).values())
        panels[2].set_title(f"Tokens averaged by a sorted place\n1: a sort, {tokens:.0f}: the mean of all")
        panels[2].set_yscale("log", base=2)
        panels[2].set_ylim(0.9, tokens * 1.12)
        ticks = [2**k for k in range(int(math.log2(tokens)) + 1)]
        panels[2].set_yticks(ticks, [str(tick) for tick in ticks])
        modules = next(line["orders"] for run in runs for line in run.metrics if line.get("orders"))
        if len(modules) > 1:  # colours are the arms' in the first panel
            strokes = [Line2D([], [], color="black", linestyle=dashes) for dashes in LINES]
            panels[2].legend(strokes, map(place_of, modules), loc="best")
        panels[3].set_title("Variance between tokens kept\n1: all of it, 0: all tokens are alike")
        lowest = min(line.get_ydata().min() for line in panels[3].lines)  # type: ignore[union-attr]
        if lowest < 0.05:
            panels[3].set_yscale("log")
            panels[3].set_ylim(None, 3)
        else:
            panels[3].set_ylim(0, 1.05)
    for panel in panels:
        panel.set_xlabel("step")
