"""Training throughput of MambaLM-130M: tokens a second and memory, by engine of the scan; in one run.

``python benchmarks/mamba_lm.py [--json FILE]`` prints a table and writes JSON. The model, its weights, the tokens and
the optimiser (fused AdamW, autocast to bfloat16, clipping at 1) are the same in all rows; only who runs the selective
scan differs: the engine that tokendyn chooses by itself, and those named with ``--engines`` (``mamba_ssm`` is
mamba-ssm's scan, where that package is installed). Before anything is timed, every engine's loss and gradient are
compared with those of the first.

Every engine is timed in each of ``--modes``, so that what Python and launches cost can be told from what the GPU does:

``eager``: as it stands.
``graph``: a whole step (forward, backward, clipping, optimiser) captured in a CUDA graph and replayed: no host at all.
``compile``: every block under torch.compile, which makes one kernel of a norm, a gate, or a residual sum.
``compile_graph``: both.

Times are of single steps, by CUDA events (a clock on a CPU), the engines in turn, so that a drift of the machine hits
all alike; the table gives medians. ``busy`` is the GPU's own time in an eager step by the profiler: where it is well
below the eager step, the host bounds that.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tokendyn
from tokendyn.backends.torch.layers import S6, Mamba
from tokendyn.backends.torch.models import MambaLM, mamba_lm_130m
from tokendyn.errors import EngineError

MODES = ("eager", "graph", "compile", "compile_graph")


class Bench:
    """One model, one optimiser, one batch; a step of them by any engine.

    Args:
        options: the command line's.
        device: where.
    """

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.device = device
        torch.manual_seed(0)
        self.model = mamba_lm_130m(
            vocab_size=50_257, pad_vocab_size_multiple=8, n_layer=options.layers, d_model=options.width
        )
        self.model.to(device).backbone.recompute = options.recompute
        # A graph may hold the optimiser's step only if its count is on the GPU.
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-5, fused=True, capturable=device.type == "cuda"
        )
        self.ids = torch.randint(50_257, (options.batch, options.length + 1), device=device)

    def use_engine(self, engine: str) -> None:
        """Let ``engine`` run the scans of the model."""
        for module in self.model.modules():
            if isinstance(module, Mamba):
                module.engine = engine  # type: ignore[assignment]

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        # Kept casts of weights would outlive a graph's capture.
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            return self.model(ids[:, :-1], ids[:, 1:]).mean()

    def gradient(self) -> tuple[float, torch.Tensor]:
        """The loss on two sequences, and the gradient of all parameters in one vector."""
        self.model.zero_grad(set_to_none=True)
        loss = self.loss(self.ids[:2])
        loss.backward()
        found = torch.cat([p.grad.flatten().float() for p in self.model.parameters() if p.grad is not None])
        self.model.zero_grad(set_to_none=True)
        return loss.item(), found

    def step(self) -> None:
        """One training step."""
        self.loss(self.ids).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def captured(self, pool: Any) -> tuple[Callable[[], None], Any]:
        """A step as a CUDA graph in the memory ``pool`` (None: one of its own): its replay, and the pool."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self.step()
        return graph.replay, graph.pool()

    def seconds(self, step: Callable[[], None]) -> float:
        """One step, timed."""
        if self.device.type != "cuda":
            began = time.perf_counter()
            step()
            return time.perf_counter() - began
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
        step()
        marks[1].record()
        torch.cuda.synchronize()
        return marks[0].elapsed_time(marks[1]) / 1000

    def kernels(self) -> tuple[float, list[tuple[str, float, int]]]:
        """Milliseconds that the GPU works in an eager step, and the kernels that take most: name, ms, launches."""
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            self.step()
            torch.cuda.synchronize()
        rows = [event for event in found.key_averages() if event.self_device_time_total > 0]
        rows.sort(key=lambda event: -event.self_device_time_total)
        total = sum(event.self_device_time_total for event in rows) / 1000
        return total, [(event.key[:120], event.self_device_time_total / 1000, event.count) for event in rows[:25]]


def scan_by_attribute(self: Any, x: torch.Tensor, z: torch.Tensor | None = None, **options: Any) -> Any:
    """``S6.scan`` by the layer's attribute ``engine``."""
    return S6.scan(self, x, z, engine=self.engine, **options)


