"""The one solver under the scans: a linear recurrence along the first axis, and its transpose.

::

    forward     h_l = a_l h_{l-1} + x_l        h_{-1} = h0 or 0
    transposed  g_l = a_{l+1} g_{l+1} + x_l    g_L = 0

They are the gradients of each other: with G the cotangent of h, the transposed recurrence of G is the
cotangent of x, and times h_{l-1} that of a. So one function serves every derivative of every order.

Only products of the a's are made, never ratios, so growth (a > 1), resets (a = 0) and tiny a are exact.
"""

from __future__ import annotations

from typing import Any

import torch

#: Up to this length one pass over the tokens, one step a token, is faster than blocks.
_SEQUENTIAL_UP_TO = 64


def linear_recurrence(
    a: torch.Tensor, x: torch.Tensor, h0: torch.Tensor | None = None, *, transposed: bool = False
) -> torch.Tensor:
    """Solve the recurrence above along axis 0.

    Args:
        a: (L, ...) factors; axes of size 1 after the first broadcast against x.
        x: (L, ...) additive terms, of the same number of axes and dtype.
        h0: (...) the state before the first token; forward only.
        transposed: the second form of the two. It does not read ``a[0]``.

    Returns:
        (L, ...) all states, in the shape of x.

    Cost:
        O(L) products and, where L is long, about 3 sqrt(L) steps instead of L.
    """
    rule = _Recurrence if torch.compiler.is_compiling() else _RecurrenceWithJvp
    return rule.apply(a, x, h0, transposed)


def _solve(a: torch.Tensor, x: torch.Tensor, h0: torch.Tensor | None, transposed: bool) -> torch.Tensor:
    length = x.shape[0]
    h = torch.empty_like(x, memory_format=torch.contiguous_format)
    if transposed:
        # Seen from the end, a_{l+1} stands where the forward recurrence has a_l.
        at, step, shift = length - 1, -1, 1
    else:
        at, step, shift = 0, 1, 0
    h[at] = x[at] if h0 is None else torch.addcmul(x[at], a[at], h0)
    for _ in range(length - 1):
        before, at = at, at + step
        torch.addcmul(x[at], a[at + shift], h[before], out=h[at])
    return h


def _sum_to(value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    axes = [i for i, (have, want) in enumerate(zip(value.shape, shape, strict=True)) if have != want]
    return value.sum(axes, keepdim=True) if axes else value


def _before(h: torch.Tensor, h0: torch.Tensor | None) -> torch.Tensor:
    """h_{l-1} at place l."""
    first = torch.zeros_like(h[:1]) if h0 is None else h0.unsqueeze(0)
    return torch.cat([first, h[:-1]])


def _after(h: torch.Tensor) -> torch.Tensor:
    return torch.cat([h[1:], torch.zeros_like(h[:1])])


class _Recurrence(torch.autograd.Function):
    generate_vmap_rule = False

    @staticmethod
    def forward(a: torch.Tensor, x: torch.Tensor, h0: torch.Tensor | None, transposed: bool) -> torch.Tensor:
        return _solve(a, x, h0, transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        a, _, h0, ctx.transposed = inputs
        ctx.save_for_backward(a, h0, output)
        ctx.save_for_forward(a, h0, output)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[Any, ...]:
        a, h0, h = ctx.saved_tensors
        g = linear_recurrence(a, cotangents[0], transposed=not ctx.transposed)
        if ctx.transposed:
            da = _sum_to(_before(g, None) * h, a.shape) if ctx.needs_input_grad[0] else None
            return da, g, None, None
        da = _sum_to(g * _before(h, h0), a.shape) if ctx.needs_input_grad[0] else None
        return da, g, None if h0 is None else a[0] * g[0], None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], a: Any, x: Any, h0: Any, transposed: bool) -> tuple[Any, int]:
        # The mapped axis becomes the second: behind the tokens, before everything else.
        def place(value: torch.Tensor, dim: int | None, at: int) -> torch.Tensor:
            return value.unsqueeze(at) if dim is None else value.movedim(dim, at)

        a = place(a, in_dims[0], 1)
        x = place(x, in_dims[1], 1)
        h0 = None if h0 is None else place(h0, in_dims[2], 0)
        if x.shape[1] != info.batch_size:
            x = x.expand(x.shape[0], info.batch_size, *x.shape[2:])
        if h0 is not None and h0.shape[0] != info.batch_size:
            h0 = h0.expand(info.batch_size, *h0.shape[1:])
        return linear_recurrence(a, x, h0, transposed=transposed), 1


class _RecurrenceWithJvp(_Recurrence):
    """The same with forward-mode derivatives, which torch.compile does not take in a Function."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> torch.Tensor:
        a, h0, h = ctx.saved_tensors
        ta, tx, th0, _ = tangents
        source = torch.zeros_like(h) if tx is None else tx
        if ta is not None:
            if ctx.transposed:
                source = source + _after(h * ta)
            else:
                source = source + _before(h, h0) * ta
        return linear_recurrence(a, source, th0, transposed=ctx.transposed)
