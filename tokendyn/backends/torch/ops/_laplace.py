"""Products with the Laplace kernel of sorted scores, by decayed scans, and all their derivatives.

With K_ij = exp(-|s_i - s_j|/τ) and σ_ij = sgn(s_i - s_j), σ = 0 between equal scores, three products occur::

    K   Σ_j K_ij x_j            D   Σ_j σ_ij K_ij x_j            K°  Σ_j σ_ij² K_ij x_j

K differentiates to D, and D and K° to each other, so these three are closed under derivatives of any
order. D and K° leave out the pairs of equal score, where |·| has derivative 0 by convention: the scans
stop before the group of equals, not before the place.
"""

from __future__ import annotations

from typing import Any

import torch

from tokendyn.backends.torch.ops._recurrence import linear_recurrence

#: kind -> (weight of earlier minus weight of later places is a sign?, are equals counted?, kind of derivative)
_DERIVATIVE = {"K": "D", "D": "K°", "K°": "D"}


def laplace_kernel(s: torch.Tensor, x: torch.Tensor, tau: float) -> torch.Tensor:
    """``K x`` with K_ij = exp(-|s_i - s_j|/tau), for scores s (b, L) in sorted order and x (b, L, D).

    Differentiable in s and x to any order; the derivative of |·| at 0 is 0. O(b L D) time and memory.
    """
    return _product(s, x, tau, "K")


def _product(s: torch.Tensor, x: torch.Tensor, tau: float, kind: str) -> torch.Tensor:
    rule = _Laplace if torch.compiler.is_compiling() else _LaplaceWithJvp
    return rule.apply(s, x, tau, kind)


def _evaluate(s: torch.Tensor, x: torch.Tensor, tau: float, kind: str) -> torch.Tensor:
    gaps = (s[:, 1:] - s[:, :-1]).abs()
    decay = torch.nn.functional.pad(torch.exp(-gaps / tau), (1, 0)).T.unsqueeze(-1)  # (L, b, 1)
    tokens = x.transpose(0, 1)
    forward = linear_recurrence(decay, tokens)
    backward = linear_recurrence(decay, tokens, transposed=True)
    zero = torch.zeros_like(tokens[:1])
    # Sums over earlier and over later places, without the place itself.
    earlier = torch.cat([zero, decay[1:] * forward[:-1]])
    later = torch.cat([decay[1:] * backward[1:], zero])
    if kind == "K":
        return (earlier + tokens + later).transpose(0, 1)
    place = torch.arange(s.shape[1], device=s.device).expand_as(s)
    tied = gaps == 0
    first = torch.where(torch.nn.functional.pad(tied, (1, 0)), 0, place).cummax(-1).values
    last = torch.where(torch.nn.functional.pad(tied, (0, 1)), s.shape[1] - 1, place).flip(-1).cummin(-1).values.flip(-1)
    earlier = earlier.gather(0, first.T.unsqueeze(-1).expand_as(tokens))
    later = later.gather(0, last.T.unsqueeze(-1).expand_as(tokens))
    if kind == "K°":
        return (earlier + later).transpose(0, 1)
    upward = torch.where(s[:, -1:] >= s[:, :1], 1.0, -1.0).to(x.dtype)[:, :, None]
    return upward * (earlier - later).transpose(0, 1)


class _Laplace(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(s: torch.Tensor, x: torch.Tensor, tau: float, kind: str) -> torch.Tensor:
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
        sign = -1.0 if ctx.kind == "D" else 1.0  # K and K° are symmetric, D is antisymmetric
        ds = dx = None
        if ctx.needs_input_grad[0]:
            inner = _DERIVATIVE[ctx.kind]
            of_x, of_g = _product(s, x, ctx.tau, inner), _product(s, g, ctx.tau, inner)
            ds = (g * of_x + sign * x * of_g).sum(-1) * (-1.0 / ctx.tau)
        if ctx.needs_input_grad[1]:
            dx = sign * _product(s, g, ctx.tau, ctx.kind)
        return ds, dx, None, None


class _LaplaceWithJvp(_Laplace):
    """The same with forward-mode derivatives, which torch.compile does not take in a Function."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> torch.Tensor:
        s, x = ctx.saved_tensors
        ts, tx, _, _ = tangents
        result = torch.zeros_like(x) if tx is None else _product(s, tx, ctx.tau, ctx.kind)
        if ts is not None:
            inner, ts = _DERIVATIVE[ctx.kind], ts.unsqueeze(-1)
            change = ts * _product(s, x, ctx.tau, inner) - _product(s, ts * x, ctx.tau, inner)
            result = result - change / ctx.tau
        return result
