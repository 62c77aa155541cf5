"""The cuda engine: launches of the kernels in ``_scan_cuda.cu`` (general A) and ``_scan_cuda_scalar.cu``.

No value is looked at, so that CUDA graphs can capture it.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from tokendyn.backends.cuda import _scan_cuda_layout
from tokendyn.backends.cuda._scan_cuda_layout import ARGUMENTS, PLACES, SUM, SUMS_FROM
from tokendyn.backends.cuda._scan_cuda_layout import STATE as STATE
from tokendyn.backends.torch.ops._scan_operator import register

_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_TOKEN_RUNS, _SINGLE, _CHANNEL_RUNS = range(3)
_Arguments = ctypes.c_int64 * ARGUMENTS


def launch(
    kernels: str, name: str, variant: tuple[str, ...], threads: int, shared: int, blocks: int,
    arguments: ctypes.Array, device: torch.device,
) -> None:  # fmt: skip
    """Run a kernel on the current stream of ``device``."""
    from tokendyn.backends.torch.ops import _nvrtc

    _nvrtc.launch(_scan_cuda_layout.source(kernels), variant, name, threads, shared, blocks, arguments, device)


@functools.cache
def _processors(device: torch.device) -> int:
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def _layout(u: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> _scan_cuda_layout.Layout:
    (batch, channels, length), (groups, state) = u.shape, B.shape[1:3]
    scalar_A = A.shape[1] == 1
    fill = _scan_cuda_layout.BLOCKS_A_PROCESSOR["scalar" if scalar_A else "general"]
    return _scan_cuda_layout.layout(
        scalar_A, batch, groups, channels // groups, length, state, _processors(u.device), fill
    )


def states_shape(u: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> tuple[int, ...]:
    """Shape of the states that the forward pass keeps for the backward pass."""
    chunk, padded = _scan_cuda_layout.kept_states(A.shape[1] == 1, u.shape[2], B.shape[2])
    return u.shape[0], -(-u.shape[2] // chunk), u.shape[1], padded // 2 if _narrow(u, A) else padded


def _narrow(u: torch.Tensor, A: torch.Tensor) -> bool:
    """Whether states are kept in bfloat16, two in a word: products round them as much where u has 16 bits."""
    return A.shape[1] == 1 and u.dtype in (torch.bfloat16, torch.float16)


def _side_by_side(t: torch.Tensor, along: int, run: int) -> bool:
    """Whether ``run`` neighbours along a dimension are whole words (16 bytes or less) wherever such a run begins."""
    strides, size = t.stride(), t.element_size()
    in_word = min(run, 16 // size)
    if strides[along] != 1 or t.data_ptr() % (in_word * size):
        return False
    return not any(stride % in_word for axis, stride in enumerate(strides) if axis != along)


def _near(t: torch.Tensor, rows: int = 96) -> torch.Tensor:
    """The tensor, such that ``rows`` rows and 128 tokens of it are within 2 GiB: with channels last where it is not."""
    return t if 4 * (rows * t.stride(-2) + 128 * t.stride(-1)) < 2**31 else t.mT.contiguous().mT


def _float(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.float().contiguous()


class _Plan:
    """What the launches of one call share: sizes, the variant of the kernels, and their arguments."""

    def __init__(self, u, delta, A, B, C, D, z, bias, seq_idx, lengths, softplus) -> None:
        batch, channels, length = u.shape
        groups, state = B.shape[1], B.shape[2]
        self.layout = layout = _layout(u, A, B)
        self.narrow = _narrow(u, A)
        mixed = delta.dtype != u.dtype or B.dtype != u.dtype or C.dtype != u.dtype
        if mixed or (z is not None and z.dtype != u.dtype) or u.dtype not in _ELEMENTS:
            u, delta, B, C = (t.float() for t in (u, delta, B, C))
            z = None if z is None else z.float()
        u, delta, B, C = _near(u), _near(delta), _near(B, 32), _near(C, 32)
        self.u, self.delta = u, delta
        self.z = z = None if z is None else _near(z)
        self.scalar_A = A.shape[1] == 1
        size = channels // groups
        self.segments = layout.segments
        self.blocks = batch * groups * layout.tiles * layout.segments
        if all(_side_by_side(t, 2, layout.token_run) for t in (u, delta)):
            self.owner = _TOKEN_RUNS
        elif size % layout.channel_run == 0 and all(_side_by_side(t, 1, layout.channel_run) for t in (u, delta)):
            self.owner = _CHANNEL_RUNS
        else:
            self.owner = _SINGLE
        self.packed = seq_idx is not None
        self.arguments = _Arguments(
            batch, channels, length, groups, size, state, layout.block_rows, layout.tiles, layout.segments,
            layout.segment_tokens, layout.chunks, layout.parts, layout.chain, int(softplus), 0, 0,
            int(all(_side_by_side(t, 3, layout.token_run) for t in (B, C))),
        )  # fmt: skip
        self.kept: list[torch.Tensor] = []  # until the launches are under way
        self.give(
            A=_float(A), D=_float(D), bias=_float(bias),
            seq_idx=None if seq_idx is None else seq_idx.long().contiguous(),
            lengths=None if lengths is None else lengths.long().contiguous(),
        )  # fmt: skip
        self.give_activations(u=u, delta=delta, z=z)
        for name, t in (("B", B), ("C", C)):
            self.give(**{name: t})
            place = PLACES[name]
            self.arguments[place + 1 : place + 5] = t.stride()

    def give(self, **tensors: torch.Tensor | None) -> None:
        for name, t in tensors.items():
            if t is not None:
                self.arguments[PLACES[name]] = t.data_ptr()
                self.kept.append(t)

    def give_activations(self, **tensors: torch.Tensor | None) -> None:
        along, run = (2, self.layout.token_run) if self.owner == _TOKEN_RUNS else (1, self.layout.channel_run)
        for name, t in tensors.items():
            if t is not None:
                runs = self.owner != _SINGLE and _side_by_side(t, along, run)
                place = PLACES[name]
                self.arguments[place : place + 5] = (t.data_ptr(), *t.stride(), runs)
                self.kept.append(t)

    def give_segment_buffers(self) -> None:
        batch, channels = self.u.shape[:2]
        per_segment = (batch, self.segments, channels, self.layout.padded)
        slots = self.floats(batch, self.segments + 1, channels, self.layout.padded)
        self.give(ends=self.floats(*per_segment), decays=self.floats(*per_segment), slots=slots)

    def set(self, name: str, value: int) -> None:
        self.arguments[PLACES[name]] = value

    def floats(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.u.device)

    def run(self, name: str, blocks: int | None = None, backward: bool = False) -> None:
        gated, layout = backward and self.z is not None, self.layout
        variant = layout.options(_ELEMENTS[self.u.dtype], gated, self.packed, self.owner, self.narrow)
        small, large = layout.shared_bytes(gated)
        shared = large if name == "gradients" else 0 if name in ("join_segments", "add_parts") else small
        blocks = self.blocks if blocks is None else blocks
        launch(layout.kernels, name, variant, layout.threads, shared, blocks, self.arguments, self.u.device)

    def join(self, backward: bool) -> None:
        """Pass the states between segments on, from the first or the last."""
        batch, channels = self.u.shape[:2]
        self.set("backwards", int(backward))
        self.run("join_segments", -(-batch * channels * self.layout.padded // self.layout.threads), backward)

    def sum(self, *wanted: tuple) -> list[torch.Tensor | None]:
        """Sums in one launch: of (blocks' floats, offset, like what, outer, parts, inner, next, columns) each."""
        place, blocks, found = SUMS_FROM, 0, []
        for given, offset, like, outer, parts, inner, step, columns in wanted:
            if like is None:
                found.append(None)
                continue
            direct = like.dtype in (torch.float32, self.u.dtype)
            out = torch.empty(like.shape, dtype=like.dtype if direct else torch.float32, device=like.device)
            narrow = int(out.dtype != torch.float32)
            self.arguments[place : place + len(SUM)] = (
                given.data_ptr() + 4 * offset, out.data_ptr(), outer, parts, inner, step, columns, narrow,
            )  # fmt: skip
            place += len(SUM)
            blocks += _scan_cuda_layout.sum_blocks(outer, parts, inner, self.layout.threads)
            found.append(out)
        self.run("add_parts", blocks, True)
        return [None if out is None else out.to(given[2].dtype) for out, given in zip(found, wanted, strict=True)]


def forward(u, delta, A, B, C, D, z, bias, initial_state, seq_idx, lengths, softplus, return_last_state, keep_states):
    """y, the last state and the states every CHUNK tokens."""
    plan = _Plan(u, delta, A, B, C, D, z, bias, seq_idx, lengths, softplus)
    y = torch.empty_like(plan.u)
    last = plan.floats(u.shape[0], u.shape[1], B.shape[2]) if return_last_state else None
    states = plan.floats(*states_shape(u, A, B)) if keep_states else None
    plan.give_activations(y=y)
    plan.give(first_state=_float(initial_state), last_state=last, states=states)
    plan.set("keep", int(keep_states))
    if plan.segments > 1:
        plan.give_segment_buffers()
        plan.run("segment_ends")
        plan.join(backward=False)
    plan.run("outputs")
    return y.to(u.dtype), last, states


def backward(
    dy, dlast, states, u, delta, A, B, C, D, z, bias, seq_idx, lengths, softplus, initial_gradient
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z, bias and the initial state."""
    plan = _Plan(u, delta, A, B, C, D, z, bias, seq_idx, lengths, softplus)
    (batch, channels, length), (groups, state) = u.shape, B.shape[1:3]
    du, ddelta = torch.empty_like(plan.u), torch.empty_like(plan.delta)
    dz = None if plan.z is None else torch.empty_like(plan.z)
    dfirst = plan.floats(batch, channels, state) if initial_gradient else None
    plan.give_activations(dy=_near(dy.to(plan.u.dtype)), du=du, ddelta=ddelta, dz=dz)
    plan.give(last_gradient=_float(dlast), dfirst=dfirst, states=states)
    if plan.segments > 1:
        plan.give_segment_buffers()
        plan.run("segment_coends", backward=True)
        plan.join(backward=True)
    copies, rates = batch * plan.segments, 1 if plan.scalar_A else state
    dA = plan.floats(copies, channels, rates)
    dD, dbias = (None if t is None else plan.floats(copies, channels) for t in (D, bias))
    columns = plan.layout.padded if plan.scalar_A else 0  # parts are (L, columns) there, (N, L) else
    parts = plan.floats(batch, groups, plan.layout.parts, 2, columns or state, length)
    plan.give(dA=dA, dD=dD, dbias=dbias, parts_out=parts)
    if plan.layout.chain > 1:
        counters = plan.layout.counters(batch * groups)
        plan.give(counters=torch.zeros(counters, dtype=torch.int32, device=u.device))
    plan.run("gradients", backward=True)
    per_matrix = (columns or state) * length
    sum_A, sum_B, sum_C, sum_D, sum_bias = plan.sum(
        (dA, 0, A, 1, copies, channels * rates, channels * rates, 0),
        (parts, 0, B, batch * groups, plan.layout.parts, per_matrix, 2 * per_matrix, columns),
        (parts, per_matrix, C, batch * groups, plan.layout.parts, per_matrix, 2 * per_matrix, columns),
        (dD, 0, D, 1, copies, channels, channels, 0),
        (dbias, 0, bias, 1, copies, channels, channels, 0),
    )
    dz = None if dz is None else dz.to(z.dtype)
    return du.to(u.dtype), ddelta.to(delta.dtype), sum_A, sum_B, sum_C, sum_D, dz, sum_bias, dfirst


run = register("cuda", forward, backward, states_shape)
