"""Time the reordering of tokens on one GPU against dense SoftSort, in one run, results checked first.

``python benchmarks/reorder.py [--json FILE]`` prints a table and writes JSON. Dense SoftSort is what the papers' code
does: sort, distances, softmax, product. Every figure is a median of CUDA-event timings: eager, replayed from a CUDA
graph, and, of short sequences, one of 20 calls in a graph, where the host's part in starting it is divided by 20.
Permuting is a hard order with its gradient to the tokens alone; straight-through adds SoftSort's to the scores. The
floor is the time to read the tokens and write them once at the rate of a large copy; backward: read two, write one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpu_timing import head, in_graph, relative_error, require_gpu, times

import tokendyn
from tokendyn.errors import EngineError

TAU = 0.1
#: name -> (b, L, D), dtype, power
CASES = {
    "b128 L196 D160": ((128, 196, 160), torch.bfloat16, 1),
    "b128 L49 D320": ((128, 49, 320), torch.bfloat16, 1),
    "b128 L196 D160 float32": ((128, 196, 160), torch.float32, 1),
    "b128 L196 D160 power 2": ((128, 196, 160), torch.bfloat16, 2),
    "b8 L4096 D1536": ((8, 4096, 1536), torch.bfloat16, 1),
    "b8 L4096 D1536 power 2": ((8, 4096, 1536), torch.bfloat16, 2),
    "b1 L16384 D1536": ((1, 16384, 1536), torch.bfloat16, 1),
}


def dense(scores: torch.Tensor, x: torch.Tensor, power: int) -> torch.Tensor:
    """SoftSort with its L x L matrix."""
    placed = scores.sort(dim=-1).values
    distance = (placed.unsqueeze(-1) - scores.unsqueeze(-2)).abs() ** power
    return torch.softmax(-distance / TAU, -1).to(x.dtype) @ x


def ours(engine: str) -> Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]:
    return lambda scores, x, power: tokendyn.softsort(scores, x, tau=TAU, power=power, engine=engine)


def by_order(method: str) -> Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]:
    return lambda scores, x, power: tokendyn.token_order(scores, method, tau=TAU, power=power).apply(x)


WAYS: dict[str, Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
    "dense": dense,
    "cuda": ours("cuda"),
    "triton": ours("triton"),
    "plain": ours("plain"),
    "permute": by_order("hard"),
    "straight-through": by_order("straight_through"),
}


def outcome(way: Callable[..., torch.Tensor], scores: torch.Tensor, x: torch.Tensor, power: int) -> list[torch.Tensor]:
    """The output and every gradient that there is."""
    y = way(scores, x, power)
    dy = torch.randn(y.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    return [y, *(g for g in torch.autograd.grad(y, (scores, x), dy.to(y.dtype), allow_unused=True) if g is not None)]


def check(name: str, scores: torch.Tensor, x: torch.Tensor, power: int) -> float:
    """Largest relative error of output and gradients on a part of the case: of SoftSorts against the dense one in
    float64, of permutations against themselves in float64."""
    few = [t.detach()[:1, :512].clone().requires_grad_() for t in (scores, x)]
    wide = [t.detach().double().requires_grad_() for t in few]
    reference = WAYS[name if name in ("permute", "straight-through") else "dense"]
    pairs = zip(outcome(WAYS[name], *few, power), outcome(reference, *wide, power), strict=True)
    return max(relative_error(got, want) for got, want in pairs)


def measure(way: Callable[..., torch.Tensor], scores: torch.Tensor, x: torch.Tensor, power: int) -> dict[str, float]:
    dy = torch.randn_like(x)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return way(scores, x, power)

    def both() -> Any:
        return torch.autograd.grad(way(scores, x, power), (scores, x), dy, allow_unused=True)

    calls = 20 if x.shape[1] <= 256 else 1
    return times(forward, both) | {"forward in graph": in_graph(forward, calls), "both in graph": in_graph(both, calls)}


def three(figures: dict[str, float], what: str, digits: int) -> str:
    """Eager, replayed, in a longer graph."""
    return ", ".join(f"{figures[f'{what} {how}']:.{digits}f}" for how in ("eager", "graph", "in graph"))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "reorder.json")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further case after this time")
    options = parser.parse_args()
    require_gpu()
    began = time.time()
    report = head("triton")
    rate = report["copy_bytes_per_second"]
    print(f"{report['machine']}, copy {rate / 1e12:.2f} TB/s, {report['versions']}")
    print("case | way | forward ms: eager, graph, in graph | forward + backward | peak MB | error")
    for name, (shape, dtype, power) in CASES.items():
        if time.time() - began > options.seconds:
            break
        generator = torch.Generator("cuda").manual_seed(shape[1])
        scores = torch.randn(shape[:2], generator=generator, device="cuda").requires_grad_()
        x = torch.randn(shape, generator=generator, device="cuda").to(dtype).requires_grad_()
        size = x.numel() * x.element_size()
        case: dict[str, Any] = {"case": name, "floor": {"forward": 2e3 * size / rate, "both": 5e3 * size / rate}}
        case["ways"] = {}
        for way, run in WAYS.items():
            try:
                error = check(way, scores, x, power)
                t = measure(run, scores, x, power)
            except (EngineError, torch.cuda.OutOfMemoryError) as reason:
                print(f"{name} | {way} | left out: {str(reason).splitlines()[0]}", flush=True)
                continue
            assert error < 5e-2, f"{name}, {way}: errs by {error:.1e}"
            case["ways"][way] = {**t, "error": error}
            figures = f"{three(t, 'forward', 3)} | {three(t, 'both', 3)} | {t['bytes'] / 1e6:.0f}"
            print(f"{name} | {way} | {figures} | {error:.0e}", flush=True)
        best = next((case["ways"][way] for way in ("cuda", "triton", "plain") if way in case["ways"]), None)
        if best and "dense" in case["ways"]:
            theirs = case["ways"]["dense"]
            case["ratio"] = {key: theirs[key] / best[key] for key in best if key != "error"}
            figures = f"{three(case['ratio'], 'forward', 1)} | {three(case['ratio'], 'both', 1)}"
            floor = f"floor {case['floor']['forward']:.4f}, {case['floor']['both']:.4f} ms"
            print(f"{name} | dense / ours | {figures} | {floor}", flush=True)
        report["cases"].append(case)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
