"""Make the tables of measured numbers that the pages on the dynamics include.

From the root of the repository::

    python docs/dynamics/measure.py            # writes docs/dynamics/_measured/*.md
    python docs/dynamics/measure.py --check    # exits with 1 if a table would change
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tokendyn import classify, classify_sphere, simulate, simulate_sphere
from tokendyn.core import _sphere
from tokendyn.experiments._report import markdown_table

FOLDER = Path(__file__).parent / "_measured"
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "results" / "dynamics.json"


def table(header: list[str], rows: list[list[Any]]) -> str:
    return markdown_table(header, rows) + "\n"


def convergence() -> str:
    problem: dict[str, Any] = {"mu": -1.3, "s_delta": 0.7, "a": 0.8, "x0": [1.2, -0.8, 0.3, 2.0]}
    regime = classify(**problem)
    times = [1e2, 1e6, 1e10, 1e30]
    tokens = simulate(**problem, t_end=1e30, times=times, rtol=1e-11).tokens
    rows = [
        [
            l + 1,
            f"{regime.constants[l]:.6f}",
            *(f"{abs(x) * np.sqrt(t):.5f}" for x, t in zip(tokens[:, l], times, strict=True)),
        ]
        for l in range(4)
    ]
    return table(["token", "predicted constant", *(f"√t abs(x) at t = {t:.0e}" for t in times)], rows)


def convergence_bias() -> str:
    rows = []
    for bias in (0.0, -2.0, -4.6):
        regime = classify(mu=-1.3, s_delta=0.7, a=0.8, bias=bias, x0=[1.2, -0.8])
        scales = regime.time_scales
        rows.append([bias, f"{np.logaddexp(0, bias):.4f}", f"{scales[0]:.2e}", f"{scales[1]:.1e}"])
    return table(["bias", "Δ₀", "token 1 settles about t =", "token 2 settles about t ="], rows)


def slow_divergence() -> str:
    rows = []
    for x0 in ((2.2, 2.5, 3.0, 3.5), (3.0, 2.0, 1.0, 0.5), (0.5, 0.5, 0.5, 0.5)):
        regime = classify(mu=1.0, s_delta=-1.0, a=1.0, x0=x0)
        for t_end in (1e8, 1e32):
            rows.append([x0, f"{t_end:.0e}", *(f"{r:.6f}" for r in regime.ratios(t_end))])
    return table(["x(0)", "t", "r₁", "r₂", "r₃", "r₄"], rows)


def fast_divergence() -> str:
    rows = []
    for x0 in ([0.5, 1.5, 0.7], [0.3, -1.0, 1.2]):
        s_delta = 1.0 if x0[0] == 0.5 else 0.7
        problem: dict[str, Any] = {"mu": 1.0, "s_delta": s_delta, "a": 1.0, "x0": x0}
        regime, trajectory = classify(**problem), simulate(**problem, t_end=1e3, rtol=1e-11)
        for l in range(3):
            ended = f"{trajectory.ended_at[l]:.7f}"
            by = "itself" if trajectory.ended_by[l] == l else f"token {trajectory.ended_by[l] + 1}"
            rows.append([f"{x0}, S_Δ = {s_delta}", l + 1, ended, by, f"{regime.blow_up_bounds[l]:.7f}"])
    return table(["x(0)", "token", "ends at", "through", "bound"], rows)


def fast_attention() -> str:
    problem: dict[str, Any] = {"mu": 1.0, "s_delta": 0.7, "a": 1.0, "x0": [0.3, -1.0, 1.2]}
    T = simulate(**problem, t_end=1.0, rtol=1e-12).ended_at[2]
    times = [T - left for left in (1e-2, 1e-4, 1e-6, 1e-8)]
    trajectory = simulate(**problem, t_end=times[-1], times=times, rtol=1e-12)
    rows = []
    for i, left in enumerate((1e-2, 1e-4, 1e-6, 1e-8)):
        P = trajectory.attention(i)
        rows.append([f"{left:.0e}", *(f"{P[2, j]:.3g}" for j in range(3))])
    return table(["T - t", "P₃₁", "P₃₂", "P₃₃"], rows)


def counter_examples() -> str:
    M = -np.array([[1, 0.9], [0.9, 1]])
    problem: dict[str, Any] = {
        "M": M,
        "s_delta": [[-5.0, 0], [5, 0]],
        "a": 1.0,
        "x0": [[0.05, -0.1], [8.0, 1.0]],
    }
    times = [1e6, 1e8, 1e14]
    tokens = simulate(**problem, t_end=1e14, times=times, rtol=1e-10).tokens
    x = tokens[-1, 0]
    power = -x[0] * (M @ x)[0] / (2 * x @ M @ x)
    rows = [
        [f"{t:.0e}", f"{np.linalg.norm(row[0]):.3e}", f"{row[1, 0]:.2f}"] for t, row in zip(times, tokens, strict=True)
    ]
    grown = np.log(tokens[2, 1, 0] / tokens[1, 1, 0]) / np.log(1e6)
    return (
        table(["t", "norm of token 1", "first channel of token 2"], rows)
        + f"\nPredicted exponent {power:.5f}; measured between t = 1e8 and 1e14: {grown:.5f}.\n"
    )


def sphere_eigenvalues() -> str:
    rng = np.random.default_rng(5)
    L, D = 6, 4

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    signs = np.append(1.0, rng.choice([-1.0, 1.0], L - 1))
    x1, M, vector, matrix = (
        unit(rng.normal(size=D)),
        rng.normal(size=(D, D)),
        rng.normal(size=D),
        rng.normal(size=(D, D)),
    )
    W = rng.normal(size=(D, D))
    values, vectors = np.linalg.eigh(W + W.T)
    v, pole = vectors[:, -1], np.eye(D)[2]
    softplus = lambda z: np.logaddexp(0, z)  # noqa: E731
    flat = lambda rates: np.tile(-rates[:, None], D - 1)  # noqa: E731
    cases = {
        "A: Δ shared": (
            signs[:, None] * x1,
            {"M": M, "s_delta": vector, "a": 0.7},
            flat(_sphere.shared_rates(x1 @ M @ x1, softplus(signs * (vector @ x1)), 0.7)),
        ),
        "B: a Δ per channel": (
            signs[:, None] * pole,
            {"M": M, "s_delta": matrix, "a": np.full(D, 1.3)},
            _sphere.pole_eigenvalues(M[2, 2], softplus(np.outer(signs, matrix @ pole)), 1.3, 2),
        ),
        "C: value matrix": (
            signs[:, None] * v,
            {"M": M, "s_delta": vector, "a": 1.0, "W": W + W.T},
            _sphere.value_eigenvalues(float(v @ M @ v), values, D - 1, softplus(signs * (vector @ v)), 1.0),
        ),
        "causal softmax": (np.tile(x1, (L, 1)), {"Q": M, "K": matrix}, flat(_sphere.softmax_rates(L))),
        "AR(3)": (np.tile(x1, (L, 1)), {"phi": vector[:3]}, flat(_sphere.autoregressive_rates(vector[:3], L))),
    }
    rows = []
    for name, (x, parameters, expected) in cases.items():
        off = np.abs(_sphere.spectrum(x, parameters) - np.sort(expected, axis=1)).max()
        rows.append([name, L * (D - 1), "below 1e-13" if off < 1e-13 else f"{off:.1e}"])
    return table(["case", "eigenvalues", "largest difference from the Jacobian's"], rows)


def sphere_rates() -> str:
    rng = np.random.default_rng(3)
    D = 4
    x0 = rng.normal(size=D) + 0.4 * rng.normal(size=(3, D))
    x0 /= np.linalg.norm(x0, axis=-1, keepdims=True)
    root = rng.normal(size=(D, D))
    problems: dict[str, dict[str, Any]] = {
        "A: Δ shared": {"M": root @ root.T, "s_delta": rng.normal(size=D), "a": 2.0},
        "causal softmax": {"Q": root, "K": root},
        "AR(2)": {"phi": [0.4, 0.5]},
    }
    rows = []
    for name, p in problems.items():
        regime = classify_sphere(x0=x0, **p)
        times = np.linspace(0, 40 / regime.rates[1], 4000)
        tokens = simulate_sphere(x0=x0, t_end=times[-1], times=times, rtol=1e-12, **p).tokens
        distance = np.linalg.norm(tokens[:, 1] - regime.signs[1] * regime.limit, axis=-1)
        window = (distance < 1e-4) & (distance > 1e-9)
        slope = -np.polyfit(times[window], np.log(distance[window]), 1)[0]
        rows.append([name, f"{regime.rates[1]:.6f}", f"{slope:.6f}"])
    return table(["case", "predicted rate of token 2", "fitted"], rows)


def speed() -> str:
    """From the figures that benchmarks/dynamics.py has written."""
    measured = json.loads(BENCHMARK.read_text(encoding="utf-8"))
    ensemble = measured["ensemble"]
    columns = {
        "convergence": measured["convergence"],
        "slow divergence": measured["slow divergence"],
        f"{ensemble['size']} of L = {ensemble['length']}": ensemble,
    }
    solvers = [key for key, value in measured["convergence"].items() if isinstance(value, dict)]
    rows = []
    for solver in solvers:
        cells = []
        for column in columns.values():
            found = column.get(solver)
            seconds = found and found["seconds_at_error_1e-08"]
            shown = seconds and (f"{seconds:.3g} s" if seconds > 1 else f"{1e3 * seconds:.3g} ms")
            cells.append(f"{shown} ({found['times_ours']:.1f})" if seconds else "-")
        rows.append([solver, *cells])
    line, (kinds, all_of_it) = measured["right_hand_side"], measured["classifier"].values()
    return (
        table(["solver", *columns], rows)
        + f"\nOne right-hand side takes {line['ns_a_token']:.1f} ns a token + {line['offset_microseconds']:.0f} µs, "
        + f"within {100 * line['worst_relative_misfit']:.0f} % from L = 1,000 to 100,000. The classifier does "
        + f"{kinds / 1e6:.2g} million problems of L = 16 a second for kind and margin, {all_of_it / 1e6:.2g} million "
        + "with constants and bounds."
        + f"\nMeasured on {measured['machine']['cores']} cores ({measured['machine']['cpu']}).\n"
    )


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        convergence,
        convergence_bias,
        slow_divergence,
        fast_divergence,
        fast_attention,
        counter_examples,
        sphere_eigenvalues,
        sphere_rates,
        speed,
    )
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table would change")
    check = parser.parse_args().check
    FOLDER.mkdir(exist_ok=True)
    stale = []
    for name, make in TABLES.items():
        path, text = FOLDER / f"{name}.md", make()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                path.write_text(text, encoding="utf-8")
    print(f"{'stale' if check else 'written'}: {', '.join(stale) or 'none'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
