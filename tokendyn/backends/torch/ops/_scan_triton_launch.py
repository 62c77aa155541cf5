# type: ignore  # triton.jit hides from type checkers what kernels are
"""Launches of the scan kernels: sizes, buffers, grids. No value is looked at, so that CUDA graphs can capture it."""

from __future__ import annotations

import functools
import math

import torch
import triton

from tokendyn.backends.torch.ops import _scan_triton_general as general
from tokendyn.backends.torch.ops import _scan_triton_scalar as scalar
from tokendyn.backends.torch.ops._scan_triton_tiles import ROWS, STEPS

_ROWS, _STEPS, _CHUNK = ROWS.value, STEPS.value, scalar.CHUNK.value

#: General A: tiles of 16 tokens a chunk, blocks of 32 channels whose dB and dC one program adds, states n
#: whose loads are under way together (forward, backward, the last kernel), warps to keep a processor busy.
CHUNK_TILES = 4
BLOCKS_A_BAND = 4
FORWARD_UNROLL, BACKWARD_UNROLL, GRADIENT_UNROLL = 1, 8, 2
WARPS_A_PROCESSOR = 16

#: Scalar A: largest N, most channels a program (backward before capability 9, where the assembler gives up on more),
#: warps a program (forward, backward), programs to keep a processor busy, stages of loads in flight.
SCALAR_STATE = 64
SCALAR_ROWS = 64
SCALAR_ROWS_BACKWARD_BEFORE_9 = 32
SCALAR_WARPS = (4, 8)
SCALAR_PROGRAMS = 2
SCALAR_STAGES = 3

#: Triton's interpreter runs the kernels on the CPU, for tests.
INTERPRETED = triton.knobs.runtime.interpret

#: How factors are rounded before tensor cores multiply and add them: never more coarsely than the results are.
_SUMS = {torch.float32: "tf32x3", torch.float16: "tf32", torch.bfloat16: "tf32"}
#: The interpreter has no bfloat16 products.
_SCALAR_PRODUCTS = "tf32" if INTERPRETED else "bf16"
#: Where the exponent (base 2) of one token is cut between neighbours.
_SCALAR_CLAMP = 14.5


@functools.cache
def _processors(device: torch.device) -> int:
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _capability(device: torch.device) -> int:
    return 9 if device.type == "cpu" else torch.cuda.get_device_capability(device)[0]


