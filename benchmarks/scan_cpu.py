"""The selective scan on a CPU: our Numba kernels against two loops that one would write first.

    python benchmarks/scan_cpu.py [--json PATH] [--shape b d L N] [--repeats R]

- *reference loop*: the plain form in PyTorch, as reference implementations have it: the decays and inputs of all tokens
  as (b, d, L, N) arrays, then a Python loop over the tokens.
- *naive Numba*: one compiled loop over tokens and states for every channel, channels in parallel.
- *ours*: ``tokendyn.selective_scan``, and the gradients of all its arguments by ``selective_scan_vjp``.

All are given the same float32 inputs (softplus, bias and D; no gate), and are first checked against the spec on some
channels. Times are medians over the repeats, the variants taking turns. Needs PyTorch for the reference loop.
"""

from __future__ import annotations

import argparse
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
import numba
import numpy as np

import tokendyn
from tokendyn import core
from tokendyn._tolerances import tolerance
from tokendyn.backends.numpy.ops import selective_scan_vjp

#: Channels on which results are checked against the spec.
CHECKED = 8


def make_inputs(batch: int, channels: int, length: int, state: int) -> dict[str, np.ndarray]:
    """A Mamba layer at initialisation, without a gate."""
    with tokendyn.backend("numpy"):
        inputs = tokendyn.random_inputs(
            "selective_scan", batch=batch, channels=channels, length=length, state=state, with_z=False
        )
    del inputs["delta_softplus"]
    return inputs


def reference_loop(inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The scan in PyTorch: discretise everything, then step through time in Python."""
    import torch

    names = ("u", "delta", "A", "B", "C", "D", "delta_bias")
    u, delta, A, B, C, D, bias = (torch.from_numpy(inputs[name]) for name in names)
    with torch.inference_mode():
        step = torch.nn.functional.softplus(delta + bias[:, None])
        decay = torch.exp(torch.einsum("bdl,dn->bdln", step, A))
        drive = torch.einsum("bdl,bnl,bdl->bdln", step, B, u)
        h = torch.zeros(*decay.shape[:2], decay.shape[3])
        outputs = []
        for l in range(u.shape[2]):
            h = decay[:, :, l] * h + drive[:, :, l]
            outputs.append(torch.einsum("bdn,bn->bd", h, C[:, :, l]))
        return (torch.stack(outputs, dim=2) + D[:, None] * u).numpy()


@numba.njit(parallel=True)
def _naive(u, delta, A, B, C, D, bias, y):
    batch, channels, length = u.shape
    for row in numba.prange(batch * channels):
        b, d = row // channels, row % channels
        h = np.zeros(A.shape[1], u.dtype)
        for l in range(length):
            step = np.log1p(np.exp(delta[b, d, l] + bias[d]))
            out = D[d] * u[b, d, l]
            for n in range(A.shape[1]):
                h[n] = np.exp(step * A[d, n]) * h[n] + step * B[b, n, l] * u[b, d, l]
                out += C[b, n, l] * h[n]
            y[b, d, l] = out


def naive_loop(inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The scan as a first Numba version would have it."""
    y = np.empty_like(inputs["u"])
    u, delta, A, B, C, D, bias = (inputs[name] for name in ("u", "delta", "A", "B", "C", "D", "delta_bias"))
    _naive(u, delta, A, B, C, D, bias, y)
    return y


def check(name: str, got: np.ndarray, inputs: dict[str, np.ndarray]) -> float:
    """The normwise error of ``got`` against the spec on some channels; beyond the tolerance table it raises."""
    chosen = np.linspace(0, inputs["u"].shape[1] - 1, CHECKED).astype(int)
    part: dict[str, Any] = {key: value[:, chosen] if key in ("u", "delta") else value for key, value in inputs.items()}
    part.update({key: inputs[key][chosen] for key in ("A", "D", "delta_bias")})
    want = core.selective_scan(**part, delta_softplus=True)
    error = float(np.linalg.norm(got[:, chosen] - want) / np.linalg.norm(want))
    if not error <= tolerance("selective_scan", "float32").values:
        raise SystemExit(f"{name}: normwise error {error:.2g} against the spec; nothing was timed")
    return error


def measure(variants: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every call. The variants take turns, so that a busy moment hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "cpu": f"{model}, LLVM target {llvmlite.binding.get_host_cpu_name()}",
        "threads": {"numba": numba.config.NUMBA_NUM_THREADS, "torch": torch.get_num_threads()},
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "numba": numba.__version__,
            "torch": torch.__version__,
            "tokendyn": tokendyn.__version__,
        },
    }


def main() -> None:
    """Check, measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--shape", type=int, nargs=4, default=(1, 768, 1024, 16), metavar=("b", "d", "L", "N"))
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()

    inputs = make_inputs(*options.shape)
    scalar = {**inputs, "A": inputs["A"][:, 0].copy()}
    general_call, scalar_call = (partial(tokendyn.selective_scan, **v, delta_softplus=True) for v in (inputs, scalar))
    forward: dict[str, tuple[Callable[[], Any], dict[str, np.ndarray]]] = {
        "reference loop (PyTorch)": (partial(reference_loop, inputs), inputs),
        "naive Numba": (partial(naive_loop, inputs), inputs),
        "ours, general A": (general_call, inputs),
        "ours, scalar A": (scalar_call, scalar),
    }
    first_call: dict[str, float] = {}
    errors: dict[str, float] = {}
    for name, (call, given) in forward.items():
        start = time.perf_counter()
        result = call()
        first_call[name] = time.perf_counter() - start
        errors[name] = check(name, result, given)

    dy = np.random.default_rng(1).standard_normal(inputs["u"].shape).astype(np.float32)
    reverse: dict[str, Callable[[], Any]] = {
        f"{name}, gradients": partial(selective_scan_vjp, dy, **given, delta_softplus=True)
        for name, given in (("ours, general A", inputs), ("ours, scalar A", scalar))
    }
    for name, call in reverse.items():
        start = time.perf_counter()
        call()
        first_call[name] = time.perf_counter() - start

    times = measure({name: call for name, (call, _) in forward.items()} | reverse, options.repeats)
    medians = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    reference = medians["reference loop (PyTorch)"]
    about = machine()
    print(
        f"b d L N = {options.shape}, float32; {about['cpu']}; threads {about['threads']}; load {about['load_average']}"
    )
    print(f"{'':28}{'median ms':>10}{'fastest ms':>12}{'times faster':>14}{'error':>10}{'first call s':>14}")
    for name, median in medians.items():
        ratio = "" if name in reverse else f"{reference / median:.1f}"
        error = "" if name in reverse else f"{errors[name]:.1e}"
        print(f"{name:28}{median:10.2f}{1e3 * min(times[name]):12.2f}{ratio:>14}{error:>10}{first_call[name]:14.2f}")
    if options.json:
        report = {
            "benchmark": "scan_cpu",
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": about,
            "shape": dict(zip("bdLN", options.shape, strict=True)),
            "dtype": "float32",
            "repeats": options.repeats,
            "median_ms": medians,
            "fastest_ms": {name: 1e3 * min(values) for name, values in times.items()},
            "normwise_error": errors,
            "first_call_s": first_call,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
