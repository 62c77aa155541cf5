"""Kernels of CUDA sources on the devices of PyTorch, whose CUDA builds bring all that compiling them takes."""

from __future__ import annotations

import functools

import torch

from tokendyn.backends.cuda._nvrtc import Kernel, compile_source


@functools.cache
def kernel(source: str, options: tuple[str, ...], name: str, shared_bytes: int, device: int) -> Kernel:
    """The kernel ``name`` of ``source`` on a CUDA device, compiled once a process."""
    with torch.cuda.device(device):
        return Kernel(_code(source, options, torch.cuda.get_device_capability(device)), name, shared_bytes)


@functools.cache
def _code(source: str, options: tuple[str, ...], capability: tuple[int, int]) -> bytes:
    return compile_source(source, options, capability)
