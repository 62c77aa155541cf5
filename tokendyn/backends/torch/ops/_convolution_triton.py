# type: ignore  # triton.jit hides from type checkers what kernels are
"""The short causal convolution of Mamba and its SiLU in one launch, channels last.

torch's depthwise convolution wants tokens last: the projections before and after it are copied to that layout and back,
and of the scan's inputs some arrive in the one and some in the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Taps at most: a program holds as many sums for the gradient of the weights.
TAPS = 4
#: Of the forward kernel: channels of a program, tokens that it holds at a time, and tokens that it goes through.
CHANNELS, TOKENS, RUN = 128, 4, 128
#: Of the backward kernel, which goes token by token.
CHANNELS_BACK, RUN_BACK = 256, 64


@triton.jit
def token(x, l, d, length, x_l, x_d, kept):
    """x at tokens l and channels d in float32; 0 where there are none."""
    inside = ((l >= 0) & (l < length))[:, None] & kept[None, :]
    return tl.load(x + l[:, None] * x_l + d[None, :] * x_d, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def tap(weight, k: tl.constexpr, d, kept, WIDTH: tl.constexpr):
    return tl.load(weight + d * WIDTH + k, mask=kept, other=0.0).to(tl.float32)[None, :]


@triton.jit
def taps(x, weight, bias, l, d, length, x_l, x_d, kept, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Σ_k w_k x_{l-WIDTH+1+k} + bias, in float32."""
    total = token(x, l, d, length, x_l, x_d, kept) * tap(weight, WIDTH - 1, d, kept, WIDTH)
    for k in tl.static_range(WIDTH - 1):
        total += token(x, l - (WIDTH - 1) + k, d, length, x_l, x_d, kept) * tap(weight, k, d, kept, WIDTH)
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
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, RUN: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
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
        total = taps(x, weight, bias, l, d, length, x_l, x_d, kept, WIDTH, HAS_BIAS)
        tl.store(y + l[:, None] * width + d[None, :], total * tl.sigmoid(total), (l < length)[:, None] & kept[None, :])


@triton.jit
def row_of(x, l, d, x_l, x_d, mask):
    return tl.load(x + l * x_l + d * x_d, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def tap_of_last(weight, age: tl.constexpr, d, kept, WIDTH: tl.constexpr):
    """The tap of the token ``age`` before the newest; 0 beyond the width."""
    if age < WIDTH:
        return tl.load(weight + d * WIDTH + (WIDTH - 1 - age), mask=kept, other=0.0).to(tl.float32)
    return tl.zeros_like(d).to(tl.float32)


@triton.jit
def gradients(
    x, weight, bias, dy, dx, sums, x_b, x_l, x_d, dy_b, dy_l, dy_d, length, width, runs,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, RUN: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx, contiguous, and this run's part of the gradients of weights and bias: sums (all runs, WIDTH + 1, d).

    Token by token, with the last four x and the last four gradients before the SiLU in registers: token l reaches the
    outputs l to l + WIDTH - 1, so its own gradient is complete three tokens later.
    """
    batch = (tl.program_id(0) // runs).to(tl.int64)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    kept = d < width
    x += batch * x_b
    dy += batch * dy_b
    dx += batch * length * width
    sums += tl.program_id(0).to(tl.int64) * (WIDTH + 1) * width
    first = tl.program_id(0) % runs * RUN
    last = tl.minimum(first + RUN, length)
    w0 = tap_of_last(weight, 0, d, kept, WIDTH)
    w1 = tap_of_last(weight, 1, d, kept, WIDTH)
    w2 = tap_of_last(weight, 2, d, kept, WIDTH)
    w3 = tap_of_last(weight, 3, d, kept, WIDTH)
    zero = tl.zeros((CHANNELS,), tl.float32)
    shift = zero
    if HAS_BIAS:
        shift = tl.load(bias + d, mask=kept, other=0.0).to(tl.float32)
    x1 = row_of(x, first - 1, d, x_l, x_d, kept & (first > 0))
    x2 = row_of(x, first - 2, d, x_l, x_d, kept & (first > 1))
    x3 = row_of(x, first - 3, d, x_l, x_d, kept & (first > 2))
    g1, g2, g3 = zero, zero, zero
    sum_0, sum_1, sum_2, sum_3, sum_bias = zero, zero, zero, zero, zero
    for l in range(first, last + 3):
        there = kept & (l < length)
        x0 = row_of(x, l, d, x_l, x_d, there)
        total = w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3 + shift
        g0 = row_of(dy, l, d, dy_l, dy_d, there) * slope(total)
        own = tl.where(l < last, g0, 0.0)
        sum_0 += own * x0
        sum_1 += own * x1
        sum_2 += own * x2
        sum_3 += own * x3
        sum_bias += own
        moved = w3 * g0 + w2 * g1 + w1 * g2 + w0 * g3
        tl.store(dx + (l - 3) * width + d, moved, mask=kept & (l - 3 >= first))
        x3, x2, x1 = x2, x1, x0
        g3, g2, g1 = g2, g1, g0
    tl.store(sums + WIDTH * width + d, sum_bias, mask=kept)
    tl.store(sums + (WIDTH - 1) * width + d, sum_0, mask=kept)
    if WIDTH > 1:
        tl.store(sums + (WIDTH - 2) * width + d, sum_1, mask=kept)
    if WIDTH > 2:
        tl.store(sums + (WIDTH - 3) * width + d, sum_2, mask=kept)
    if WIDTH > 3:
        tl.store(sums + d, sum_3, mask=kept)


def _launched(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, most: int, run: int):
    """Grid, sizes and constants for programs of at most ``most`` channels and ``run`` tokens."""
    batch, length, width = x.shape
    channels = min(most, max(16, triton.next_power_of_2(width)))
    runs = triton.cdiv(length, run)
    constants = {"WIDTH": weight.shape[1], "HAS_BIAS": bias is not None, "RUN": run, "CHANNELS": channels}
    return (batch * runs, triton.cdiv(width, channels)), (length, width, runs), constants


class ConvolveSilu(torch.autograd.Function):
    """silu(conv(x) + bias) of x (b, L, d), weight (d, WIDTH) contiguous and bias (d,) or None; contiguous."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        grid, sizes, constants = _launched(x, weight, bias, CHANNELS, RUN)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        convolve[grid](x, weight, bias, y, *x.stride(), *sizes, **constants, TOKENS=TOKENS)
        ctx.save_for_backward(x, weight, bias)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, bias = ctx.saved_tensors
        grid, sizes, constants = _launched(x, weight, bias, CHANNELS_BACK, RUN_BACK)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        sums = torch.empty((grid[0], weight.shape[1] + 1, x.shape[2]), dtype=torch.float32, device=x.device)
        gradients[grid](x, weight, bias, dy, dx, sums, *x.stride(), *dy.stride(), *sizes, **constants)
        total = sums.sum(0)
        return dx, total[:-1].mT.to(weight.dtype), None if bias is None else total[-1].to(bias.dtype)


def convolve_silu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """silu(conv(x) + bias): x (b, L, d) → (b, L, d), weight (d, WIDTH), bias (d,) or None."""
    return ConvolveSilu.apply(x, weight.contiguous(), bias)
