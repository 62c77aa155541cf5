"""The Triton kernels of the selective scan against the spec.

On a GPU they run there; elsewhere Triton's interpreter runs them on the CPU, with small sizes. Everything that
they allocate is filled with NaN first, so that an element which no kernel writes shows. On a machine with a GPU:
``pytest tests/backends/test_triton_scan.py`` (all), or ``-m gpu`` (the real sizes alone).
"""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch

from tokendyn import core
from tokendyn._tolerances import HALF_EPS, HALF_FACTOR, tolerance

from .triton_session import DEVICE, ON_GPU

# isort: split
from tokendyn.backends.torch.ops import _scan_plain, _scan_triton, _scan_triton_launch

DIFFERENTIABLE = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")

CASES = {
    "one token": {"b": 1, "d": 1, "L": 1, "N": 1},
    "plain": {"b": 1, "d": 3, "L": 20, "N": 2, "without": ("D", "z", "delta_bias", "initial_state")},
    "all options, two blocks of channels": {"b": 1, "d": 33, "L": 18, "N": 2},
    "blocks of states": {"b": 1, "d": 2, "L": 3, "N": 18},
    "groups": {"b": 2, "d": 4, "L": 16, "N": 2, "G": 2},
    "channels last": {"b": 1, "d": 5, "L": 33, "N": 2, "last": True},
    "packed and padded": {"b": 2, "d": 2, "L": 32, "N": 2, "packed": True, "padded": True},
    "scalar A": {"b": 1, "d": 3, "L": 35, "N": 2, "scalar": True},
    "scalar A, packed and padded": {"b": 2, "d": 3, "L": 40, "N": 2, "scalar": True, "packed": True, "padded": True},
    "scalar A, groups, channels last": {"b": 1, "d": 4, "L": 35, "N": 2, "scalar": True, "G": 2, "last": True},
    "large steps": {"b": 1, "d": 2, "L": 20, "N": 2, "scale": 1e3},
    "small steps": {"b": 1, "d": 2, "L": 20, "N": 2, "scale": 1e-6},
    "scalar A, large steps": {"b": 1, "d": 2, "L": 40, "N": 2, "scalar": True, "scale": 100.0},
}
#: Scalar A runs as matrix products in bfloat16 and as a recurrence in the other dtypes.
RUNS = [(name, "float32") for name in CASES if not name.startswith("scalar A,")] + [
    (name, dtype)
    for name in ("plain", "scalar A", "scalar A, packed and padded", "scalar A, groups, channels last")
    for dtype in ("bfloat16", "float16")
    if dtype == "bfloat16" or name == "plain"
]
RUNS.append(("scalar A, large steps", "bfloat16"))


