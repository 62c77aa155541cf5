"""The kernel of scores against the product in float64; see ``triton_session`` for where it runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tokendyn.backends.torch.ops import _order

from .triton_session import DEVICE, ON_GPU

# isort: split
from tokendyn.backends.torch.ops import _score_triton


def draw(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(list(shape)).standard_normal(shape)).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "length", "width"), [(2, 19, 20), (1, _score_triton.TOKENS + 1, _score_triton.CHANNELS + 3), (3, 1, 1)]
)
def test_scores_and_gradients(batch: int, length: int, width: int, dtype: torch.dtype) -> None:
    x = draw(batch, length, 2 * width).to(dtype)[..., width:].requires_grad_()  # a part of wider tokens
    direction, dscores = draw(width).float().requires_grad_(), draw(length, batch).float().mT
    found = _score_triton.scores(x, direction)
    assert found.dtype == torch.float32
    found = [found, *torch.autograd.grad(found, (x, direction), dscores)]
    wide, exact = (t.detach().double().requires_grad_() for t in (x, direction))
    want = wide @ exact
    want = [want, *torch.autograd.grad(want, (wide, exact), dscores.double())]
    for ours, theirs in zip(found, want, strict=True):
        rounding = 4e-3 if ours.dtype == torch.bfloat16 else 2e-6
        assert (ours - theirs).norm() <= rounding * theirs.norm()


def test_second_derivatives() -> None:
    x, direction = draw(2, 5, 3).float().requires_grad_(), draw(3).float().requires_grad_()
    (dx,) = torch.autograd.grad(_score_triton.scores(x, direction).square().sum(), x, create_graph=True)
    found = torch.autograd.grad(dx.square().sum(), direction)[0]
    (dx,) = torch.autograd.grad((x @ direction).square().sum(), x, create_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(dx.square().sum(), direction)[0])


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("length", "width"), [(196, 160), (49, 320)])
def test_scores_of_whole_batches(length: int, width: int) -> None:
    x, direction = draw(128, length, width).bfloat16(), draw(width).float()
    want = x.double() @ direction.double()
    assert (_order.exact_scores(x, direction) - want).norm() <= 1e-6 * want.norm()
