"""SoftSort on PyTorch in its linear form: chunks, ties, temperatures, memory, and scores that are no numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import tokendyn
from tokendyn import core
from tokendyn.backends.torch import ops
from tokendyn.backends.torch.ops import _laplace, _softsort_plain

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have SoftSort take its linear form at every length, in chunks of the size given."""

    def choose(chunk: int) -> None:
        monkeypatch.setattr(_softsort_plain, "_DENSE_UP_TO", {"cpu": 0, "cuda": 0})
        monkeypatch.setattr(_laplace, "_CHUNK", chunk)

    return choose


def scores_of(rng: np.random.Generator, kind: str, shape: tuple[int, int]) -> np.ndarray:
    if kind == "ties":
        return rng.integers(0, 3, shape) / 2.0
    if kind == "all equal":
        return np.full(shape, 0.3)
    return rng.standard_normal(shape)


@pytest.mark.parametrize("operation", ["softsort", "softsort_restore"])
@pytest.mark.parametrize("tau", [1e-4, 0.5, 1e4])
@pytest.mark.parametrize("kind", ["distinct", "ties", "all equal"])
def test_linear_form_is_the_spec(kind: str, tau: float, operation: str, linear: Callable[[int], None]) -> None:
    """Groups of equal scores within a chunk, across one edge, and across several chunks."""
    rng = np.random.default_rng(int(tau * 1e4))
    for length, chunk in ((1, 4), (7, 1), (12, 3), (13, 4), (9, 64)):
        linear(chunk)
        s, x = scores_of(rng, kind, (2, length)), rng.standard_normal((2, length, 3))
        dout = rng.standard_normal(x.shape)
        for ascending in (True, False):
            options = {"tau": tau, "ascending": ascending}
            inputs = [torch.from_numpy(v).requires_grad_() for v in (s, x)]
            out = getattr(tokendyn, operation)(*inputs, **options)
            np.testing.assert_allclose(out.detach(), getattr(core, operation)(s, x, **options), rtol=1e-12, atol=1e-12)
            reference = getattr(core, f"{operation}_vjp")(dout, s, x, **options)
            found = torch.autograd.grad(out, inputs, torch.from_numpy(dout))
            for gradient, expected in zip(found, (reference["scores"], list(reference.values())[1]), strict=True):
                np.testing.assert_allclose(gradient, expected, rtol=1e-10, atol=1e-11 * max(1.0, 1 / tau))


def test_long_sequences_take_the_linear_form_and_agree_with_the_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(8)
    s = torch.from_numpy(np.round(rng.standard_normal((1, 300)), 1)).requires_grad_()  # many ties
    x = torch.from_numpy(rng.standard_normal((1, 300, 2))).requires_grad_()
    results = []
    for longest in (_softsort_plain._DENSE_UP_TO, {"cpu": 10_000, "cuda": 0}):
        monkeypatch.setattr(_softsort_plain, "_DENSE_UP_TO", longest)
        out = tokendyn.softsort(s, x, tau=0.3)
        back = tokendyn.softsort_restore(s, out, tau=0.3)
        results.append((out, back, *torch.autograd.grad(back.square().sum(), (s, x))))
        results[-1] += (tokendyn.effective_tokens(s, tau=0.3),)
    for ours, dense in zip(*results, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-11, atol=1e-12)


def test_memory_is_linear_in_the_length() -> None:
    kept: list[int] = []
    for length in (1024, 2048):
        s = torch.linspace(0, 1, length).view(1, -1).requires_grad_()
        x = torch.ones(1, length, 4, requires_grad=True)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t
        ):
            tokendyn.softsort_restore(s, tokendyn.softsort(s, x))
        kept.append(sum(sizes))
    assert kept[1] <= 2.01 * kept[0]
    assert kept[1] < 2048 * 200


