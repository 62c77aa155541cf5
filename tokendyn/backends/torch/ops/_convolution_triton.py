# type: ignore  # triton.jit hides from type checkers what kernels are
"""The short convolution of Mamba or MambaVision and its SiLU in one launch, channels last.

torch's depthwise convolution wants tokens last: the projections before and after it are copied to that layout and back,
and of the scan's inputs some arrive in the one and some in the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Numbers that a program holds at a time, of so many channels at most, and tokens that it goes through.
HELD, CHANNELS, RUN = 512, 128, 128
#: Programs that keep a GPU busy; where there would be fewer, each goes through SHORT_RUN tokens.
ENOUGH, SHORT_RUN = 1024, 32


@triton.jit
def token(x, l, d, length, x_l, x_d, kept):
    """x at tokens l and channels d in float32; 0 where there are none."""
    inside = ((l >= 0) & (l < length))[:, None] & kept[None, :]
    return tl.load(x + l[:, None] * x_l + d[None, :] * x_d, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def tap(weight, k: tl.constexpr, d, kept, WIDTH: tl.constexpr):
    return tl.load(weight + d * WIDTH + k, mask=kept, other=0.0).to(tl.float32)[None, :]


@triton.jit
def taps(
    x, weight, bias, l, d, length, x_l, x_d, kept,
    WIDTH: tl.constexpr, AHEAD: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Σ_k w_k x_{l-WIDTH+1+AHEAD+k} + bias, in float32."""
    last = l + AHEAD
    total = token(x, last, d, length, x_l, x_d, kept) * tap(weight, WIDTH - 1, d, kept, WIDTH)
    for k in tl.static_range(WIDTH - 1):
        total += token(x, last - (WIDTH - 1) + k, d, length, x_l, x_d, kept) * tap(weight, k, d, kept, WIDTH)
    if HAS_BIAS:
        total += tl.load(bias + d, mask=kept, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def slope(total):
    """The derivative of SiLU."""
    gate = tl.sigmoid(total)
    return gate * (1 + total * (1 - gate))


@triton.jit
def convolve(
    x, weight, bias, y, x_b, x_l, x_d, length, width, runs,
    WIDTH: tl.constexpr, AHEAD: tl.constexpr, HAS_BIAS: tl.constexpr,
    RUN: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``y = silu(conv(x) + bias)``; y is contiguous."""
    batch = (tl.program_id(0) // runs).to(tl.int64)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    kept = d < width
    x += batch * x_b
    y += batch * length * width
    first = tl.program_id(0) % runs * RUN
    for start in range(first, tl.minimum(first + RUN, length), TOKENS):
        l = start + tl.arange(0, TOKENS)
        total = taps(x, weight, bias, l, d, length, x_l, x_d, kept, WIDTH, AHEAD, HAS_BIAS)
        tl.store(y + l[:, None] * width + d[None, :], total * tl.sigmoid(total), (l < length)[:, None] & kept[None, :])


@triton.jit
def gradients(
    x, weight, bias, dy, dx, sums, x_b, x_l, x_d, dy_b, dy_l, dy_d, length, width, runs,
    WIDTH: tl.constexpr, AHEAD: tl.constexpr, HAS_BIAS: tl.constexpr,
    RUN: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx, contiguous, and this run's part of the gradients of weights and bias: sums (all runs, WIDTH + 1, d).

    Token l reaches the outputs l - AHEAD to l - AHEAD + WIDTH - 1; what the SiLU was given there is computed anew.
    """
    batch = (tl.program_id(0) // runs).to(tl.int64)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    kept = d < width
    x += batch * x_b
    dy += batch * dy_b
    dx += batch * length * width
    sums += tl.program_id(0).to(tl.int64) * (WIDTH + 1) * width
    first = tl.program_id(0) % runs * RUN
    sum_bias = tl.zeros((TOKENS, CHANNELS), tl.float32)
    sum_0, sum_1, sum_2, sum_3 = sum_bias, sum_bias, sum_bias, sum_bias
    for start in range(first, tl.minimum(first + RUN, length), TOKENS):
        l = start + tl.arange(0, TOKENS)
        given = token(dy, l, d, length, dy_l, dy_d, kept)
        given *= slope(taps(x, weight, bias, l, d, length, x_l, x_d, kept, WIDTH, AHEAD, HAS_BIAS))
        moved = given * tap(weight, WIDTH - 1 - AHEAD, d, kept, WIDTH)
        for j in tl.static_range(WIDTH):
            if j != AHEAD:
                other = token(dy, l - AHEAD + j, d, length, dy_l, dy_d, kept)
                other *= slope(taps(x, weight, bias, l - AHEAD + j, d, length, x_l, x_d, kept, WIDTH, AHEAD, HAS_BIAS))
                moved += other * tap(weight, WIDTH - 1 - j, d, kept, WIDTH)
        tl.store(dx + l[:, None] * width + d[None, :], moved, (l < length)[:, None] & kept[None, :])
        sum_bias += given
        first_seen = l + AHEAD - (WIDTH - 1)
        sum_0 += given * token(x, first_seen, d, length, x_l, x_d, kept)
        if WIDTH > 1:
            sum_1 += given * token(x, first_seen + 1, d, length, x_l, x_d, kept)
        if WIDTH > 2:
            sum_2 += given * token(x, first_seen + 2, d, length, x_l, x_d, kept)
        if WIDTH > 3:
            sum_3 += given * token(x, first_seen + 3, d, length, x_l, x_d, kept)
    tl.store(sums + WIDTH * width + d, tl.sum(sum_bias, axis=0), mask=kept)
    tl.store(sums + d, tl.sum(sum_0, axis=0), mask=kept)
    if WIDTH > 1:
        tl.store(sums + width + d, tl.sum(sum_1, axis=0), mask=kept)
    if WIDTH > 2:
        tl.store(sums + 2 * width + d, tl.sum(sum_2, axis=0), mask=kept)
    if WIDTH > 3:
        tl.store(sums + 3 * width + d, tl.sum(sum_3, axis=0), mask=kept)


def _launched(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ahead: int):
    """Grid, sizes and constants of both kernels."""
    batch, length, width = x.shape
    # The tile that leaves the fewest of its channels idle, the widest of several.
    tiles = [size for size in (CHANNELS, CHANNELS // 2, CHANNELS // 4) if size < 2 * width] or [CHANNELS // 8]
    channels = min(tiles, key=lambda size: triton.cdiv(width, size) * size)
    across = triton.cdiv(width, channels)
    run = RUN if batch * triton.cdiv(length, RUN) * across >= ENOUGH else SHORT_RUN
    runs = triton.cdiv(length, run)
    constants = {"WIDTH": weight.shape[1], "AHEAD": ahead, "HAS_BIAS": bias is not None, "RUN": run,
                 "TOKENS": HELD // channels, "CHANNELS": channels}  # fmt: skip
    return (batch * runs, across), (length, width, runs), constants


class ConvolveSilu(torch.autograd.Function):
    """silu(conv(x) + bias) of x (b, L, d), weight (d, WIDTH) contiguous and bias (d,) or None; contiguous."""

    @staticmethod
    def forward(ctx, x, weight, bias, ahead):
        grid, sizes, constants = _launched(x, weight, bias, ahead)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        convolve[grid](x, weight, bias, y, *x.stride(), *sizes, **constants)
        ctx.save_for_backward(x, weight, bias)
        ctx.ahead = ahead
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, bias = ctx.saved_tensors
        grid, sizes, constants = _launched(x, weight, bias, ctx.ahead)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        sums = torch.empty((grid[0], weight.shape[1] + 1, x.shape[2]), dtype=torch.float32, device=x.device)
        gradients[grid](x, weight, bias, dy, dx, sums, *x.stride(), *dy.stride(), *sizes, **constants)
        total = sums.sum(0)
        return dx, total[:-1].mT.to(weight.dtype), None if bias is None else total[-1].to(bias.dtype), None


def convolve_silu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ahead: int = 0) -> torch.Tensor:
    """silu(conv(x) + bias): x (b, L, d) → (b, L, d), weight (d, WIDTH), bias (d,) or None."""
    return ConvolveSilu.apply(x, weight.contiguous(), bias, ahead)
