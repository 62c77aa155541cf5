"""The machine code of CUDA kernels for XLA's device: compiled when first needed, loaded once a context."""

from __future__ import annotations

import functools
from typing import Any

import jax
from cuda.bindings import driver  # type: ignore  # compiled modules without types

from tokendyn.backends.cuda import _scan_cuda_layout
from tokendyn.backends.cuda._nvrtc import Kernel, check, compile_source


@functools.cache
def _attribute(device: int, name: str) -> int:
    attribute = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    return check(driver.cuDeviceGetAttribute(attribute, device), f"asking for {name}")


def _capability(device: int) -> tuple[int, int]:
    return _attribute(device, "COMPUTE_CAPABILITY_MAJOR"), _attribute(device, "COMPUTE_CAPABILITY_MINOR")


@functools.cache
def processors() -> int:
    """Multiprocessors of the device that JAX takes by default."""
    check(driver.cuInit(0), "starting CUDA")
    return _attribute(_ordinal(), "MULTIPROCESSOR_COUNT")


def _ordinal() -> int:
    return int(check(driver.cuDeviceGet(jax.local_devices()[0].local_hardware_id), "finding the GPU"))


@functools.cache
def _code(kernels: str, options: tuple[str, ...], capability: tuple[int, int]) -> bytes:
    return compile_source(_scan_cuda_layout.source(kernels), options, capability)


def compile_now(kernels: str, options: tuple[str, ...]) -> None:
    """Compile for the device that JAX takes by default, while JAX traces rather than when it runs."""
    _code(kernels, options, _capability(_ordinal()))


@functools.cache
def _kernel(kernels: str, options: tuple[str, ...], name: str, shared: int, context: int) -> Kernel:
    device = int(check(driver.cuCtxGetDevice(), "asking for the GPU"))
    return Kernel(_code(kernels, options, _capability(device)), name, shared)


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