@pytest.mark.parametrize("chunk", [2, 64])
@pytest.mark.parametrize("kind", ["K", "D", "K°"])
def test_laplace_products_are_closed_under_derivatives(kind: str, chunk: int) -> None:
    """Each of the three against its dense form, values and first and second derivatives, ties held together."""
    rng = np.random.default_rng(19)
    s = torch.from_numpy(np.sort(rng.integers(0, 4, (2, 8)) / 3.0)).requires_grad_()
    x = torch.from_numpy(rng.standard_normal((2, 8, 2))).requires_grad_()
    cotangent = torch.from_numpy(rng.standard_normal((2, 8, 2)))
    direction = torch.from_numpy(rng.standard_normal((2, 8)))

    def ours(s: Any, x: Any) -> Any:
        size = min(chunk, 8)
        return _laplace._product(s.view(2, -1, size), x.view(2, -1, size, 2), 0.7, kind).reshape(2, 8, 2)

    def dense(s: Any, x: Any) -> Any:
        difference = s.unsqueeze(-1) - s.unsqueeze(-2)
        weights = torch.exp(-difference.abs() / 0.7)
        return (weights * {"K": 1.0, "D": difference.sign(), "K°": difference != 0}[kind]) @ x

    results = []
    for product in (ours, dense):
        out = product(s, x)
        first = torch.autograd.grad(out, (s, x), cotangent, create_graph=True)
        second = torch.autograd.grad((first[0] * direction).sum() + first[1].square().sum(), (s, x))
        results.append((out, *first, *second))
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("chunk", [None, 2, 64])
def test_scores_that_are_no_numbers_give_nan(bad: float, chunk: int | None, linear: Callable[[int], None]) -> None:
    """Where the check cannot see them (compiled, on a GPU) the whole sequence is NaN, and no other is touched."""
    if chunk is not None:
        linear(chunk)
    for length in (1, 6):
        s = torch.linspace(0, 1, 3 * length).view(3, length).clone()
        s[1, length // 2] = bad
        x = torch.ones(3, length, 2)
        for out in (
            ops.softsort(s, x),
            ops.softsort(s, x, power=2),
            ops.softsort_restore(s, x),
            ops.softsort_matrix(s),
            ops.effective_tokens(s),
        ):
            assert out[1].isnan().all()
            assert out[[0, 2]].isfinite().all()


def test_scores_and_tokens_of_two_dtypes() -> None:
    """The finer dtype decides the sums, that of the tokens the result."""
    rng = np.random.default_rng(3)
    s = torch.from_numpy(rng.standard_normal((2, 9)))
    x = torch.from_numpy(rng.standard_normal((2, 9, 3)))
    for dtype in (torch.float32, torch.bfloat16):
        out = tokendyn.softsort(s, x.to(dtype), tau=0.1)
        assert out.dtype is dtype
        assert torch.equal(out, tokendyn.softsort(s, x.to(dtype).double(), tau=0.1).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [5, 64, 700])
def test_equal_scores_keep_their_order_both_ways(length: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(length)
    s = torch.from_numpy(rng.integers(0, 5, (3, length))).to(dtype)
    for ascending in (True, False):
        indices = tokendyn.hard_order(s, ascending=ascending)
        placed = s.gather(-1, indices)
        steps = placed.diff() if ascending else -placed.diff()
        assert (steps >= 0).all()
        assert (indices.diff()[steps == 0] > 0).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_indices_of_any_integer_dtype(dtype: torch.dtype) -> None:
    x = torch.arange(24.0).view(2, 4, 3).mT.mT
    indices = torch.tensor([[3, 1, 0, 2], [0, 2, 1, 3]])
    moved = tokendyn.take_tokens(x, indices.to(dtype))
    assert torch.equal(moved, x.gather(1, indices.unsqueeze(-1).expand_as(x)))
    assert torch.equal(tokendyn.put_tokens(moved.mT.contiguous().mT, indices.to(dtype)), x)
