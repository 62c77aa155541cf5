"""The machine code of CUDA kernels for XLA's device: compiled when first needed, loaded once a context."""

from __future__ import annotations

import functools
from typing import Any

import jax
from cuda.bindings import driver  # type: ignore  # compiled modules without types

from tokendyn.backends.cuda import _scan_cuda_layout
from tokendyn.backends.cuda._nvrtc import Kernel, check, compile_source


@functools.cache
def _code(kernels: str, options: tuple[str, ...], capability: tuple[int, int]) -> bytes:
    return compile_source(_scan_cuda_layout.source(kernels), options, capability)


def compile_now(kernels: str, options: tuple[str, ...]) -> None:
    """Compile for the device that JAX takes by default, while JAX traces rather than when it runs."""
    major, minor = jax.local_devices()[0].compute_capability.split(".")
    _code(kernels, options, (int(major), int(minor)))


@functools.cache
def _kernel(kernels: str, options: tuple[str, ...], name: str, shared: int, context: int) -> Kernel:
    device, wanted = check(driver.cuCtxGetDevice(), "asking for the GPU"), driver.CUdevice_attribute
    major, minor = (
        check(driver.cuDeviceGetAttribute(attribute, device), "asking for the compute capability")
        for attribute in (
            wanted.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            wanted.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    return Kernel(_code(kernels, options, (major, minor)), name, shared)


def launch(
    kernels: str,
    name: str,
    options: tuple[str, ...],
    threads: int,
    shared: int,
    blocks: int,
    arguments: Any,
    stream: int,
) -> None:
    """Run a kernel on a stream, in the stream's context."""
    context = check(driver.cuStreamGetCtx(stream), "asking for the stream's context")
    check(driver.cuCtxPushCurrent(context), "entering the stream's context")
    try:
        _kernel(kernels, options, name, shared, int(context))(blocks, threads, stream, arguments)
    finally:
        driver.cuCtxPopCurrent()
