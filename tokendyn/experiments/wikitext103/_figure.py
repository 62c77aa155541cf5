"""The figures of a language study: learning curves, spectra, signs, and token norms beside the ODE's word on them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tokendyn.experiments._drawing import COLOURS, STYLE, draw_band, save_figure
from tokendyn.experiments._run_folder import RunRecord
from tokendyn.experiments._text._sources import LETTERS, RANDOM
from tokendyn.experiments.wikitext103._config import LanguageConfig

Line = dict[str, Any]
Runs = dict[str, list[list[Line]]]  # by arm: each seed's measurements on held-out text, in the order of steps


def draw_figure(folder: Path, config: LanguageConfig, runs: Sequence[RunRecord]) -> list[Path]:
    """Draw ``study`` and, where blocks were measured, ``layers`` into ``folder``, each .png and .svg; their paths.

    ``study``, over training: held-out loss, its difference from the first arm's seed by seed; for Mamba the mean over
    layers of the largest and of the median magnitude among the eigenvalues of M that are not 0 by rank, and the part of
    positive x_lᵀ M x_j. A grey line is the entropy of random letters.

    ``layers``, by depth after training: the largest magnitude, the part of positive x_lᵀ M x_j of every run, the token
    norms, and these as the token dynamics predict them.

    Bands are ranges over seeds.
    """
    held_out = {
        arm: [[line for line in run.metrics if line["split"] == "held_out"] for run in runs if run.arm == arm]
        for arm in config.arms
    }
    with matplotlib.rc_context(STYLE):
        paths = save_figure(_over_training(held_out, config.data.text == RANDOM), folder, "study")
        if any("blocks" in lines[-1] for of_arm in held_out.values() for lines in of_arm):
            paths += save_figure(_by_depth(held_out), folder, "layers")
    return paths


def _over_training(held_out: Runs, random_letters: bool) -> Figure:
    with_layers = [arm for arm, of_arm in held_out.items() if "layers" in of_arm[0][-1].get("blocks", {})]
    figure = Figure(figsize=(9, 7 if with_layers else 3.6), layout="constrained")
    panels: list[Axes] = list(figure.subplots(2 if with_layers else 1, 2).flat)
    reference = next(iter(held_out))
    losses = {arm: np.array(_table(of_arm, _loss)) for arm, of_arm in held_out.items()}
    for arm, colour in _coloured(held_out):
        steps = [line["step"] for line in held_out[arm][0]]
        draw_band(panels[0], steps, losses[arm].tolist(), colour, "-", arm)
        if arm == reference:
            panels[1].axhline(0, color=colour, linewidth=1.6)
        else:
            draw_band(panels[1], steps, (losses[arm] - losses[reference]).tolist(), colour, "-", arm)
        if arm in with_layers:
            draw_band(
                panels[2], steps, _table(held_out[arm], lambda line: _over_layers(line, _largest)), colour, "-", ""
            )
            draw_band(
                panels[2], steps, _table(held_out[arm], lambda line: _over_layers(line, _median)), colour, ":", ""
            )
            draw_band(panels[3], steps, _table(held_out[arm], lambda line: _over_layers(line, _pairs)), colour, "-", "")
    if random_letters:
        entropy = math.log(len(LETTERS))
        panels[0].axhline(entropy, color="#888888", linestyle="--", linewidth=1)
        panels[0].annotate("entropy", (1, entropy), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    else:
        _leave_out_start(panels[0], losses)
    seeds = len(held_out[reference])
    titles = (
        "Held-out loss, nats a token\n" + (f"mean and range of {seeds} seeds" if seeds > 1 else "one seed"),
        f"Held-out loss minus that of {reference}\nseed by seed",
        "Eigenvalues of M, mean over layers\nlargest magnitude —, median ···",
        "Part of x_lᵀ M x_j > 0 on held-out text\nmean over layers",
    )
    for panel, title in zip(panels, titles, strict=False):
        _label(panel, title, "step")
    if with_layers:
        panels[2].set_yscale("log")
        panels[3].set_ylim(-0.02, 1.02)
    panels[0].legend(loc="best")
    if len(losses) == 1:
        panels[1].set_axis_off()
    return figure


def _by_depth(held_out: Runs) -> Figure:
    figure = Figure(figsize=(9, 7), layout="constrained")
    panels: list[Axes] = list(figure.subplots(2, 2).flat)
    signs: dict[str, list[list[float]]] = {}
    for arm, colour in _coloured(held_out):
        last = [lines[-1]["blocks"] for lines in held_out[arm] if "blocks" in lines[-1]]
        if not last:
            continue
        depth = list(range(len(last[0]["norms"])))
        draw_band(panels[2], depth, [blocks["norms"] for blocks in last], colour, "-", arm)
        if "layers" not in last[0]:
            continue
        draw_band(panels[3], depth, [blocks["norms_ode"] for blocks in last], colour, "-", arm)
        layers = [list(blocks["layers"].values()) for blocks in last]
        draw_band(panels[0], depth[:-1], [[_largest(layer) for layer in of_run] for of_run in layers], colour, "-", arm)
        signs[arm] = [[_pairs(layer) for layer in of_run] for of_run in layers]
    titles = (
        "Largest |eigenvalue| of M",
        "Part of x_lᵀ M x_j > 0 on held-out text\na row for every seed",
        "log2 of the token norm, mean over tokens",
        "The same as the token dynamics have it\none block, one unit of time",
    )
    for place, (panel, title) in enumerate(zip(panels, titles, strict=True)):
        _label(panel, title, "layer" if place < 2 else "block")
    panels[2].legend(loc="lower right")
    if signs:
        panels[0].set_yscale("log")
        _draw_signs(panels[1], signs)
    else:
        for panel in (panels[0], panels[1], panels[3]):
            panel.set_axis_off()
    return figure


def _draw_signs(panel: Axes, signs: dict[str, list[list[float]]]) -> None:
    """A coloured table: an arm's runs are rows, layers columns; white is as many positive as negative pairs."""
    width = max(len(row) for rows in signs.values() for row in rows)
    table = [row + [math.nan] * (width - len(row)) for rows in signs.values() for row in rows]
    image = panel.imshow(table, cmap="PuOr", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    ends = np.cumsum([len(rows) for rows in signs.values()])
    for end in ends[:-1]:
        panel.axhline(end - 0.5, color="white", linewidth=2)
    panel.set_yticks([end - (len(rows) + 1) / 2 for end, rows in zip(ends, signs.values(), strict=True)], list(signs))
    panel.grid(False)
    assert panel.figure is not None
    panel.figure.colorbar(image, ax=panel)


def _leave_out_start(panel: Axes, losses: dict[str, np.ndarray]) -> None:
    """Cut off the loss before the first step, beside which all later ones look the same."""
    after = [table[:, 1:] for table in losses.values()]
    if min(table.shape[1] for table in after) > 1:
        low, high = min(table.min() for table in after), max(table.max() for table in after)
        panel.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def _label(panel: Axes, title: str, below: str) -> None:
    panel.set_title(title)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlabel(below)


def _coloured(held_out: Runs) -> Sequence[tuple[str, str]]:
    return list(zip(held_out, itertools.cycle(COLOURS), strict=False))


def _table(lines: Sequence[Sequence[Line]], value: Callable[[Line], float]) -> list[list[float]]:
    return [[value(line) for line in run] for run in lines]


def _over_layers(line: Line, measure: Callable[[dict[str, Any]], float]) -> float:
    return float(np.mean([measure(layer) for layer in line["blocks"]["layers"].values()]))


def _loss(line: Line) -> float:
    return line["loss"]


def _largest(layer: dict[str, Any]) -> float:
    return layer["eigenvalues"][0]


def _median(layer: dict[str, Any]) -> float:
    return float(np.median(layer["eigenvalues"]))


def _pairs(layer: dict[str, Any]) -> float:
    return layer["positive_pairs"]
