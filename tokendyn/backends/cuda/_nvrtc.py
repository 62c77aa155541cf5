"""CUDA sources compiled when they are first needed, by NVIDIA's run-time compiler, and launches of what they hold.

The packages ``cuda-bindings`` and ``nvidia-cuda-nvrtc`` are all that it takes: no toolkit and no build step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from cuda.bindings import driver, nvrtc  # type: ignore  # compiled modules without types


def check(outcome: tuple[Any, ...], what: str) -> Any:
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
    program = check(nvrtc.nvrtcCreateProgram(source.encode(), b"scan.cu", 0, [], []), "making a CUDA program")
    major, minor = capability
    words = [f"--gpu-architecture=sm_{major}{minor}", "--std=c++17", *options]
    try:
        if int(nvrtc.nvrtcCompileProgram(program, len(words), [word.encode() for word in words])[0]) != 0:
            log = b" " * check(nvrtc.nvrtcGetProgramLogSize(program), "reading the compiler's log")
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"a CUDA source does not compile with {' '.join(words)}:\n{log.decode().rstrip(chr(0))}")
        code = b" " * check(nvrtc.nvrtcGetCUBINSize(program), "reading machine code")
        check(nvrtc.nvrtcGetCUBIN(program, code), "reading machine code")
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


class Kernel:
    """A kernel on one device, whose only parameter is a structure of 64-bit integers."""

    def __init__(self, code: bytes, name: str, shared_bytes: int) -> None:
        self._module = check(driver.cuModuleLoadData(code), "loading machine code")
        function = check(driver.cuModuleGetFunction(self._module, name.encode()), f"finding the kernel {name}")
        attributes = driver.CUfunction_attribute
        attribute = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check(driver.cuFuncSetAttribute(function, attribute, shared_bytes), f"asking for {shared_bytes} bytes")
        if shared_bytes > 48 << 10:  # several blocks a multiprocessor want all the shared memory that it has
            carveout = attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
            check(driver.cuFuncSetAttribute(function, carveout, 100), "asking for a multiprocessor's shared memory")
        width = driver.cuFuncGetAttribute(attributes.CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_WIDTH, function)
        if check(width, "asking for a kernel's clusters") > 1:
            # By default a cluster's blocks go to as many multiprocessors as can be, and places there stay empty.
            policy = int(driver.CUclusterSchedulingPolicy.CU_CLUSTER_SCHEDULING_POLICY_LOAD_BALANCING)
            attribute = attributes.CU_FUNC_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE
            check(driver.cuFuncSetAttribute(function, attribute, policy), "asking for dense clusters")
        self._function, self._shared_bytes = function, shared_bytes

    def __call__(self, blocks: int, threads: int, stream: int, arguments: ctypes.Array[ctypes.c_int64]) -> None:
        pointer = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        launched = driver.cuLaunchKernel(
            self._function, blocks, 1, 1, threads, 1, 1, self._shared_bytes, stream, ctypes.addressof(pointer), 0
        )
        check(launched, "launching a kernel")
