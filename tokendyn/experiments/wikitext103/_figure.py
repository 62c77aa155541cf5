"""The figure of a language study: learning curves, spectra, signs, and token norms beside the ODE's word on them."""

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


def draw_figure(folder: Path, config: LanguageConfig, runs: Sequence[RunRecord]) -> list[Path]:
    """Draw ``study.png`` and ``study.svg`` into ``folder``; their paths. Bands are ranges over seeds.

    Held-out loss over training; for Mamba the mean over layers of the largest and of the median magnitude among the
    eigenvalues of M that are not 0 by rank, and the part of positive x_lᵀ M x_j; by depth, after training, the
    magnitudes and the token norms, these beside the prediction of the token dynamics. Without measures of the blocks
    the loss alone; a grey line is the entropy of random letters.
    """
    measured = any("blocks" in line for run in runs for line in run.metrics)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 6) if measured else (6.5, 4.5), layout="constrained")
        panels: list[Axes] = list(figure.subplots(2, 3).flat) if measured else [figure.subplots()]
        for arm, colour in zip(config.arms, itertools.cycle(COLOURS), strict=False):
            of_arm = [run for run in runs if run.arm == arm]
            lines = [[line for line in run.metrics if line["split"] == "held_out"] for run in of_arm]
            steps = [line["step"] for line in lines[0]]
            draw_band(panels[0], steps, _table(lines, lambda line: line["loss"]), colour, "-", arm)
            last = [run[-1]["blocks"] for run in lines if "blocks" in run[-1]]
            if not last:
                continue
            depth = list(range(len(last[0]["norms"])))
            draw_band(panels[5], depth, [blocks["norms"] for blocks in last], colour, "-", arm)
            if "layers" not in last[0]:
                continue
            draw_band(panels[5], depth, [blocks["norms_ode"] for blocks in last], colour, ":", "")
            draw_band(panels[1], steps, _table(lines, lambda line: _over_layers(line, _largest)), colour, "-", arm)
            draw_band(panels[1], steps, _table(lines, lambda line: _over_layers(line, _median)), colour, ":", "")
            draw_band(panels[2], steps, _table(lines, lambda line: _over_layers(line, _pairs)), colour, "-", arm)
            for panel, measure in ((panels[3], _largest), (panels[4], _pairs)):
                by_layer = [[measure(layer) for layer in blocks["layers"].values()] for blocks in last]
                draw_band(panel, depth[:-1], by_layer, colour, "-", arm)
        if config.data.text == RANDOM:
            entropy = math.log(len(LETTERS))
            panels[0].axhline(entropy, color="#888888", linestyle="--", linewidth=1)
            panels[0].annotate("entropy", (1, entropy), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        _label(panels, len({run.seed for run in runs}))
        return save_figure(figure, folder, "study")


def _label(panels: Sequence[Axes], seeds: int) -> None:
    titles = (
        "Held-out loss, nats a token\n" + (f"mean and range of {seeds} seeds" if seeds > 1 else "one seed"),
        "Eigenvalues of M, mean over layers\nlargest magnitude —, median ···",
        "Part of x_lᵀ M x_j > 0 on held-out text\nmean over layers",
        "Largest |eigenvalue| of M by layer\nafter training",
        "Part of x_lᵀ M x_j > 0 by layer\nafter training",
        "log2 of the token norm after each block\nmeasured —, by the token dynamics ···",
    )
    for place, (panel, title) in enumerate(zip(panels, titles, strict=False)):
        panel.set_title(title)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_xlabel("step" if place < 3 else "block" if place == 5 else "layer")
        if place in (1, 3) and panel.lines:
            panel.set_yscale("log")
        if place in (2, 4):
            panel.set_ylim(-0.02, 1.02)
        if not panel.lines:
            panel.set_axis_off()
    panels[0].legend(loc="upper right")


def _table(lines: Sequence[Sequence[Line]], value: Callable[[Line], float]) -> list[list[float]]:
    return [[value(line) for line in run] for run in lines]


def _over_layers(line: Line, measure: Callable[[dict[str, Any]], float]) -> float:
    return float(np.mean([measure(layer) for layer in line["blocks"]["layers"].values()]))


def _largest(layer: dict[str, Any]) -> float:
    return layer["eigenvalues"][0]


def _median(layer: dict[str, Any]) -> float:
    return float(np.median(layer["eigenvalues"]))


def _pairs(layer: dict[str, Any]) -> float:
    return layer["positive_pairs"]
