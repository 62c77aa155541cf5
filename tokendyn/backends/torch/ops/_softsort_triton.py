"""The triton engine of SoftSort and its inverse."""

from __future__ import annotations

import torch

from tokendyn.backends.torch.ops import _softsort_triton_tiles as tiles
from tokendyn.backends.torch.ops._softsort_operator import register


def _softsort_backward(dy, scores, x, saved, tau: float, power: int, ascending: bool, for_scores: bool, for_x: bool):
    mass, rank = saved
    return tiles.softsort_backward(dy, scores, x, mass, rank, tau, power, for_scores, for_x)


def _restore_backward(dx, scores, y, saved, tau: float, power: int, ascending: bool, for_scores: bool, for_y: bool):
    total, mass, rank = saved
    return tiles.restore_backward(dx, scores, y, total, mass, rank, tau, power, for_scores, for_y)


_MASS_AND_RANK = (torch.float32, torch.int32)

softsort = register("softsort", "triton", tiles.softsort, _softsort_backward, _MASS_AND_RANK)
softsort_restore = register(
    "softsort_restore", "triton", tiles.restore, _restore_backward, (torch.float32, *_MASS_AND_RANK)
)
