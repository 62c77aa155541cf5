"""The chunked engine: the fast and frugal way on a CPU, with a reverse pass written by hand.

The sequence is walked in chunks whose states fit into the cache. Only the state before each chunk is kept; the
reverse pass makes the others again. Every buffer is made once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from tokendyn.backends.torch.ops import _scan_plain
from tokendyn.backends.torch.ops._function import transformed
from tokendyn.backends.torch.ops._precision import without_autocast
from tokendyn.backends.torch.ops._scan_plain import Recurrence, solve_plainly

#: Elements of one chunk of states: three such buffers fit into a core's second-level cache.
_CHUNK_ELEMENTS = 1 << 17
_SHORTEST_CHUNK = 8


def declines(call: Any) -> str | None:
    """Why this engine cannot take a call, or None. See :class:`_engines.ScanCall`."""
    if call.device != "cpu":
        return f"the arrays are on {call.device}, it runs on the CPU, where a launch costs little"
    if call.transformed:
        return "its autograd function has no rule for torch.func transforms"
    if torch.compiler.is_compiling():
        return "torch.compile would unroll its loop"
    return None


def solve(r: Recurrence) -> tuple[torch.Tensor, torch.Tensor]:
    """What :func:`_scan_plain.solve_plainly` returns."""
    inputs = tuple(None if t is None else t.contiguous() for t in (r.step, r.v, r.A, r.B, r.C, r.h0))
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    return _Chunked.apply(*inputs, r.resets, keep)


run = functools.partial(_scan_plain.run, solve=solve)


class _Chunks:
    """The chunks of one recurrence, and the buffers in which they are worked on."""

    def __init__(self, r: Recurrence) -> None:
        length, *rest, channels = r.step.shape
        rest[-1] = r.B.shape[-2]
        per_token = r.B[0].numel() * channels
        self.r = r
        self.size = min(length, max(_SHORTEST_CHUNK, _CHUNK_ELEMENTS // per_token))
        self.begun = [True] * length  # of tensors without values, as in a trace, none can be told from others
        if type(r.resets) is torch.Tensor and not r.resets.is_meta:
            self.begun = r.resets.flatten(1).any(1).tolist()
        self.decay = r.step.new_empty(self.size, *rest[:-1], r.A.shape[1], channels)
        self.states = r.step.new_empty(self.size, *rest, channels)

    def spans(self) -> Iterator[slice]:
        for start in range(0, len(self.r.step), self.size):
            yield slice(start, min(start + self.size, len(self.r.step)))

    def passed(self, l: int, h: torch.Tensor) -> torch.Tensor:
        """What token l takes over of the state before it, or gives back of a gradient: nothing where a sequence begins,
        not even what is no number, which a decay of 0 would pass on."""
        resets = self.r.resets
        return h if resets is None or not self.begun[l] else h.masked_fill(resets[l], 0.0)

    def run(self, span: slice, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """exp(Δ A) and all states of a chunk, from the state before it."""
        r, count = self.r, span.stop - span.start
        decay = torch.mul(r.step[span], r.A, out=self.decay[:count]).exp_()
        if r.resets is not None:
            decay.masked_fill_(r.resets[span], 0.0)
        states = torch.mul(r.v[span], r.B[span], out=self.states[:count])
        for l, a, state in zip(range(span.start, span.stop), decay.unbind(), states.unbind(), strict=True):
            h = state.addcmul_(a, self.passed(l, h))
        return decay, states


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        step: torch.Tensor,
        v: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        h0: torch.Tensor | None,
        resets: torch.Tensor | None,
        keep: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        chunks = _Chunks(Recurrence(step, v, A, B, C, h0, resets))
        h = chunks.states.new_zeros(chunks.states.shape[1:]) if h0 is None else h0
        y = torch.empty_like(v)
        before = []
        with without_autocast(step):
            for span in chunks.spans():
                if keep:
                    before.append(h)
                _, states = chunks.run(span, h)
                torch.matmul(C[span].mT, states, out=y[span])
                h = states[-1].clone()
        ctx.save_for_backward(step, v, A, B, C, h0, resets, *before)
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        dy, dh = cotangents
        step, v, A, B, C, h0, resets, *before = ctx.saved_tensors
        r = Recurrence(step, v, A, B, C, h0, resets)
        if torch.is_grad_enabled() or transformed():
            return *_differentiable_vjp(r, dy, dh), None, None
        with without_autocast(step):
            return *_vjp(r, before, dy, dh), None, None


def _vjp(
    r: Recurrence, before: list[torch.Tensor], dy: torch.Tensor | None, dh: torch.Tensor | None
) -> tuple[Any, ...]:
    """With g_l the gradient that reaches h_l and ā_l = exp(Δ_l A)::

    g_l = dy_l C_l + ā_{l+1} ∘ g_{l+1}      dC_l = Σ_c dy_l h_l      dB_l = Σ_c v_l g_l      dv_l = ⟨B_l, g_l⟩
    q_l = ā_l ∘ h_{l-1} ∘ g_l               dΔ_l = Σ_n A ∘ q_l       dA = Σ_l Δ_l q_l
    """
    A, chunks = r.A, _Chunks(r)
    gradients = torch.empty_like(chunks.states)
    dy = torch.zeros_like(r.v) if dy is None else dy.contiguous()
    dstep, dv = torch.empty_like(dy), torch.empty_like(dy)
    dB, dC = (torch.empty_like(r.B) for _ in range(2))
    dA = torch.zeros_like(A)
    carried = dh
    for span, h in reversed(list(zip(chunks.spans(), before, strict=True))):
        decay, states = chunks.run(span, h)
        count = len(states)
        g = torch.mul(dy[span], r.C[span], out=gradients[:count])
        if carried is not None:
            g[-1].add_(carried)
        places = g.unbind()
        for l in range(count - 1, 0, -1):
            places[l - 1].addcmul_(decay[l], chunks.passed(span.start + l, places[l]))
        carried = decay[0] * chunks.passed(span.start, places[0])
        torch.matmul(states, dy[span].mT, out=dC[span])
        torch.matmul(g, r.v[span].mT, out=dB[span])
        torch.matmul(r.B[span].mT, g, out=dv[span])
        g[1:].mul_(states[:-1])
        g[0].mul_(h)
        if r.resets is not None:
            g.masked_fill_(r.resets[span], 0.0)
        q = decay.mul_(g) if A.shape[1] == g.shape[-2] else decay.mul_(g.sum(-2, keepdim=True))
        torch.sum(torch.mul(q, A, out=gradients[:count, ..., : A.shape[1], :]), -2, keepdim=True, out=dstep[span])
        dA += q.mul_(r.step[span]).sum((0, 1))
    return dstep, dv, dA, dB, dC, None if r.h0 is None else carried


def _differentiable_vjp(r: Recurrence, dy: torch.Tensor | None, dh: torch.Tensor | None) -> tuple[Any, ...]:
    """The same through autograd, for derivatives of the second and higher orders."""
    inputs = (r.step, r.v, r.A, r.B, r.C, r.h0)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    with torch.enable_grad():
        outputs = solve_plainly(r)
        given = [(out, grad) for out, grad in zip(outputs, (dy, dh), strict=True) if grad is not None]
        gradients = iter(
            torch.autograd.grad(
                [out for out, _ in given], wanted, [grad for _, grad in given], create_graph=True, allow_unused=True
            )
        )
    return tuple(next(gradients) if t is not None and t.requires_grad else None for t in inputs)
