"""Training throughput of MambaLM-130M: tokens a second and memory, by engine of the scan; in one run.

``python benchmarks/mamba_lm.py [--json FILE]`` prints a table and writes JSON. The model, its weights, the tokens and
the optimiser (fused AdamW, autocast to bfloat16, clipping at 1) are the same in all rows; only who runs the selective
scan differs: the engine that tokendyn chooses by itself, and those named with ``--engines`` (``mamba_ssm`` is
mamba-ssm's scan, where that package is installed). Before anything is timed, every engine's loss and gradient are
compared with those of the first. Times are of single steps, by CUDA events (a clock on a CPU), the engines in turn, so
that a drift of the machine hits all alike; the table gives medians.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tokendyn
from tokendyn.backends.torch.layers import Mamba
from tokendyn.backends.torch.models import MambaLM, mamba_lm_130m
from tokendyn.errors import EngineError


def use_engine(model: MambaLM, engine: str) -> None:
    """Let ``engine`` run the scans of ``model``."""
    for module in model.modules():
        if isinstance(module, Mamba):
            module.scan = functools.partial(type(module).scan, module, engine=engine)  # type: ignore[method-assign]


def loss_of(model: MambaLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast(ids.device.type, torch.bfloat16):
        return model(ids[:, :-1], ids[:, 1:]).mean()


def gradient(model: MambaLM, ids: torch.Tensor, engine: str) -> tuple[float, torch.Tensor]:
    """The loss, and the gradient of all parameters in one vector."""
    use_engine(model, engine)
    model.zero_grad(set_to_none=True)
    loss = loss_of(model, ids)
    loss.backward()
    found = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return loss.item(), found


def step_seconds(model: MambaLM, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    """One training step, timed."""
    cuda = ids.device.type == "cuda"
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if cuda else []
    began = time.perf_counter()
    if cuda:
        marks[0].record()
    loss_of(model, ids).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if not cuda:
        return time.perf_counter() - began
    marks[1].record()
    torch.cuda.synchronize()
    return marks[0].elapsed_time(marks[1]) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["auto", "mamba_ssm"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--recompute", action="store_true", help="keep no activations inside blocks")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = mamba_lm_130m(vocab_size=50_257, pad_vocab_size_multiple=8, n_layer=options.layers, d_model=options.width)
    model.to(device).backbone.recompute = options.recompute
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(50_257, (options.batch, options.length + 1), device=device)

    engines, compared = [], {}
    reference: tuple[float, torch.Tensor] | None = None
    for engine in options.engines:
        try:
            loss, found = gradient(model, ids[:2], engine)
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
        engines.append(engine)

    seconds: dict[str, list[float]] = {engine: [] for engine in engines}
    memory: dict[str, int] = {}
    for step in range(options.warm_up + options.steps):
        for engine in engines:
            use_engine(model, engine)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            took = step_seconds(model, optimizer, ids)
            if device.type == "cuda":
                memory[engine] = max(memory.get(engine, 0), torch.cuda.max_memory_allocated())
            if step >= options.warm_up:
                seconds[engine].append(took)

    tokens = options.batch * options.length
    rows: dict[str, dict[str, Any]] = {}
    for engine in engines:
        middle = statistics.median(seconds[engine])
        rows[engine] = {
            "tokens_per_second": tokens / middle,
            "step_ms": 1000 * middle,
            "step_ms_quartiles": [1000 * q for q in statistics.quantiles(seconds[engine], n=4)[::2]],
            "peak_memory_bytes": memory.get(engine),
            **compared[engine],
        }
    print(f"MambaLM, {options.layers} x {options.width}, batch {options.batch} x {options.length}, {device.type}")
    print("| engine | tokens/s | ms a step | against the last | peak GiB | gradient off |\n|---|---|---|---|---|---|")
    last = rows[engines[-1]]["step_ms"]
    for engine, row in rows.items():
        peak = "-" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**30:.1f}"
        times = f"{row['tokens_per_second']:,.0f} | {row['step_ms']:.1f} | {last / row['step_ms']:.2f} x"
        print(f"| {engine} | {times} | {peak} | {row['gradient_off']:.1e} |")
    if options.json:
        name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        versions = {"tokendyn": tokendyn.__version__, "torch": torch.__version__}
        options.json.write_text(
            json.dumps({"device": name, "settings": settings, "versions": versions, "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
