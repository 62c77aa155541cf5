"""The figure of a text classification study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from tokendyn.experiments._drawing import STYLE, save_figure
from tokendyn.experiments._order_figure import draw_curves
from tokendyn.experiments._run_folder import RunRecord
from tokendyn.experiments.text_classification._config import TextConfig
from tokendyn.experiments.text_classification._task import block_of


def draw_figure(folder: Path, config: TextConfig, reference: dict[str, Any], runs: Sequence[RunRecord]) -> list[Path]:
    """Draw ``study.png`` and ``study.svg`` into ``folder``; their paths.

    The curves of :func:`~.._order_figure.draw_curves`, and a grey line at the accuracy of ``reference``.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        draw_curves(figure, config.arms, runs, block_of)
        accuracy = figure.axes[0]
        accuracy.axhline(100 * reference["accuracy"], color="#888888", linestyle="--", linewidth=1)
        accuracy.annotate(
            reference["name"], (1, 100 * reference["accuracy"]), xycoords=("axes fraction", "data"), ha="right",
            va="bottom", fontsize=7, color="#666666",
        )  # fmt: skip
        return save_figure(figure, folder, "study")
