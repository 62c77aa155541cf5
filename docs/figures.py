"""Draws the pictures of the concept pages, from the library itself: ``python docs/figures.py`` writes images/*.svg."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import tokendyn
from tokendyn.experiments._drawing import COLOURS, STYLE

FOLDER = Path(__file__).parent / "images"


def _numbered(count: int) -> tuple[float, float, float, float]:
    """The extent of a square picture whose first row and column have the number 1."""
    return 0.5, count + 0.5, count + 0.5, 0.5


def hidden_attention() -> Figure:
    """One sequence, three channels that forget at different rates."""
    rng = np.random.default_rng(4)
    L, N, rates = 24, 6, (0.05, 0.5, 5.0)
    B, C = rng.normal(size=(2, 1, N, L))
    delta = np.broadcast_to(rng.normal(size=L), (1, 3, L))
    P = tokendyn.hidden_attention(delta, -np.array(rates), B, C, delta_softplus=True)[0]
    figure = Figure(figsize=(8, 2.9), layout="constrained")
    for ax, matrix, rate in zip(figure.subplots(1, 3), P, rates, strict=True):
        shown = np.where(np.tri(L) > 0, matrix, np.nan)
        top = np.nanmax(np.abs(shown))
        ax.imshow(shown, cmap="PuOr", vmin=-top, vmax=top, extent=_numbered(L))
        ax.set_title(f"a = {rate:g}")
        ax.set_xlabel("looked at, j")
        ax.grid(False)
    figure.axes[0].set_ylabel("token l")
    return figure


def depth_as_time() -> Figure:
    """Stacks of 8, 32, 128 layers beside the solution of the differential equation."""
    problem: dict[str, Any] = {"mu": -1.5, "s_delta": -0.4, "a": 1.0}
    x0, depth = np.array([1.8, -1.2, 0.9, -0.5]), 2.0
    exact = tokendyn.simulate(**problem, x0=x0, t_end=depth)
    figure = Figure(figsize=(8, 2.9), layout="constrained")
    for ax, layers in zip(figure.subplots(1, 3, sharey=True), (8, 32, 128), strict=True):
        stack = [x0]
        for _ in range(layers):
            stack.append(stack[-1] + depth / layers * tokendyn.flow_rhs(stack[-1], **problem))
        for l in range(4):
            ax.plot(exact.times, exact.tokens[:, l], color=COLOURS[l + 1], linewidth=1.2)
            ax.plot(np.linspace(0, depth, layers + 1), np.array(stack)[:, l], ".", color=COLOURS[l + 1], markersize=3)
        ax.set_title(f"{layers} layers")
        ax.set_xlabel("depth t")
    figure.axes[0].set_ylabel("token x")
    return figure


def softsort() -> Figure:
    """SoftSort's matrix at three temperatures, and how many tokens a place averages."""
    scores = np.random.default_rng(2).normal(size=(1, 24))
    scores = (scores - scores.mean()) / scores.std()
    figure = Figure(figsize=(8, 2.9), layout="constrained")
    for ax, tau in zip(figure.subplots(1, 3), (1.0, 0.1, 0.01), strict=True):
        averaged = float(tokendyn.effective_tokens(scores, tau=tau).mean())
        ax.imshow(tokendyn.softsort_matrix(scores, tau=tau)[0], cmap="Blues", vmin=0, extent=_numbered(24))
        ax.set_title(f"τ = {tau:g}: averages {averaged:.1f} tokens")
        ax.set_xlabel("token l")
        ax.grid(False)
    figure.axes[0].set_ylabel("place k")
    return figure


def house() -> Figure:
    """What may call what."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    ax = figure.subplots()
    ax.set_xlim(0, 10)
    ax.set_ylim(0.4, 5.5)
    ax.axis("off")
    floors = {
        "experiments": (4.6, "training, data, reports"),
        "diagnose": (3.4, "a trained model in, a report out"),
        "backends": (2.2, "numpy, torch, jax: operations, layers, models"),
        "core": (1.0, "the specification, float64; its compiled twins"),
    }
    for name, (y, text) in floors.items():
        ax.add_patch(Rectangle((0.2, y - 0.4), 6.1, 0.8, facecolor="#eef3f8", edgecolor=COLOURS[2]))
        ax.text(0.4, y + 0.02, name, fontsize=10, weight="bold", va="bottom")
        ax.text(0.4, y - 0.06, text, fontsize=8.5, va="top")
        if name != "core":
            ax.annotate("", (3.2, y - 0.8), (3.2, y - 0.4), arrowprops={"arrowstyle": "-|>", "color": "#333333"})
    ax.add_patch(Rectangle((7.2, 0.6), 2.6, 4.4, facecolor="#fbf3e6", edgecolor=COLOURS[5]))
    ax.text(8.5, 3.0, "_operations", fontsize=10, weight="bold", ha="center", va="bottom")
    ax.text(8.5, 2.9, "the table: names,\nsignatures, contracts,\nargument checks", fontsize=8.5, ha="center", va="top")
    for y in (4.6, 3.4, 2.2, 1.0):
        ax.annotate("", (7.2, y), (6.3, y), arrowprops={"arrowstyle": "-|>", "color": "#888888", "linestyle": ":"})
    ax.text(6.75, 5.2, "may read", fontsize=8.5, ha="center", color="#555555")
    ax.text(3.35, 2.8, "may call", fontsize=8.5, va="center", color="#555555")
    return figure


def main() -> None:
    with matplotlib.rc_context(STYLE):
        for draw in (hidden_attention, depth_as_time, softsort, house):
            draw().savefig(FOLDER / f"{draw.__name__}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
