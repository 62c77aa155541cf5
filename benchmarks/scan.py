"""Time the selective scan's engines on one GPU, in one run, results checked first.

``python benchmarks/scan.py [--json FILE]`` prints a table and writes JSON. Every figure is a median of CUDA-event
timings, eager (as called from Python) and graph (replayed from a CUDA graph, so that launches from Python do not
count). Peers are measured where they are installed: mamba-ssm, flash-linear-attention's ``fused_recurrent_gla(gv=)``
on scalar A (from gates and Δu made before the clock starts), mambapy's parallel scan (from exp(ΔA) and ΔBu likewise;
at the shapes whose b d L N states fit). The last cases are one token of decoding, per call. The floor is the time
that one read of u and delta and one write of y take at the rate of a large copy on the same GPU; backward adds one
read of dy, u, delta and one write of du, ddelta.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpu_timing import captured, head, installed, median, relative_error, require_gpu, times

import tokendyn
from tokendyn.errors import EngineError

SHAPES = {
    "b8 d1536 L2048 N16": (8, 1536, 2048, 16),
    "b128 d160 L196 N8": (128, 160, 196, 8),
    "b128 d320 L49 N8": (128, 320, 49, 8),
    "b8 d1536 L8192 N16": (8, 1536, 8192, 16),
    "b1 d1536 L65536 N16": (1, 1536, 65536, 16),
}
BFLOAT16 = [(shape, torch.bfloat16, scalar, False) for shape in SHAPES for scalar in (False, True)]
OTHERS = [
    ("b8 d1536 L2048 N16", torch.float32, False, False),
    ("b8 d1536 L2048 N16", torch.float32, True, False),
    ("b8 d1536 L2048 N16", torch.bfloat16, False, True),
    ("b8 d1536 L2048 N16", torch.bfloat16, True, True),
]
ENGINES = ("cuda", "triton", "mamba_ssm")


def arguments(shape, dtype, scalar, channels_last):
    """Random arguments with step sizes of about 0.01 to 1, as a trained model has them."""
    b, d, length, n = shape
    generator = torch.Generator("cuda").manual_seed(length + d)

    def normal(*size):
        return torch.randn(size, generator=generator, device="cuda")

    def activation():
        if channels_last:
            return normal(b, length, d).to(dtype).transpose(1, 2)
        return normal(b, d, length).to(dtype)

    A = -torch.rand((d,) if scalar else (d, n), generator=generator, device="cuda") - 0.1
    given = {
        "u": activation(),
        "delta": activation(),
        "A": A,
        "B": normal(b, n, length).to(dtype),
        "C": normal(b, n, length).to(dtype),
        "D": normal(d),
        "delta_bias": normal(d) - 2.0,
    }
    return {name: value.requires_grad_() for name, value in given.items()}


def check(given, engines):
    """Largest relative error of the gradients and outputs of the engines against the plain engine in float64."""
    small = {name: value.detach()[:1] if value.ndim == 3 else value.detach() for name, value in given.items()}
    small = {name: value[..., :256] if value.ndim == 3 else value for name, value in small.items()}

    def outcome(engine, dtype=None):
        leaves = {name: (value if dtype is None else value.to(dtype)).requires_grad_() for name, value in small.items()}
        y = tokendyn.selective_scan(**leaves, delta_softplus=True, engine=engine)
        return [y, *torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))]

    want = outcome("plain", torch.float64)
    errors = {}
    for engine in engines:
        try:
            got = outcome(engine)
        except EngineError:
            continue
        errors[engine] = max(relative_error(g, w) for g, w in zip(got, want, strict=True))
        assert errors[engine] < 5e-2, f"{engine} errs by {errors[engine]:.1e}"
    return errors


def measure(given, engine):
    """Times in milliseconds and peak memory in bytes of forward and forward + backward."""
    leaves = list(given.values())
    dy = torch.randn_like(given["u"])

    def forward():
        with torch.no_grad():
            return tokendyn.selective_scan(**given, delta_softplus=True, engine=engine)

    def both():
        y = tokendyn.selective_scan(**given, delta_softplus=True, engine=engine)
        return torch.autograd.grad(y, leaves, dy)

    return times(forward, both)


def without_skip(given):
    """y of the call without D, in float32 by the engine that takes it, for peers that start from Δ."""
    wide = {name: value.detach().float() for name, value in given.items() if name != "D"}
    return tokendyn.selective_scan(**wide, delta_softplus=True)


def measure_gla(given):
    """flash-linear-attention on scalar A: one head of K = N keys and V = d values, gated on the side of the values."""
    gla = importlib.import_module("fla.ops.gla").fused_recurrent_gla
    step = torch.nn.functional.softplus(given["delta"].float() + given["delta_bias"][:, None])
    dtype = given["u"].dtype

    def tokens_first(t):
        return t.detach().mT.unsqueeze(2).contiguous()

    q, k = (tokens_first(given[name]).requires_grad_() for name in ("C", "B"))
    v = tokens_first((step * given["u"]).to(dtype)).requires_grad_()
    gate = tokens_first((step * given["A"][:, None]).float()).requires_grad_()
    dy = torch.randn_like(v)

    def forward():
        with torch.no_grad():
            return gla(q, k, v, gv=gate, scale=1.0)[0]

    def both():
        return torch.autograd.grad(gla(q, k, v, gv=gate, scale=1.0)[0], (q, k, v, gate), dy)

    error = relative_error(forward().squeeze(2).mT, without_skip(given))
    assert error < 5e-2, f"fla errs by {error:.1e}"
    return times(forward, both), error


def measure_mambapy(given):
    """mambapy's parallel scan h_l = a_l h_{l-1} + x_l over materialised (b, L, d, N)."""
    pscan = importlib.import_module("mambapy.pscan").pscan
    step = torch.nn.functional.softplus(given["delta"].float() + given["delta_bias"][:, None]).detach().mT
    A = given["A"].detach()
    A = A.unsqueeze(-1) if A.ndim == 1 else A
    decay = torch.exp(step.unsqueeze(-1) * A).expand(*step.shape, given["B"].shape[1]).contiguous()
    B, C = (given[name].detach().float().mT for name in ("B", "C"))
    inflow = (step * given["u"].detach().float().mT).unsqueeze(-1) * B.unsqueeze(2)
    decay, inflow = decay.requires_grad_(), inflow.requires_grad_()

    def run():
        return (pscan(decay, inflow) @ C.unsqueeze(-1)).squeeze(-1)

    def forward():
        with torch.no_grad():
            return run()

    y = forward()
    error = relative_error(y.mT, without_skip(given))
    assert error < 5e-2, f"mambapy errs by {error:.1e}"
    dy = torch.randn_like(y)
    return times(forward, lambda: torch.autograd.grad(run(), (decay, inflow), dy)), error


