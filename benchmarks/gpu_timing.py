"""What the benchmarks on a GPU share: timing, eager and replayed from a CUDA graph, memory, and the report's head."""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tokendyn


def require_gpu() -> None:
    """End the program where there is no GPU to measure."""
    if not torch.cuda.is_available():
        sys.exit("This benchmark measures an NVIDIA GPU, and PyTorch finds none here.")


def median(call: Callable[[], Any], repeats: int = 20) -> float:
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


def captured(call: Callable[[], Any], pool: Any = None) -> Callable[[], None]:
    """``call`` as the replay of a CUDA graph, with memory of its own or that of ``pool``.

    The replay holds on to ``call``: a graph has no more than the addresses of what was made before it, such as the
    optimiser's state.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        call()

    def replay(_holding: Callable[[], Any] = call) -> None:
        graph.replay()

    return replay


def in_graph(call: Callable[[], Any], calls: int) -> float:
    """Milliseconds of one of ``calls`` in a CUDA graph: what a call adds to a longer graph, such as a training step's,
    without what the host takes to start one."""

    def many() -> None:
        for _ in range(calls):
            call()

    return median(captured(many)) / calls


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most memory allocated during ``call``, above what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # blocks that others have left would be taken whole, though up to 1 MiB larger
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def times(forward: Callable[[], Any], both: Callable[[], Any] | None) -> dict[str, float]:
    """Milliseconds of forward and of forward + backward, eager and replayed, and the latter's peak memory."""
    found = {"forward eager": median(forward), "forward graph": median(captured(forward))}
    if both is not None:
        found |= {"both eager": median(both), "bytes": peak_bytes(both), "both graph": median(captured(both))}
    return found


def copy_rate() -> float:
    """Bytes read and written in a second by a large copy on this GPU."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (median(lambda: target.copy_(source)) * 1e-3)


def installed(package: str) -> str | None:
    """The version of ``package``, from itself or as it was installed, or None if it cannot be imported."""
    try:
        module = importlib.import_module(package)
    except ImportError:
        return None
    return getattr(module, "__version__", None) or importlib.metadata.version(package)


def command() -> str:
    """The command as it was given, without folders of this machine."""
    return " ".join(["python", *(Path(word).name if Path(word).is_absolute() else word for word in sys.argv)])


def head(*packages: str) -> dict[str, Any]:
    """What every report says first: command, machine, versions, copy rate."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "tokendyn": tokendyn.__version__}
    return {
        "command": command(),
        "machine": torch.cuda.get_device_name(),
        "versions": versions | {package: installed(package) for package in packages},
        "copy_bytes_per_second": copy_rate(),
        "cases": [],
    }


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """``|got - want| / |want|`` in float64; infinity where that is no number, which ``max`` would pass over."""
    got, want = got.detach().double(), want.detach().double()
    error = float((got - want).norm() / want.norm())
    return math.inf if math.isnan(error) else error
