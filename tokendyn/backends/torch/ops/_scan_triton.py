"""The triton engine: which calls it takes, and its kernels as operators that torch.compile and autograd know."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton

from tokendyn.backends.torch.ops import _scan_triton_general as general
from tokendyn.backends.torch.ops._scan_triton_tiles import ROWS, STEPS

_ROWS, _STEPS = ROWS.value, STEPS.value
#: Tiles of 16 tokens a chunk, blocks of 32 channels whose dB and dC one program adds, warps to keep a processor busy.
_CHUNK_TILES = 8
_BLOCKS_A_BAND = 4
_WARPS_A_PROCESSOR = 16

#: Triton's interpreter runs the kernels on the CPU, for tests.
INTERPRETED = triton.knobs.runtime.interpret


@functools.cache
def _processors(device: torch.device) -> int:
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def _vector(length: int, *tensors: torch.Tensor | None) -> int:
    """Tokens that can be loaded at once: 16 bytes where every tensor is (b, d, L) in memory and aligned, else 1."""
    width = 1
    for t in tensors:
        if t is None:
            continue
        width = 16 // t.element_size()
        if t.stride(2) != 1 or length % width or t.stride(1) % 16 or t.stride(0) % 16 or t.data_ptr() % 16:
            return 1
    return width


def _padded(t: torch.Tensor) -> torch.Tensor:
    """B or C contiguous, aligned, and a whole number of tiles long."""
    missing = -t.shape[-1] % _STEPS
    if missing:
        return torch.nn.functional.pad(t, (0, missing)).contiguous()
    t = t.contiguous()
    return t.clone() if t.data_ptr() % 16 else t


class _Plan:
    """Sizes and launch figures that the forward and backward kernels of one call share."""

    def __init__(self, u: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> None:
        self.batch, self.channels, self.length = u.shape
        self.groups, self.state = B.shape[1], B.shape[2]
        self.group_size = self.channels // self.groups
        self.blocks = triton.cdiv(self.group_size, _ROWS)
        self.padded = triton.cdiv(self.length, _STEPS) * _STEPS
        self.tiles = min(_CHUNK_TILES, self.padded // _STEPS)
        self.chunks = triton.cdiv(self.padded // _STEPS, self.tiles)
        self.bands = triton.cdiv(self.blocks, _BLOCKS_A_BAND)
        self.items = self.batch * self.groups * self.blocks * self.chunks
        self.band_items = self.batch * self.groups * self.bands * self.chunks
        self.most_programs = _processors(u.device) * _WARPS_A_PROCESSOR
        self.A_n = self.channels if A.shape[1] > 1 else 0
        self.VECTOR_B = 16 // B.element_size()

    def floats(self, like: torch.Tensor, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=like.device)

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.length, self.padded, self.channels, self.group_size, self.groups, self.blocks

    def boundaries(self, ends: torch.Tensor, decays: torch.Tensor, first: torch.Tensor | None, slots: torch.Tensor,
                   backwards: bool) -> None:  # fmt: skip
        strides = (0, 0, 0) if first is None else (first.stride(0), first.stride(2), first.stride(1))
        grid = (self.batch, triton.cdiv(self.state * self.channels, 128))
        general.pass_states[grid](
            ends, decays, first, slots, *strides, self.state, self.channels, self.chunks,
            BACKWARDS=backwards, AT_ONCE=16, WIDTH=128,
        )  # fmt: skip


def _set_slot(slots: torch.Tensor, index: int, state: torch.Tensor | None) -> None:
    if state is None:
        slots[:, index].zero_()
    else:
        slots[:, index].copy_(state.transpose(1, 2))


def _rows_of_A(A: torch.Tensor) -> torch.Tensor:
    return A.t().contiguous()


@torch.library.custom_op("tokendyn::scan_general", mutates_args=())
def scan_general(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    lengths: torch.Tensor | None,
    delta_softplus: bool,
    return_last_state: bool,
    keep_states: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, the last state, and the states at chunk boundaries; the latter two are empty unless asked for."""
    plan = _Plan(u, A, B)
    A, B, C = _rows_of_A(A), _padded(B), _padded(C)
    vector = _vector(plan.length, u, delta, z)
    y = torch.empty_like(u)
    if _vector(plan.length, y) != vector:
        vector = 1
    states = plan.floats(u, plan.batch, plan.chunks + 1, plan.state, plan.channels)
    programs = min(plan.items, plan.most_programs)
    work = plan.floats(u, programs, plan.state, _ROWS)
    counts = (plan.state, plan.chunks, plan.items)
    if plan.chunks > 1:
        ends = plan.floats(u, plan.batch, plan.chunks, plan.state, plan.channels)
        decays = torch.empty_like(ends)
        general.chunk_states[(programs,)](
            u, delta, A, B, delta_bias, seq_idx, lengths, ends, decays, work,
            *u.stride(), *delta.stride(), plan.A_n, *plan.sizes, *counts,
            SOFTPLUS=delta_softplus, TILES=plan.tiles, VECTOR=vector, VECTOR_B=plan.VECTOR_B, num_warps=1,
        )  # fmt: skip
        plan.boundaries(ends, decays, initial_state, states, backwards=False)
    else:
        _set_slot(states, 0, initial_state)
    general.outputs[(programs,)](
        u, delta, z, A, B, C, D, delta_bias, seq_idx, lengths, states, y, work,
        *u.stride(), *delta.stride(), *_strides(z), *y.stride(), plan.A_n, *plan.sizes, *counts,
        SOFTPLUS=delta_softplus, TILES=plan.tiles, VECTOR=vector, VECTOR_B=plan.VECTOR_B,
        STORE_LAST=plan.chunks == 1, num_warps=1,
    )  # fmt: skip
    last = states[:, -1].transpose(1, 2).clone(memory_format=torch.contiguous_format) if return_last_state else plan.floats(u, 0)
    return y, last, states if keep_states else plan.floats(u, 0)


