"""The kernel of the short convolution and its SiLU against torch's convolution in float64; what is compiled instead.

``pytest tests/backends/test_triton_convolution.py``; see ``triton_session`` for where the kernel runs.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tokendyn.backends.torch.ops import _convolution

from .triton_session import DEVICE

# isort: split
from tokendyn.backends.torch.ops import _convolution_triton


def draw(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(list(shape)).standard_normal(shape))


def expected(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ahead: int = 0) -> torch.Tensor:
    padded = F.pad(x.mT, (weight.shape[1] - 1 - ahead, ahead))
    return F.silu(F.conv1d(padded, weight[:, None], bias, groups=x.shape[2])).mT


@pytest.mark.parametrize(
    ("batch", "length", "width", "taps", "ahead", "with_bias", "dtype"),
    [
        (2, 13, 20, 4, 0, True, torch.float32),
        (1, 2 * _convolution_triton.SHORT_RUN + 3, 3, 4, 0, False, torch.float32),
        (1, 5, _convolution_triton.CHANNELS + 2, 3, 1, True, torch.float32),
        (2, 5, 7, 2, 0, True, torch.float32),
        (1, 2, 3, 4, 3, True, torch.float32),
        (1, 9, 3, 1, 0, True, torch.float32),
        (1, _convolution_triton.SHORT_RUN + 5, 40, 3, 1, False, torch.float32),
        (2, 13, 17, 3, 0, True, torch.bfloat16),
        (2, 13, 17, 3, 1, True, torch.bfloat16),
    ],
)
def test_output_and_gradients_are_those_of_torch(
    batch: int, length: int, width: int, taps: int, ahead: int, with_bias: bool, dtype: torch.dtype
) -> None:
    both = draw(batch, length, 2 * width).to(DEVICE, dtype)  # half of a projection, as in Mamba
    given = [both[..., :width].detach(), draw(width, taps).to(DEVICE, torch.float32)]
    given += [draw(width).to(DEVICE, torch.float32)] if with_bias else []
    dy = draw(batch, width, length).mT.to(DEVICE, dtype)  # of another layout

    leaves = [t.requires_grad_() for t in given]
    y = _convolution_triton.convolve_silu(*leaves, *([] if with_bias else [None]), ahead)
    found = [y, *torch.autograd.grad(y, leaves, dy)]

    exact = [t.detach().double().requires_grad_() for t in given]
    y = expected(*exact, *([] if with_bias else [None]), ahead)
    for ours, theirs in zip(found, [y, *torch.autograd.grad(y, exact, dy.double())], strict=True):
        assert ours.shape == theirs.shape
        rounding = 8e-3 if ours.dtype == torch.bfloat16 else 2e-6
        assert (ours - theirs).norm() <= rounding * theirs.norm()


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_what_is_not_taken_by_the_kernel_is_the_same(monkeypatch: pytest.MonkeyPatch, ahead: int) -> None:
    """On a CPU torch's convolution, under torch.compile its taps one by one."""
    x, weight, bias = draw(2, 11, 5), draw(5, 1, 3), draw(5)
    want = expected(x, weight[:, 0], bias, ahead)
    torch.testing.assert_close(_convolution.convolve_silu(x, weight, bias, ahead), want, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(_convolution.convolve_silu(x, weight, bias, ahead), want, rtol=1e-12, atol=1e-12)
