"""CUDA sources compiled when they are first needed, by NVIDIA's run-time compiler, and their launches.

PyTorch's CUDA builds bring all of it (the packages ``cuda-bindings`` and ``nvidia-cuda-nvrtc``): no toolkit and no
build step is needed.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from cuda.bindings import driver, nvrtc  # type: ignore  # compiled modules without types


def _check(outcome: tuple[Any, ...], what: str) -> Any:
    """The value of a call's outcome (code, value...)."""
    code, *values = outcome
    if int(code) != 0:
        raise RuntimeError(f"{what} failed: {code.name}")
    return values[0] if values else None


def compile_source(source: str, options: Sequence[str], capability: tuple[int, int]) -> bytes:
    """Machine code of ``source`` for a compute capability.

    Raises:
        RuntimeError: the source does not compile; the message holds the compiler's log.
    """
    program = _check(nvrtc.nvrtcCreateProgram(source.encode(), b"scan.cu", 0, [], []), "making a CUDA program")
    major, minor = capability
    words = [f"--gpu-architecture=sm_{major}{minor}", "--std=c++17", *options]
    try:
        if int(nvrtc.nvrtcCompileProgram(program, len(words), [word.encode() for word in words])[0]) != 0:
            log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program), "reading the compiler's log")
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"a CUDA source does not compile with {' '.join(words)}:\n{log.decode().rstrip(chr(0))}")
        code = b" " * _check(nvrtc.nvrtcGetCUBINSize(program), "reading machine code")
        _check(nvrtc.nvrtcGetCUBIN(program, code), "reading machine code")
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


class Kernel:
    """A kernel on one device, whose only parameter is a structure of 64-bit integers."""

    def __init__(self, code: bytes, name: str, shared_bytes: int) -> None:
        self._module = _check(driver.cuModuleLoadData(code), "loading machine code")
        function = _check(driver.cuModuleGetFunction(self._module, name.encode()), f"finding the kernel {name}")
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuFuncSetAttribute(function, attribute, shared_bytes), f"asking for {shared_bytes} bytes")
        if shared_bytes > 48 << 10:  # several blocks a multiprocessor want all the shared memory that it has
            carveout = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
            _check(driver.cuFuncSetAttribute(function, carveout, 100), "asking for a multiprocessor's shared memory")
        self._function, self._shared_bytes = function, shared_bytes

    def __call__(self, blocks: int, threads: int, stream: int, arguments: ctypes.Array[ctypes.c_int64]) -> None:
        pointer = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        launched = driver.cuLaunchKernel(
            self._function, blocks, 1, 1, threads, 1, 1, self._shared_bytes, stream, ctypes.addressof(pointer), 0
        )
        _check(launched, "launching a kernel")


@functools.cache
def kernel(source: str, options: tuple[str, ...], name: str, shared_bytes: int, device: int) -> Kernel:
    """The kernel ``name`` of ``source`` on a CUDA device, compiled once a process."""
    with torch.cuda.device(device):
        return Kernel(_code(source, options, torch.cuda.get_device_capability(device)), name, shared_bytes)


@functools.cache
def _code(source: str, options: tuple[str, ...], capability: tuple[int, int]) -> bytes:
    return compile_source(source, options, capability)
