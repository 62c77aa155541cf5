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

from tokendyn.backends.cuda import _scan_cuda_layout
from tokendyn.backends.torch.ops import _nvrtc, _softsort_cuda

try:
    _nvrtc.compile_source('extern "C" __global__ void nothing() {}', [], (8, 0))
except Exception as reason:  # cuda-bindings raises what its loader finds missing
    pytest.skip(f"NVIDIA's run-time compiler cannot be loaded here: {reason}", allow_module_level=True)

#: An A100's, less what the driver keeps.
SHARED = 163 * 1024
MOST_STACK = 1024
#: Scalar A, length, N; then element, gated, packed, owner of elements, runs of tokens.
VARIANTS = {
    "bfloat16, whole runs": (False, 2048, 16, 1, False, False, 0, (8, 8)),
    "float16, widest, packed": (False, 2048, 32, 2, True, True, 2, (0, 4)),
    "bfloat16, scalar A": (True, 2048, 16, 1, False, False, 0, (4, 4)),
    "bfloat16, scalar A, channels last": (True, 2048, 16, 1, False, False, 2, (0, 4)),
    "float32, scalar A, short, packed": (True, 49, 8, 0, True, True, 1, (0, 0)),
}


def layout(variant: str, clusters: bool) -> _scan_cuda_layout.Layout:
    scalar_A, length, state = VARIANTS[variant][:3]
    return _scan_cuda_layout.layout(scalar_A, 8, 1, 1536, length, state, 132, 4, clusters, backward=False)


#: What NVIDIA's compiler 13.0 makes of ``max(0, min(n, x)) == n`` on an H100: a clamp that leaves two answers in one
#: predicate. Kernels took it for true of x < n, and read and wrote beyond their tokens.
MISCOMPILED = re.compile(r"VIMNMX\.RELU \w+, (P\d), \1,")


def compiled(capability: tuple[int, int], source: str, options: tuple[str, ...], folder: Path) -> Path:
    file = folder / "kernels.cubin"
    file.write_bytes(_nvrtc.compile_source(source, options, capability))
    return file


def read(file: Path, what: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, what, str(file)], capture_output=True, text=True, check=True).stdout


def resources(file: Path) -> dict[str, tuple[int, int]]:
    """Registers and bytes of stack of every kernel."""
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", read(file, "-res-usage"))
    return {name: (int(registers), int(stack)) for name, registers, stack in found}


def test_machine_code_that_is_known_to_be_wrong_is_found(tmp_path):
    source = """extern "C" __global__ void kernel(int* p, int count) {
        int tokens = max(0, min(7, count - (int)threadIdx.x));
        p[threadIdx.x] = tokens, p[threadIdx.x + 1000] = tokens == 7 ? p[0] : p[1];
    }"""
    assert MISCOMPILED.search(read(compiled((9, 0), source, (), tmp_path), "-sass"))


COMPILED = [((8, 0), variant) for variant in VARIANTS] + [
    ((9, 0), "bfloat16, whole runs"),
    ((9, 0), "bfloat16, scalar A"),
    ((9, 0), "bfloat16, scalar A, channels last"),
]


@pytest.mark.parametrize(("capability", "variant"), COMPILED, ids=str)
def test_every_kernel_is_compiled_and_fits(capability, variant, tmp_path):
    division = layout(variant, capability >= (9, 0))
    options = division.options(*VARIANTS[variant][3:])
    file = compiled(capability, _scan_cuda_layout.source(division.kernels), options, tmp_path)
    found = resources(file)
    assert set(found) == {"outputs", "segment_ends", "join_segments", "segment_coends", "gradients", "add_parts"}
    assert all(stack <= MOST_STACK for _, stack in found.values()), found
    assert not MISCOMPILED.search(read(file, "-sass"))


def softsort_kernels(length: int, slabs: int, element: int) -> list[_softsort_cuda.Variant]:
    """What a forward and a backward pass of SoftSort launch."""
    both = [
        _softsort_cuda.across_channels("product", length, slabs, element, True, False),
        _softsort_cuda.across_channels("gradients", length, slabs, element, False, True),
    ]
    if length <= _softsort_cuda.SPAN:
        return both
    ends = [_softsort_cuda.across_channels("ends", length, slabs, element, not two, two) for two in (False, True)]
    single = [_softsort_cuda.joining(True), _softsort_cuda.summing("arrange"), _softsort_cuda.summing("finish")]
    return [*both, *ends, *single]


@pytest.mark.parametrize(("capability", "length", "element"), [((8, 0), 4096, 0), ((9, 0), 196, 2), ((9, 0), 49, 1)])
def test_every_kernel_of_softsort_is_compiled_and_fits(capability, length, element, tmp_path):
    for variant in softsort_kernels(length, 10, element):
        file = compiled(capability, _softsort_cuda.source(variant.kernel), variant.options, tmp_path)
        found = resources(file)
        assert set(found) == {variant.kernel}
        assert all(stack <= MOST_STACK for _, stack in found.values()), found
        assert variant.shared <= SHARED
        assert not MISCOMPILED.search(read(file, "-sass"))


@pytest.mark.parametrize("scalar_A", [False, True])
@pytest.mark.parametrize("state", [1, 8, 16, 32])
def test_every_state_fits_into_shared_memory(state, scalar_A):
    layout = _scan_cuda_layout.layout(scalar_A, 8, 1, 1536, 2048, state, 108, 4, clusters=False, backward=True)
    assert max(layout.shared_bytes(gated=True)) <= SHARED


def test_a_source_that_does_not_compile_says_why():
    with pytest.raises(RuntimeError, match=r"(?s)does not compile with .*sm_80.*nonsense"):
        _nvrtc.compile_source("nonsense", [], (8, 0))
