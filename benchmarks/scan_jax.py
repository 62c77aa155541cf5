"""The selective scan in JAX against ``jax.lax.associative_scan`` on the materialised pair of decays and inputs.

    python benchmarks/scan_jax.py [--shape b d L N] [--dtype float32] [--engines xla pallas cuda] [--json PATH]
    python benchmarks/scan_jax.py --engines pallas --tilings 128,8,512,2 128,4,256,1   # chunk, tile, elements, warps

All are given the same inputs (softplus, bias and D; no gate) and checked against the associative scan in float32 first.
Times are medians over the repeats of one compiled call, the variants taking turns; memory is what XLA allocates for
temporaries, from its own analysis of the compiled program. On a GPU, run ``benchmarks/scan.py`` on the same shapes for
the Triton engine of PyTorch and mamba-ssm.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tokendyn
from tokendyn._tolerances import tolerance

Inputs = dict[str, jax.Array]


def make_inputs(batch: int, channels: int, length: int, state: int, dtype: str, scalar: bool) -> Inputs:
    """A Mamba layer at initialisation, without a gate; parameters in float32."""
    sizes = {"batch": batch, "channels": channels, "length": length, "state": state}
    with tokendyn.backend("jax"):
        inputs = tokendyn.random_inputs("selective_scan", **sizes, scalar_a=scalar, with_z=False)
    del inputs["delta_softplus"]
    return {name: v.astype(dtype) if name in ("u", "delta", "B", "C") else v for name, v in inputs.items()}


def associative(inputs: Inputs) -> jax.Array:
    """As one would first write it: all (b, d, L, N) decays and inputs, then one associative scan over L."""
    u, B, C, delta = (inputs[name].astype(jnp.float32) for name in ("u", "B", "C", "delta"))
    step = jax.nn.softplus(delta + inputs["delta_bias"][:, None])
    A = inputs["A"].reshape(u.shape[1], -1)
    shape = (*u.shape, B.shape[1])
    decay = jnp.broadcast_to(jnp.exp(step[..., None] * A[:, None]), shape)
    drive = (step * u)[..., None] * B.mT[:, None]

    def join(earlier: Any, later: Any) -> Any:
        return earlier[0] * later[0], later[0] * earlier[1] + later[1]

    states = jax.lax.associative_scan(join, (decay, drive), axis=2)[1]
    y = jnp.einsum("bdln,bnl->bdl", states, C) + inputs["D"][:, None] * u
    return y.astype(inputs["u"].dtype)


def ours(inputs: Inputs, engine: str) -> jax.Array:
    return tokendyn.selective_scan(**inputs, delta_softplus=True, engine=engine)


def tiled(inputs: Inputs, tiling: tuple[int, ...]) -> jax.Array:
    from tokendyn.backends.jax.ops import _scan_pallas

    chunk, tile, elements, warps = tiling
    cut = _scan_pallas.Tiling(chunk=chunk, tile=tile, elements=elements, warps=warps)
    return _scan_pallas.run(tiling=cut, **inputs, delta_softplus=True)[0]


def gradients(scan: Callable[[Inputs], jax.Array], inputs: Inputs) -> Any:
    """Output and the gradients of all arguments, for a cotangent that is the input."""
    y, pull = jax.vjp(scan, inputs)
    return y, pull(inputs["u"])[0]


def error(got: Any, want: Any) -> float:
    """The largest normwise error over all arrays."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    arrays = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in arrays)


def measure(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of a call; each is repeated within a sample until the sample is long enough to time."""
    count = {}
    for name, call in calls.items():
        start = time.perf_counter()
        jax.block_until_ready(call())
        count[name] = max(1, min(100, int(0.02 / (time.perf_counter() - start))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            result = None
            for _ in range(count[name]):
                result = call()
            jax.block_until_ready(result)
            times[name].append(1e3 * (time.perf_counter() - start) / count[name])
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Check, measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=4, default=(1, 768, 1024, 16), metavar=("b", "d", "L", "N"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--scalar", action="store_true", help="scalar A")
    parser.add_argument("--engines", nargs="+", default=["auto"])
    parser.add_argument("--tilings", nargs="+", default=[], metavar="chunk,tile,elements,warps")
    parser.add_argument("--no-baseline", action="store_true", help="where the associative scan does not fit")
    parser.add_argument("--passes", nargs="+", default=["forward", "both"], choices=("forward", "both"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()

    inputs = make_inputs(*options.shape, options.dtype, options.scalar)
    scans: dict[str, Callable[[Inputs], jax.Array]] = {} if options.no_baseline else {"associative_scan": associative}
    scans |= {f"engine {name}": partial(ours, engine=name) for name in options.engines}
    scans |= {f"pallas {text}": partial(tiled, tiling=tuple(map(int, text.split(",")))) for text in options.tilings}
    calls: dict[str, Callable[[], Any]] = {}
    memory: dict[str, int] = {}
    errors: dict[str, float] = {}
    compile_s: dict[str, float] = {}
    for kind in options.passes:
        reference = None
        for name, scan in scans.items():
            function = scan if kind == "forward" else partial(gradients, scan)
            start = time.perf_counter()
            compiled = jax.jit(function).lower(inputs).compile()
            label = f"{name}, {kind}"
            compile_s[label] = time.perf_counter() - start
            analysis = compiled.memory_analysis()
            memory[label] = 0 if analysis is None else analysis.temp_size_in_bytes
            result = compiled(inputs)
            reference = result if reference is None else reference
            errors[label] = error(result, reference)
            row = tolerance("selective_scan", "float32")
            allowed = 2e-2 if options.dtype == "bfloat16" else row.values if kind == "forward" else row.gradients
            if not errors[label] <= allowed:
                raise SystemExit(f"{label}: error {errors[label]:.2g} against {next(iter(scans))}; nothing was timed")
            calls[label] = partial(compiled, inputs)
    medians = measure(calls, options.repeats)

    load = os.getloadavg() if hasattr(os, "getloadavg") else None
    print(
        f"b d L N = {tuple(options.shape)}, {options.dtype}, JAX {jax.__version__} on {jax.devices()[0]}; load {load}"
    )
    print(f"{'':36}{'median ms':>10}{'times faster':>14}{'temporary MB':>14}{'error':>10}{'compile s':>11}")
    for label, median in medians.items():
        baseline = medians.get(f"associative_scan, {label.rsplit(', ', 1)[1]}")
        ratio = "" if baseline is None else f"{baseline / median:.1f}"
        print(
            f"{label:36}{median:10.3f}{ratio:>14}{memory[label] / 1e6:14.1f}{errors[label]:10.1e}"
            f"{compile_s[label]:11.1f}"
        )
    if options.json:
        report = {
            "benchmark": "scan_jax",
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": str(jax.devices()[0].device_kind),
            "jax": jax.__version__,
            "load_average": load,
            "shape": dict(zip("bdLN", options.shape, strict=True)),
            "dtype": options.dtype,
            "scalar_A": options.scalar,
            "repeats": options.repeats,
            "median_ms": medians,
            "temporary_bytes": memory,
            "normwise_error": errors,
            "compile_s": compile_s,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
