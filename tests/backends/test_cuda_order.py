"""The CUDA kernels of SoftSort and its inverse, on the CPU by an emulator of the language and on a GPU as they are.

``pytest tests/backends/test_cuda_order.py`` here, with ``-m gpu`` on a machine with an NVIDIA GPU.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import tokendyn
from tokendyn._tolerances import HALF_EPS, HALF_FACTOR, tolerance
from tokendyn.backends.torch.ops import _engines, _softsort_cuda, _softsort_plain

from . import cuda_emulator
from .graph_replay import expect_replay

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
NAMES = ("softsort", "softsort_restore")
KERNELS = ("arrange", "ends", "join", "product", "gradients", "finish")

pytestmark = pytest.mark.skipif(
    not ON_GPU and cuda_emulator.COMPILER is None, reason="needs a C++ compiler or an NVIDIA GPU"
)

#: b, L, D, ties, tau, ascending, dtype.
CASES = {
    "one token": (1, 1, 1, False, 1.0, True, torch.float32),
    "ties": (2, 19, 18, True, 0.5, True, torch.float32),
    "side by side, descending": (1, 21, 250, True, 0.1, False, torch.float32),
    "across warps and blocks": (2, 150, 40, True, 0.3, True, torch.float32),
    "whole": (1, 49, 32, True, 0.3, True, torch.float32),
    "ties across spans": (1, 300, 3, True, 0.5, False, torch.float32),
    "sorted before the kernels": (1, 2100, 1, True, 0.2, False, torch.float32),
    "nearly a mean": (2, 33, 4, False, 100.0, True, torch.float32),
    "bfloat16": (2, 40, 37, True, 0.5, True, torch.bfloat16),
    "float16": (2, 20, 7, True, 0.5, False, torch.float16),
}


@pytest.fixture(autouse=True)
def _somewhere(monkeypatch):
    """Without a GPU the launches go to the emulator."""
    if not ON_GPU:
        monkeypatch.setattr(_softsort_cuda, "launch", cuda_emulator.launch_order)


def tensors(b, length, width, ties, dtype=torch.float32):
    rng = np.random.default_rng([b, length, width])
    scores = rng.standard_normal((b, length))
    if ties:  # of a few tokens, or (in sequences of some length) of more than a warp has
        scores = scores.round(0 if 100 < length < 1000 else 1)
    scores = torch.from_numpy(scores).to(DEVICE, torch.float32)
    x = torch.from_numpy(rng.standard_normal((b, length, width))).to(DEVICE, dtype)
    return scores.requires_grad_(), x.requires_grad_()


def evaluate(module, name, scores, x, tau=0.5, ascending=True):
    """The output and both gradients."""
    out = getattr(module, name)(scores, x, tau=tau, power=1, ascending=ascending)
    seed = torch.from_numpy(np.random.default_rng(7).standard_normal(tuple(out.shape))).to(out)
    return [t.detach() for t in (out, *torch.autograd.grad(out, (scores, x), seed))]


def error(got, want):
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


def excess(name, case) -> float:
    """The largest error over what is allowed."""
    b, length, width, ties, tau, ascending, dtype = case
    scores, x = tensors(b, length, width, ties, dtype)
    given = {"tau": tau, "ascending": ascending}
    got = evaluate(_softsort_cuda, name, scores, x, **given)
    wide = (t.detach().double().requires_grad_() for t in (scores, x))
    want = evaluate(_softsort_plain, name, *wide, **given)
    plain = evaluate(_softsort_plain, name, scores, x, **given)
    bound, found = tolerance(name, "float32"), 0.0
    for i, (g, w, p) in enumerate(zip(got, want, plain, strict=True)):
        if dtype == torch.float32:
            allowed = bound.gradients if i else bound.values
        else:
            allowed = HALF_FACTOR * error(p, w) + HALF_EPS * torch.finfo(dtype).eps
        off = error(g, w) / allowed
        found = max(found, math.inf if math.isnan(off) else off)
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_those_of_the_plain_engine(name, case):
    assert excess(name, CASES[case]) <= 1


#: In which kernel what is replaced by what, and the case that shows it.
FAULTS = {
    "equal scores count": ("gradients", "if (k >= 0.0f) strict[n]", "strict[n]", "across warps and blocks"),
    "ties end with a run": (
        "gradients",
        "strict[n] = k < 0.0f ? strict[n] :",
        "strict[n] =",
        "across warps and blocks",
    ),
    "another token's decay": (
        "product",
        "at.placed[here] - at.placed[here - 1]",
        "at.placed[here] - at.placed[0]",
        "ties",
    ),
    "a warp starts at zero": ("product", "before.join(k[i], own[i])", "before.clear()", "whole"),
    "a span starts at zero": ("join", "before.join(decay(", "if (false) before.join(decay(", "ties across spans"),
    "a span's ties are forgotten": (
        "gradients",
        "before.strict[0] = *",
        "before.strict[0] = 0 * *",
        "ties across spans",
    ),
    "half of the channels": ("gradients", "return v[0] + __shfl_xor", "return v[0] + 0 * __shfl_xor", "ties"),
    "channels side by side": (
        "gradients",
        "beside < SLABS; beside++",
        "beside < 1; beside++",
        "side by side, descending",
    ),
    "one block's channels": ("finish", "part < p.parts; part++", "part < 1; part++", "across warps and blocks"),
    "places of equal scores": ("product", "sorting.scores[j] <= own", "sorting.scores[j] < own", "ties"),
}


@pytest.mark.skipif(ON_GPU, reason="faults are planted in the emulator")
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, monkeypatch):
    kernel, right, wrong, case = FAULTS[fault]
    sources = {name: _softsort_cuda.source(name) for name in KERNELS}
    assert right in sources[kernel]
    sources[kernel] = sources[kernel].replace(right, wrong)
    monkeypatch.setattr(_softsort_cuda, "source", sources.__getitem__)
    assert excess("softsort", CASES[case]) > 10


@pytest.mark.parametrize("name", NAMES)
def test_tokens_may_lie_in_any_order_of_axes(name):
    scores, x = tensors(2, 19, 18, True)
    want = evaluate(_softsort_cuda, name, scores, x)
    across = x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    shifted = torch.stack([scores.detach(), torch.full_like(scores, float("nan"))], -1)[..., 0].requires_grad_()
    for got, expected in zip(evaluate(_softsort_cuda, name, shifted, across), want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("length", [4, 19, 40, 100, 300] if ON_GPU else [19])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_beyond_the_tokens_is_read_or_written(name, length, monkeypatch):
    scores, x = tensors(2, length, 18, True)
    want = evaluate(_softsort_cuda, name, scores, x)
    fenced = []

    def fence(like, fill=float("nan")):
        """Memory for ``like`` between two sequences of NaN."""
        around = torch.full((like.shape[0] + 2, *like.shape[1:]), float("nan"), dtype=like.dtype, device=like.device)
        fenced.append(around)
        around[1:-1] = fill
        return around[1:-1]

    monkeypatch.setattr(torch, "empty_like", fence)
    x = fence(x, x.detach()).requires_grad_()
    out = getattr(_softsort_cuda, name)(scores, x, tau=0.5, power=1, ascending=True)
    seed = fence(out, torch.from_numpy(np.random.default_rng(7).standard_normal(tuple(out.shape))).to(out))
    got = (out, *torch.autograd.grad(out, (scores, x), seed))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert len(fenced) == 4  # the tokens, the output, its gradient and the tokens'
    assert all(around[[0, -1]].isnan().all() for around in fenced)


@pytest.mark.parametrize("length", [20, 1030])
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_scores_that_are_not_finite_give_nan_in_their_sequence_alone(name, bad, length):
    scores, x = tensors(2, length, 1, False)
    with torch.no_grad():
        scores[1, 4] = bad
    for value in evaluate(_softsort_cuda, name, scores, x):
        assert value[0].isfinite().all()
        assert value[1].isnan().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_temperature_sorts(name):
    scores, x = tensors(1, 18, 2, False)
    order = tokendyn.hard_order(scores.detach())
    move = tokendyn.take_tokens if name == "softsort" else tokendyn.put_tokens
    out, dscores, _ = evaluate(_softsort_cuda, name, scores, x, tau=1e-38)
    assert torch.equal(out, move(x.detach(), order))
    assert not dscores.any()


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_again_and_no_gradient_that_is_not_asked_for(name, monkeypatch):
    scores, x = tensors(1, 18, 3, True)
    want, again = (evaluate(_softsort_cuda, name, scores, x) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(want, again, strict=True))
    run, launched = _softsort_cuda.launch, []
    monkeypatch.setattr(
        _softsort_cuda, "launch", lambda variant, *rest: (launched.append(variant.kernel), run(variant, *rest))
    )
    for given, kernels, expected in (
        ((scores.detach(), x), ["product", "product"], want[2]),
        ((scores, x.detach()), ["product", "gradients"], want[1]),
    ):
        launched.clear()
        out = getattr(_softsort_cuda, name)(*given, tau=0.5, power=1, ascending=True)
        seed = torch.from_numpy(np.random.default_rng(7).standard_normal(tuple(out.shape))).to(out)
        (got,) = torch.autograd.grad(out, [t for t in given if t.requires_grad], seed)
        assert launched == kernels
        assert error(got, expected.double()) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_operators_are_registered_rightly(name):
    scores, x = tensors(1, 4, 3, False)
    operator = getattr(torch.ops.tokendyn, f"{name}_cuda").default
    torch.library.opcheck(operator, (scores, x, 0.5, 1, True), test_utils=("test_schema", "test_faketensor"))
    out = getattr(_softsort_cuda, name)(scores, x, tau=0.5, power=1, ascending=True)
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=rf"'cuda' of {name} has no second derivatives"):
        torch.autograd.grad(dx.sum(), scores)


def test_what_the_kernels_decline(monkeypatch):
    monkeypatch.setattr(_engines, "_HAS_NVRTC", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))

    def reason(**change):
        given = {"dtype": torch.bfloat16, "device": "cuda", "needs_grad": True, "transformed": False}
        call = _engines.OrderCall(**{**given, "length": 16384, "power": 1, **change})
        (engine,) = (engine for engine in _engines.ENGINES["softsort"] if engine.name == "cuda")
        return engine.declines(call)

    assert reason() is None
    assert "power is 2" in reason(power=2)
    assert "float64" in reason(dtype=torch.float64)
    assert "torch.func" in reason(transformed=True)
    assert "on cpu" in reason(device="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(128, 196, 160), (128, 49, 320), (3, 777, 200), (2, 4096, 96)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_real_sizes(name, shape, dtype):
    assert excess(name, (*shape, True, 0.5, True, dtype)) <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # advice of torch's compiler
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # of inductor's own imports
@pytest.mark.parametrize("name", NAMES)
def test_compiles_whole_and_is_captured_in_a_graph(name):
    scores, x = tensors(8, 196, 160, False, torch.bfloat16)

    def step(call=lambda s, x: getattr(tokendyn, name)(s, x, engine="cuda")):
        return torch.autograd.grad(call(scores, x).float().square().sum(), (scores, x))

    eager = step()
    compiled = torch.compile(lambda s, x: getattr(tokendyn, name)(s, x, engine="cuda"), fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(eager, step(compiled), strict=True))
    expect_replay(step, eager)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
def test_memory_is_linear_in_the_length():
    scores, x = tensors(1, 16384, 64, False, torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = tokendyn.softsort(scores, x, engine="cuda")
    torch.autograd.grad(out.float().square().sum(), (scores, x))
    assert torch.cuda.max_memory_allocated() - before < 16384 * 64 * 4 * 10
