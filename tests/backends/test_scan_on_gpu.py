"""The scan's engines on an NVIDIA GPU at real sizes: the numbers, compilation, CUDA graphs, the same bits again."""

from __future__ import annotations

import pytest
import torch

import tokendyn

pytest.importorskip("triton")

# isort: split
from tokendyn.backends.cuda import _scan_cuda_layout
from tokendyn.backends.cuda._scan_cuda_plan import CLUSTERS_FROM
from tokendyn.backends.torch.ops import _scan_chunked, _scan_cuda, _scan_triton

from .graph_replay import expect_replay
from .scan_cases import arguments, check, evaluate, tensors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

ENGINES = ("cuda", "triton")
GPU_SIZES = {
    "general": {"b": 2, "d": 256, "L": 1024, "N": 16},
    "odd": {"b": 2, "d": 200, "L": 777, "N": 9, "G": 2, "packed": True, "padded": True},
    "wide state": {"b": 1, "d": 64, "L": 300, "N": 200},
    "channels last": {"b": 2, "d": 256, "L": 600, "N": 16, "last": True},
    "scalar A": {"b": 2, "d": 256, "L": 1024, "N": 16, "scalar": True},
    "scalar A, odd": {"b": 2, "d": 200, "L": 777, "N": 9, "G": 2, "packed": True, "padded": True, "scalar": True},
    "half runs": {"b": 8, "d": 160, "L": 196, "N": 8},
    "scalar A, channels last": {"b": 2, "d": 248, "L": 600, "N": 16, "last": True, "scalar": True},
    "scalar A, odd channels last": {"b": 2, "d": 250, "L": 601, "N": 16, "last": True, "scalar": True},
    "scalar A, short": {"b": 64, "d": 160, "L": 49, "N": 8, "scalar": True},
    "scalar A, one long sequence": {"b": 1, "d": 64, "L": 5000, "N": 32, "scalar": True},
    "scalar A, decays of all sizes": {"b": 2, "d": 128, "L": 500, "N": 16, "scalar": True, "scale": 8.0},
    "scalar A, huge steps": {"b": 2, "d": 128, "L": 500, "N": 16, "scalar": True, "scale": 1e3},
    "scalar A, large steps": {"b": 2, "d": 128, "L": 500, "N": 16, "scalar": True, "scale": 3e2},
}
#: A gradient of z is 78,252 there.
BEYOND_FLOAT16 = ("scalar A, huge steps",)
REAL_SIZES = [
    (name, dtype)
    for name in GPU_SIZES
    for dtype in ("float32", "bfloat16", "float16")
    if dtype != "float16" or name not in BEYOND_FLOAT16
]


def run_by(engine, state):
    """What runs a call by ``engine``, which may decline a wide state."""
    if engine == "cuda" and state > _scan_cuda_layout.STATE:
        pytest.skip("the engine declines so wide a state")
    return {"cuda": _scan_cuda.run, "triton": _scan_triton.run}[engine]


@pytest.mark.parametrize(("name", "dtype"), REAL_SIZES)
@pytest.mark.parametrize("engine", ENGINES)
def test_real_sizes(engine, name, dtype):
    dtype, options = getattr(torch, dtype), dict(GPU_SIZES[name])
    run, last = run_by(engine, options["N"]), options.get("last", False)
    values = arguments(name, **options)
    rounded = {
        key: value.detach().double().cpu().numpy() if isinstance(value, torch.Tensor) else value
        for key, value in tensors(values, dtype, False).items()
    }
    want = evaluate(_scan_chunked.run, tensors(rounded, torch.float64, False, "cpu"))
    check(run, values, dtype, last, want)


@pytest.mark.parametrize("name", ["general", "half runs"])
def test_without_clusters_as_on_an_A100(name, monkeypatch):
    monkeypatch.setattr(_scan_cuda, "_gpu", lambda device: (132, CLUSTERS_FROM - 1))
    test_real_sizes("cuda", name, "bfloat16")


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_bits_again(engine, scalar):
    values = arguments("again", 4, 500, 1500, 16, scalar=scalar)
    given = tensors(values, torch.bfloat16, False)
    first, second = (evaluate(run_by(engine, 16), given) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # advice of torch's compiler
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # of inductor's own imports
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_compiles_whole_and_is_captured_in_a_graph(engine, scalar):
    values = arguments("graph", 2, 64, 128, 8, scalar=scalar)
    given = tensors(values, torch.bfloat16, False)

    def step():
        y = tokendyn.selective_scan(**given, engine=engine)
        return torch.autograd.grad(y.float().square().sum(), [given["u"], given["A"]])

    eager = step()
    compiled = torch.compile(lambda: tokendyn.selective_scan(**given, engine=engine), fullgraph=True)
    y = compiled()
    found = torch.autograd.grad(y.float().square().sum(), [given["u"], given["A"]])
    assert all(torch.equal(a, b) for a, b in zip(eager, found, strict=True))
    del y  # it keeps nodes of the graph alive that belong to the default stream
    expect_replay(step, eager)
