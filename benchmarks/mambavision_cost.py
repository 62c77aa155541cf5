"""What reordering costs MambaVision-T (paper 1, Table 8): parameters, FLOPs, images a second, memory; in one run.

``python benchmarks/mambavision_cost.py [--compile] [--graphs] [--profile] [--json FILE]`` prints a table and writes
JSON after every part, so a run that is cut short leaves what it measured. Models: ours without an order; with the
published order as its public code computes it (scores, sort, a dense L x L matrix, einsum); with the same order as
computed here; the PyPI model ``mambavision`` where it is installed (it needs mamba-ssm). All with channels last,
autocast to bfloat16, fused AdamW and cuDNN's choice of the fastest convolution. ``--compile`` adds training steps of
ours under torch.compile, ``--graphs`` whole steps replayed from a CUDA graph, which no time of the host slows;
``--profile`` where the time of a training step goes, kernel by kernel.

Checked too, from the same start: both ways of ordering give the same outputs in float64, and from the PyPI model's
weights ours gives its outputs and, over 20 training steps on the same fresh batches, its losses. A check that fails
is reported, and the exit code is 1. Times are medians over bursts of steps in a row, by CUDA events (a clock on a
CPU), of the models in turn, so that a drift of the machine hits all alike.

FLOPs are those of one image forward, a multiply-add counted once (the paper counts two), of matrix products and
convolutions; what torch cannot count is added by hand, such as 9 L d N of a selective scan.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import captured, command, installed, relative_error
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tokendyn
from tokendyn.backends.torch import models
from tokendyn.backends.torch.layers._ordering import ScoreOrdering

FOLLOWED_STEPS = 20
SHARP = (2.0**8, 2.0**12)
BASELINE, DENSE, OURS, PUBLIC = "baseline", "published order, dense", "published order, ours", "PyPI mambavision"
COMPILED, REPLAYED = ", compiled", ", CUDA graph"
PROFILED_STEPS, KERNELS_SHOWN = 3, 30


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
            module.forward = lambda *given, made=made, tau=module.tau, **named: DenseOrder(
                made(*given, **named).scores, tau
            )
    return model


def make_models(options: argparse.Namespace) -> dict[str, nn.Module]:
    """By name, all from one start."""
    torch.manual_seed(0)
    size = getattr(models, options.model)
    published = size(order="published", parity="published", num_classes=1000)
    baseline = size(parity="published", num_classes=1000)
    baseline.load_state_dict(published.state_dict(), strict=False)
    found = {BASELINE: baseline, DENSE: with_dense_order(copy.deepcopy(published)), OURS: published}
    theirs = public_model() if options.model == "mambavision_t" else None
    if theirs is not None:
        baseline.load_state_dict(theirs.state_dict())
        for name in (DENSE, OURS):
            found[name].load_state_dict(theirs.state_dict(), strict=False)
        found[PUBLIC] = theirs
    return {name: model.to(options.device, memory_format=torch.channels_last) for name, model in found.items()}


def public_model() -> nn.Module | None:
    """The PyPI package's MambaVision-T, or None where it cannot be imported."""
    try:
        from mambavision.models.mamba_vision import mamba_vision_T
    except ImportError as cause:
        print(f"PyPI mambavision is left out: {cause}")
        return None
    return mamba_vision_T(pretrained=False)


