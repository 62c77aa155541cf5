"""The Triton kernels of SoftSort and its inverse: what the equivalence cases do not ask; on a GPU the real sizes too.

``pytest tests/backends/test_triton_order.py``; see ``triton_session`` for where the kernels run.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tokendyn
from tokendyn._tolerances import HALF_EPS, HALF_FACTOR, tolerance
from tokendyn.backends.torch.ops import _engines, _softsort_plain
from tokendyn.errors import EngineError

from .graph_replay import expect_replay
from .triton_session import DEVICE, ON_GPU

# isort: split
from tokendyn.backends.torch.ops import _softsort_triton

NAMES = ("softsort", "softsort_restore")
OPTIONS = {"tau": 0.5, "power": 1, "ascending": True}


def tensors(b, length, width, dtype, *, ties=False):
    rng = np.random.default_rng([b, length, width])
    scores = rng.standard_normal((b, length))
    scores = torch.from_numpy(scores.round(1) if ties else scores).to(DEVICE, torch.float32)
    x = torch.from_numpy(rng.standard_normal((b, length, width))).to(DEVICE, dtype)
    return scores.requires_grad_(), x.requires_grad_()


def evaluate(module, name, scores, x, **options):
    """The output and both gradients."""
    out = getattr(module, name)(scores, x, **{**OPTIONS, **options})
    seed = torch.from_numpy(np.random.default_rng(7).standard_normal(tuple(out.shape))).to(out)
    return [t.detach() for t in (out, *torch.autograd.grad(out, (scores, x), seed))]


def error(got, want):
    return float((got.double() - want).norm() / want.norm())


def widened(scores, x):
    return (t.detach().double().requires_grad_() for t in (scores, x))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", NAMES)
def test_tokens_may_lie_in_any_order_of_axes(name):
    scores, x = tensors(2, 19, 18, torch.float32, ties=True)
    want = evaluate(_softsort_triton, name, scores, x)
    across = x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    shifted = torch.stack([scores.detach(), torch.full_like(scores, float("nan"))], -1)[..., 0].requires_grad_()
    for got, expected in zip(evaluate(_softsort_triton, name, shifted, across), want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter is NumPy
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_scores_that_are_not_finite_give_nan_in_their_sequence_alone(name, bad):
    scores, x = tensors(2, 20, 3, torch.float32)
    with torch.no_grad():
        scores[1, 4] = bad
    for value in evaluate(_softsort_triton, name, scores, x):
        assert value[0].isfinite().all()
        assert value[1].isnan().all()


@pytest.mark.usefixtures("poisoned")
def test_indices_that_name_no_token_give_nan_and_leave_no_memory_unwritten():
    """What the table refuses where it can see values; on a GPU it cannot."""
    from tokendyn.backends.torch.ops import _permute, _permute_triton

    x = torch.from_numpy(np.random.default_rng(3).standard_normal((2, 5, 3))).to(DEVICE, torch.float32)
    indices = torch.tensor([[1, 0, 2, 4, 3], [0, 1, 1, -1, 5]], device=DEVICE)
    permutation = indices[:1].cpu()
    for name, nothing in (("take_tokens", [3, 4]), ("put_tokens", [2, 3, 4])):
        moved = getattr(_permute_triton, name)(x, indices).cpu()
        assert torch.equal(moved[:1], getattr(_permute, name)(x[:1].cpu(), permutation))
        assert moved[1, nothing].isnan().all()
        assert moved[1, [place for place in range(5) if place not in nothing]].isfinite().all()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the interpreter is NumPy
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_temperature_sorts(name, power):
    scores, x = tensors(1, 18, 2, torch.float32)
    order = tokendyn.hard_order(scores.detach())
    move = tokendyn.take_tokens if name == "softsort" else tokendyn.put_tokens
    out, dscores, _ = evaluate(_softsort_triton, name, scores, x, tau=1e-38, power=power)
    if ON_GPU:  # where products are of TF32 in three parts, even with a permutation
        assert error(out, move(x.detach(), order)) <= tolerance(name, "float32").values
    else:
        assert torch.equal(out, move(x.detach(), order))
    assert not dscores.any()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_same_bits_again(name):
    scores, x = tensors(1, 18, 3, torch.float32, ties=True)
    first, second = (evaluate(_softsort_triton, name, scores, x) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_only_gradients_that_are_needed_are_made(name, monkeypatch):
    scores, x = tensors(1, 18, 3, torch.float32, ties=True)
    _, *want = evaluate(_softsort_triton, name, scores, x)
    launches = {"pair_sums": (scores.detach(), x), "product": (scores, x.detach())}
    for (launch, given), expected in zip(launches.items(), reversed(want), strict=True):
        out = getattr(_softsort_triton, name)(*given, **OPTIONS)
        with monkeypatch.context() as patch:
            if name == "softsort" or launch == "pair_sums":  # the inverse's scores need a product
                patch.setattr(_softsort_triton.tiles._Plan, launch, None)
            seed = torch.from_numpy(np.random.default_rng(7).standard_normal(tuple(out.shape))).to(out)
            (got,) = torch.autograd.grad(out, [t for t in given if t.requires_grad], seed)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", NAMES)
def test_operators_are_registered_rightly(name):
    scores, x = tensors(1, 4, 3, torch.float32)
    torch.library.opcheck(
        getattr(torch.ops.tokendyn, f"{name}_triton").default,
        (scores, x, 0.5, 1, True),
        test_utils=("test_schema", "test_faketensor"),
    )
    out = getattr(_softsort_triton, name)(scores, x, **OPTIONS)
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=rf"'triton' of {name} has no second derivatives"):
        torch.autograd.grad(dx.sum(), scores)


def test_what_the_kernels_decline():
    def reason(**change):
        given = {"dtype": torch.bfloat16, "device": "cuda", "needs_grad": True, "transformed": False}
        call = _engines.OrderCall(**{**given, "length": 49, "power": 1, **change})
        (engine,) = (engine for engine in _engines.ENGINES["softsort"] if engine.name == "triton")
        return engine.declines(call)

    assert reason() is None
    assert reason(power=2, length=16384) is None
    assert "power is 1.5" in reason(power=1.5)
    assert "L = 384 exceeds 256, where power 1 takes less time in linear form" in reason(length=384)
    assert "float64" in reason(dtype=torch.float64)
    assert "torch.func" in reason(transformed=True)
    assert "on cpu" in reason(device="cpu")


@pytest.mark.skipif(ON_GPU, reason="says why the kernels decline on a CPU")
@pytest.mark.parametrize("name", NAMES)
def test_an_engine_is_asked_for_by_name(name):
    scores, x = tensors(1, 4, 3, torch.float32)
    with pytest.raises(EngineError, match=rf"{name}: engine 'triton' cannot take this call: the arrays are on cpu"):
        getattr(tokendyn, name)(scores, x, engine="triton")
    plain = getattr(tokendyn, name)(scores, x, engine="plain")
    assert torch.equal(plain, getattr(tokendyn, name)(scores, x))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize(("b", "length", "width"), [(128, 196, 160), (128, 49, 320), (3, 777, 200)])
@pytest.mark.parametrize("name", NAMES)
def test_real_sizes(name, b, length, width, power, dtype):
    scores, x = tensors(b, length, width, dtype, ties=True)
    got = evaluate(_softsort_triton, name, scores, x, power=power)
    want = evaluate(_softsort_plain, name, *widened(scores, x), power=power)
    plain = evaluate(_softsort_plain, name, scores, x, power=power)
    bound = tolerance(name, "float32")
    for i, (g, w, p) in enumerate(zip(got, want, plain, strict=True)):
        if dtype == torch.float32:
            allowed = bound.gradients if i else bound.values
        else:
            allowed = HALF_FACTOR * error(p, w) + HALF_EPS * torch.finfo(dtype).eps
        assert error(g, w) <= allowed


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # advice of torch's compiler
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # of inductor's own imports
@pytest.mark.parametrize("name", NAMES)
def test_compiles_whole_and_is_captured_in_a_graph(name):
    scores, x = tensors(8, 196, 160, torch.bfloat16)

    def step():
        out = getattr(tokendyn, name)(scores, x, engine="triton")
        return torch.autograd.grad(out.float().square().sum(), (scores, x))

    eager = step()
    compiled = torch.compile(lambda s, x: getattr(tokendyn, name)(s, x, engine="triton"), fullgraph=True)
    found = torch.autograd.grad(compiled(scores, x).float().square().sum(), (scores, x))
    assert all(torch.equal(a, b) for a, b in zip(eager, found, strict=True))
    expect_replay(step, eager)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
def test_power_two_streams_long_sequences():
    scores, x = tensors(1, 16384, 64, torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = tokendyn.softsort(scores, x, power=2, engine="triton")
    torch.autograd.grad(out.float().square().sum(), (scores, x))
    assert torch.cuda.max_memory_allocated() - before < 16384 * 64 * 4 * 10
