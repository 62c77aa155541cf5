"""The PyTorch operations on an NVIDIA GPU: the same numbers as on the CPU, and what only a GPU can get wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tokendyn
from tokendyn.backends.torch.ops._recurrence import linear_recurrence

from .test_torch_ops import DIFFERENTIABLE, SUBJECTS, close, leaves, requiring_grad, scalar

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
]


@pytest.mark.parametrize("name", SUBJECTS)
def test_same_as_on_the_cpu(name: str) -> None:
    """In float64, which only the plain engine takes."""
    results = []
    for device in ("cuda", "cpu"):
        call, values = SUBJECTS[name].split(device=device)
        inputs = requiring_grad(values)
        outs = leaves(call(*inputs))
        gradients = torch.autograd.grad(scalar(call)(*inputs), inputs) if name in DIFFERENTIABLE else ()
        assert all(out.device.type == device for out in (*outs, *gradients))
        results.append(tuple(value.detach().cpu() for value in (*outs, *gradients)))
    close(results[0], results[1], 1e-10)


@pytest.mark.parametrize("name", ["scan, plain", "softsort, linear", "restore", "attention, mean", "take", "put"])
def test_gradients_are_deterministic(name: str) -> None:
    call, values = SUBJECTS[name].split("float32", "cuda")
    inputs = requiring_grad(values)
    first, second = (torch.autograd.grad(scalar(call)(*inputs), inputs) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("transposed", [False, True])
def test_long_recurrence(transposed: bool) -> None:
    rng = np.random.default_rng(6)
    a, x = (torch.from_numpy(rng.uniform(0.5, 1.05, (1000, 2, n))) for n in (1, 3))
    on_gpu = linear_recurrence(a.cuda(), x.cuda(), transposed=transposed)
    torch.testing.assert_close(on_gpu.cpu(), linear_recurrence(a, x, transposed=transposed), rtol=1e-12, atol=1e-12)


def test_scores_that_are_no_numbers_give_nan_without_a_look_at_them() -> None:
    scores = torch.tensor([[0.0, float("nan"), 1.0], [0.0, 2.0, 1.0]], device="cuda")
    x = torch.ones(2, 3, 2, device="cuda")
    for out in (tokendyn.softsort(scores, x), tokendyn.softsort_restore(scores, x), tokendyn.effective_tokens(scores)):
        assert out[0].isnan().all()
        assert out[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_scores_keep_their_order(dtype: torch.dtype) -> None:
    scores = torch.from_numpy(np.random.default_rng(1).integers(0, 4, (5, 1500))).to("cuda", dtype)
    for ascending in (True, False):
        indices = tokendyn.hard_order(scores, ascending=ascending)
        assert torch.equal(indices.cpu(), tokendyn.hard_order(scores.cpu(), ascending=ascending))
