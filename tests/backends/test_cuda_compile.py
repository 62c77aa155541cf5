"""The CUDA kernels are compiled for an A100 and an H100, without one, and fit into their shared memory."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")  # its wheel has the tool that reads machine code
pytest.importorskip("cuda.bindings.nvrtc")

# isort: split
import triton

from tokendyn.backends.torch.ops import _nvrtc, _scan_cuda

try:
    _nvrtc.compile_source('extern "C" __global__ void nothing() {}', [], (8, 0))
except Exception as reason:  # cuda-bindings raises what its loader finds missing
    pytest.skip(f"NVIDIA's run-time compiler cannot be loaded here: {reason}", allow_module_level=True)

#: An A100's, less what the driver keeps.
SHARED = 163 * 1024
MOST_STACK = 1024
#: element, lanes a channel, scalar A, gated, packed, owner of elements; the last has the most of everything.
VARIANTS = {
    "bfloat16, whole runs": (1, 4, False, False, False, 0),
    "float32, scalar A, two lanes": (0, 2, True, True, False, 1),
    "float16, eight lanes, packed": (2, 8, False, True, True, 2),
}


def resources(capability: tuple[int, int], variant: str, folder: Path) -> dict[str, tuple[int, int]]:
    """Registers and bytes of stack of every kernel."""
    options, *_ = _scan_cuda.options(*VARIANTS[variant])
    file = folder / "scan.cubin"
    file.write_bytes(_nvrtc.compile_source(_scan_cuda.source(), options, capability))
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "-res-usage", str(file)], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", text)
    return {name: (int(registers), int(stack)) for name, registers, stack in found}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["sm_80", "sm_90"])
def test_every_kernel_is_compiled_and_fits(capability, variant, tmp_path):
    found = resources(capability, variant, tmp_path)
    assert set(found) == {"outputs", "segment_ends", "join_segments", "segment_coends", "gradients", "add_parts"}
    assert all(stack <= MOST_STACK for _, stack in found.values()), found
    assert max(_scan_cuda.options(*VARIANTS[variant])[1:]) <= SHARED


def test_a_source_that_does_not_compile_says_why():
    with pytest.raises(RuntimeError, match=r"(?s)does not compile with .*sm_80.*nonsense"):
        _nvrtc.compile_source("nonsense", [], (8, 0))
