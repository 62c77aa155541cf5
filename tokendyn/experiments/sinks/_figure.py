"""The study's figure: how large the first token's sink is, and what makes it larger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tokendyn.experiments._drawing import COLOURS, STYLE, save_figure
from tokendyn.experiments.sinks._interventions import INTERVENTIONS
from tokendyn.experiments.sinks._measure import EXPLANATIONS

_MODELS = {
    "mamba_lm": ("MambaLM, trained", COLOURS[1]),
    "mamba_lm_untrained": ("MambaLM, untrained", COLOURS[7]),
    "typeseg": ("typeseg, trained", COLOURS[2]),
}


def draw(found: dict[str, Any], folder: Path) -> list[Path]:
    """``sinks.png`` and ``sinks.svg`` of what ``result.json`` holds."""
    models = [name for name in _MODELS if name in found]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        panels = figure.subplots(1, 3, width_ratios=(1, 1.1, 1.3))
        _layers(panels[0], found, models)
        _interventions(panels[1], found, models)
        _explanations(panels[2], found, models)
        return save_figure(figure, folder, "sinks")


def _layers(panel: Axes, found: dict[str, Any], models: list[str]) -> None:
    for name in models:
        label, colour = _MODELS[name]
        rows = found[name]["plain"]["sinks"]
        depth = [row["place"] + 1 for row in rows]
        panel.plot(depth, [row["sink"] for row in rows], "o", color=colour, label=label, ms=4, alpha=0.8)
    even = found[models[0]]["plain"]["sinks"][0]["even"]
    panel.axhline(even, color="black", linestyle="--", linewidth=1, label="even spread")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set(yscale="log", xlabel="scan, by depth", ylabel="attention to token 1", title="Is token 1 a sink?")
    panel.legend(fontsize=7)


def _interventions(panel: Axes, found: dict[str, Any], models: list[str]) -> None:
    for name in models:
        label, colour = _MODELS[name]
        means = [found[name]["interventions"][change]["mean"] for change in INTERVENTIONS]
        panel.plot(range(len(means)), means, "o:", color=colour, label=label, ms=4, linewidth=0.8)
    panel.set_xticks(range(len(INTERVENTIONS)), list(INTERVENTIONS), rotation=35, ha="right", fontsize=7)
    panel.set(yscale="log", title="What makes it one?")


def _explanations(panel: Axes, found: dict[str, Any], models: list[str]) -> None:
    for place, name in enumerate(models):
        _, colour = _MODELS[name]
        for row, explanation in enumerate(EXPLANATIONS):
            entry = found[name]["plain"]["explains_attention"][explanation]
            height = row + 0.22 * (place - (len(models) - 1) / 2)
            panel.plot(entry["interval"], [height, height], color=colour, linewidth=1.6)
            panel.plot([entry["correlation"]], [height], "o", color=colour, ms=4)
    panel.axvline(0, color="black", linewidth=0.8)
    panel.set_yticks(range(len(EXPLANATIONS)), [name.replace("_", " ") for name in EXPLANATIONS])
    panel.invert_yaxis()
    panel.set(xlim=(-1, 1), xlabel="Spearman's correlation inside layers, 95 %", title="What goes with it?")
