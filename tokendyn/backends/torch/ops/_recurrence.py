"""The one solver under the scans: a linear recurrence along the first axis, and its transpose.

::

    forward     h_l = a_l h_{l-1} + x_l        h_{-1} = h0 or 0
    transposed  g_l = a_{l+1} g_{l+1} + x_l    g_L = 0

They are the gradients of each other: with G the cotangent of h, the transposed recurrence of G is the
cotangent of x, and times h_{l-1} that of a. So one function serves derivatives of every order.

Only products of the a's are made, never ratios, so growth (a > 1), resets (a = 0) and tiny a are exact. Where the
recurrence is solved in blocks (see :func:`linear_recurrence`) a product over sqrt(L) tokens must not overflow.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from tokendyn.backends.torch.ops._function import Function

#: Where a step has fewer elements than this, launching it costs more than running it, and blocks pay although
#: they triple the arithmetic.
_LAUNCH_BOUND = {"cpu": 1 << 11, "cuda": 1 << 19}
_SHORTEST_IN_BLOCKS = 48


def linear_recurrence(
    a: torch.Tensor, x: torch.Tensor, h0: torch.Tensor | None = None, *, transposed: bool = False, cuts: bool = False
) -> torch.Tensor:
    """Solve one of the two recurrences above along axis 0. Differentiable to any order.

    Args:
        a: (L, ...) factors; axes of size 1 after the first broadcast against x.
        x: (L, ...) additive terms, of the same number of axes and dtype.
        h0: (...) the state before the first token; forward form only.
        transposed: the second form of the two. It does not read ``a[0]``.
        cuts: where a is -0 nothing is passed on, not even what is infinite or NaN, and a has no gradient.

    Returns:
        (L, ...) all states, in the shape of x.

    Cost:
        O(L) products; L steps, or about 3 sqrt(L) where a step is too small to keep the device busy.
    """
    return _Recurrence.call(a, x, h0, transposed, cuts)


def _solve(a: torch.Tensor, x: torch.Tensor, h0: torch.Tensor | None, transposed: bool, cuts: bool) -> torch.Tensor:
    """Block by block: first every block from a zero state, all blocks in lockstep, and beside it the products
    ``reach`` of the factors between the state before the block and each place; then the true states are handed
    from block to block. With a single block this is the plain loop.
    """
    length = len(x)
    block = _block_length(x)
    h = torch.empty_like(x, memory_format=torch.contiguous_format)
    reach = torch.empty_like(a, memory_format=torch.contiguous_format) if block < length else None
    toward = 1 if transposed else -1

    def passed(h: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return torch.where(factor.signbit(), 0.0, h) if cuts else h

    for i in range(block):
        # The i-th place of every block, seen in the direction of the recurrence; blocks are counted from where it
        # starts. The block that comes first needs no reach.
        here = slice((length - 1 - i) % block, length - i, block) if transposed else slice(i, length, block)
        before = slice(here.start + toward, here.stop + toward, block)
        factor = a[before if transposed else here]
        if i == 0:
            h[here] = x[here]
            if reach is not None:
                reach[here][: len(factor)] = factor
        else:
            torch.addcmul(x[here], factor, passed(h[before], factor), out=h[here])
            if reach is not None:
                torch.mul(factor, passed(reach[before], factor), out=reach[here])
        if i == 0 and h0 is not None:
            h[0].addcmul_(a[0], h0)
    if reach is not None and transposed:
        for stop in range(length - block, 0, -block):
            span = slice(max(stop - block, 0), stop)
            h[span].addcmul_(reach[span], passed(h[stop], reach[span]))
    elif reach is not None:
        for start in range(block, length, block):
            span = slice(start, start + block)
            h[span].addcmul_(reach[span], passed(h[start - 1], reach[span]))
    return h


def _block_length(x: torch.Tensor) -> int:
    length = len(x)
    bound = _LAUNCH_BOUND.get(x.device.type, _LAUNCH_BOUND["cuda"])
    if length < _SHORTEST_IN_BLOCKS or x.numel() >= bound * length:
        return length
    return math.isqrt(length)


# One node for torch.compile, which would otherwise unroll the loop and copy all of h at every step of it.
_solve_as_one_node = torch.library.custom_op(
    "tokendyn::linear_recurrence",
    _solve,
    mutates_args=(),
    schema="(Tensor a, Tensor x, Tensor? h0, bool transposed, bool cuts) -> Tensor",
)


@_solve_as_one_node.register_fake
def _(a: torch.Tensor, x: torch.Tensor, h0: torch.Tensor | None, transposed: bool, cuts: bool) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class _Recurrence(Function):
    @staticmethod
    def forward(
        a: torch.Tensor, x: torch.Tensor, h0: torch.Tensor | None, transposed: bool, cuts: bool
    ) -> torch.Tensor:
        solve = _solve_as_one_node if torch.compiler.is_compiling() else _solve
        return solve(a, x, h0, transposed, cuts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        a, _, h0, ctx.transposed, ctx.cuts = inputs
        ctx.save_for_backward(a, h0, output)
        ctx.save_for_forward(a, h0, output)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[Any, ...]:
        a, h0, h = ctx.saved_tensors
        g = linear_recurrence(a, cotangents[0], transposed=not ctx.transposed, cuts=ctx.cuts)
        da = None
        if ctx.needs_input_grad[0]:
            da = _sum_to(_before(g, None) * h if ctx.transposed else g * _before(h, h0), a.shape)
            da = torch.where(a.signbit(), 0.0, da) if ctx.cuts else da
        return da, g, None if h0 is None else a[0] * g[0], None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, int]:
        # The mapped axis becomes the second, behind the tokens.
        def place(value: torch.Tensor, dim: int | None, at: int, spread: bool) -> torch.Tensor:
            value = value.unsqueeze(at) if dim is None else value.movedim(dim, at)
            return value.expand(*value.shape[:at], info.batch_size, *value.shape[at + 1 :]) if spread else value

        a, x, h0, transposed, cuts = inputs
        a = place(a, in_dims[0], 1, spread=False)
        x = place(x, in_dims[1], 1, spread=True)
        h0 = None if h0 is None else place(h0, in_dims[2], 0, spread=True)
        return linear_recurrence(a, x, h0, transposed=transposed, cuts=cuts), 1

    @staticmethod
    def tangent(ctx: Any, *tangents: Any) -> torch.Tensor:
        a, h0, h = ctx.saved_tensors
        da, dx, dh0, *_ = tangents
        source = torch.zeros_like(h) if dx is None else dx
        if da is not None:
            change = _after(h) * _after(da) if ctx.transposed else _before(h, h0) * da
            if ctx.cuts:
                change = torch.where((_after(a) if ctx.transposed else a).signbit(), 0.0, change)
            source = source + change
        return linear_recurrence(a, source, dh0, transposed=ctx.transposed, cuts=ctx.cuts)


def _before(h: torch.Tensor, h0: torch.Tensor | None) -> torch.Tensor:
    """h_{l-1} at place l."""
    first = torch.zeros_like(h[:1]) if h0 is None else h0.unsqueeze(0)
    return torch.cat([first, h[:-1]])


def _after(h: torch.Tensor) -> torch.Tensor:
    """h_{l+1} at place l."""
    return torch.cat([h[1:], torch.zeros_like(h[:1])])


def _sum_to(value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Sum over the axes along which ``shape`` has size 1: the transpose of broadcasting."""
    axes = [i for i, (have, want) in enumerate(zip(value.shape, shape, strict=True)) if have != want]
    return value.sum(axes, keepdim=True) if axes else value
