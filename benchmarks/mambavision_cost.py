"""What reordering costs MambaVision-T (paper 1, Table 8): parameters, FLOPs, images a second, memory; in one run.

``python benchmarks/mambavision_cost.py [--json FILE]`` prints a table and writes JSON. Models: ours without an order;
with the published order as its public code computes it (scores, sort, a dense L x L matrix, einsum); with the same
order as computed here (two decayed scans); the PyPI model ``mambavision`` where it is installed (it needs mamba-ssm).
All with channels last, autocast to bfloat16 and fused AdamW; ``--compile`` adds ours under torch.compile.

Checked before anything is timed: both ways of ordering give the same outputs in float64, and from the PyPI model's
weights ours gives its outputs and, over 20 training steps on the same batches, its losses. Times are medians of single
steps by CUDA events (a clock on a CPU), of the models in turn, so that a drift of the machine hits all alike.

FLOPs are those of one image forward, a multiply-add counted once as the paper counts it, of matrix products and
convolutions; the selective scan, which torch cannot count, adds 9 L d N by hand.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import command
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tokendyn
from tokendyn.backends.torch import models
from tokendyn.backends.torch.layers._ordering import ScoreOrdering

FOLLOWED_STEPS = 20
SHARP = 2.0**12


class DenseOrder:
    """The published code's way: every sorted place an explicit row of weights over all tokens."""

    def __init__(self, scores: torch.Tensor, tau: float) -> None:
        ordered = scores.sort(dim=1).values
        self.weights = (-(ordered[:, :, None] - scores[:, None, :]).abs() / tau).softmax(dim=2)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bkl,bld->bkd", self.weights.to(x.dtype), x)


def with_dense_order(model: nn.Module) -> nn.Module:
    """The model with its orders computed densely."""
    for module in model.modules():
        if isinstance(module, ScoreOrdering):
            made = module.forward
            module.forward = lambda x, *s, made=made, module=module: DenseOrder(made(x, *s).scores, module.tau)
    return model


def make_models(options: argparse.Namespace) -> dict[str, nn.Module]:
    """By name, all from one start."""
    torch.manual_seed(0)
    size = getattr(models, options.model)
    published = size(order="published", parity="published", num_classes=1000)
    baseline = size(parity="published", num_classes=1000)
    baseline.load_state_dict(published.state_dict(), strict=False)
    found = {
        "baseline": baseline,
        "published order, dense": with_dense_order(copy.deepcopy(published)),
        "published order, scans": published,
    }
    theirs = public_model() if options.model == "mambavision_t" else None
    if theirs is not None:
        baseline.load_state_dict(theirs.state_dict())
        for name in ("published order, dense", "published order, scans"):
            found[name].load_state_dict(theirs.state_dict(), strict=False)
        found["PyPI mambavision"] = theirs
    if options.compile:
        for name in ("baseline", "published order, scans"):
            found[f"{name}, compiled"] = copy.deepcopy(found[name])
    return {name: model.to(options.device, memory_format=torch.channels_last) for name, model in found.items()}


def public_model() -> nn.Module | None:
    """The PyPI package's MambaVision-T, or None where it cannot be imported."""
    try:
        from mambavision.models.mamba_vision import mamba_vision_T
    except ImportError as cause:
        print(f"PyPI mambavision is left out: {cause}")
        return None
    return mamba_vision_T(pretrained=False)


