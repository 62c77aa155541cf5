# type: ignore  # triton.jit hides from type checkers what kernels are
"""The triton engine of permutations: one launch, NaN where the indices name no token; the transpose is the gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Channels a program moves at a time, and numbers a program.
CHANNELS, NUMBERS = 256, 2048


@triton.jit
def move(
    x, indices, out, x_b, x_l, x_d, indices_b, indices_l, length, width, blocks,
    PUT: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``out[k] = x[indices[k]]``, or with PUT ``out[indices[k]] = x[k]``, of a block of tokens; out is contiguous.

    An index that names no token gives NaN, or with PUT goes nowhere.
    """
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)
    named = tl.load(indices + batch * indices_b + k * indices_l, mask=k < length, other=0).to(tl.int32)
    valid = (named >= 0) & (named < length)
    named = tl.where(valid, named, k)
    source, target = (k, named) if PUT else (named, k)
    x += batch * x_b
    out += batch * length * width
    for first in range(0, width, CHANNELS):
        d = first + tl.arange(0, CHANNELS)
        inside = (k < length)[:, None] & (d < width)[None, :]
        tokens = tl.load(x + source[:, None] * x_l + d[None, :] * x_d, mask=inside & valid[:, None], other=float("nan"))
        stored = inside & valid[:, None] if PUT else inside
        tl.store(out + target[:, None] * width + d[None, :], tokens, mask=stored)


def launch(x: torch.Tensor, indices: torch.Tensor, put: bool) -> torch.Tensor:
    """x permuted by indices, or with ``put`` by their inverse."""
    batch, length, width = x.shape
    out = x.new_full(x.shape, float("nan")) if put else x.new_empty(x.shape)
    channels = min(CHANNELS, triton.next_power_of_2(width))
    tokens = min(NUMBERS // channels, triton.next_power_of_2(length))
    blocks = triton.cdiv(length, tokens)
    move[(batch * blocks,)](
        x, indices, out, *x.stride(), *indices.stride(), length, width, blocks,
        PUT=put, TOKENS=tokens, CHANNELS=channels,
    )  # fmt: skip
    return out


@torch.library.custom_op("tokendyn::move_tokens", mutates_args=())
def move_tokens(x: torch.Tensor, indices: torch.Tensor, put: bool) -> torch.Tensor:
    """See :func:`launch`."""
    return launch(x, indices, put)


@move_tokens.register_fake
def _(x, indices, put):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):
    _, indices, ctx.put = inputs
    ctx.save_for_backward(indices)


def _differentiate(ctx, gradient):
    (indices,) = ctx.saved_tensors
    return torch.ops.tokendyn.move_tokens(gradient, indices, not ctx.put), None, None


move_tokens.register_autograd(_differentiate, setup_context=_save)


def take_tokens(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """See :func:`tokendyn.take_tokens`."""
    return torch.ops.tokendyn.move_tokens(x, indices, False)


def put_tokens(y: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """See :func:`tokendyn.put_tokens`."""
    return torch.ops.tokendyn.move_tokens(y, indices, True)