def _strides(t: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if t is None else t.stride()


@scan_general.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, lengths, delta_softplus, return_last_state,
      keep_states):  # fmt: skip
    batch, channels, length = u.shape
    state = B.shape[2]
    tiles = (length + _STEPS - 1) // _STEPS
    chunks = (tiles + _CHUNK_TILES - 1) // _CHUNK_TILES
    last = (batch, channels, state) if return_last_state else (0,)
    states = (batch, chunks + 1, state, channels) if keep_states else (0,)
    return (
        torch.empty_like(u),
        u.new_empty(last, dtype=torch.float32),
        u.new_empty(states, dtype=torch.float32),
    )


@torch.library.custom_op("tokendyn::scan_general_backward", mutates_args=())
def scan_general_backward(
    dy: torch.Tensor,
    dlast: torch.Tensor | None,
    states: torch.Tensor,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    lengths: torch.Tensor | None,
    delta_softplus: bool,
    initial_gradient: bool,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
    torch.Tensor,
]:  # fmt: skip
    """du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state; empty where the argument was not given."""
    plan = _Plan(u, A, B)
    A_dtype, A_states, B_dtype = A.dtype, A.shape[1], B.dtype
    A, B, C = _rows_of_A(A), _padded(B), _padded(C)
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dz = plan.floats(u, 0) if z is None else torch.empty_like(z)
    vector = _vector(plan.length, u, delta, z)
    if _vector(plan.length, du, ddelta, None if z is None else dz) != vector:
        vector = 1
    vector_dy = _vector(plan.length, dy)
    costates = plan.floats(u, plan.batch, plan.chunks + 1, plan.state, plan.channels)
    common = {"SOFTPLUS": delta_softplus, "TILES": plan.tiles, "VECTOR": vector, "VECTOR_DY": vector_dy,
              "VECTOR_B": plan.VECTOR_B, "num_warps": 1}  # fmt: skip
    if plan.chunks > 1:
        programs = min(plan.items, plan.most_programs)
        work = plan.floats(u, programs, plan.state, _ROWS)
        ends = plan.floats(u, plan.batch, plan.chunks, plan.state, plan.channels)
        decays = torch.empty_like(ends)
        general.chunk_costates[(programs,)](
            dy, delta, z, A, C, delta_bias, seq_idx, lengths, ends, decays, work,
            *dy.stride(), *delta.stride(), *_strides(z), plan.A_n, *plan.sizes, plan.state, plan.chunks, plan.items,
            **common,
        )  # fmt: skip
        plan.boundaries(ends, decays, dlast, costates, backwards=True)
    else:
        _set_slot(costates, 1, dlast)
    programs = min(plan.band_items, plan.most_programs)
    work = plan.floats(u, programs, plan.state, _ROWS)
    tile_states = plan.floats(u, programs, plan.tiles, plan.state, _ROWS)
    dA = plan.floats(u, plan.batch, plan.chunks, plan.state, plan.channels)
    dB = plan.floats(u, plan.batch, plan.groups, plan.bands, plan.state, plan.padded)
    dC = torch.empty_like(dB)
    dD = plan.floats(u, plan.batch, plan.chunks, plan.channels) if D is not None else plan.floats(u, 0)
    dbias = plan.floats(u, plan.batch, plan.chunks, plan.channels) if delta_bias is not None else plan.floats(u, 0)
    general.gradients[(programs,)](
        dy, u, delta, z, A, B, C, D, delta_bias, seq_idx, lengths, states, costates,
        du, ddelta, dz, dA, dB, dC, dD, dbias, tile_states, work,
        *dy.stride(), *u.stride(), *delta.stride(), *_strides(z), *du.stride(), *ddelta.stride(),
        *_strides(None if z is None else dz), plan.A_n, *plan.sizes, plan.bands, plan.state, plan.chunks,
        plan.band_items, BLOCKS_A_BAND=_BLOCKS_A_BAND, STORE_FIRST=plan.chunks == 1,
        PRECISION="tf32x3" if u.dtype == torch.float32 else "tf32", **common,
    )  # fmt: skip
    dA = dA.sum((0, 1)).t() if A_states > 1 else dA.sum((0, 1, 2)).unsqueeze(1)
    return (
        du,
        ddelta,
        dA.to(A_dtype).contiguous(),
        dB.sum(2)[..., : plan.length].to(B_dtype).contiguous(),
        dC.sum(2)[..., : plan.length].to(B_dtype).contiguous(),
        dD if D is None else dD.sum((0, 1)).to(D.dtype),
        dz,
        dbias if delta_bias is None else dbias.sum((0, 1)).to(delta_bias.dtype),
        costates[:, 0].transpose(1, 2).clone(memory_format=torch.contiguous_format) if initial_gradient else plan.floats(u, 0),
    )


