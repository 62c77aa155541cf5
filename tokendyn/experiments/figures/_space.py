"""Figure 6 of paper 1, the counter-examples to its conjecture, and a phase diagram of random problems in R^D."""

from __future__ import annotations

from typing import Any

import numpy as np

from tokendyn import classify, simulate
from tokendyn.core._plot import colour
from tokendyn.core._simulate import simulate as run
from tokendyn.experiments.figures._style import Drawn, new_figure, thinned

#: Two negative, one of each, two positive eigenvalues of (M + Mᵀ)/2.
MATRICES = {
    "A": np.array([[-1.0, 0.4], [0.0, -0.6]]),
    "B": np.array([[0.9, 0.5], [-0.3, -0.7]]),
    "C": np.array([[0.8, 0.3], [0.1, 0.5]]),
}
STEP = np.array([[-0.3, 0.2], [0.1, -0.4]])
TOKENS = [[1.0, 0.5], [-0.6, 1.1], [-1.2, -0.4], [0.7, -0.9]]

NEGATIVE = {
    "M": -np.array([[1.0, 0.9], [0.9, 1.0]]),
    "s_delta": np.array([[-5.0, 0.0], [5.0, 0.0]]),
    "a": 1.0,
    "x0": [[0.05, -0.1], [8.0, 1.0]],
}
INDEFINITE = {"M": np.diag([1.0, -1.0]), "s_delta": np.zeros((2, 2)), "a": 1.0, "x0": [[0.1, 1.0], [1.0, 0.2]]}


def planes() -> Drawn:
    """Figure 6 A-C: four tokens in the plane, by the signs of the eigenvalues of (M + Mᵀ)/2."""
    figure = new_figure(10.5, 6.6)
    axes = figure.subplots(2, 3)
    data: dict[str, Any] = {"s_delta": STEP, "a": 1.0, "x0": TOKENS}
    for column, (name, M) in enumerate(MATRICES.items()):
        problem = {"M": M, "s_delta": STEP, "a": 1.0, "x0": TOKENS}
        trajectory = simulate(**problem, t_end=1e4, rtol=1e-8)
        regime = classify(**problem)
        values = np.linalg.eigvalsh((M + M.T) / 2)
        trajectory.plot(axes[0, column])
        axes[0, column].set_title(f"{name}: eigenvalues {values[0]:.2f}, {values[1]:.2f}")
        norms = np.linalg.norm(np.where(trajectory.alive[..., None], trajectory.tokens, np.nan), axis=-1)
        shown = trajectory.times > 1e-3
        ax = axes[1, column]
        for l in range(len(TOKENS)):
            ax.loglog(trajectory.times[shown], norms[shown, l], color=colour(l))
            if np.isfinite(trajectory.ended_at[l]):
                ax.axvline(trajectory.ended_at[l], color=colour(l), linestyle=":", linewidth=0.8)
        if name == "A":
            late = trajectory.times > 10
            ax.loglog(
                trajectory.times[late], 0.6 * trajectory.times[late] ** -0.5, "--", color="#666666", label="t^(-1/2)"
            )
            ax.legend()
        ax.set_ylim(1e-3, 1e3)
        ax.set_xlabel("depth t")
        ax.set_ylabel("|x|")
        ax.set_title(f"{regime.kind} ({regime.certainty})")
        data[name] = {
            "M": M,
            "eigenvalues": values,
            "trajectory": thinned(trajectory),
            "fates": regime.fates,
        }
    return figure, data


