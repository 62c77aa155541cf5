"""Every Triton kernel is compiled for an A100 and an H100, without one, and fits into their shared memory.

In processes of their own, since the interpreter that the other tests run the kernels in replaces Triton's compiler.
The registers and the stack that the assembler reports are bounded too: where spilling makes it give up, it leaves a
kernel with 32 registers and kilobytes of stack, which no timing on a larger GPU would show.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None or importlib.util.find_spec("torch") is None:
    pytest.skip("Triton or PyTorch is not installed", allow_module_level=True)
if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
    pytest.skip("Triton's wheel with the assembler exists for x86-64 Linux", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
#: Compute capability -> bytes of shared memory that a block may have; the A100's bound holds for both.
SHARED = {"80": 163 * 1024, "90": 163 * 1024}
MOST_STACK = 1024


@functools.cache
def compiled(capability: str) -> tuple[set[str], tuple[dict, ...]]:
    """The names of all kernels, and what each compiled one needs."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.backends.compile_kernels", capability],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, *lines = map(json.loads, done.stdout.splitlines())
    return set(first["kernels"]), tuple(lines)


@pytest.mark.parametrize("capability", SHARED)
def test_every_kernel_is_compiled_and_fits(capability: str, record_property: Callable[[str, object], None]) -> None:
    kernels, lines = compiled(capability)
    names = {line["kernel"] for line in lines}
    assert names == kernels if capability == "80" else names < kernels
    for line in lines:
        record_property(f"{line['kernel']} ({line['call']})", json.dumps(line))
        assert line["shared"] <= SHARED[capability], line
        assert line["stack"] <= MOST_STACK, line
        assert line["local"] == 0, line
