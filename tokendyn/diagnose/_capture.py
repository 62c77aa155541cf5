"""What a trained layer's scan was given and what it made of it, seen by hooks while the model runs as it is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokendyn import _operations as ops
from tokendyn.diagnose._attention import attention_blocks
from tokendyn.errors import OptionError

#: While captures are measured: the scans made for that are no scans of the model.
_measuring: ContextVar[bool] = ContextVar("tokendyn_measuring", default=False)


@dataclass
class Projections:
    """The maps that make Δ, B and C of a layer's tokens, where they are linear up to a bias or a norm.

    Attributes:
        S_B, S_C: (N, d). Where an RMS norm follows them its gains are folded in: B_l = S_B x_l / ρ(x_l) with ρ > 0, so
            that every x_lᵀ M x_j of these maps has the sign of ⟨C_l, B_j⟩, and its size only up to these factors.
        s_delta: factors of S_Δ, left to right.
        normalised: a norm stands between these maps and the scan (Falcon-Mamba, Jamba).
        biased: B or C have a bias, which no spectrum shows.
        step_gain: (R,) the gain of the RMS norm between the two factors of S_Δ, where there is one.
        linear: False where the norm is none of these, so that nothing can be said from the maps alone.
    """

    S_B: Tensor
    S_C: Tensor
    s_delta: tuple[Tensor, ...]
    normalised: bool = False
    biased: bool = False
    step_gain: Tensor | None = None
    linear: bool = True


@dataclass(eq=False)
class Capture:
    """One selective scan of one layer on the inputs given; tensors are detached, on the model's device.

    Attributes:
        layer: the layer's name in the model; ``index``: which of its scans, where it makes several.
        family: the adapter that saw it.
        u: (b, d, L) tokens as the scan got them; ``driven``: as they entered the state, where the model rounds them.
        delta: (b, d, L) Δ, after bias and softplus.
        linear_part: makes :attr:`pre`, for those who ask.
        A: (d, N); B, C: (b, N, L); D: (d,) or None; z: (b, d, L) or None, the gate before its activation.
        y: (b, d, L) what the scan gave: with the skip, and gated where there is a z.
        projections: the maps behind Δ, B, C, or None where they cannot be seen.
        tokens_in, tokens_out: (b, L, D) the residual stream before and after the layer's block.
        fused: where the model ran a fused path, which shows nothing, and the rest was seen by running the layer's other
            path beside it: the largest difference of the two outputs over the largest output. Else None.
        reorders: the layer brought its tokens into another order before the scan.
        notes: what this capture could not see.
    """

    layer: str
    family: str
    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    y: Tensor
    index: int = 0
    linear_part: Callable[[], Tensor | None] | None = None
    driven: Tensor | None = None
    projections: Projections | None = None
    tokens_in: Tensor | None = None
    tokens_out: Tensor | None = None
    fused: float | None = None
    reorders: bool = False
    notes: tuple[str, ...] = ()

    @cached_property
    def pre(self) -> Tensor | None:
        """(b, d, L) S_Δ x, before the bias and the softplus, or None where it cannot be seen."""
        return None if self.linear_part is None else self.linear_part()

    @property
    def title(self) -> str:
        """The layer's name, and which of its scans where it makes several."""
        return self.layer if self.index == 0 else f"{self.layer} (scan {self.index + 1})"

    @property
    def source(self) -> Tensor:
        """(b, d, L) the tokens that enter the state."""
        return self.u if self.driven is None else self.driven

    def attention(self, channel: int, sequence: int = 0) -> Tensor:
        """(L, L) hidden attention P of one channel on one sequence, in float64; O(L² N) time, O(L²) memory."""
        length = self.u.shape[-1]
        if not -self.u.shape[1] <= channel < self.u.shape[1]:
            raise OptionError(f"attention: channel is {channel}, expected 0 to {self.u.shape[1] - 1}")
        weights = torch.zeros(length, length, dtype=torch.float64, device=self.u.device)
        for rows, columns, block in attention_blocks(self, sequence, [channel], torch.float64):
            weights[rows, columns] = block[0]
        return weights

    def reconstruct(self, sequence: int = 0, channels: list[int] | None = None) -> Tensor:
        """(c, L) the output ``(P u + D u) ∘ silu(z)`` by hidden attention, block by block, in float64.

        An independent path to :attr:`y`: no recurrence is run. O(c L² N) time; no (c, L, L) is ever made.
        """
        chosen = list(range(self.u.shape[1])) if channels is None else channels
        exact = torch.float64
        source = self.source[sequence, chosen].to(exact)
        out = torch.zeros_like(source)
        for rows, columns, block in attention_blocks(self, sequence, chosen, exact):
            out[:, rows] += torch.einsum("crl,cl->cr", block, source[:, columns])
        if self.D is not None:
            out += self.D[chosen, None].to(exact) * self.u[sequence, chosen].to(exact)
        return out if self.z is None else out * F.silu(self.z[sequence, chosen].to(exact))

    def state_output(self) -> Tensor:
        """(b, d, L) P u: the scan's output without skip and gate, by one scan of the captured tensors."""
        return ops.selective_scan(self.source, self.delta, self.A.to(self.delta.dtype), self.B, self.C)