def arguments(name, b, d, L, N, G=None, last=False, packed=False, padded=False, scalar=False, scale=1.0, without=()):
    """Float64 arrays by argument name. With ``scale`` the step size is given itself, up to that size."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    shared = (b, N, L) if G is None else (b, G, N, L)
    found = {
        "u": rng.standard_normal((b, d, L)),
        "delta": rng.standard_normal((b, d, L)) if scale == 1.0 else scale * rng.random((b, d, L)),
        "A": -0.1 - rng.random((d,) if scalar else (d, N)),
        "B": rng.standard_normal(shared),
        "C": rng.standard_normal(shared),
        "D": rng.standard_normal(d),
        "z": rng.standard_normal((b, d, L)),
        "delta_bias": rng.standard_normal(d),
        "initial_state": rng.standard_normal((b, d, N)),
    }
    for absent in (*without, *(() if scale == 1.0 else ("delta_bias",))):
        del found[absent]
    found["delta_softplus"] = scale == 1.0
    if packed:
        found["seq_idx"] = np.cumsum(rng.random((b, L)) < 0.2, axis=1)
    if padded:
        found["lengths"] = np.array([L // 2, L, 0][:b])
    return found


def tensors(values, dtype, last):
    """The arguments on the device in ``dtype``, parameters in float32."""
    parameters = ("A", "D", "delta_bias", "initial_state")
    found = {}
    for key, value in values.items():
        if not isinstance(value, np.ndarray):
            found[key] = value
            continue
        t = torch.from_numpy(value).to(DEVICE)
        if key in DIFFERENTIABLE:
            t = t.to(torch.float32 if key in parameters and dtype != torch.float64 else dtype)
        if last and key in ("u", "delta", "z"):
            t = t.transpose(1, 2).contiguous().transpose(1, 2)
        found[key] = t.requires_grad_() if key in DIFFERENTIABLE else t
    return found


def seeds(y, last):
    """The same gradients of y and of the last state for every implementation."""
    rng = np.random.default_rng(y.numel())
    return [torch.from_numpy(rng.standard_normal(tuple(t.shape))).to(t) for t in (y, last)]


def evaluate(run, given):
    """y, the last state and all gradients of ``run``."""
    y, last = run(**given, return_last_state=True)
    wrt = [key for key in DIFFERENTIABLE if key in given]
    gradients = torch.autograd.grad((y, last), [given[key] for key in wrt], seeds(y, last))
    found = {"y": y, "last_state": last, **dict(zip(wrt, gradients, strict=True))}
    return {key: value.detach() for key, value in found.items()}


def by_spec(values, dtype):
    """The same from the spec in float64, on inputs and seeds rounded as ``dtype`` rounds them."""
    rounded = {
        key: value.detach().double().cpu().numpy() if isinstance(value, torch.Tensor) else value
        for key, value in tensors(values, dtype, False).items()
    }
    y, last = core.selective_scan(**rounded, return_last_state=True)
    to = torch.float32 if dtype != torch.float64 else dtype
    dout = [s.double().numpy() for s in seeds(torch.from_numpy(y).to(dtype), torch.from_numpy(last).to(to))]
    gradients = core.selective_scan_vjp(tuple(dout), **rounded, return_last_state=True)
    found = {"y": y, "last_state": last, **gradients}
    return {key: torch.from_numpy(np.asarray(value, np.float64)) for key, value in found.items()}


def error(got, want):
    return float((got.double().cpu() - want).norm() / want.norm().clamp_min(1e-30))


def worst_token(got, want):
    size = want.square().sum(1).sqrt()
    off = (got.double().cpu() - want).square().sum(1).sqrt()
    return float((off / size.clamp_min(float(size.max()) * 1e-3)).max())


@pytest.fixture
def _small_chunks(monkeypatch):
    monkeypatch.setattr(_scan_triton_launch, "CHUNK_TILES", 1)
    monkeypatch.setattr(_scan_triton_launch, "BLOCKS_A_BAND", 2)
    monkeypatch.setattr(_scan_triton_launch, "SCALAR_PROGRAMS", 8)


@pytest.mark.usefixtures("_small_chunks", "poisoned")
@pytest.mark.filterwarnings("ignore:overflow encountered in matmul:RuntimeWarning")  # in entries that a mask discards
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize(("name", "dtype"), RUNS, ids=[f"{n}-{d}" for n, d in RUNS])
def test_kernels_agree_with_the_spec(name, dtype):
    dtype = getattr(torch, dtype)
    options = dict(CASES[name])
    last = options.get("last", False)
    values = arguments(name, **options)
    want = by_spec(values, dtype)
    got = evaluate(_scan_triton.run, tensors(values, dtype, last))
    assert got.keys() == want.keys()
    bound = tolerance("selective_scan", "float32")
    plain = evaluate(_scan_plain.run, tensors(values, dtype, last)) if dtype != torch.float32 else {}
    for key, value in want.items():
        assert got[key].shape == value.shape
        assert torch.isfinite(got[key]).all(), f"{key} is not finite"
        off = error(got[key], value)
        if dtype == torch.float32:
            allowed = bound.values if key in ("y", "last_state") else bound.gradients
        else:
            allowed = HALF_FACTOR * error(plain[key], value) + HALF_EPS * torch.finfo(dtype).eps
        assert off <= allowed, f"{key}: {off:.1e} exceeds {allowed:.1e}"
    if dtype == torch.float32:
        assert worst_token(got["y"], want["y"]) <= bound.worst_token


@pytest.mark.usefixtures("_small_chunks")
def test_gradients_are_the_same_bits_again():
    values = arguments("again", 1, 2, 18, 1)
    first, second = (evaluate(_scan_triton.run, tensors(values, torch.float32, False)) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_padding_reaches_nothing():
    values = arguments("padding", 1, 2, 8, 2, padded=True)
    clean = evaluate(_scan_triton.run, tensors(values, torch.float32, False))
    for key in ("u", "delta", "B", "C", "z"):
        values[key][..., values["lengths"][0] :] = np.nan
    given = tensors(values, torch.float32, False)
    dirty = evaluate(_scan_triton.run, given)
    assert all(torch.equal(clean[key], dirty[key]) for key in clean)


def test_second_derivative_is_an_error():
    given = tensors(arguments("twice", 1, 1, 2, 1), torch.float32, False)
    y = _scan_triton.run(**given)
    (du,) = torch.autograd.grad(y.sum(), given["u"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"selective_scan_triton_backward.* no autograd formula"):
        torch.autograd.grad(du.sum(), given["delta"])


def test_operator_is_registered_rightly():
    given = tensors(arguments("opcheck", 1, 2, 4, 1), torch.float32, False)
    B, C = given["B"].unsqueeze(1), given["C"].unsqueeze(1)
    args = (given["u"], given["delta"], given["A"], B, C, given["D"], None, None, None, None, None, True, True, True)
    torch.library.opcheck(
        torch.ops.tokendyn.selective_scan_triton.default, args, test_utils=("test_schema", "test_faketensor")
    )


GPU_SIZES = {
    "general": {"b": 2, "d": 256, "L": 1024, "N": 16},
    "odd": {"b": 2, "d": 200, "L": 777, "N": 9, "G": 2, "packed": True, "padded": True},
    "wide state": {"b": 1, "d": 64, "L": 300, "N": 200},
    "channels last": {"b": 2, "d": 256, "L": 600, "N": 16, "last": True},
    "scalar A": {"b": 2, "d": 256, "L": 1024, "N": 16, "scalar": True},
    "scalar A, odd": {"b": 2, "d": 200, "L": 777, "N": 9, "G": 2, "packed": True, "padded": True, "scalar": True},
}


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", GPU_SIZES)
def test_real_sizes(name, dtype):
    dtype = getattr(torch, dtype)
    options = dict(GPU_SIZES[name])
    last = options.get("last", False)
    values = arguments(name, **options)
    rounded = {
        key: value.detach().double().cpu().numpy() if isinstance(value, torch.Tensor) else value
        for key, value in tensors(values, dtype, False).items()
    }
    given = tensors(values, dtype, last)
    got = evaluate(_scan_triton.run, given)
    want = {k: v.cpu() for k, v in evaluate(_scan_plain.run, tensors(rounded, torch.float64, False)).items()}
    bound = tolerance("selective_scan", "float32")
    plain = evaluate(_scan_plain.run, tensors(values, dtype, last)) if dtype != torch.float32 else {}
    for key, value in want.items():
        if dtype == torch.float32:
            allowed = bound.values if key in ("y", "last_state") else bound.gradients
        else:
            allowed = HALF_FACTOR * error(plain[key], value) + HALF_EPS * torch.finfo(dtype).eps
        off = error(got[key], value)
        assert off <= allowed, f"{key}: {off:.1e} exceeds {allowed:.1e}"


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # advice of torch's compiler
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # of inductor's own imports
@pytest.mark.parametrize("scalar", [False, True])
def test_compiles_whole_and_is_captured_in_a_graph(scalar):
    import tokendyn

    values = arguments("graph", 2, 64, 128, 8, scalar=scalar)
    given = tensors(values, torch.bfloat16, False)

    def step():
        y = tokendyn.selective_scan(**given, engine="triton")
        return torch.autograd.grad(y.float().square().sum(), [given["u"], given["A"]])

    eager = step()
    compiled = torch.compile(lambda: tokendyn.selective_scan(**given, engine="triton"), fullgraph=True)
    y = compiled()
    found = torch.autograd.grad(y.float().square().sum(), [given["u"], given["A"]])
    assert all(torch.equal(a, b) for a, b in zip(eager, found, strict=True))
    del y  # it keeps nodes of the graph alive that belong to the default stream
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))
