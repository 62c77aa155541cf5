# type: ignore  # triton.jit hides from type checkers what kernels are
"""The product of tokens with one vector, in float32 whatever the tokens' dtype: one launch, no copy of the tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Tokens of a program, and channels that it holds at a time.
TOKENS, CHANNELS = 32, 128


@triton.jit
def rows_of(x, row, length, x_b, x_l):
    """Where tokens lie, numbered through all sequences."""
    return x + (row // length).to(tl.int64) * x_b + (row % length) * x_l


@triton.jit
def product(x, direction, scores, x_b, x_l, x_d, length, rows, width, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """``scores[row] = Σ_d x[row, d] direction[d]``."""
    row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    tokens = rows_of(x, row, length, x_b, x_l)
    total = tl.zeros((TOKENS,), tl.float32)
    for first in range(0, width, CHANNELS):
        d = first + tl.arange(0, CHANNELS)
        inside = (row < rows)[:, None] & (d < width)[None, :]
        found = tl.load(tokens[:, None] + d[None, :] * x_d, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(found * tl.load(direction + d, mask=d < width, other=0.0)[None, :], axis=1)
    tl.store(scores + row, total, mask=row < rows)


@triton.jit
def gradients(
    x, direction, dscores, dx, sums, x_b, x_l, x_d, length, rows, width,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx, contiguous, and this program's part of the gradient of the direction: sums (programs, width)."""
    row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    tokens = rows_of(x, row, length, x_b, x_l)
    places = dx + row.to(tl.int64) * width
    given = tl.load(dscores + row, mask=row < rows, other=0.0)
    sums += tl.program_id(0).to(tl.int64) * width
    for first in range(0, width, CHANNELS):
        d = first + tl.arange(0, CHANNELS)
        inside = (row < rows)[:, None] & (d < width)[None, :]
        found = tl.load(tokens[:, None] + d[None, :] * x_d, mask=inside, other=0.0).to(tl.float32)
        tl.store(sums + d, tl.sum(found * given[:, None], axis=0), mask=d < width)
        along = tl.load(direction + d, mask=d < width, other=0.0)
        tl.store(places[:, None] + d[None, :], given[:, None] * along[None, :], mask=inside)


def _launched(x: torch.Tensor):
    """Grid, sizes and constants of both kernels."""
    batch, length, width = x.shape
    channels = min(CHANNELS, max(16, triton.next_power_of_2(width)))
    rows = batch * length
    return (triton.cdiv(rows, TOKENS),), (*x.stride(), length, rows, width), {"TOKENS": TOKENS, "CHANNELS": channels}


class Product(torch.autograd.Function):
    """x (b, L, d) times direction (d,) float32, contiguous: (b, L) float32."""

    @staticmethod
    def forward(ctx, x, direction):
        grid, sizes, constants = _launched(x)
        scores = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
        product[grid](x, direction, scores, *sizes, **constants)
        ctx.save_for_backward(x, direction)
        return scores

    @staticmethod
    def backward(ctx, dscores):
        x, direction = ctx.saved_tensors
        if torch.is_grad_enabled():  # its result will be differentiated again
            return (dscores.unsqueeze(-1) * direction).to(x.dtype), (dscores.unsqueeze(-1) * x).sum((0, 1))
        grid, sizes, constants = _launched(x)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        sums = torch.empty((grid[0], x.shape[2]), dtype=torch.float32, device=x.device)
        gradients[grid](x, direction, dscores.contiguous(), dx, sums, *sizes, **constants)
        return dx, sums.sum(0)


def scores(x: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """(b, L) float32: x (b, L, d), not of float64, times direction (d,) float32."""
    return Product.apply(x, direction.contiguous())
