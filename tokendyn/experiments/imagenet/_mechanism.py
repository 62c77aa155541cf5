"""Figures of what ``--mechanism`` measures: does order help, by what, and what do the tokens do."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokendyn.experiments._checkpoint import read_tensors
from tokendyn.experiments._drawing import COLOURS, STYLE, draw_band
from tokendyn.experiments._files import write_with
from tokendyn.experiments._order_figure import LINES
from tokendyn.experiments._run_folder import RunRecord
from tokendyn.experiments._task import KEEPSAKES
from tokendyn.experiments.imagenet._figure import draw_places, label_row
from tokendyn.experiments.imagenet._images import Images
from tokendyn.experiments.imagenet._task import stage_of

Result = dict[str, Any]


def draw_mechanism(folder: Path, result: Result, images: Images, runs: Sequence[RunRecord]) -> list[Path]:
    """Draw ``differences.png``, ``mechanism.png`` and ``class_maps.png`` into ``folder``; their paths."""
    folder.mkdir(exist_ok=True)
    colours = dict(zip(result["arms"], itertools.cycle(COLOURS), strict=False))
    with matplotlib.rc_context(STYLE):
        drawn = {
            "differences.png": _draw_differences(result, colours),
            "mechanism.png": _draw_mechanism(result, runs, colours),
            "class_maps.png": _draw_class_maps(images, runs),
        }
        for name, figure in drawn.items():
            if figure is not None:
                write_with(folder / name, lambda place, figure=figure: figure.savefig(place, dpi=150))
    return [folder / name for name, figure in drawn.items() if figure is not None]


def _draw_differences(result: Result, colours: dict[str, str]) -> Figure:
    """Left: each arm's accuracy less the first arm's, seed by seed. Right: with the order shuffled at test time."""
    arms = result["arms"]
    compared = [arm for arm in arms if "difference" in arms[arm]]
    figure = Figure(figsize=(9.5, 1.1 + 0.34 * len(arms)), layout="constrained")
    left, right = figure.subplots(1, 2)
    for row, arm in enumerate(compared):
        difference = arms[arm]["difference"]["accuracy"]
        if difference["interval95"] is not None:
            left.plot([100 * end for end in difference["interval95"]], [row, row], color=colours[arm], linewidth=2)
        left.plot(100 * np.array(difference["values"]), np.full(len(difference["values"]), row), "|", color="#555555")
        left.plot(100 * difference["mean"], row, "o", color=colours[arm])
    left.axvline(0, color="black", linewidth=0.8)
    _rows(left, compared)
    left.set_title(f"Accuracy minus that of {next(iter(arms))}, points\nmean, seeds (strokes), 95 % interval (line)")
    for row, arm in enumerate(arms):
        held_out = arms[arm]["held_out"]
        ends = [100 * held_out[key]["mean"] for key in ("accuracy_shuffled", "accuracy")]
        right.plot(ends, [row, row], color="#bbbbbb", linewidth=1.5, zorder=1)
        right.plot(ends[0], row, "o", markerfacecolor="white", color=colours[arm])
        right.plot(ends[1], row, "o", color=colours[arm])
    _rows(right, list(arms))
    right.set_title("Held-out accuracy, %\nfilled: as trained, open: order shuffled at test time")
    return figure


def _rows(panel: Axes, names: Sequence[str]) -> None:
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.5, -0.5)


def _draw_mechanism(result: Result, runs: Sequence[RunRecord], colours: dict[str, str]) -> Figure:
    figure = Figure(figsize=(11, 6), layout="constrained")
    above, below = figure.subplots(2, 3)
    curves: tuple[tuple[str, Callable[[dict[str, float]], float]], ...] = (
        ("Reaction of an image's loss to its scores", lambda order: order["score_gradient"]),
        ("Rank correlation of places, images of one class", lambda order: order["agreement_class"]),
        ("the same, less that of any two images", lambda order: order["agreement_class"] - order["agreement_all"]),
    )
    for panel, (title, measure) in zip(above, curves, strict=True):
        for arm, colour in colours.items():
            lines = [[x for x in run.metrics if x["split"] == "held_out"] for run in runs if run.arm == arm]
            modules = [name for name, order in lines[0][-1].get("orders", {}).items() if "score_gradient" in order]
            for module, dashes in zip(modules, LINES, strict=False):
                values = [[measure(line["orders"][module]) for line in run] for run in lines]
                draw_band(panel, [x["step"] for x in lines[0]], values, colour, dashes, f"{arm}, {stage_of(module)}")
        panel.set_title(title)
        panel.set_xlabel("step")
    if above[0].lines:
        above[0].set_yscale("log")
        above[0].legend(fontsize=7, loc="best")
    blocks = list(next(iter(result["arms"].values()))["tokens"])
    for panel, (key, title) in zip(
        below,
        (
            ("pairwise_cosine", "Mean cosine of two tokens"),
            ("first_cosine", "Mean cosine with the first token"),
            ("clusters", "Clusters of cosine 0.9 among the tokens"),
        ),
        strict=True,
    ):
        for arm, colour in colours.items():
            values = np.array([result["arms"][arm]["tokens"][block][key]["values"] for block in blocks]).T
            draw_band(panel, list(range(len(blocks))), values.tolist(), colour, "-", arm)
        panel.set_title(title)
        panel.set_xticks(range(len(blocks)), [_short(name) for name in blocks])
        panel.set_xlabel("after this stage.block, at the end of the training")
    below[0].legend(fontsize=7, loc="best")
    return figure


def _short(block: str) -> str:
    """``levels.2.blocks.0`` as 3.1."""
    _, stage, _, index = block.split(".")
    return f"{int(stage) + 1}.{int(index) + 1}"


def _draw_class_maps(images: Images, runs: Sequence[RunRecord]) -> Figure | None:
    """The place of each token in the scan, mean over the images of a class, first ordering block, first seed."""
    kept = {}
    for run in runs:
        if run.arm not in kept and run.metrics[-1].get("orders"):
            kept[run.arm] = read_tensors(run.folder / KEEPSAKES)
    if not kept:
        return None
    columns = min(10, len(next(iter(kept.values()))["classes"]))
    figure = Figure(figsize=(0.95 * columns + 1.6, 1.05 * len(kept) + 0.3), layout="constrained")
    panels = figure.subplots(len(kept), columns, squeeze=False)
    for row, (arm, tensors) in zip(panels, kept.items(), strict=True):
        label_row(row[0], arm)
        for panel, name, values in zip(row, images.classes, tensors["classes"].numpy(), strict=False):
            draw_places(panel, values, int(tensors["tokens"]))
            panel.set(xticks=[], yticks=[])
            panel.grid(False)
            if arm == next(iter(kept)):
                panel.set_title(name[:12], fontsize=8, loc="center")
    return figure
