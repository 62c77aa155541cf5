"""The figure of an image study: how the arms learned, and what the orders did to the tokens."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.ticker import LogLocator, NullLocator

from tokendyn.experiments._checkpoint import read_tensors
from tokendyn.experiments._drawing import COLOURS, STYLE, draw_band, save_figure
from tokendyn.experiments._run_folder import RunRecord
from tokendyn.experiments._task import KEEPSAKES
from tokendyn.experiments.imagenet._arms import describe_order, resolve_arm
from tokendyn.experiments.imagenet._config import ImageNetConfig
from tokendyn.experiments.imagenet._images import Images
from tokendyn.experiments.imagenet._task import MEASURED_IMAGES, example_images, mosaic, stage_of

LINES = ("-", "--", ":", "-.")


def draw_figure(
    folder: Path,
    config: ImageNetConfig,
    images: Images,
    runs: Sequence[RunRecord],
) -> list[Path]:
    """Draw ``study.png`` and ``study.svg`` into ``folder``; their paths.

    Above: held-out accuracy and loss, and over training the tokens that a sorted place averages and the
    variance between tokens that the order keeps (means and ranges over seeds). Below: held-out images, and
    for every token of the first ordering block the place to which it goes, from the first seed's models.
    """
    ordered = [
        arm for arm in config.arms if any("orders" in line for run in runs if run.arm == arm for line in run.metrics)
    ]
    with matplotlib.rc_context(STYLE):
        maps_height = 1.15 * (len(ordered) + 1) + 0.5 if ordered else 0.0
        figure = Figure(figsize=(11, 3.1 + maps_height), layout="constrained")
        parts: Any = figure.subfigures(2, 1, height_ratios=[3.1, maps_height], hspace=0.02) if ordered else [figure]
        _draw_curves(parts[0], config, runs, measures=bool(ordered))
        if ordered:
            _draw_maps(parts[1], ordered, config, images, runs)
        return save_figure(figure, folder, "study")


def _draw_curves(
    figure: Figure | SubFigure, config: ImageNetConfig, runs: Sequence[RunRecord], *, measures: bool
) -> None:
    panels: list[Axes] = list(np.atleast_1d(figure.subplots(1, 4 if measures else 2)))
    for arm, colour in zip(config.arms, itertools.cycle(COLOURS), strict=False):
        lines = [[line for line in run.metrics if line["split"] == "held_out"] for run in runs if run.arm == arm]
        steps = [line["step"] for line in lines[0]]
        draw_band(panels[0], steps, [[100 * line["accuracy"] for line in run] for run in lines], colour, "-", arm)
        draw_band(panels[1], steps, [[line["loss"] for line in run] for run in lines], colour, "-", arm)
        for module, dashes in zip(lines[0][-1].get("orders", {}), LINES, strict=False):
            with_orders = [[line for line in run if "orders" in line] for run in lines]
            steps = [line["step"] for line in with_orders[0]]
            label = f"{arm}, {stage_of(module)}"
            for panel, key in ((panels[2], "effective_tokens"), (panels[3], "variance_kept")):
                values = [[line["orders"][module][key] for line in run] for run in with_orders]
                draw_band(panel, steps, values, colour, dashes, label)
    seeds = len(config.seeds)
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
        panels[2].set_title(f"Tokens averaged by a sorted place\n1: a sort, {tokens}: the mean of all")
        panels[2].set_yscale("log", base=2)
        panels[2].set_ylim(0.9, tokens * 1.12)
        ticks = [2**k for k in range(int(math.log2(tokens)) + 1)]
        panels[2].set_yticks(ticks, [str(tick) for tick in ticks])
        panels[2].legend(loc="best", fontsize=8)
        panels[3].set_title("Variance between tokens kept\n1: all of it, 0: all tokens are alike")
        lowest = min(line.get_ydata().min() for line in panels[3].lines)  # type: ignore[union-attr]
        if lowest < 0.05:
            panels[3].set_yscale("log")
            panels[3].set_ylim(None, 3)
        else:
            panels[3].set_ylim(0, 1.05)
    for panel in panels:
        panel.set_xlabel("step")


def _draw_maps(
    figure: SubFigure,
    ordered: Sequence[str],
    config: ImageNetConfig,
    images: Images,
    runs: Sequence[RunRecord],
) -> None:
    held_out = images.held_out
    examples = example_images(images)
    pixels, _ = held_out.read(examples)
    columns = len(examples) + 1
    grid = figure.add_gridspec(len(ordered) + 1, columns + 1, width_ratios=[1.0] * columns + [0.09])
    panels = np.array([[figure.add_subplot(grid[i, j]) for j in range(columns)] for i in range(len(ordered) + 1)])
    for panel in panels.flat:
        panel.set_xticks([])
        panel.set_yticks([])
        panel.spines[:].set_visible(False)
        panel.grid(False)
    for panel, image, index in zip(panels[0], pixels, examples, strict=False):
        panel.imshow(image, interpolation="nearest")
        panel.set_title(textwrap.fill(images.classes[held_out.labels[index]], 18), fontsize=8, loc="center")
    label_row(panels[0, 0], "held-out images")
    for row, arm in zip(panels[1:], ordered, strict=True):
        run = next(run for run in runs if run.arm == arm)
        kept = read_tensors(run.folder / KEEPSAKES)
        tokens = int(kept["tokens"])
        for panel, values in zip(row, [*kept["examples"].numpy(), kept["mean"].numpy()], strict=True):
            draw_places(panel, values, tokens)
        order = describe_order(resolve_arm(arm)).replace(", ", ",\n")
        averaged = kept["effective_tokens"].item()
        label_row(row[0], f"{arm}\n{order}\n(a place averages\n{averaged:.1f} of {tokens} tokens)")
        if arm == ordered[0]:
            windows = kept["mean"].numel() // tokens
            raster = mosaic(torch.arange(float(tokens)).repeat(windows, 1), 1)[0].numpy()
            drawn = draw_places(panels[0, -1], raster, tokens)
            bar = figure.colorbar(drawn, cax=figure.add_subplot(grid[:, columns]))
            bar.set_label("place of a token in the scan", fontsize=8)
            bar.set_ticks([0, tokens - 1], labels=["first", "last"])
    panels[0, -1].set_title("without an order", fontsize=8, loc="center")
    panels[1, -1].set_title(f"mean of {min(MEASURED_IMAGES, len(held_out))} images", fontsize=8, loc="center")


def label_row(panel: Axes, text: str) -> None:
    panel.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8)


def draw_places(panel: Axes, values: np.ndarray, tokens: int) -> AxesImage:
    return panel.imshow(values, cmap="viridis", vmin=0, vmax=tokens - 1, interpolation="nearest")