@scan_general_backward.register_fake
def _(dy, dlast, states, u, delta, A, B, C, D, z, delta_bias, seq_idx, lengths, delta_softplus, initial_gradient):
    nothing = u.new_empty((0,), dtype=torch.float32)
    initial = (u.shape[0], u.shape[1], B.shape[2]) if initial_gradient else (0,)
    return (
        torch.empty_like(u),
        torch.empty_like(delta),
        A.new_empty(A.shape),
        B.new_empty(B.shape),
        C.new_empty(C.shape),
        nothing if D is None else D.new_empty(D.shape),
        nothing if z is None else torch.empty_like(z),
        nothing.clone() if delta_bias is None else delta_bias.new_empty(delta_bias.shape),
        u.new_empty(initial, dtype=torch.float32),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, lengths, ctx.delta_softplus, ctx.last, _ = inputs
    ctx.initial_dtype = None if initial_state is None else initial_state.dtype
    ctx.save_for_backward(output[2], u, delta, A, B, C, D, z, delta_bias, seq_idx, lengths)


def _backward(ctx: Any, dy: torch.Tensor | None, dlast: torch.Tensor | None, _: Any) -> tuple[Any, ...]:
    states, u, *rest = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(u)
    found = torch.ops.tokendyn.scan_general_backward(
        dy, dlast if ctx.last else None, states, u, *rest, ctx.delta_softplus, ctx.initial_dtype is not None
    )
    du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial = found
    D, z, bias = rest[4], rest[5], rest[6]
    return (
        du, ddelta, dA, dB, dC, None if D is None else dD, None if z is None else dz, None if bias is None else dbias,
        None if ctx.initial_dtype is None else dinitial.to(ctx.initial_dtype), None, None, None, None, None,
    )  # fmt: skip


scan_general.register_autograd(_backward, setup_context=_save)


def declines(call: Any) -> str | None:
    """Why the triton engine cannot take a call, or None. See :class:`_engines.ScanCall`."""
    if call.device != "cuda" and not (INTERPRETED and call.device == "cpu"):
        return f"the arrays are on {call.device}, it needs an NVIDIA GPU"
    if call.dtype == torch.float64:
        return "it computes in float32, the arrays are float64"
    if call.state > 256:
        return f"the state has N = {call.state} entries, it takes at most 256"
    if call.transformed:
        return "its operators have no rule for torch.func transforms"
    return None


def run(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: torch.Tensor | None = None,
    return_last_state: bool = False,
    seq_idx: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> Any:
    """See :func:`tokendyn.selective_scan`."""
    if B.ndim == 3:
        B, C = B.unsqueeze(1), C.unsqueeze(1)
    differentiable = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    keep_states = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)
    if seq_idx is not None:
        seq_idx = seq_idx.contiguous()
    y, last_state, _ = torch.ops.tokendyn.scan_general(
        u, delta, A.reshape(A.shape[0], -1), B, C, D, z, delta_bias, initial_state, seq_idx, lengths, delta_softplus,
        return_last_state, keep_states,
    )  # fmt: skip
    return (y, last_state) if return_last_state else y
