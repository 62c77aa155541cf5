"""Kernels of CUDA sources on the devices of PyTorch, whose CUDA builds bring all that compiling them takes."""

from __future__ import annotations

import functools

import torch
from cuda.bindings import driver  # type: ignore  # compiled modules without types

from tokendyn.backends.cuda._nvrtc import Kernel, check, compile_source


def kernel(source: str, options: tuple[str, ...], name: str, shared_bytes: int, device: int) -> Kernel:
    """The kernel ``name`` of ``source`` on a CUDA device, compiled once a process, for a launch from this thread."""
    with torch.cuda.device(device):
        # A thread in which PyTorch has done nothing on a GPU yet, as autograd's may be, has no context.
        if not int(check(driver.cuCtxGetCurrent(), "asking for the thread's context")):
            context = check(driver.cuDevicePrimaryCtxRetain(device), "asking for the device's context")
            check(driver.cuCtxSetCurrent(context), "entering the device's context")
        return _kernel(source, options, name, shared_bytes, device)


@functools.cache
def _kernel(source: str, options: tuple[str, ...], name: str, shared_bytes: int, device: int) -> Kernel:
    return Kernel(_code(source, options, torch.cuda.get_device_capability(device)), name, shared_bytes)


@functools.cache
def _code(source: str, options: tuple[str, ...], capability: tuple[int, int]) -> bytes:
    return compile_source(source, options, capability)