def check(found: dict[str, nn.Module], images: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Differences of outputs, normwise; losses over the followed steps."""
    few, report = images[:8], {}
    with torch.no_grad():
        outputs = {name: model.eval()(few).double() for name, model in found.items() if "compiled" not in name}
        # At the start an order averages everything, however it is computed: look where it sorts, in float64.
        for name in ("published order, scans", "published order, dense"):
            model = found[name].double()
            outputs["averaged"] = model(few.double())
            sharpen(model, SHARP)
            outputs[name] = model(few.double())
            sharpen(model, 1 / SHARP)
            model.float()

    def apart(one: str, other: str) -> float:
        return ((outputs[one] - outputs[other]).norm() / outputs[other].norm()).item()

    report["scans against dense"] = apart("published order, scans", "published order, dense")
    report["sorted against averaged"] = apart("published order, scans", "averaged")
    assert report["scans against dense"] < 1e-9 < 1e-6 < report["sorted against averaged"], report
    if "PyPI mambavision" in found:
        report["baseline against PyPI"] = apart("baseline", "PyPI mambavision")
        assert report["baseline against PyPI"] < 1e-4, report
        losses = {}
        for name in ("baseline", "PyPI mambavision"):
            model = without_drop_path(copy.deepcopy(found[name])).train()
            step = Step(model, images, labels, bfloat16=False)
            losses[name] = [step() for _ in range(FOLLOWED_STEPS)]
        report["losses"] = losses
        worst = max(abs(a - b) / abs(b) for a, b in zip(*losses.values(), strict=True))
        report["losses apart"] = worst
        assert worst < 1e-2, report
    return report


def sharpen(model: nn.Module, factor: float) -> None:
    """Scale the scores of all orders."""
    for module in model.modules():
        if isinstance(module, ScoreOrdering):
            module.K.mul_(factor)


def without_drop_path(model: nn.Module) -> nn.Module:
    """The model without stochastic depth, ours or timm's: two models cannot draw alike."""
    for module in model.modules():
        if type(module).__name__ == "DropPath":
            for name in ("p", "drop_prob"):
                if hasattr(module, name):
                    setattr(module, name, 0.0)
    return model


class Step:
    """One training step; called, it returns the loss as a number (``launch`` does not wait for it)."""

    def __init__(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, bfloat16: bool = True) -> None:
        self.model, self.images, self.labels, self.bfloat16 = model, images, labels, bfloat16
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=8e-4, weight_decay=0.05, fused=True)

    def launch(self) -> torch.Tensor:
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.bfloat16):
            loss = F.cross_entropy(self.model(self.images).float(), self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def __call__(self) -> float:
        return self.launch().item()


class Forward:
    """One inference."""

    def __init__(self, model: nn.Module, images: torch.Tensor) -> None:
        self.model, self.images = model, images

    def launch(self) -> torch.Tensor:
        with torch.no_grad(), torch.autocast(self.images.device.type, torch.bfloat16):
            return self.model(self.images)


def milliseconds(call: Any, device: torch.device) -> float:
    """One call, waited for."""
    if device.type == "cpu":
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(stop)


def time_in_turn(calls: dict[str, Any], device: torch.device, repeats: int, warmup: int) -> dict[str, float]:
    """Median milliseconds of each call, all of them called in turn."""
    for call in calls.values():
        for _ in range(warmup):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(milliseconds(call, device))
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(call: Any, device: torch.device) -> int | None:
    """Bytes that one call needs beyond what is there before it."""
    if device.type == "cpu":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def count_flops(model: nn.Module, image: torch.Tensor) -> float:
    """Multiply-adds of one image forward, 9 L d N of each selective scan included."""
    scans: list[int] = []
    handles = []
    for module in model.modules():
        if hasattr(module, "A_log"):
            channels, state = module.A_log.shape

            def note(_: nn.Module, given: tuple[torch.Tensor, ...], size: int = channels * state) -> None:
                scans.append(9 * given[0].shape[0] * given[0].shape[1] * size)

            handles.append(module.register_forward_pre_hook(note))
    with FlopCounterMode(display=False) as counter:
        model(image)
    for handle in handles:
        handle.remove()
    return counter.get_total_flops() / 2 + sum(scans)


def main(arguments: list[str] | None = None) -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "mambavision_cost.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="mambavision_t", help="a function of tokendyn.torch.models")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=224, help="pixels on a side")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="measure ours under torch.compile too")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)

    found = make_models(options)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(options.batch, 3, options.size, options.size, generator=generator).to(device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (options.batch,), generator=generator).to(device)
    checks = check(found, images, labels)
    print(json.dumps({key: value for key, value in checks.items() if key != "losses"}))

    rows: dict[str, dict[str, Any]] = {}
    for name, model in found.items():
        if "compiled" not in name:
            rows[name] = {
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "gflops": count_flops(model.eval(), images[:1]) / 1e9,
            }
        else:
            rows[name] = dict(rows[name.removesuffix(", compiled")])
    called = {name: torch.compile(model) if "compiled" in name else model for name, model in found.items()}
    forwards = {name: Forward(model, images).launch for name, model in called.items()}
    for name, value in time_in_turn(forwards, device, options.repeats, options.warmup).items():
        rows[name]["forward_ms"] = value
    for model in found.values():
        model.train()
    steps = {name: Step(model, images, labels).launch for name, model in called.items()}
    for name, value in time_in_turn(steps, device, options.repeats, options.warmup).items():
        rows[name]["training_ms"] = value
    for name, model in called.items():
        # All models stay in memory: what counts is what a step adds, and the model's own parameters and states.
        own = sum(parameter.numel() for parameter in model.parameters()) * 4 * 4
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        peak = peak_memory(steps[name], device)
        rows[name]["training_bytes"] = None if peak is None else peak - before + own

    print(
        "model | parameters | GFLOPs | forward images/s | training images/s, against baseline | memory MB, against it"
    )
    for name, row in rows.items():
        rates = [1e3 * options.batch / row[key] for key in ("forward_ms", "training_ms")]
        slower = row["training_ms"] / rows["baseline"]["training_ms"] - 1
        memory = "-"
        if row["training_bytes"] is not None:
            more = row["training_bytes"] / rows["baseline"]["training_bytes"] - 1
            memory = f"{row['training_bytes'] / 1e6:,.0f}, {100 * more:+.1f} %"
        print(
            f"{name} | {row['parameters']:,} | {row['gflops']:.2f} | {rates[0]:,.0f} | {rates[1]:,.0f}, "
            f"{100 * slower:+.1f} % time | {memory}"
        )
    report = {
        "command": command(),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "tokendyn": tokendyn.__version__,
        },
        "batch": options.batch,
        "size": options.size,
        "checks": checks,
        "models": rows,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
