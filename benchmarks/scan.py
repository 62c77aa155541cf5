"""Time the selective scan's engines on one GPU, in one run, results checked first.

``python benchmarks/scan.py [--json FILE]`` prints a table and writes JSON. Every figure is a median of CUDA-event
timings, eager (as called from Python) and graph (replayed from a CUDA graph, so that launches from Python do not
count). mamba-ssm is measured where it is installed. The floor is the time that one read of u and delta and one
write of y take at the rate of a large copy on the same GPU; backward adds one read of dy, u, delta and one write
of du, ddelta.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tokendyn
from tokendyn.errors import EngineError

SHAPES = {
    "b8 d1536 L2048 N16": (8, 1536, 2048, 16),
    "b8 d1536 L8192 N16": (8, 1536, 8192, 16),
    "b1 d1536 L65536 N16": (1, 1536, 65536, 16),
    "b128 d160 L196 N8": (128, 160, 196, 8),
    "b128 d320 L49 N8": (128, 320, 49, 8),
}
BFLOAT16 = [(shape, torch.bfloat16, scalar, False) for shape in SHAPES for scalar in (False, True)]
OTHERS = [
    ("b8 d1536 L2048 N16", torch.float32, False, False),
    ("b8 d1536 L2048 N16", torch.float32, True, False),
    ("b8 d1536 L2048 N16", torch.bfloat16, False, True),
    ("b8 d1536 L2048 N16", torch.bfloat16, True, True),
]
ENGINES = ("triton", "mamba_ssm")


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


def median(call, repeats=20):
    """Median milliseconds of ``call``, after a warm-up."""
    for _ in range(3):
        call()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, stop in pairs:
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(stop) for start, stop in pairs)
    return times[repeats // 2]


def captured(call):
    """``call`` as the replay of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def copy_rate():
    """Bytes read and written in a second by a large copy on this GPU."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (median(lambda: target.copy_(source)) * 1e-3)


def check(given):
    """Largest relative error of the gradients and outputs of the engines against the plain engine in float64."""
    small = {name: value.detach()[:1] if value.ndim == 3 else value.detach() for name, value in given.items()}
    small = {name: value[..., :256] if value.ndim == 3 else value for name, value in small.items()}

    def outcome(engine, dtype=None):
        leaves = {name: (value if dtype is None else value.to(dtype)).requires_grad_() for name, value in small.items()}
        y = tokendyn.selective_scan(**leaves, delta_softplus=True, engine=engine)
        return [y, *torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))]

    want = outcome("plain", torch.float64)
    errors = {}
    for engine in ENGINES:
        try:
            got = outcome(engine)
        except EngineError:
            continue
        errors[engine] = max(float((g.double() - w).norm() / w.norm()) for g, w in zip(got, want, strict=True))
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

    found = {"forward eager": median(forward), "both eager": median(both)}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    torch.cuda.synchronize()
    found["bytes"] = torch.cuda.max_memory_allocated() - before
    found["forward graph"] = median(captured(forward))
    found["both graph"] = median(captured(both))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "scan.json")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further case after this time")
    options = parser.parse_args()
    began = time.time()
    rate = copy_rate()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "tokendyn": tokendyn.__version__}
    for package in ("triton", "mamba_ssm"):
        try:
            versions[package] = __import__(package).__version__
        except ImportError:
            versions[package] = None
    report = {
        "command": " ".join(["python", *sys.argv]),
        "machine": torch.cuda.get_device_name(),
        "versions": versions,
        "copy_bytes_per_second": rate,
        "cases": [],
    }
    print(f"{report['machine']}, copy {rate / 1e12:.2f} TB/s, {versions}")
    print("case | engine | forward ms eager, graph | forward + backward ms eager, graph | peak MB | largest error")
    for name, dtype, scalar, last in [*BFLOAT16, *OTHERS]:
        if time.time() - began > options.seconds:
            break
        shape = SHAPES[name]
        label = (
            f"{name} {str(dtype).removeprefix('torch.')}{' scalar A' if scalar else ''}{' (b, L, d)' if last else ''}"
        )
        given = arguments(shape, dtype, scalar, last)
        case = {"case": label, "errors": check(given), "engines": {}}
        element = given["u"].numel() * given["u"].element_size()
        case["floor"] = {"forward": 3e3 * element / rate, "both": 8e3 * element / rate}
        for engine in case["errors"]:
            case["engines"][engine] = t = measure(given, engine)
            print(
                f"{label} | {engine} | {t['forward eager']:.3f}, {t['forward graph']:.3f} | {t['both eager']:.3f}, "
                f"{t['both graph']:.3f} | {t['bytes'] / 1e6:.0f} | {case['errors'][engine]:.0e}",
                flush=True,
            )
        if len(case["engines"]) == 2:
            ours, theirs = (case["engines"][engine] for engine in ENGINES)
            case["ratio"] = {key: theirs[key] / ours[key] for key in ours if key != "bytes"}
            r = case["ratio"]
            print(
                f"{label} | mamba_ssm / triton | {r['forward eager']:.2f}, {r['forward graph']:.2f} | "
                f"{r['both eager']:.2f}, {r['both graph']:.2f} | floor {case['floor']['forward']:.3f}, "
                f"{case['floor']['both']:.3f} ms",
                flush=True,
            )
        report["cases"].append(case)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
