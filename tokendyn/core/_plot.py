"""Drawing a trajectory; needs matplotlib, which is imported when first used."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import numpy as np

from tokendyn.core._regime import Regime
from tokendyn.core._regime_numba import CONVERGENCE, FAST, SLOW
from tokendyn.errors import EngineError

if TYPE_CHECKING:
    from tokendyn.core._trajectory import Trajectory

#: Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#888888")


def colour(token: int) -> str:
    """The colour of a token, the same in every plot."""
    return COLOURS[token % len(COLOURS)]


def axes_for(ax: Any, **options: Any) -> Any:
    """``ax``, or new axes of a new figure."""
    if ax is not None:
        return ax
    if importlib.util.find_spec("matplotlib") is None:
        raise EngineError("plotting needs matplotlib; run: pip install 'tokendyn[experiments]'")
    from matplotlib import pyplot

    return pyplot.figure(figsize=(6, 4), layout="constrained").add_subplot(**options)


def plot(trajectory: Trajectory, ax: Any = None, *, laws: bool = True) -> Any:
    """See :meth:`tokendyn.Trajectory.plot`."""
    if trajectory.sphere:
        return _sphere(trajectory, ax)
    if trajectory.one_channel:
        return _line(trajectory, ax, laws)
    return _plane(trajectory, ax) if trajectory.tokens.shape[2] == 2 else _norms(trajectory, ax)


def law(regime: Regime, token: int, times: np.ndarray, ended_at: float) -> np.ndarray:
    """|x_token| as its asymptotic law has it, NaN where the law does not speak of the time."""
    p, fate = regime.problem, int(regime.fate_codes[token])
    values = np.full(len(times), np.nan)
    if fate == CONVERGENCE:
        late = times > 0
        values[late] = regime.constants[token] * times[late] ** -0.5
    elif fate == SLOW and token == int(np.flatnonzero(p["x0"])[0]):
        late = times > np.e**2
        log = np.log(times[late])
        shift = np.log(float(p["mu"])) + float(p["bias"]) - 2 * np.log(abs(float(p["s_delta"])))
        values[late] = (log + 3 * np.log(log) + shift) / abs(float(p["s_delta"]))
    elif fate == FAST and np.isfinite(regime.constants[token]):
        early = times < ended_at
        values[early] = regime.constants[token] * (ended_at - times[early]) ** regime.rates[token]
    return values


def _span(trajectory: Trajectory) -> bool:
    """Whether times are better shown by their logarithm; then time 0 is left out."""
    positive = trajectory.times[trajectory.times > 0]
    return bool(len(positive) > 1 and positive[-1] / np.median(positive) > 50)


def _line(trajectory: Trajectory, ax: Any, laws: bool) -> Any:
    ax = axes_for(ax)
    regime, times = trajectory.regime, trajectory.times
    logarithmic = _span(trajectory)
    shown = times > 0 if logarithmic else np.ones(len(times), bool)
    tokens = np.where(trajectory.alive, trajectory.tokens, np.nan)
    finite = tokens[np.isfinite(tokens)]
    reach = 1.15 * np.quantile(np.abs(finite), 0.995 if np.isfinite(trajectory.ended_at).any() else 1.0)
    if np.isfinite(trajectory.ended_at).any():
        reach = min(reach, 6 * np.abs(trajectory.start).max())
    for l in range(tokens.shape[1]):
        ax.plot(times[shown], tokens[shown, l], color=colour(l), label=f"token {l + 1}")
        ended = trajectory.ended_at[l]
        if laws:
            sign = np.sign(trajectory.start[l])
            predicted = sign * law(regime, l, times, ended) * np.where(trajectory.alive[:, l], 1.0, np.nan)
            close = np.abs(predicted) < reach
            ax.plot(times[shown & close], predicted[shown & close], "--", color=colour(l), linewidth=1, alpha=0.8)
        if np.isfinite(ended):
            ax.axvline(ended, color=colour(l), linewidth=0.8, linestyle=":")
    if laws:
        ax.plot([], [], "--", color="#666666", linewidth=1, label="predicted")
    ax.set_ylim(-reach if (finite < 0).any() else 0.0, reach if (finite > 0).any() else 0.0)
    if logarithmic:
        ax.set_xscale("log")
    ax.set_xlabel("depth t")
    ax.set_ylabel("token x")
    ax.set_title(regime.kind)
    ax.legend(fontsize="small")
    return ax


def _plane(trajectory: Trajectory, ax: Any) -> Any:
    ax = axes_for(ax)
    tokens = np.where(trajectory.alive[..., None], trajectory.tokens, np.nan)
    reach = 2.5 * np.abs(trajectory.start).max()
    for l in range(tokens.shape[1]):
        ax.plot(tokens[:, l, 0], tokens[:, l, 1], color=colour(l), label=f"token {l + 1}")
        ax.plot(*trajectory.start[l], "o", color=colour(l), markersize=5)
    ax.plot(0, 0, "+", color="#000000")
    reach = min(reach, 1.1 * np.nanmax(np.abs(tokens)))
    ax.set_xlim(-reach, reach)
    ax.set_ylim(-reach, reach)
    ax.set_aspect("equal")
    ax.set_xlabel("channel 1")
    ax.set_ylabel("channel 2")
    ax.legend(fontsize="small")
    return ax


def _norms(trajectory: Trajectory, ax: Any) -> Any:
    ax = axes_for(ax)
    norms = np.linalg.norm(np.where(trajectory.alive[..., None], trajectory.tokens, np.nan), axis=-1)
    shown = trajectory.times > 0 if _span(trajectory) else np.ones(len(trajectory), bool)
    for l in range(norms.shape[1]):
        ax.plot(trajectory.times[shown], norms[shown, l], color=colour(l), label=f"token {l + 1}")
    if _span(trajectory):
        ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("depth t")
    ax.set_ylabel("|x|")
    ax.legend(fontsize="small")
    return ax


def _sphere(trajectory: Trajectory, ax: Any) -> Any:
    if trajectory.tokens.shape[2] != 3:
        ax = axes_for(ax)
        similarity = (trajectory.tokens * trajectory.tokens[:, :1]).sum(-1)
        for l in range(1, similarity.shape[1]):
            ax.plot(trajectory.times, similarity[:, l], color=colour(l), label=f"token {l + 1}")
        ax.set_xlabel("depth t")
        ax.set_ylabel("cosine with token 1")
        ax.set_ylim(-1.05, 1.05)
        return ax
    ax = axes_for(ax, projection="3d")
    draw_ball(ax)
    for l in range(trajectory.tokens.shape[1]):
        path = trajectory.tokens[:, l]
        ax.plot(*path.T, color=colour(l), linewidth=1)
        ax.scatter(*path[0], color=colour(l), s=10)
        ax.scatter(*path[-1], color=colour(l), s=40, marker="*")
    return ax


def draw_ball(ax: Any) -> None:
    """The grid of the unit sphere, behind whatever is drawn into the three-dimensional axes."""
    u, v = np.meshgrid(np.linspace(0, 2 * np.pi, 37), np.linspace(0, np.pi, 19))
    ax.computed_zorder = False
    ax.plot_wireframe(np.cos(u) * np.sin(v), np.sin(u) * np.sin(v), np.cos(v), color="#dddddd", lw=0.4, zorder=0)
    ax.set_box_aspect((1, 1, 1), zoom=1.35)
    ax.set_axis_off()
