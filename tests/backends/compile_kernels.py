"""Compile every Triton kernel for a GPU that is not there, and say what it needs: one line of JSON a kernel.

``python -m tests.backends.compile_kernels 80`` for compute capability 8.0. The kernels are launched by their own
code on tensors without storage, by a driver that compiles and does not run, so that what is compiled is what a user's
call would compile. Triton's wheel brings the assembler; no GPU and no CUDA toolkit is needed.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("TRITON_INTERPRET=1 is set, which replaces Triton's compiler; unset it")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tokendyn.backends.torch.ops import (
    _convolution_triton,
    _permute_triton,
    _scan_triton_general,
    _scan_triton_launch,
    _scan_triton_scalar,
    _score_triton,
    _softsort_triton_tiles,
    _step_triton,
)

MODULES = (
    _convolution_triton,
    _scan_triton_general,
    _scan_triton_scalar,
    _step_triton,
    _permute_triton,
    _score_triton,
    _softsort_triton_tiles,
)
#: An A100's multiprocessors; grids depend on them, code does not.
PROCESSORS = 108


class Compiler:
    """A driver of a GPU of the given compute capability."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and spills as cuobjdump reads them off the machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found, text
    return dict(zip(("registers", "stack", "local"), map(int, found.groups()), strict=True))


def kernels() -> set[str]:
    """Names of what is launched: the functions of the modules that ask which program they are."""
    return {
        qualified(value)
        for module in MODULES
        for value in vars(module).values()
        if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__ and "program_id" in value.src
    }


def qualified(kernel: JITFunction) -> str:
    return f"{kernel.fn.__module__.rpartition('.')[2].strip('_')}.{kernel.fn.__name__}"


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def run_scan(dtype: torch.dtype, *, scalar: bool, length: int, extras: bool) -> None:
    """Forward and backward; ``extras`` are packing, padding, groups and a first state, all at once."""
    b, d, n = 2, 1536, 16  # so few that a sequence is cut into parts, which are kernels of their own
    groups = 2 if extras else 1
    u, delta, z, dy = (floats(b, d, length, dtype=dtype) for _ in range(4))
    A = floats(d, 1 if scalar else n)
    B, C = (floats(b, groups, n, length, dtype=dtype) for _ in range(2))
    D, bias = floats(d), floats(d)
    z = z if extras else None
    h0 = floats(b, d, n) if extras else None
    seq_idx = torch.empty((b, length), dtype=torch.int64, device="meta") if extras else None
    lengths = torch.empty((b,), dtype=torch.int64, device="meta") if extras else None
    launch = _scan_triton_launch
    if launch.uses_matrices(A, B):
        _, _, states = launch.scalar_forward(u, delta, A, B, C, D, z, bias, h0, seq_idx, lengths, True, True)
        backward = launch.scalar_backward
    else:
        _, _, states = launch.general_forward(u, delta, A, B, C, D, z, bias, h0, seq_idx, lengths, True)
        backward = launch.general_backward
    backward(dy, h0, states, u, delta, A, B, C, D, z, bias, seq_idx, lengths, True)


def run_step(dtype: torch.dtype) -> None:
    b, d, n = 8, 1536, 16
    x = floats(b, d, dtype=dtype)
    B = floats(b, 1, n, dtype=dtype)
    _step_triton.launch(floats(b, d, n), x, x, floats(d, n), B, B, floats(d), x, floats(d), True)


def run_convolution(dtype: torch.dtype, *, centred: bool) -> None:
    """As in MambaVision, or causal as in Mamba."""
    b, length, d, taps = (128, 196, 160, 3) if centred else (8, 2048, 1536, 4)
    x, bias = floats(b, length, 2 * d, dtype=dtype)[..., :d].requires_grad_(), None if centred else floats(d)
    y = _convolution_triton.convolve_silu(x, floats(d, taps), bias, 1 if centred else 0)
    y.backward(floats(b, length, d, dtype=dtype))


def run_order(dtype: torch.dtype, *, power: int, inverse: bool = True) -> None:
    b, length, width = 128, 196, 160
    scores, x = floats(b, length, dtype=dtype), floats(b, length, width, dtype=dtype)
    mass, rank = floats(b, length), torch.empty((b, length), dtype=torch.int32, device="meta")
    tiles = _softsort_triton_tiles
    _permute_triton.launch(x, rank, False)
    _score_triton.scores(x.requires_grad_(), floats(width)).backward(mass)
    x.requires_grad_(False)
    tiles.softsort(scores, x, 1.0, power, True)
    tiles.softsort_backward(x, scores, x, mass, rank, 1.0, power, True, True)
    if not inverse:
        return
    tiles.restore(scores, x, 1.0, power, True)
    tiles.restore_backward(x, scores, x, mass, mass, rank, 1.0, power, True, True)


def calls(capability: int) -> dict[str, Callable[[], None]]:
    """What is compiled: every kernel for 8.0; for 9.0 again those with products, which are other instructions there,
    and with every option."""
    bf16 = torch.bfloat16
    options = {"length": 2048, "extras": capability != 80}
    made: dict[str, Callable[[], None]] = {
        "scan bfloat16, scalar A": functools.partial(run_scan, bf16, scalar=True, **options),
        "softsort bfloat16": functools.partial(run_order, bf16, power=1),
        "step bfloat16": functools.partial(run_step, bf16),
        "convolution bfloat16": functools.partial(run_convolution, bf16, centred=capability != 80),
    }
    if capability == 80:
        made["scan bfloat16, general A"] = functools.partial(run_scan, bf16, scalar=False, **options)
        made["softsort float32, power 2"] = functools.partial(run_order, torch.float32, power=2, inverse=False)
    return made


def main(capability: int) -> None:
    driver.set_active(Compiler(capability))
    _scan_triton_launch._processors = lambda device: PROCESSORS
    _scan_triton_launch._capability = lambda device: capability // 10
    run = JITFunction.run
    what = ""
    seen: set[str] = set()

    def compile_only(self: JITFunction, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            line = {"kernel": qualified(self), "call": what, "shared": kernel.metadata.shared}
            print(
                json.dumps({**line, "warps": kernel.metadata.num_warps, **resources(kernel.asm["cubin"])}), flush=True
            )
        return kernel

    JITFunction.run = compile_only
    print(json.dumps({"kernels": sorted(kernels())}), flush=True)
    todo = calls(capability)
    for what in todo:
        todo[what]()


if __name__ == "__main__":
    main(int(sys.argv[1]))