def check(found: dict[str, nn.Module], images: torch.Tensor) -> dict[str, Any]:
    """Differences of outputs, normwise; losses over the followed steps; what is not as it should be."""
    few, report, wrong = images[:8], {}, []
    with torch.no_grad():
        outputs = {name: model.eval()(few).double() for name, model in found.items()}
        # At the start an order averages everything, however it is computed: look where it sorts, in float64.
        for name in (OURS, DENSE):
            model = found[name].double()
            for sharpness in (1.0, *SHARP):
                sharpen(model, sharpness)
                outputs[f"{name}, {sharpness:g}"] = model(few.double())
                sharpen(model, 1 / sharpness)
            model.float()

    def apart(one: str, other: str) -> float:
        return relative_error(outputs[one], outputs[other])

    report["ours against dense"] = max(apart(f"{OURS}, {factor:g}", f"{DENSE}, {factor:g}") for factor in (1, *SHARP))
    report["sorted against averaged"] = min(apart(f"{OURS}, {factor:g}", f"{OURS}, 1") for factor in SHARP)
    if not report["ours against dense"] < 1e-9 < 1e-6 < report["sorted against averaged"]:
        wrong.append("both ways of ordering should give the same outputs, and other ones than an average")
    if PUBLIC in found:
        report["baseline against PyPI"] = apart(BASELINE, PUBLIC)
        if not report["baseline against PyPI"] < 1e-4:
            wrong.append("the baseline should give the PyPI model's outputs from its weights")
        losses = {}
        for name in (BASELINE, PUBLIC):
            model = without_drop_path(copy.deepcopy(found[name])).train()
            generator = torch.Generator(images.device).manual_seed(1)
            step = Step(model, images.clone(), torch.zeros(len(images), dtype=torch.long, device=images.device))
            step.bfloat16, losses[name] = False, []
            for _ in range(FOLLOWED_STEPS):
                step.images.normal_(generator=generator)
                step.labels.random_(1000, generator=generator)
                losses[name].append(step.launch().item())
        report["losses"] = losses
        report["losses apart"] = max(abs(a - b) / abs(b) for a, b in zip(*losses.values(), strict=True))
        if not report["losses apart"] < 1e-2:
            wrong.append(f"the baseline's loss should follow the PyPI model's over {FOLLOWED_STEPS} steps")
    return report | {"wrong": wrong}


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
    """One training step; ``launch`` does not wait for it."""

    def __init__(
        self, model: Callable[..., Any], images: torch.Tensor, labels: torch.Tensor, *, capturable: bool = False
    ) -> None:
        self.model, self.images, self.labels, self.bfloat16 = model, images, labels, True
        parameters = model.parameters()  # type: ignore[attr-defined]
        self.optimizer = torch.optim.AdamW(parameters, lr=8e-4, weight_decay=0.05, fused=True, capturable=capturable)

    def launch(self) -> torch.Tensor:
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.bfloat16):
            loss = F.cross_entropy(self.model(self.images).float(), self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


class Forward:
    """One inference."""

    def __init__(self, model: Callable[..., Any], images: torch.Tensor) -> None:
        self.model, self.images = model, images

    def launch(self) -> torch.Tensor:
        with torch.no_grad(), torch.autocast(self.images.device.type, torch.bfloat16):
            return self.model(self.images)


def milliseconds(call: Callable[[], Any], device: torch.device, burst: int) -> float:
    """One of ``burst`` calls in a row, which are waited for at the end."""
    if device.type == "cpu":
        began = time.perf_counter()
        for _ in range(burst):
            call()
        return 1e3 * (time.perf_counter() - began) / burst
    torch.cuda.synchronize(device)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(burst):
        call()
    stop.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(stop) / burst


def time_in_turn(
    calls: dict[str, Callable[[], Any]], device: torch.device, repeats: int, burst: int
) -> dict[str, float]:
    """Median milliseconds of each call, all of them called in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(milliseconds(call, device, burst))
    return {name: statistics.median(values) for name, values in times.items()}


def training_bytes(model: nn.Module, call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that training this model alone takes at its peak: parameters, gradients, AdamW's states, and what a step
    adds. All models stay in memory, so it is what a step adds to it, and this model's own."""
    if device.type == "cpu":
        return None
    own = sum(parameter.numel() for parameter in model.parameters()) * 4 * 3  # gradients come with the step
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before + own


def count_flops(model: nn.Module, image: torch.Tensor) -> float:
    """Multiply-adds of one image forward; what torch does not count is added: 9 L d N of each selective scan, a score's
    product, and the convolutions that a kernel of ours makes."""
    uncounted: list[int] = []
    handles = []
    for module in model.modules():
        a_token = 0
        if hasattr(module, "A_log"):
            a_token += 9 * module.A_log.numel()
        if isinstance(module, ScoreOrdering):
            a_token += module.K.numel()
        if isinstance(module, models.MambaVisionMixer) and image.is_cuda:
            a_token += module.conv1d_x.weight.numel() + module.conv1d_z.weight.numel()
        if a_token:

            def note(_: nn.Module, given: tuple[torch.Tensor, ...], a_token: int = a_token) -> None:
                uncounted.append(given[0].shape[0] * given[0].shape[1] * a_token)

            handles.append(module.register_forward_pre_hook(note))
    with FlopCounterMode(display=False) as counter:
        model(image)
    for handle in handles:
        handle.remove()
    return counter.get_total_flops() / 2 + sum(uncounted)


def profiled(call: Callable[[], Any]) -> dict[str, Any]:
    """Milliseconds of a step in which the GPU was busy, how many kernels it ran, and the costliest of these."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(PROFILED_STEPS):
            call()
        torch.cuda.synchronize()
    events = found.key_averages()
    kernels = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    per_step = 1e3 * PROFILED_STEPS
    return {
        "busy_ms": sum(event.self_device_time_total for event in kernels) / per_step,
        "kernels": sum(event.count for event in kernels) / PROFILED_STEPS,
        "costliest": [
            {
                "kernel": event.key[:120],
                "ms": event.self_device_time_total / per_step,
                "calls": event.count / PROFILED_STEPS,
            }
            for event in kernels[:KERNELS_SHOWN]
        ],
    }


class Report:
    """The rows, written anew whenever something was added."""

    def __init__(self, options: argparse.Namespace) -> None:
        device = torch.device(options.device)
        self.file: Path = options.json
        self.batch: int = options.batch
        self.began = time.perf_counter()
        self.rows: dict[str, dict[str, Any]] = {}
        self.head: dict[str, Any] = {
            "command": command(),
            "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "tokendyn": tokendyn.__version__,
                **{name: installed(name) for name in ("triton", "timm", "mamba_ssm")},
            },
            "batch": options.batch,
            "size": options.size,
            "failed": {},
        }

    def add(self, **parts: Any) -> None:
        self.head |= parts
        self.head["seconds"] = time.perf_counter() - self.began
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.head | {"models": self.rows}, indent=1))

    def attempt(self, what: str, call: Callable[[], Any]) -> Any:
        """The call's result, or None where it fails: other rows are still worth having."""
        try:
            return call()
        except Exception:
            traceback.print_exc()
            self.head["failed"][what] = traceback.format_exc(limit=-3)
            return None

    def print(self) -> None:
        print("model | parameters | GFLOPs | forward images/s | training images/s, against PyPI as it is | memory MB")
        best = 1 / self.rows[PUBLIC]["training_ms"] if "training_ms" in self.rows.get(PUBLIC, {}) else None
        for name, row in self.rows.items():
            forward, training = (row.get(f"{kind}_ms") for kind in ("forward", "training"))
            cells = [
                f"{row['parameters']:,}",
                "-" if row["gflops"] is None else f"{row['gflops']:.2f}",
                "-" if forward is None else f"{1e3 * self.batch / forward:,.0f}",
                "-" if training is None else f"{1e3 * self.batch / training:,.0f}",
            ]
            if training is not None and best is not None:
                cells[-1] += f", {1 / training / best:.2f} x"
            memory = row.get("training_bytes")
            print(" | ".join([name, *cells, "-" if memory is None else f"{memory / 1e6:,.0f}"]))


def main(arguments: list[str] | None = None) -> int:
    """Check, measure, print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "mambavision_cost.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="mambavision_t", help="a function of tokendyn.torch.models")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=224, help="pixels on a side")
    parser.add_argument("--repeats", type=int, default=8, help="bursts")
    parser.add_argument("--burst", type=int, default=5, help="steps in a row")
    parser.add_argument("--compile", action="store_true", help="measure under torch.compile too")
    parser.add_argument("--graphs", action="store_true", help="measure training steps replayed from CUDA graphs too")
    parser.add_argument("--profile", action="store_true", help="list the costliest kernels of a training step (GPU)")
    parser.add_argument("--no-checks", dest="checks", action="store_false", help="time only")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    report = Report(options)
    rows = report.rows

    found = make_models(options)
    fresh = {name: copy.deepcopy(model.state_dict()) for name, model in found.items()}
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(options.batch, 3, options.size, options.size, generator=generator).to(device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (options.batch,), generator=generator).to(device)
    torch.backends.cudnn.benchmark = True
    for name, model in found.items():
        flops = report.attempt(f"{name}, FLOPs", lambda model=model: count_flops(model.eval(), images[:1]))
        rows[name] = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "gflops": None if flops is None else flops / 1e9,
        }
    called: dict[str, tuple[Callable[..., Any], str]] = {name: (model.train(), name) for name, model in found.items()}
    steps: dict[str, Callable[[], Any]] = {}

    def enter(name: str) -> None:
        """A row of training steps, warmed up."""
        model, of = called[name]
        call = Step(model, images, labels).launch
        for _ in range(3):
            call()
        rows.setdefault(name, {key: rows[of][key] for key in ("parameters", "gflops")})
        rows[name]["training_bytes"] = training_bytes(found[of], call, device)
        steps[name] = call

    def measure(kind: str, calls: dict[str, Callable[[], Any]]) -> None:
        for name, value in time_in_turn(calls, device, options.repeats, options.burst).items():
            rows[name][f"{kind}_ms"] = value
        report.add()
        report.print()

    def replay() -> None:
        """Rows of training steps from graphs, for those models that have none yet."""
        for name, (model, of) in called.items():
            replayed = f"{name}{REPLAYED}"
            if name in steps and replayed not in steps:
                step = Step(model, images, labels, capturable=True)
                graph = report.attempt(replayed, lambda step=step: captured(step.launch, pool))
                if graph is not None:
                    steps[replayed] = graph
                    rows[replayed] = {key: rows[of][key] for key in ("parameters", "gflops")}
        measure("training", steps)

    pool = torch.cuda.graph_pool_handle() if options.graphs and device.type == "cuda" else None
    for name in found:
        report.attempt(name, lambda name=name: enter(name))
    measure("training", steps)
    if pool is not None:
        replay()
    for of in (BASELINE, OURS) if options.compile else ():
        name = f"{of}{COMPILED}"
        called[name] = torch.compile(copy.deepcopy(found[of])), of
        report.attempt(name, lambda name=name: enter(name))
        measure("training", steps)
        if pool is not None:
            replay()

    for model, _ in called.values():
        model.eval()  # type: ignore[attr-defined]
    forwards = {name: Forward(model, images).launch for name, model in found.items()}
    for name in found if pool is not None else ():
        graph = report.attempt(f"{name}{REPLAYED}, forward", lambda name=name: captured(forwards[name], pool))
        if graph is not None:
            forwards[f"{name}{REPLAYED}"] = graph
            rows.setdefault(f"{name}{REPLAYED}", {key: rows[name][key] for key in ("parameters", "gflops")})
    measure("forward", forwards)
    checks = None
    if options.checks:
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = False  # float32 models are compared
        copies = {name: copy.deepcopy(model) for name, model in found.items() if name != DENSE}
        copies[DENSE] = with_dense_order(copy.deepcopy(found[OURS]))
        for name, model in copies.items():
            model.load_state_dict(fresh[name])
        checks = report.attempt("checks", lambda: check(copies, images))
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
        print(json.dumps({key: value for key, value in (checks or {}).items() if key != "losses"}))
        report.add(checks=checks)
    if options.profile and device.type == "cuda":  # last: its hooks slow what comes after it
        for model, _ in called.values():
            model.train()  # type: ignore[attr-defined]
        for name in steps:
            if not name.startswith(DENSE) and not name.endswith(REPLAYED):
                rows[name]["profile"] = report.attempt(f"{name}, profile", lambda name=name: profiled(steps[name]))
                report.add()
    wrong = (checks or {"wrong": []})["wrong"]
    for sentence in [*wrong, *(f"{name} could not be measured" for name in report.head["failed"])]:
        print(f"not as it should be: {sentence}", file=sys.stderr)
    return int(bool(wrong or report.head["failed"]))


if __name__ == "__main__":
    sys.exit(main())
