"""What all figures share: their look, heat maps, and how they are saved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from tokendyn import Trajectory
from tokendyn.experiments._drawing import STYLE
from tokendyn.experiments._files import write_json, write_with

_STYLE: dict[Any, Any] = STYLE | {"legend.fontsize": "small"}

Drawn = tuple[Figure, dict[str, Any]]


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, free of any global state."""
    return Figure(figsize=(width, height), layout="constrained")


def two_rows(figure: Figure, upper: float, lower: float) -> tuple[Any, Any]:
    """The figure's upper and lower part, of these relative heights."""
    parts: Any = figure.subfigures(2, 1, height_ratios=[upper, lower])
    return parts[0], parts[1]


def heat_maps(figure: Any, attentions: list[np.ndarray], times: list[float]) -> None:
    """Hidden attention matrices side by side, each on a scale of its own, zero white."""
    figure.suptitle("hidden attention", x=0.02, ha="left", fontsize=9.5)
    axes = figure.subplots(1, len(times))
    for ax, P, time in zip(axes, attentions, times, strict=True):
        shown = np.where(np.tri(len(P)) > 0, P, np.nan)
        top = float(np.nanmax(np.abs(shown))) or 1.0
        image = ax.imshow(shown, cmap="RdBu_r", vmin=-top, vmax=top)
        figure.colorbar(image, ax=ax, shrink=0.8, format="%.1e" if top < 0.01 or top > 100 else "%.2g")
        ax.set_title(f"t = {time:g}")
        ax.set_xlabel("column j")
        numbers = [str(l + 1) for l in range(len(P))]
        ax.set_xticks(range(len(P)), numbers)
        ax.set_yticks(range(len(P)), numbers)
        ax.grid(False)
    axes[0].set_ylabel("row l")


def save(folder: Path, name: str, figure: Figure, data: dict[str, Any]) -> list[Path]:
    """Write NAME.png, NAME.svg and NAME.json; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in ("png", "svg", "json")]
    write_with(paths[0], lambda place: figure.savefig(place, dpi=150))
    write_with(paths[1], lambda place: figure.savefig(place, metadata={"Date": None}))
    write_json(paths[2], plain(data))
    return paths


def thinned(trajectory: Trajectory, points: int = 400) -> dict[str, Any]:
    """Times, tokens and ends of a trajectory, at no more than ``points`` times."""
    kept = np.unique(np.linspace(0, len(trajectory) - 1, min(points, len(trajectory))).astype(int))
    return {
        "times": trajectory.times[kept],
        "tokens": trajectory.tokens[kept],
        "ended_at": trajectory.ended_at,
        "reason": trajectory.reason,
    }


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: arrays as lists, NaN and infinities as null or text."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return value if math.isfinite(value) else ("infinity" if value > 0 else "-infinity")
    return value


def styled() -> Any:
    """The style as a context."""
    return matplotlib.rc_context(_STYLE)