def counter_examples() -> Drawn:
    """Both halves of the conjecture of paper 1's Appendix B are false."""
    figure = new_figure(10, 3.8)
    left, right = figure.subplots(1, 2)
    grows = simulate(**NEGATIVE, t_end=1e14, rtol=1e-9)
    x = grows.tokens[-1, 0]
    M = NEGATIVE["M"]
    power = float(-x[0] * (M @ x)[0] / (2 * x @ M @ x))
    shown = grows.times > 1e-2
    late = grows.times > 1e3
    times = grows.times
    left.loglog(times[shown], np.linalg.norm(grows.tokens[shown, 0], axis=1), color=colour(0), label="token 1, |x|")
    left.loglog(times[shown], grows.tokens[shown, 1, 0], color=colour(1), label="token 2, first channel")
    scale = grows.tokens[-1, 1, 0] / times[-1] ** power
    left.loglog(
        times[late], 1.25 * scale * times[late] ** power, "--", color="#666666", label=f"t^{power:.4f}, predicted"
    )
    left.set_title("eigenvalues -0.1 and -1.9, yet token 2 grows without bound")
    left.set_xlabel("depth t")
    left.legend()
    shrinks = simulate(**INDEFINITE, t_end=1e6, rtol=1e-9)
    norms = np.linalg.norm(np.where(shrinks.alive[..., None], shrinks.tokens, np.nan), axis=-1)
    shown = shrinks.times > 1e-3
    right.loglog(shrinks.times[shown], norms[shown, 0], color=colour(0), label="token 1")
    right.loglog(
        shrinks.times[shown], norms[shown, 1], color=colour(1), label=f"token 2, T = {shrinks.ended_at[1]:.4f}"
    )
    late = shrinks.times > 10
    constant = (2 * np.log(2) * 0.9802) ** -0.5
    predicted = constant * shrinks.times[late] ** -0.5
    right.loglog(shrinks.times[late], 1.25 * predicted, "--", color="#666666", label="t^(-1/2), predicted")
    right.set_ylim(5e-4, 1e2)
    right.set_title("eigenvalues 1 and -1, yet token 1 goes to 0")
    right.set_xlabel("depth t")
    right.set_ylabel("|x|")
    right.legend()
    marks = [1e6, 1e8, 1e14]
    at_marks = simulate(**NEGATIVE, t_end=1e14, times=marks, rtol=1e-9).tokens[:, 1, 0]
    return figure, {
        "negative definite": {
            **NEGATIVE,
            "trajectory": thinned(grows),
            "power": power,
            "first channel of token 2": dict(zip(map(str, marks), at_marks, strict=True)),
        },
        "indefinite": {
            **INDEFINITE,
            "trajectory": thinned(shrinks),
            "constant": constant,
        },
    }


def phase_diagram() -> Drawn:
    """Share of convergent tokens against the extreme eigenvalues of (M + Mᵀ)/2, for random M and Δ, D = 2, 8, 32."""
    figure = new_figure(10.5, 6.6)
    axes = figure.subplots(2, 3)
    data: dict[str, Any] = {"tokens": 4, "t_end in time scales": _LOOKS[-1]}
    points: Any = None
    for row, shared in enumerate((True, False)):
        for column, (D, count) in enumerate(((2, 600), (8, 600), (32, 240))):
            low, high, share, undecided = _phases(D, count, shared)
            ax = axes[row, column]
            ax.axhline(0, color="#000000", linewidth=0.8)
            sure = undecided == 0
            points = ax.scatter(low[sure], high[sure], c=share[sure], cmap="viridis", vmin=0, vmax=1, s=9)
            ax.plot(low[~sure], high[~sure], "x", color="#999999", markersize=3)
            name = f"D = {D}, {'Δ shared' if shared else 'a Δ per channel'}"
            below = high < 0
            told = f"{100 * share[below & sure].mean():.0f} %" if (below & sure).any() else "-"
            above = f"{100 * share[~below & sure].mean():.0f} %" if (~below & sure).any() else "-"
            ax.set_title(f"{name}\nbelow the line {told}, above {above}")
            ax.set_xlabel("smallest eigenvalue")
            ax.set_ylabel("largest eigenvalue")
            data[name] = {"smallest": low, "largest": high, "share": share, "undecided": undecided}
    figure.colorbar(points, ax=axes, label="share of tokens that converge", shrink=0.6)
    return figure, data


_LOOKS = np.array([1e2, 1e3])


def _phases(D: int, count: int, shared: bool) -> tuple[np.ndarray, ...]:
    """Extreme eigenvalues, share of tokens seen to converge, and number of undecided tokens, of random problems."""
    rng = np.random.default_rng([D, count, shared])
    M = rng.normal(size=(count, D, D)) * 0.6 / np.sqrt(D) + rng.uniform(-2, 1.2, count)[:, None, None] * np.eye(D)
    s_delta = rng.normal(size=(count, 1 if shared else D, D)) / np.sqrt(D)
    x0 = rng.normal(size=(count, 4, D)) / np.sqrt(D)
    values = np.linalg.eigvalsh((M + np.swapaxes(M, 1, 2)) / 2)
    parameters = {"mu": None, "M": M, "S_B": None, "S_C": None, "s_delta": s_delta, "a": np.array(1.0)}
    parameters["bias"] = np.array(0.0)
    options = {"points_per_step": 1, "max_steps": 1500, "implicit": False}
    trajectory = run(x0, parameters, sphere=False, t_end=_LOOKS[-1], times=_LOOKS, rtol=1e-5, **options)
    ended = np.isfinite(trajectory.ended_at)
    with np.errstate(invalid="ignore"):
        early, late = np.moveaxis(np.linalg.norm(trajectory.tokens, axis=-1), 1, 0)
        start = np.linalg.norm(x0, axis=-1)
        converges = (late < 0.6 * early) & (late < 0.5 * start) & ~ended
        diverges = ended | ((late > early) & (late > start))
    undecided = (~converges & ~diverges).sum(axis=1)
    share = converges.sum(axis=1) / np.maximum(4 - undecided, 1)
    return values[:, 0], values[:, -1], share, undecided
