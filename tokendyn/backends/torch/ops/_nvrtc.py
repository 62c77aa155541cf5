"""Kernels of CUDA sources on the devices of PyTorch, whose CUDA builds bring all that compiling them takes."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from cuda.bindings import driver  # type: ignore  # compiled modules without types

from tokendyn.backends.cuda._nvrtc import Kernel, check, compile_source


def launch(
    source: str, options: tuple[str, ...], name: str, threads: int, shared_bytes: int, blocks: int,
    arguments: ctypes.Array[ctypes.c_int64], device: torch.device,
) -> None:  # fmt: skip
    """Run the kernel ``name`` of ``source`` on the current stream of ``device``, compiled once a process."""
    index = torch.cuda.current_device() if device.index is None else device.index
    with torch.cuda.device(index):
        # A thread of autograd has no context before its first call of CUDA's run-time library, which may be to come.
        check(driver.cuCtxSetCurrent(_context(index)), "making a GPU current")
        kernel = _kernel(source, options, name, shared_bytes, index)
        kernel(blocks, threads, torch.cuda.current_stream().cuda_stream, arguments)


@functools.cache
def _context(device: int) -> Any:
    """The context that PyTorch uses on a device."""
    ordinal = check(driver.cuDeviceGet(device), "finding a GPU")
    return check(driver.cuDevicePrimaryCtxRetain(ordinal), "taking a GPU's context")


@functools.cache
def _kernel(source: str, options: tuple[str, ...], name: str, shared_bytes: int, device: int) -> Kernel:
    return Kernel(_code(source, options, torch.cuda.get_device_capability(device)), name, shared_bytes)


@functools.cache
def _code(source: str, options: tuple[str, ...], capability: tuple[int, int]) -> bytes:
    return compile_source(source, options, capability)