def _floats(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _strides(t: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if t is None else t.stride()


def _like(t: torch.Tensor | None, otherwise: torch.Tensor) -> torch.Tensor:
    return _floats(otherwise, 0) if t is None else torch.empty_like(t)


def uses_matrices(A: torch.Tensor, B: torch.Tensor) -> bool:
    """Whether a call runs as matrix products: by shapes and dtype alone.

    Only in bfloat16: products that keep float32's or float16's accuracy (3xTF32) take longer than the recurrence.
    """
    return A.shape[1] == 1 and B.shape[2] <= SCALAR_STATE and B.dtype == torch.bfloat16


def states_shape(u: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> tuple[int, ...]:
    """Shape of the states that the forward pass keeps for the backward pass."""
    batch, channels, length = u.shape
    if uses_matrices(A, B):
        return batch, -(-length // _CHUNK), B.shape[2], channels
    tiles = -(-length // _STEPS)
    return batch, -(-tiles // min(CHUNK_TILES, tiles)) + 1, B.shape[2], channels


def _join(ends, decays, first: torch.Tensor | None, slots: torch.Tensor, backwards: bool) -> None:
    """Fill the slots (b, parts + 1, N, d) between parts of a sequence, from the first (or last) state on."""
    batch, parts, state, channels = ends.shape
    strides = (0, 0, 0) if first is None else (first.stride(0), first.stride(2), first.stride(1))
    general.pass_states[(batch, triton.cdiv(state * channels, 128))](
        ends, decays, first, slots, *strides, state, channels, parts, BACKWARDS=backwards, AT_ONCE=16, WIDTH=128
    )


def _set_slot(slots: torch.Tensor, index: int, state: torch.Tensor | None) -> None:
    if state is None:
        slots[:, index].zero_()
    else:
        slots[:, index].copy_(state.transpose(1, 2))


def slot(slots: torch.Tensor, index: int) -> torch.Tensor:
    return slots[:, index].transpose(1, 2).clone(memory_format=torch.contiguous_format)


# General A ------------------------------------------------------------------------------------------------------------


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
    """B or C in float32, contiguous, aligned, and a whole number of tiles long."""
    missing = -t.shape[-1] % _STEPS
    if missing:
        return torch.nn.functional.pad(t.float(), (0, missing))
    t = t.float().contiguous()
    return t.clone() if t.data_ptr() % 16 else t


def _unroll(state: int, most: int) -> int:
    """The largest divisor of ``state`` up to ``most``."""
    return max(count for count in range(1, most + 1) if state % count == 0)


class _General:
    """What the forward and the backward launches of one call share."""

    def __init__(self, u: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> None:
        batch, channels, length = u.shape
        groups, state = B.shape[1], B.shape[2]
        tiles = triton.cdiv(length, _STEPS)
        self.A = A.t().contiguous()
        self.A_n = channels if A.shape[1] > 1 else 0
        self.tiles = min(CHUNK_TILES, tiles)
        self.chunks = triton.cdiv(tiles, self.tiles)
        blocks = triton.cdiv(channels // groups, _ROWS)
        self.bands = triton.cdiv(blocks, BLOCKS_A_BAND)
        self.padded = tiles * _STEPS
        self.sizes = (length, self.padded, channels, channels // groups, groups, blocks)
        self.items = batch * groups * blocks * self.chunks
        self.band_items = batch * groups * self.bands * self.chunks
        self.most = _processors(u.device) * WARPS_A_PROCESSOR
        self.per_chunk = (batch, self.chunks, state, channels)
        self.slots = (batch, self.chunks + 1, state, channels)


def general_forward(u, delta, A, B, C, D, z, bias, initial_state, seq_idx, lengths, softplus):
    """y and the states at the boundaries of chunks, the last of which is the last state."""
    plan, state = _General(u, A, B), B.shape[2]
    B, C = _padded(B), _padded(C)
    y = torch.empty_like(u)
    vector = min(_vector(u.shape[2], u, delta, z), _vector(u.shape[2], y))
    states = _floats(u, *plan.slots)
    programs = min(plan.items, plan.most)
    work = _floats(u, programs, state, _ROWS)
    options = {
        "SOFTPLUS": softplus,
        "TILES": plan.tiles,
        "UNROLL": _unroll(state, FORWARD_UNROLL),
        "VECTOR": vector,
        "num_warps": 1,
        "num_stages": 1,
    }
    if plan.chunks > 1:
        ends, decays = _floats(u, *plan.per_chunk), _floats(u, *plan.per_chunk)
        general.chunk_states[(programs,)](
            u, delta, plan.A, B, bias, seq_idx, lengths, ends, decays, work,
            *u.stride(), *delta.stride(), plan.A_n, *plan.sizes, state, plan.chunks, plan.items, **options,
        )  # fmt: skip
        _join(ends, decays, initial_state, states, backwards=False)
    else:
        _set_slot(states, 0, initial_state)
    general.outputs[(programs,)](
        u, delta, z, plan.A, B, C, D, bias, seq_idx, lengths, states, y, work,
        *u.stride(), *delta.stride(), *_strides(z), *y.stride(), plan.A_n, *plan.sizes,
        state, plan.chunks, plan.items, STORE_LAST=plan.chunks == 1, **options,
    )  # fmt: skip
    return y, states, states


def general_backward(dy, dlast, states, u, delta, A, B, C, D, z, bias, seq_idx, lengths, softplus):
    """Gradients, those of parameters in float32; the last entry holds the gradient of the initial state in slot 0."""
    plan, length, state, (batch, groups) = _General(u, A, B), u.shape[2], B.shape[2], B.shape[:2]
    scalar_A = A.shape[1] == 1
    B, C = _padded(B), _padded(C)
    du, ddelta, dz = torch.empty_like(u), torch.empty_like(delta), _like(z, u)
    vector = min(_vector(length, u, delta, z), _vector(length, du, ddelta, None if z is None else dz))
    costates = _floats(u, *plan.slots)
    options = {"SOFTPLUS": softplus, "TILES": plan.tiles, "UNROLL": _unroll(state, BACKWARD_UNROLL), "VECTOR": vector,
               "VECTOR_DY": _vector(length, dy), "num_warps": 1, "num_stages": 1}  # fmt: skip
    if plan.chunks > 1:
        programs = min(plan.items, plan.most)
        work = _floats(u, programs, state, _ROWS)
        ends, decays = _floats(u, *plan.per_chunk), _floats(u, *plan.per_chunk)
        general.chunk_costates[(programs,)](
            dy, delta, z, plan.A, C, bias, seq_idx, lengths, ends, decays, work,
            *dy.stride(), *delta.stride(), *_strides(z), plan.A_n, *plan.sizes,
            state, plan.chunks, plan.items, **options,
        )  # fmt: skip
        _join(ends, decays, dlast, costates, backwards=True)
    else:
        _set_slot(costates, 1, dlast)
    programs = min(plan.band_items, plan.most)
    work = _floats(u, programs, state, _ROWS)
    tile_states = _floats(u, programs, plan.tiles, state, _ROWS)
    dA = _floats(u, *plan.per_chunk)
    dB = _floats(u, batch, groups, plan.bands, state, plan.padded)
    dC = torch.empty_like(dB)
    sums = (batch, plan.chunks, u.shape[1])
    dD = _floats(u, *(sums if D is not None else (0, 0, 0)))
    dbias = _floats(u, *(sums if bias is not None else (0, 0, 0)))
    general.gradients[(programs,)](
        dy, u, delta, z, plan.A, B, C, D, bias, seq_idx, lengths, states, costates,
        du, ddelta, dz, dA, dB, dC, dD, dbias, tile_states, work,
        *dy.stride(), *u.stride(), *delta.stride(), *_strides(z), *du.stride(), *ddelta.stride(),
        *_strides(None if z is None else dz), plan.A_n, *plan.sizes, plan.bands, state, plan.chunks,
        plan.band_items, BLOCKS_A_BAND=BLOCKS_A_BAND, STORE_FIRST=plan.chunks == 1, PRECISION=_SUMS[u.dtype],
        GRAD_UNROLL=_unroll(state if state <= 16 else math.gcd(state, 16), GRADIENT_UNROLL),
        **options,
    )  # fmt: skip
    dA = dA.sum((0, 1, 2)).unsqueeze(1) if scalar_A else dA.sum((0, 1)).t()
    dB, dC = dB.sum(2)[..., :length], dC.sum(2)[..., :length]
    return du, ddelta, dA, dB, dC, dD.sum((0, 1)), dz, dbias.sum((0, 1)), costates


# Scalar A -------------------------------------------------------------------------------------------------------------


class _Scalar:
    """What the forward and the backward launches of one call share."""

    def __init__(self, u: torch.Tensor, B: torch.Tensor, softplus: bool, most_rows: int) -> None:
        batch, channels, length = u.shape
        groups, state = B.shape[1], B.shape[2]
        size = channels // groups
        rows = min(most_rows, max(16, triton.next_power_of_2(size)))
        self.tiles = triton.cdiv(size, rows)
        self.chunks = triton.cdiv(length, _CHUNK)
        programs = batch * groups * self.tiles
        wanted = triton.cdiv(_processors(u.device) * SCALAR_PROGRAMS, programs)
        segment = triton.cdiv(self.chunks, min(self.chunks, wanted))
        self.segments = triton.cdiv(self.chunks, segment)
        self.grid = (programs, self.segments)
        self.sizes = (length, channels, size, groups, self.tiles, state, self.chunks, segment)
        self.per_segment = (batch, self.segments, state, channels)
        self.slots = (batch, self.segments + 1, state, channels)
        width = max(16, triton.next_power_of_2(state))
        self.options = {"SOFTPLUS": softplus, "ROWS": rows, "STATE": width, "PRECISION": _SCALAR_PRODUCTS,
                        "CLAMP": _SCALAR_CLAMP, "num_stages": SCALAR_STAGES}  # fmt: skip


def scalar_forward(u, delta, A, B, C, D, z, bias, initial_state, seq_idx, lengths, softplus, keep_states):
    """y, the states before and after segments, and (if kept) the states before all chunks."""
    plan = _Scalar(u, B, softplus, SCALAR_ROWS)
    A, B, C = A.contiguous(), B.contiguous(), C.contiguous()
    y = torch.empty_like(u)
    slots = _floats(u, *plan.slots)
    states = _floats(u, u.shape[0], plan.chunks, B.shape[2], u.shape[1]) if keep_states else None
    if plan.segments > 1:
        ends, decays = _floats(u, *plan.per_segment), _floats(u, *plan.per_segment)
        scalar.segment_states[plan.grid](
            u, delta, A, B, bias, seq_idx, lengths, ends, decays, *u.stride(), *delta.stride(), *plan.sizes,
            **plan.options, num_warps=SCALAR_WARPS[0],
        )  # fmt: skip
        _join(ends, decays, initial_state, slots, backwards=False)
    else:
        _set_slot(slots, 0, initial_state)
    scalar.outputs[plan.grid](
        u, delta, z, A, B, C, D, bias, seq_idx, lengths, slots, states, y,
        *u.stride(), *delta.stride(), *_strides(z), *y.stride(), *plan.sizes,
        STORE_LAST=plan.segments == 1, **plan.options, num_warps=SCALAR_WARPS[0],
    )  # fmt: skip
    return y, slots, states


def scalar_backward(dy, dlast, states, u, delta, A, B, C, D, z, bias, seq_idx, lengths, softplus):
    """As :func:`general_backward`."""
    rows = SCALAR_ROWS if _capability(u.device) >= 9 else SCALAR_ROWS_BACKWARD_BEFORE_9
    plan, (batch, groups, state, length) = _Scalar(u, B, softplus, rows), B.shape
    A, B, C = A.contiguous(), B.contiguous(), C.contiguous()
    du, ddelta, dz = torch.empty_like(u), torch.empty_like(delta), _like(z, u)
    slots = _floats(u, *plan.slots)
    if plan.segments > 1:
        ends, decays = _floats(u, *plan.per_segment), _floats(u, *plan.per_segment)
        scalar.segment_costates[plan.grid](
            dy, delta, z, A, C, bias, seq_idx, lengths, ends, decays,
            *dy.stride(), *delta.stride(), *_strides(z), *plan.sizes, **plan.options, num_warps=SCALAR_WARPS[0],
        )  # fmt: skip
        _join(ends, decays, dlast, slots, backwards=True)
    else:
        _set_slot(slots, 1, dlast)
    dB = _floats(u, batch, groups, plan.tiles, state, length)
    dC = torch.empty_like(dB)
    sums = (batch, plan.segments, u.shape[1])
    dA = _floats(u, *sums)
    dD = _floats(u, *(sums if D is not None else (0, 0, 0)))
    dbias = _floats(u, *(sums if bias is not None else (0, 0, 0)))
    scalar.gradients[plan.grid](
        dy, u, delta, z, A, B, C, D, bias, seq_idx, lengths, states, slots,
        du, ddelta, dz, dA, dB, dC, dD, dbias,
        *dy.stride(), *u.stride(), *delta.stride(), *_strides(z), *du.stride(), *ddelta.stride(),
        *_strides(None if z is None else dz), *plan.sizes, STORE_FIRST=plan.segments == 1, **plan.options,
        num_warps=SCALAR_WARPS[1],
    )  # fmt: skip
    dA = dA.sum((0, 1)).unsqueeze(1)
    return du, ddelta, dA, dB.sum(2), dC.sum(2), dD.sum((0, 1)), dz, dbias.sum((0, 1)), slots
