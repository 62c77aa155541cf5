"""Products with the Laplace kernel of sorted scores, in linear memory, and all their derivatives.

With K_ij = exp(-|s_i - s_j|/τ) and σ_ij = sgn(s_i - s_j), σ = 0 between equal scores, three products occur::

    K   Σ_j K_ij x_j            D   Σ_j σ_ij K_ij x_j            K°  Σ_j σ_ij² K_ij x_j

K differentiates to D, and D and K° to each other, so the three are closed under derivatives of any order.
D and K° leave out the pairs of equal score, where |·| has derivative 0 by convention.

Of sorted scores K is semiseparable: beyond a place p between i and j, K_ij = K_ip K_pj. So the sequence is cut
into chunks. Inside a chunk the product is a matrix product; what lies outside reaches a chunk through one vector
from each side, handed on from chunk to chunk by a decayed recurrence. Every exponent is a difference of two
scores, never positive, so nothing overflows or cancels at any τ.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tokendyn.backends.torch.ops._function import Function
from tokendyn.backends.torch.ops._precision import without_autocast
from tokendyn.backends.torch.ops._recurrence import linear_recurrence

_CHUNK = 64
_DERIVATIVE = {"K": "D", "D": "K°", "K°": "D"}


def laplace_kernel(s: torch.Tensor, x: torch.Tensor, tau: float) -> torch.Tensor:
    """``K x`` for scores s (b, L), sorted either way, and x (b, L, D) of the same dtype.

    Differentiable in s and x to any order. O(b L D) time and memory.
    """
    b, length, width = x.shape
    size = min(length, _CHUNK)
    missing = -length % size
    if missing:  # zeros at the last score add nothing
        s = torch.cat([s, s[:, -1:].expand(b, missing)], 1)
        x = F.pad(x, (0, 0, 0, missing))
    product = _product(s.reshape(b, -1, size), x.reshape(b, -1, size, width), tau, "K")
    return product.reshape(b, -1, width)[:, :length]


def _product(s: torch.Tensor, x: torch.Tensor, tau: float, kind: str) -> torch.Tensor:
    """One of the three products, of scores (b, chunks, size) and x (b, chunks, size, D)."""
    return _Laplace.call(s, x, tau, kind)


def _evaluate(s: torch.Tensor, x: torch.Tensor, tau: float, kind: str) -> torch.Tensor:
    difference = s.unsqueeze(-1) - s.unsqueeze(-2)
    kernel = (difference.abs() / -tau).exp()
    if kind == "K":
        weights = kernel
    elif kind == "D":
        weights = kernel * difference.sign()
    else:
        weights = kernel * (difference != 0)
    product = weights @ x
    if s.shape[1] == 1:
        return product
    earlier = _outside(s, x, kernel, tau, kind != "K", later=False)
    later = _outside(s, x, kernel, tau, kind != "K", later=True)
    if kind != "D":
        return product + earlier + later
    upward = (s[:, -1, -1] >= s[:, 0, 0]).to(x.dtype) * 2 - 1
    return product + upward[:, None, None, None] * (earlier - later)


def _outside(
    s: torch.Tensor, x: torch.Tensor, kernel: torch.Tensor, tau: float, apart: bool, later: bool
) -> torch.Tensor:
    """What the chunks before (or after) give to every place: Σ K_ij x_j over them, (b, chunks, size, D).

    ``apart`` leaves out the pairs of equal score, also where a group of equals spans several chunks.
    """
    edge = 0 if later else -1  # the side of a chunk that later chunks (earlier ones) see
    near, far = (slice(None, -1), slice(1, None)) if later else (slice(1, None), slice(None, -1))
    margin = (0, 0, 0, 0, 0, 1) if later else (0, 0, 0, 0, 1, 0)
    edges = s[..., edge]  # (b, chunks)

    def from_chunk_to_chunk(weights: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        weights = F.pad(weights, (1, 0)).T.unsqueeze(-1)
        return linear_recurrence(weights, own.transpose(0, 1), transposed=later).transpose(0, 1)

    gaps = (edges[:, 1:] - edges[:, :-1]).abs()
    steps = (gaps / -tau).exp()
    totals = from_chunk_to_chunk(steps, (kernel[..., edge, None, :] @ x).squeeze(-2))[:, far]
    distance = (s[:, near] - edges[:, far, None]).abs()
    reach = (distance / -tau).exp().unsqueeze(-1)
    if not apart:
        return F.pad(reach * totals.unsqueeze(-2), margin)
    # Places that equal the edge they look at see what that edge itself sees: the sum without its equals.
    equal_edges = gaps == 0
    different = (s != edges.unsqueeze(-1)).to(x.dtype)
    own = ((kernel[..., edge, :] * different).unsqueeze(-2) @ x).squeeze(-2)
    across = F.pad((steps * ~equal_edges).unsqueeze(-1) * totals, margin[2:])
    strict = from_chunk_to_chunk(equal_edges.to(x.dtype), own + across)[:, far]
    equal = (distance == 0).unsqueeze(-1)
    return F.pad(torch.where(equal, strict.unsqueeze(-2), reach * totals.unsqueeze(-2)), margin)


class _Laplace(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(s: torch.Tensor, x: torch.Tensor, tau: float, kind: str) -> torch.Tensor:
        with without_autocast(x):
            return _evaluate(s, x, tau, kind)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        s, x, ctx.tau, ctx.kind = inputs
        ctx.save_for_backward(s, x)
        ctx.save_for_forward(s, x)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[Any, ...]:
        s, x = ctx.saved_tensors
        (g,) = cotangents
        sign = -1.0 if ctx.kind == "D" else 1.0  # D is antisymmetric, the others are symmetric
        ds = dx = None
        if ctx.needs_input_grad[0]:
            both = _product(s, torch.cat([x, g], -1), ctx.tau, _DERIVATIVE[ctx.kind])
            of_x, of_g = both.split(x.shape[-1], -1)
            ds = (g * of_x + sign * x * of_g).sum(-1) * (-1.0 / ctx.tau)
        if ctx.needs_input_grad[1]:
            dx = sign * _product(s, g, ctx.tau, ctx.kind)
        return ds, dx, None, None

    @staticmethod
    def tangent(ctx: Any, *tangents: Any) -> torch.Tensor:
        s, x = ctx.saved_tensors
        ds, dx, _, _ = tangents
        result = torch.zeros_like(x) if dx is None else _product(s, dx, ctx.tau, ctx.kind)
        if ds is not None:
            inner, ds = _DERIVATIVE[ctx.kind], ds.unsqueeze(-1)
            change = ds * _product(s, x, ctx.tau, inner) - _product(s, ds * x, ctx.tau, inner)
            result = result - change / ctx.tau
        return result
