"""The token dynamics' integrator against SciPy and diffrax, in one run on one machine, at equal achieved error.

    python benchmarks/dynamics.py [--json PATH] [--quick]

1. *One trajectory*, L = 256, t in [0, 10], in two regimes.
2. *An ensemble*, 10,000 trajectories of L = 64: ours on all cores, SciPy in a loop over a sample of them, scaled up.
3. *One right-hand side* from L = 1,000 to 100,000, and a line through the times.
4. *The classifier*, 100,000 problems of L = 16.

In 1 and 2 every solver runs at a row of tolerances. Its error is the largest relative error of a token at t = 10
against our solution at rtol 1e-13, which SciPy confirms; its time at a given error is interpolated between tolerances,
log against log. Solvers: ours; diffrax's Dopri8 under jit with two right-hand sides (a sequential and an associative
scan); SciPy's DOP853 with our compiled right-hand side, and with one in NumPy and Python.

Times are medians; the solvers take turns, so that a busy machine is busy for all. Needs jax and diffrax for their rows.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import llvmlite.binding
import numpy as np
from scipy.integrate import solve_ivp

from tokendyn import classify, simulate
from tokendyn.core._flow_numba import _lines

REGIMES = {
    "convergence": {"mu": -1.3, "s_delta": 0.7, "a": 0.8},
    "slow divergence": {"mu": 1.0, "s_delta": -0.8, "a": 1.0},
}
T_END = 10.0
ERROR = 1e-8
PACKAGES = ("tokendyn", "numpy", "scipy", "numba", "jax", "diffrax")

RightHandSide = Callable[[float, np.ndarray], np.ndarray]


def tokens(regime: str, *shape: int) -> np.ndarray:
    x0 = np.random.default_rng([shape[-1], len(regime)]).normal(size=shape)
    return x0 if regime == "convergence" else np.abs(x0) + 0.1


def compiled(p: dict[str, float], length: int) -> RightHandSide:
    """Our right-hand side as SciPy calls it, without the checks of the public function."""
    mu, s_delta, a, bias = (np.array([v]) for v in (p["mu"], p["s_delta"], p["a"], 0.0))

    def rhs(t: float, x: np.ndarray) -> np.ndarray:
        out = np.empty((1, length))
        _lines(x[None], mu, s_delta, a, bias, out)
        return out[0]

    return rhs


def plain(p: dict[str, float], length: int) -> RightHandSide:
    """The right-hand side in Python: NumPy for the elementwise part, a loop for the recurrence."""

    def rhs(t: float, x: np.ndarray) -> np.ndarray:
        step = np.logaddexp(0.0, p["s_delta"] * x)
        decay, source = np.exp(-p["a"] * step), x * x * step
        w = np.empty(length)
        state = 0.0
        for l in range(length):
            state = decay[l] * state + source[l]
            w[l] = state
        return p["mu"] * x * w

    return rhs


def with_scipy(rhs: RightHandSide, x0: np.ndarray, rtol: float) -> np.ndarray:
    solution = solve_ivp(rhs, (0, T_END), x0, "DOP853", t_eval=[T_END], rtol=rtol, atol=0.0)
    return solution.y[:, -1]


def with_ours(p: dict[str, float], x0: np.ndarray, rtol: float) -> np.ndarray:
    return simulate(x0=x0, t_end=T_END, times=[T_END], rtol=rtol, **p).tokens[..., 0, :]


def with_diffrax(p: dict[str, float], scan: str) -> Callable[[np.ndarray, float], np.ndarray]:
    import diffrax
    import jax
    import jax.numpy as jnp

    def rhs(t: Any, x: Any, args: Any) -> Any:
        step = jax.nn.softplus(p["s_delta"] * x)
        decay, source = jnp.exp(-p["a"] * step), x * x * step
        if scan == "sequential":
            _, w = jax.lax.scan(lambda s, ds: (ds[0] * s + ds[1],) * 2, jnp.zeros(()), (decay, source), unroll=16)
        else:
            _, w = jax.lax.associative_scan(
                lambda left, right: (left[0] * right[0], right[0] * left[1] + right[1]), (decay, source)
            )
        return p["mu"] * x * w

    @jax.jit
    def solve(x0: Any, rtol: Any) -> Any:
        steps = diffrax.PIDController(rtol=rtol, atol=0.0)
        term = diffrax.ODETerm(rhs)
        return diffrax.diffeqsolve(
            term, diffrax.Dopri8(), 0.0, T_END, None, x0, stepsize_controller=steps, max_steps=4096
        ).ys[0]

    return lambda x0, rtol: np.asarray(solve(x0, rtol))


def clock(runs: dict[Any, Callable[[], Any]], repeats: int) -> tuple[dict[Any, float], dict[Any, Any]]:
    """Median seconds and result of each run; they take turns."""
    results = {key: run() for key, run in runs.items()}
    times: dict[Any, list[float]] = {key: [] for key in runs}
    for _ in range(repeats):
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            times[key].append(time.perf_counter() - start)
    return {key: statistics.median(values) for key, values in times.items()}, results


def at_error(times: list[float], errors: list[float]) -> float | None:
    """The time at which the error is ``ERROR``: interpolated between tolerances, None outside of them."""
    order = np.argsort(errors)
    x, y = np.log(np.maximum(errors, 1e-16))[order], np.log(times)[order]
    return float(np.exp(np.interp(np.log(ERROR), x, y))) if x[0] <= np.log(ERROR) <= x[-1] else None


def compare(
    solvers: dict[str, tuple[Callable[[float], np.ndarray], float]],
    exact: np.ndarray,
    tolerances: list[float],
    repeats: int,
) -> dict[str, dict[str, Any]]:
    """Seconds of every solver at rtol 1e-8, its error there, and its seconds at an error of ``ERROR``.

    Args:
        solvers: name -> the solver at a tolerance, which returns some rows of ``exact``, and what multiplies its time.
        exact: what all should find.
    """
    runs = {(name, rtol): partial(solve, rtol) for name, (solve, _) in solvers.items() for rtol in tolerances}
    times, results = clock(runs, repeats)
    found = {}
    print(f"{'':<28}{'s at rtol 1e-8':>16}{'its error':>11}{f's at error {ERROR:g}':>20}{'times ours':>12}")
    for name, (_, factor) in solvers.items():
        seconds = [factor * times[name, rtol] for rtol in tolerances]
        errors = [
            float(np.abs(results[name, rtol] / exact[: len(results[name, rtol])] - 1).max()) for rtol in tolerances
        ]
        at = tolerances.index(1e-8)
        row = {"seconds_at_rtol_1e-8": seconds[at], "error_at_rtol_1e-8": errors[at]}
        row[f"seconds_at_error_{ERROR:g}"] = needed = at_error(seconds, errors)
        ours = found.get("tokendyn", row)[f"seconds_at_error_{ERROR:g}"]
        row["times_ours"] = None if needed is None or ours is None else needed / ours
        found[name] = row
        cells = [f"{seconds[at]:>16.3g}", f"{errors[at]:>11.1e}"]
        cells += (
            ["-".rjust(20), "-".rjust(12)] if needed is None else [f"{needed:>20.3g}", f"{row['times_ours']:>12.1f}"]
        )
        print(f"{name:<28}{''.join(cells)}")
    return found


def one_trajectory(regime: str, repeats: int, length: int = 256) -> dict[str, Any]:
    p, x0 = REGIMES[regime], tokens(regime, length)
    exact = with_ours(p, x0, 1e-13)
    agreement = float(np.abs(with_scipy(compiled(p, length), x0, 1e-13) / exact - 1).max())
    print(f"\n{regime}, L = {length}, t in [0, {T_END:g}]; SciPy at rtol 1e-13 agrees to {agreement:.1e}")
    solvers: dict[str, Any] = {
        "tokendyn": (partial(with_ours, p, x0), 1.0),
        "SciPy DOP853, compiled": (partial(with_scipy, compiled(p, length), x0), 1.0),
        "SciPy DOP853, Python": (partial(with_scipy, plain(p, length), x0), 1.0),
    }
    try:
        for scan in ("sequential", "associative"):
            solvers[f"diffrax Dopri8, {scan}"] = partial(with_diffrax(p, scan), x0), 1.0
    except ImportError:
        print("diffrax is not installed: left out")
    tolerances = [10.0**-k for k in range(5, 12)]
    return {"references_agree_to": agreement, **compare(solvers, exact, tolerances, repeats)}


def ensemble(size: int, sample: int, repeats: int, length: int = 64) -> dict[str, Any]:
    p, x0 = REGIMES["convergence"], tokens("convergence", size, length)
    print(f"\n{size} trajectories of L = {length}, t in [0, {T_END:g}]; SciPy from {sample} of them")

    def loop(rhs: RightHandSide, rtol: float) -> np.ndarray:
        return np.array([with_scipy(rhs, x, rtol) for x in x0[:sample]])

    solvers: dict[str, Any] = {
        "tokendyn": (lambda rtol: with_ours(p, x0, rtol)[:sample], 1.0),
        "SciPy DOP853, compiled": (partial(loop, compiled(p, length)), size / sample),
        "SciPy DOP853, Python": (partial(loop, plain(p, length)), size / sample),
    }
    found = compare(solvers, with_ours(p, x0[:sample], 1e-13), [1e-5, 1e-6, 1e-7, 1e-8, 1e-9], repeats)
    return {"size": size, "length": length, **found}


def right_hand_side(repeats: int) -> dict[str, Any]:
    p = REGIMES["convergence"]
    lengths = np.array([1_000, 3_000, 10_000, 30_000, 100_000])
    runs = {
        int(length): partial(compiled(p, int(length)), 0.0, tokens("convergence", int(length))) for length in lengths
    }
    times, _ = clock(runs, repeats)
    seconds = np.array([times[int(length)] for length in lengths])
    power = float(np.polyfit(np.log(lengths), np.log(seconds), 1)[0])
    per_token, offset = np.polyfit(lengths, seconds, 1, w=1 / seconds)
    misfit = float(np.abs((per_token * lengths + offset) / seconds - 1).max())
    print("\none right-hand side")
    for length, s in zip(lengths, seconds, strict=True):
        print(f"L = {length:>7}{1e6 * s:>12.1f} µs")
    print(
        f"time ~ L^{power:.3f}; {1e9 * per_token:.2f} ns a token + {1e6 * offset:.1f} µs, within {100 * misfit:.0f} %"
    )
    return {
        "microseconds": {int(k): 1e6 * float(v) for k, v in zip(lengths, seconds, strict=True)},
        "power": power,
        "ns_a_token": 1e9 * float(per_token),
        "offset_microseconds": 1e6 * float(offset),
        "worst_relative_misfit": misfit,
    }


def classifier(repeats: int, size: int = 100_000, length: int = 16) -> dict[str, float]:
    rng = np.random.default_rng([size, length])
    problem: dict[str, Any] = {
        "x0": rng.normal(size=(size, length)),
        "mu": rng.normal(size=size),
        "s_delta": rng.normal(size=size),
        "a": rng.uniform(0.2, 3.0, size),
    }

    def everything() -> None:
        regime = classify(**problem)
        _ = regime.constants, regime.blow_up_bounds

    times, _ = clock({"kind and margin": lambda: classify(**problem), "and constants, bounds": everything}, repeats)
    print(f"\nclassifier, problems of L = {length} a second")
    for name, seconds in times.items():
        print(f"{name:<28}{size / seconds:>12,.0f}")
    return {f"problems_a_second, {name}": size / seconds for name, seconds in times.items()}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="fewer repeats and a smaller ensemble: see that it runs")
    options = parser.parse_args()
    try:
        import jax

        jax.config.update("jax_enable_x64", True)
    except ImportError:
        pass
    about = {
        "cpu": llvmlite.binding.get_host_cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load_at_start": os.getloadavg()[0],
    }
    print(", ".join(f"{name}: {value}" for name, value in about.items()))
    repeats = 1 if options.quick else 5
    result = {
        "machine": about,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        **{regime: one_trajectory(regime, repeats) for regime in REGIMES},
        "ensemble": ensemble(*((500, 4, 1) if options.quick else (10_000, 20, 2))),
        "right_hand_side": right_hand_side(5 * repeats),
        "classifier": classifier(repeats),
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