@dataclass
class Site:
    """One layer with a selective scan, and how to watch it: ``watch(record)`` installs hooks and returns what
    removes them; ``record(make)`` is called once a scan in the layer's forward, ``make()`` gives Capture's fields, or
    None where nothing could be seen."""

    name: str
    module: nn.Module
    family: str
    watch: Callable[[Callable[..., None]], Callable[[], None]]
    block: nn.Module | None = None
    in_stream: bool = True  # False if the layer stands alone, with no residual stream to measure
    pending: list[Capture] = field(default_factory=list)
    seconds: float = 0.0  # taken by hooks, without what is done with the captures


@contextlib.contextmanager
def watching(sites: list[Site], receive: Callable[[Capture], Any]) -> Iterator[None]:
    """Let a model run as it is; ``receive`` gets every scan's :class:`Capture` when its block is through.

    Nothing is kept here: what ``receive`` does not keep is freed, so a model's layers are never held all at once.
    """
    undo: list[Callable[[], None]] = []
    try:
        for site in sites:
            undo.append(_watch(site, receive))
        yield
    finally:
        for remove in reversed(undo):
            remove()


def _watch(site: Site, receive: Callable[[Capture], Any]) -> Callable[[], None]:
    block = site.block or site.module
    entering: list[Tensor | None] = []

    def record(make: Callable[[], dict[str, Any] | None]) -> None:
        if _measuring.get():
            return
        begun = time.perf_counter()
        if (fields := make()) is not None:
            site.pending.append(Capture(layer=site.name, family=site.family, index=len(site.pending), **fields))
        site.seconds += time.perf_counter() - begun

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        begun = time.perf_counter()
        site.pending.clear()
        entering[:] = [_stream((*args, *kwargs.values()))]
        site.seconds += time.perf_counter() - begun

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        begun = time.perf_counter()
        leaving = _stream(output if isinstance(output, tuple) else (output,))
        before = entering[0] if entering else None
        site.seconds += time.perf_counter() - begun
        measuring = _measuring.set(True)
        try:
            for capture in site.pending:
                if site.in_stream:
                    capture.tokens_in, capture.tokens_out = before, leaving
                receive(capture)
        finally:
            _measuring.reset(measuring)
            site.pending.clear()
            entering.clear()

    handles = [
        block.register_forward_pre_hook(enter, with_kwargs=True),
        block.register_forward_hook(leave),
    ]
    unwatch = site.watch(record)

    def remove() -> None:
        unwatch()
        for handle in handles:
            handle.remove()
        site.pending.clear()

    return remove


def _stream(values: tuple[Any, ...]) -> Tensor | None:
    """The residual stream among a block's arguments or outputs: its tokens, plus the residual carried beside them."""
    tensors = [v for v in values[:2] if isinstance(v, Tensor) and v.ndim == 3 and v.is_floating_point()]
    if not tensors:
        tensors = [v for v in values if isinstance(v, Tensor) and v.ndim == 3 and v.is_floating_point()][:1]
    if not tensors:
        return None
    stream = tensors[0].detach()
    if len(tensors) == 2 and tensors[1].shape == stream.shape:  # (hidden_states, residual), as in mamba-ssm
        stream = stream + tensors[1].detach()
    return stream
