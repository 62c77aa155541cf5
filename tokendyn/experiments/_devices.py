"""Where it is computed: the device asked for, torch's settings on it, which GPU each of several processes takes."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

import torch

from tokendyn.errors import OptionError
from tokendyn.experiments._config import ComputeConfig

RUNS_ON_A_GPU = 3  # a model of a few million parameters leaves most of one idle while Python launches its kernels


def resolve_device(asked: str) -> torch.device:
    """The device that ``--device`` names.

    Raises:
        OptionError: the name is unknown, or there is no such device.
    """
    name = asked if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if re.fullmatch(r"cpu|cuda(:\d+)?", name) is None:
        raise OptionError(f"--device is {asked!r}, expected cpu, cuda, cuda:N or auto")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as cause:
        reason = str(cause).splitlines()[0]
        raise OptionError(f"--device {asked} cannot be used here ({reason}); choose cpu or auto") from cause
    return device


@contextlib.contextmanager
def numerics(compute: ComputeConfig) -> Iterator[None]:
    """torch's global settings that decide bits, as configured inside the block and as before after it."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if compute.deterministic and compute.device != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it; read when it starts
    torch.set_num_threads(compute.threads)
    torch.use_deterministic_algorithms(compute.deterministic, warn_only=compute.device != "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    tune, cudnn_attention = torch.backends.cudnn.benchmark, torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cudnn.benchmark = not compute.deterministic  # the fastest convolution may be another every time
    torch.backends.cuda.enable_cudnn_sdp(False)  # its gradients hold NaN at some lengths (pytorch/pytorch#196678)
    # DDP would have a compiled model cut into a graph for each bucket of gradients: many times as long to compile.
    uncut = torch._dynamo.config.patch(optimize_ddp=False) if compute.compile else contextlib.nullcontext()
    try:
        with uncut:
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = tune
        torch.backends.cuda.enable_cudnn_sdp(cudnn_attention)


def jobs_for(asked: int | None, device: torch.device) -> int:
    """How many runs train at the same time: as ``asked``, else :data:`RUNS_ON_A_GPU` a GPU, or one on a CPU."""
    if asked is not None:
        return asked
    return 1 if device.type != "cuda" else RUNS_ON_A_GPU * max(1, _choice(device))


def take_gpu(device: torch.device, place: int) -> None:
    """Called first in the process number ``place`` (from 0): where the device is ``cuda``, any GPU, it takes number
    ``place`` modulo how many there are, and ``cuda`` means that one there from now on."""
    count = _choice(device)
    if count:
        torch.cuda.set_device(place % count)


def _choice(device: torch.device) -> int:
    """GPUs among which processes may choose: none if one was named, as in ``cuda:1``."""
    return torch.cuda.device_count() if device.type == "cuda" and device.index is None else 0
