"""Which GPU each of several processes trains on, and how many train at the same time."""

from __future__ import annotations

import torch

RUNS_ON_A_GPU = 3  # a model of a few million parameters leaves most of one idle while Python launches its kernels


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