def compare_engines(bench: Bench, asked: list[str]) -> dict[str, dict[str, float]]:
    """Loss and the gradient's distance from the first engine's, of all engines that take the call."""
    compared: dict[str, dict[str, float]] = {}
    reference: tuple[float, torch.Tensor] | None = None
    for engine in asked:
        bench.use_engine(engine)
        try:
            loss, found = bench.gradient()
        except EngineError as cause:
            print(f"{engine}: left out ({cause})", file=sys.stderr)
            continue
        reference = reference or (loss, found)
        off = ((found - reference[1]).norm() / reference[1].norm()).item()
        compared[engine] = {"loss": loss, "gradient_off": off}
        if abs(loss - reference[0]) > 1e-2 or off > 0.1:  # of two ways to round to bfloat16
            raise SystemExit(
                f"{engine} computes something else: loss {loss} against {reference[0]}, gradient off {off}"
            )
    return compared


def measure(bench: Bench, mode: str, engines: list[str], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The rows of one mode."""
    cuda = bench.device.type == "cuda"
    steps: dict[str, Callable[[], None]] = {}
    pool = None
    for engine in engines:
        bench.use_engine(engine)
        if mode.endswith("graph"):
            steps[engine], pool = bench.captured(pool)
        else:
            steps[engine] = bench.step
    seconds: dict[str, list[float]] = {engine: [] for engine in engines}
    memory: dict[str, int] = {}
    for step in range(options.warm_up + options.steps):
        for engine in engines:
            bench.use_engine(engine)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            took = bench.seconds(steps[engine])
            if cuda and not mode.endswith("graph"):  # a replay allocates nothing
                memory[engine] = max(memory.get(engine, 0), torch.cuda.max_memory_allocated())
            if step >= options.warm_up:
                seconds[engine].append(took)
    rows: dict[str, dict[str, Any]] = {}
    for engine in engines:
        middle = statistics.median(seconds[engine])
        rows[engine] = {
            "tokens_per_second": options.batch * options.length / middle,
            "step_ms": 1000 * middle,
            "step_ms_quartiles": [1000 * q for q in statistics.quantiles(seconds[engine], n=4)[::2]],
            "peak_memory_bytes": memory.get(engine),
        }
    if cuda and mode == "eager":
        for engine in engines:
            bench.use_engine(engine)
            rows[engine]["busy_ms"], rows[engine]["kernels"] = bench.kernels()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["auto", "mamba_ssm"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=4)
    parser.add_argument("--recompute", action="store_true", help="keep no activations inside blocks")
    parser.add_argument("--seconds", type=float, help="begin no mode after so many seconds")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    Mamba.scan = scan_by_attribute  # type: ignore[method-assign]
    bench = Bench(options, device)
    compared = compare_engines(bench, options.engines)
    engines = list(compared)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    found: dict[str, Any] = {
        "device": name,
        "settings": {key: value for key, value in vars(options).items() if key not in ("json", "seconds")},
        "versions": {"tokendyn": tokendyn.__version__, "torch": torch.__version__},
        "compared": compared,
        "modes": {},
        "left_out": {},
    }
    print(f"MambaLM, {options.layers} x {options.width}, batch {options.batch} x {options.length}, {name}")
    head = "| mode | engine | tokens/s | ms a step | against the last | GPU busy, ms | peak GiB |"
    print(f"{head}\n|---|---|---|---|---|---|---|", flush=True)
    for mode in options.modes:
        if device.type != "cuda" and mode.endswith("graph"):
            found["left_out"][mode] = "no GPU"
        elif options.seconds is not None and time.perf_counter() - began > options.seconds:
            found["left_out"][mode] = "no time"
        else:
            if mode.startswith("compile"):
                compile_blocks(bench.model)
            try:
                found["modes"][mode] = measure(bench, mode, engines, options)
                print_rows(mode, found["modes"][mode])
            except RuntimeError as cause:  # what cannot be captured or compiled; the modes before it stand
                found["left_out"][mode] = str(cause)
        if options.json:
            options.json.write_text(json.dumps(found, indent=2) + "\n")
    for mode, reason in found["left_out"].items():
        print(f"{mode}: left out, {reason}", file=sys.stderr)


def compile_blocks(model: MambaLM) -> None:
    """Put every block under torch.compile; one graph serves them all."""
    for block in model.backbone.layers:
        block.compile()


def print_rows(mode: str, rows: dict[str, dict[str, Any]]) -> None:
    last = list(rows.values())[-1]["step_ms"]
    for engine, row in rows.items():
        peak = "-" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**30:.1f}"
        busy = f"{row['busy_ms']:.1f}" if "busy_ms" in row else "-"
        times = f"{row['tokens_per_second']:,.0f} | {row['step_ms']:.1f} | {last / row['step_ms']:.2f} x"
        print(f"| {mode} | {engine} | {times} | {busy} | {peak} |", flush=True)


if __name__ == "__main__":
    main()