def peers(shape, given, scalar):
    """Engines of other packages that this case has: name -> (times, error)."""
    found = {}
    if scalar and installed("fla"):
        found["fla"] = measure_gla(given)
    b, d, length, n = shape
    if b * d * length * n * 4 <= 4 << 30 and installed("mambapy"):
        found["mambapy"] = measure_mambapy(given)
    return found


def measure_step(batch, channels, state, dtype):
    """One token of decoding: our engines, and mamba-ssm's, which overwrites its state."""
    generator = torch.Generator("cuda").manual_seed(batch)

    def normal(*size):
        return torch.randn(size, generator=generator, device="cuda")

    x, dt, z = (normal(batch, channels).to(dtype) for _ in range(3))
    B, C = (normal(batch, state).to(dtype) for _ in range(2))
    first, A, D, bias = (
        normal(batch, channels, state),
        -normal(channels, state).exp(),
        normal(channels),
        normal(channels),
    )
    given = (x, dt, A, B, C, D, z, bias, True)
    with torch.no_grad():
        want = tokendyn.selective_state_update(first, *given, engine="plain")
        ways = {
            engine: lambda e=engine: tokendyn.selective_state_update(first, *given, engine=e)
            for engine in ("triton", "plain")
        }
        if installed("mamba_ssm"):
            theirs = importlib.import_module("mamba_ssm.ops.triton.selective_state_update").selective_state_update
            kept = first.clone()
            ways["mamba_ssm"] = lambda: (theirs(kept, *given), kept)
        found = {}
        for name, way in ways.items():
            error = max(relative_error(got, w) for got, w in zip(way(), want, strict=True))
            assert error < 5e-2, f"{name} errs by {error:.1e}"
            found[name] = {"forward eager": median(way), "forward graph": median(captured(way)), "error": error}
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "scan.json")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further case after this time")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    options = parser.parse_args()
    require_gpu()
    began = time.time()
    report = head("cuda.bindings", "triton", "mamba_ssm", "fla", "mambapy")
    rate = report["copy_bytes_per_second"]
    print(f"{report['machine']}, copy {rate / 1e12:.2f} TB/s, {report['versions']}")
    print("case | engine | forward ms eager, graph | forward + backward ms eager, graph | peak MB | largest error")
    for name, dtype, scalar, last in [*OTHERS, *BFLOAT16]:
        if time.time() - began > options.seconds:
            break
        shape = SHAPES[name]
        label = (
            f"{name} {str(dtype).removeprefix('torch.')}{' scalar A' if scalar else ''}{' (b, L, d)' if last else ''}"
        )
        given = arguments(shape, dtype, scalar, last)
        case = {"case": label, "errors": check(given, options.engines), "engines": {}}
        element = given["u"].numel() * given["u"].element_size()
        case["floor"] = {"forward": 3e3 * element / rate, "both": 8e3 * element / rate}
        for engine in case["errors"]:
            case["engines"][engine] = t = measure(given, engine)
            print(
                f"{label} | {engine} | {t['forward eager']:.3f}, {t['forward graph']:.3f} | {t['both eager']:.3f}, "
                f"{t['both graph']:.3f} | {t['bytes'] / 1e6:.0f} | {case['errors'][engine]:.0e}",
                flush=True,
            )
        for peer, (t, error) in peers(shape, given, scalar).items():
            case["engines"][peer] = {**t, "error": error}
            print(
                f"{label} | {peer} | {t['forward eager']:.3f}, {t['forward graph']:.3f} | {t['both eager']:.3f}, "
                f"{t['both graph']:.3f} | {t['bytes'] / 1e6:.0f} | {error:.0e}",
                flush=True,
            )
        if {"cuda", "mamba_ssm"} <= case["engines"].keys():
            ours, theirs = (case["engines"][engine] for engine in ("cuda", "mamba_ssm"))
            case["ratio"] = {key: theirs[key] / ours[key] for key in ours if key != "bytes"}
            r = case["ratio"]
            print(
                f"{label} | mamba_ssm / cuda | {r['forward eager']:.2f}, {r['forward graph']:.2f} | "
                f"{r['both eager']:.2f}, {r['both graph']:.2f} | floor {case['floor']['forward']:.3f}, "
                f"{case['floor']['both']:.3f} ms",
                flush=True,
            )
        report["cases"].append(case)
        write(options.json, report)
    report["steps"] = []
    for batch in (1, 8, 64, 512):
        found = measure_step(batch, 1536, 16, torch.bfloat16)
        report["steps"].append({"case": f"one token, b{batch} d1536 N16 bfloat16", "engines": found})
        shown = "; ".join(f"{k} {v['forward eager']:.4f}, {v['forward graph']:.4f}" for k, v in found.items())
        print(f"one token, b{batch} d1536 N16 bfloat16 | ms eager, graph: {shown}", flush=True)
    write(options.json, report)


def write(path, report):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
