"""The figure of an image study: how the arms learned, and what the orders did to the tokens."""

from __future__ import annotations

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

from tokendyn.experiments._checkpoint import read_tensors
from tokendyn.experiments._drawing import STYLE, save_figure
from tokendyn.experiments._order_arms import describe_order, resolve_arm
from tokendyn.experiments._order_figure import arms_with_orders, draw_curves
from tokendyn.experiments._run_folder import RunRecord
from tokendyn.experiments._task import KEEPSAKES
from tokendyn.experiments.imagenet._config import ImageNetConfig
from tokendyn.experiments.imagenet._images import Images
from tokendyn.experiments.imagenet._task import MEASURED_IMAGES, example_images, mosaic, stage_of


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
    ordered = arms_with_orders(config.arms, runs)
    with matplotlib.rc_context(STYLE):
        maps_height = 1.15 * (len(ordered) + 1) + 0.5 if ordered else 0.0
        figure = Figure(figsize=(11, 3.1 + maps_height), layout="constrained")
        parts: Any = figure.subfigures(2, 1, height_ratios=[3.1, maps_height], hspace=0.02) if ordered else [figure]
        draw_curves(parts[0], config.arms, runs, stage_of)
        if ordered:
            _draw_maps(parts[1], ordered, config, images, runs)
        return save_figure(figure, folder, "study")


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
