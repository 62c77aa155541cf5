"""Token dynamics on the sphere: clusters in R^3, similarities in higher dimension, and the predicted rates."""

from __future__ import annotations

from typing import Any

import numpy as np

from tokendyn import classify_sphere, simulate_sphere
from tokendyn.core._plot import colour
from tokendyn.experiments.figures._style import Drawn, new_figure, thinned, two_rows


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def clusters() -> Drawn:
    """Tokens gather at ± the first token (one Δ), or at ± a pole (a Δ per channel); attention at one point."""
    rng = np.random.default_rng(7)
    x0 = _unit(rng.normal(size=(14, 3)))
    root = rng.normal(size=(3, 3))
    problems: dict[str, dict[str, Any]] = {
        "case A: Δ shared": {"M": root @ root.T, "s_delta": rng.normal(size=3), "a": 1.0},
        "case B: a Δ per channel": {"M": np.eye(3), "s_delta": np.zeros((3, 3)), "a": 1.0, "bias": [0.0, 1.5, -1.0]},
        "causal softmax attention": {"Q": np.eye(3), "K": np.eye(3)},
    }
    figure = new_figure(10.5, 6.4)
    above, below = two_rows(figure, 1.1, 1)
    data: dict[str, Any] = {"x0": x0}
    for column, (name, p) in enumerate(problems.items()):
        regime = classify_sphere(x0=x0, **p)
        slowest = np.nanmin(np.abs(regime.rates[regime.rates != 0]))
        trajectory = simulate_sphere(x0=x0, t_end=40 / slowest, **p)
        ax = above.add_subplot(1, 3, column + 1, projection="3d")
        trajectory.plot(ax)
        ax.set_title(name, y=0.95)
        data[name] = {"parameters": p, "trajectory": thinned(trajectory), "signs": regime.signs}
    D, L = 16, 32
    x0 = _unit(rng.normal(size=(L, D)))
    root = rng.normal(size=(D, D)) / 4
    p = {"M": root @ root.T, "s_delta": rng.normal(size=D) / 4, "a": 0.2}
    regime = classify_sphere(x0=x0, **p)
    slowest = regime.rates[1:].min()
    times = np.array([0.0, 1.0, 3.0, 12.0]) / slowest
    tokens = simulate_sphere(x0=x0, t_end=times[-1], times=times, **p).tokens
    order = np.argsort(-regime.signs, kind="stable")
    axes = below.subplots(1, 4)
    image = None
    for ax, time, x in zip(axes, times, tokens, strict=True):
        x = x[order]
        image = ax.imshow(x @ x.T, cmap="RdBu_r", vmin=-1, vmax=1)
        ax.set_title(f"D = {D}: cosines at t = {time:.3g}")
        ax.set_xticks([])
        ax.set_yticks([])
        ax.grid(False)
    below.colorbar(image, ax=list(axes), shrink=0.8)
    data["pairwise"] = {"parameters": p, "times": times, "tokens": tokens, "signs": regime.signs, "rates": regime.rates}
    return figure, data


def sphere_rates() -> Drawn:
    """Distances to the limit on a logarithmic scale, with the predicted exponentials beside them."""
    rng = np.random.default_rng(11)
    D, L = 4, 5
    root = rng.normal(size=(D, D))
    x0 = _unit(_unit(rng.normal(size=D)) + 0.5 * rng.normal(size=(L, D)))
    problems: dict[str, dict[str, Any]] = {
        "case A: Δ shared": {"M": root @ root.T, "s_delta": rng.normal(size=D), "a": 1.0},
        "case C: value matrix": {
            "M": np.eye(D),
            "s_delta": rng.normal(size=D),
            "a": 1.0,
            "W": np.diag([2.0, 1.4, 0.3, -1.0]),
        },
        "causal softmax attention": {"Q": root, "K": root},
        "AR(3)": {"phi": [0.4, 0.3, 0.5]},
    }
    figure = new_figure(10.5, 3.6)
    data: dict[str, Any] = {"x0": x0}
    for ax, (name, p) in zip(figure.subplots(1, 4), problems.items(), strict=True):
        regime = classify_sphere(x0=x0, **p)
        moving = np.flatnonzero(regime.rates)
        times = np.linspace(0, 25 / regime.rates[moving].min(), 600)
        tokens = simulate_sphere(x0=x0, t_end=times[-1], times=times, rtol=1e-12, **p).tokens
        distances = np.linalg.norm(tokens - regime.signs[:, None] * regime.limit, axis=-1)
        fitted = {}
        for l in map(int, moving):
            shown = distances[:, l] > 1e-10
            ax.semilogy(times[shown], distances[shown, l], color=colour(l), label=f"token {l + 1}")
            window = (distances[:, l] > 1e-9) & (distances[:, l] < 1e-4)
            slope, height = np.polyfit(times[window], np.log(distances[window, l]), 1)
            ax.semilogy(
                times[shown], np.exp(height - regime.decay[l] * times[shown]), "--", color=colour(l), linewidth=1
            )
            fitted[l + 1] = {"fitted": -slope, "predicted": regime.decay[l]}
        ax.set_ylim(1e-10, 3)
        ax.set_title(name)
        ax.set_xlabel("depth t")
        ax.legend()
        data[name] = {"parameters": p, "rates": regime.rates, "decay": regime.decay, "fits": fitted}
    figure.axes[0].set_ylabel("distance to the limit")
    return figure, data
