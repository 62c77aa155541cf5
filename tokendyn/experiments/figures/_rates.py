"""Measured against predicted: constants, exponents, blow-up times and ratios of many random problems on the line."""

from __future__ import annotations

from typing import Any

import numpy as np

from tokendyn import classify, simulate
from tokendyn.core._plot import COLOURS
from tokendyn.experiments.figures._style import Drawn, new_figure


def measured_against_predicted() -> Drawn:
    """Every law of one channel: what is predicted, what is simulated, and how far apart they are."""
    figure = new_figure(10.5, 6.4)
    axes = figure.subplots(2, 3).ravel()
    data: dict[str, Any] = {}
    for ax, (name, (predicted, measured)) in zip(axes, _laws().items(), strict=True):
        off = np.abs(measured / predicted - 1)
        low, high = min(predicted.min(), measured.min()), max(predicted.max(), measured.max())
        ax.plot([low, high], [low, high], color="#999999", linewidth=0.8)
        ax.plot(predicted, measured, ".", color=COLOURS[0], markersize=3)
        if low > 0 and high > 20 * low:
            ax.set_xscale("log")
            ax.set_yscale("log")
        ax.set_title(f"{name}\nworst relative difference {off.max():.1e}")
        ax.set_xlabel("predicted")
        ax.set_ylabel("measured")
        data[name] = {"predicted": predicted, "measured": measured, "worst": off.max()}
    return figure, data


def _laws() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(2024)
    b = 200
    found = {}

    negative: dict[str, Any] = {
        "mu": -rng.uniform(0.3, 3, b),
        "s_delta": rng.normal(size=b),
        "a": rng.uniform(1, 3, b),
        "x0": rng.choice([-1, 1], (b, 4)) * rng.uniform(0.3, 2, (b, 4)),
    }
    end = np.abs(simulate(**negative, t_end=1e10, times=[1e10]).tokens[:, 0]) * 1e5
    constants = classify(**negative).constants
    found["convergence: |x| √t at t = 1e10, token 1"] = constants[:, 0], end[:, 0]
    found["convergence: tokens 2 to 4, a ≥ 1"] = constants[:, 1:].ravel(), end[:, 1:].ravel()

    a = np.linspace(0.15, 0.8, 14)
    times = np.logspace(14, 30, 9)
    second: dict[str, Any] = {"mu": -1.1, "s_delta": 0.6, "a": a, "x0": [1.2, -0.8]}
    tokens = simulate(**second, t_end=1e30, times=times, rtol=1e-12).tokens[:, :, 1]
    deviations = np.abs(np.abs(tokens) * np.sqrt(times) / classify(**second).constants[:, 1:] - 1)
    slopes = []
    for row in deviations:
        window = row > 1e-9
        slopes.append(-np.polyfit(np.log(times[window]), np.log(row[window]), 1)[0])
    found["token 2 nears its law like t^-p: p"] = 1 - 2.0**-a, np.array(slopes)

    s_delta, mu = rng.choice([-1, 1], b) * 10 ** rng.uniform(-1, 1, b), 10 ** rng.uniform(-1, 1, b)
    single: dict[str, Any] = {
        "mu": mu,
        "s_delta": s_delta,
        "a": 1.0,
        "x0": np.sign(s_delta)[:, None] * 10 ** rng.uniform(-1, 1, (b, 1)),
    }
    exact = classify(**single).blow_up_time
    found["blow-up time of a token alone"] = exact, simulate(**single, t_end=2 * exact.max(), rtol=1e-11).ended_at[:, 0]

    predicted, measured = [], []
    for _ in range(24):
        slope = float(rng.choice([0.0, 1.0]) * rng.uniform(0.3, 2))
        problem: dict[str, Any] = {
            "mu": float(rng.uniform(0.5, 2)),
            "s_delta": slope,
            "a": 1.0,
            "x0": [float(rng.uniform(0.5, 2))],
        }
        trajectory = simulate(**problem, t_end=1e6, rtol=1e-12, points_per_step=8)
        sizes = np.abs(trajectory.tokens[:, 0])
        window = (sizes > 300) & (sizes < 3000)
        left = trajectory.ended_at[0] - trajectory.times[window]
        predicted.append(1 / 3 if slope else 1 / 2)
        measured.append(-np.polyfit(np.log(left), np.log(sizes[window]), 1)[0])
    found["blow-up exponents, 1/2 where S_Δ = 0"] = np.array(predicted), np.array(measured)

    growing: dict[str, Any] = {
        "mu": rng.uniform(0.3, 2, b),
        "s_delta": -rng.uniform(0.3, 2, b),
        "a": rng.uniform(0.5, 3, b),
        "x0": rng.uniform(0.3, 3, (b, 4)),
    }
    late = simulate(**growing, t_end=1e32, times=[1e16, 1e32], rtol=1e-10).tokens
    ratios = late[:, :, 1:] / late[:, :, :1]
    found["ratios to token 1, t = 1e16 and 1e32"] = ratios[:, 0].ravel(), ratios[:, 1].ravel()
    return found
