"""Builds the kernels of the cuda engine for the CPU and runs them there: see ``cuda_emulator.hpp``."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from tokendyn.backends.cuda import _scan_cuda_layout
from tokendyn.backends.torch.ops import _softsort_cuda

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
SCAN = ("outputs", "segment_ends", "join_segments", "segment_coends", "gradients", "add_parts")
_FOLDER = tempfile.TemporaryDirectory(prefix="tokendyn-emulator-")


@functools.cache
def _library(source: str, variant: tuple[str, ...], kernels: tuple[str, ...]) -> ctypes.CDLL:
    assert COMPILER is not None
    folder = Path(_FOLDER.name)
    name = hashlib.sha256("".join((source, *variant)).encode()).hexdigest()[:16]
    text = "".join(
        f'extern "C" const char* run_{kernel}(const Args* args, int blocks) {{\n'
        f"    constexpr int together = {'CLUSTER' if kernel == 'gradients' else 1};\n"
        f"    return fibres::run([&] {{ {kernel}(*args); }}, blocks, together);\n}}\n"
        for kernel in kernels
    )
    code, library = folder / f"{name}.cpp", folder / f"{name}.so"
    code.write_text(f'#include "{Path(__file__).with_suffix(".hpp")}"\n{source}\n{text}')
    command = [COMPILER, "-O0", "-std=c++17", "-fPIC", "-shared", "-w", *variant, str(code), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def _run(library: ctypes.CDLL, name: str, arguments: ctypes.Array, blocks: int) -> None:
    function = getattr(library, f"run_{name}")
    function.restype = ctypes.c_char_p
    fault = function(arguments, blocks)
    assert fault is None, f"{name}: {fault.decode()}"


def launch_order(variant: _softsort_cuda.Variant, blocks: int, arguments: ctypes.Array, device):
    """In the place of the launch of SoftSort's engine."""
    name = variant.kernel
    assert variant.shared <= 16 << 14
    _run(_library(_softsort_cuda.source(name), variant.options, (name,)), name, arguments, blocks)


def launch(kernels, name, variant: tuple[str, ...], threads, shared: int, blocks: int, arguments: ctypes.Array, device):
    """In the place of the engine's own ``launch``."""
    assert shared <= 16 << 14
    _run(_library(_scan_cuda_layout.source(kernels), variant, SCAN), name, arguments, blocks)
