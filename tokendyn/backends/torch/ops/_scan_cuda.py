"""The cuda engine: launches of the kernels in ``_scan_cuda.cu``.

No value is looked at, so that CUDA graphs can capture it.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from tokendyn.backends.torch.ops._scan_operator import register

#: Largest N: a channel's state lies in at most eight lanes, four n each.
STATE = 32
THREADS, TILE = 128, 8
#: Blocks that keep a multiprocessor busy: sequences are cut until there are so many.
BLOCKS_A_PROCESSOR = 3
#: Copies of dB and dC that blocks of channels add to, one after the other, for memory's sake.
PARTS = 4

_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_TOKEN_RUNS, _SINGLE, _CHANNEL_RUNS = range(3)
_SUM = ("in", "out", "outer", "parts", "inner", "next", "element")
_SUMS = 5  # of A, D, delta_bias, B, C
_FIELDS = (
    "batch", "channels", "length", "groups", "group_size", "state", "tiles", "segments", "segment_tokens", "chunks",
    "parts", "chain", "softplus", "keep", "backwards", "matrix_runs",
    "A", "D", "bias", "seq_idx", "lengths", "first_state", "last_state", "last_gradient", "dfirst",
    "states", "slots", "ends", "decays", "dA", "dD", "dbias", "parts_out", "counters",
    *(f"{name}{suffix}" for name in ("u", "delta", "z", "y", "dy", "du", "ddelta", "dz")
      for suffix in ("", "_b", "_d", "_l", "_runs")),
    *(f"{name}{suffix}" for name in ("B", "C") for suffix in ("", "_b", "_g", "_n", "_l")),
    f"sums[{_SUMS * len(_SUM)}]",
)  # fmt: skip
_PLACES = {name: place for place, name in enumerate(_FIELDS)}
_SUMS_FROM = len(_FIELDS) - 1
_Arguments = ctypes.c_int64 * (_SUMS_FROM + _SUMS * len(_SUM))


@functools.cache
def source() -> str:
    """The kernels, below the structure of their arguments."""
    fields = "".join(f"    long long {name};\n" for name in _FIELDS)
    return f"struct Args {{\n{fields}}};\n" + Path(__file__).with_name("_scan_cuda.cu").read_text()


def shared_bytes(quads: int, gated: bool) -> tuple[int, int]:
    """Shared memory of a block of the forward and of the backward kernels."""
    rows, half, state = THREADS // quads, 8 * quads, 4 * quads

    def arrays(tokens: int, per_token: int) -> int:
        return 4 * (per_token * rows * (tokens + 4) + 2 * tokens * (state + 4) + tokens + 3 * rows)

    forward = arrays(half, 2)
    starts, sums = 2 * half // TILE * THREADS * 16, 2 * 4 * (2 * TILE * 36) * 4
    backward = arrays(2 * half, 3 + gated) + starts + sums + 4
    return forward, -(-backward // 16) * 16


@functools.cache
def options(
    element: int, quads: int, scalar_A: bool, gated: bool, packed: bool, owner: int
) -> tuple[tuple[str, ...], int, int]:
    """The compiler's options of a variant, and its blocks' shared memory, forward and backward."""
    forward, backward = shared_bytes(quads, gated)
    chosen = {"ELEMENT": element, "QUADS": quads, "SCALAR_A": int(scalar_A), "GATED": int(gated),
              "PACKED": int(packed), "OWNER": owner, "FORWARD_BYTES": forward, "BACKWARD_BYTES": backward}  # fmt: skip
    return tuple(f"-D{name}={value}" for name, value in chosen.items()), forward, backward


def launch(
    name: str, variant: tuple[str, ...], shared: int, blocks: int, arguments: ctypes.Array, device: torch.device
) -> None:
    """Run a kernel on the current stream of ``device``."""
    from tokendyn.backends.torch.ops import _nvrtc

    index = torch.cuda.current_device() if device.index is None else device.index
    kernel = _nvrtc.kernel(source(), variant, name, shared, index)
    with torch.cuda.device(index):
        kernel(blocks, THREADS, torch.cuda.current_stream().cuda_stream, arguments)


@functools.cache
def _processors(device: torch.device) -> int:
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def quads(state: int) -> int:
    """Lanes that share a channel's state: the fours of n, a power of 2."""
    return 1 << max(0, (-(-state // 4) - 1).bit_length())


def chunk_tokens(quads: int) -> int:
    """Tokens between two states that are kept for the backward pass."""
    return 16 * quads


def states_shape(u: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> tuple[int, ...]:
    """Shape of the states that the forward pass keeps for the backward pass."""
    lanes = quads(B.shape[2])
    return u.shape[0], -(-u.shape[2] // chunk_tokens(lanes)), u.shape[1], 4 * lanes


def _side_by_side(t: torch.Tensor, along: int) -> bool:
    """Whether eight neighbours along a dimension are whole 16-byte words wherever they start at a multiple of eight."""
    strides, in_word = t.stride(), 16 // t.element_size()
    if strides[along] != 1 or t.data_ptr() % 16:
        return False
    return not any(stride % in_word for axis, stride in enumerate(strides) if axis != along)


def _float(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.float().contiguous()


class _Plan:
    """What the launches of one call share: sizes, the variant of the kernels, and their arguments."""

    def __init__(self, u, delta, A, B, C, D, z, bias, seq_idx, lengths, softplus) -> None:
        batch, channels, length = u.shape
        groups, state = B.shape[1], B.shape[2]
        mixed = delta.dtype != u.dtype or B.dtype != u.dtype or C.dtype != u.dtype
        if mixed or (z is not None and z.dtype != u.dtype) or u.dtype not in _ELEMENTS:
            u, delta, B, C = (t.float() for t in (u, delta, B, C))
            z = None if z is None else z.float()
        self.u, self.delta, self.z = u, delta, z
        self.quads = quads(state)
        self.padded = 4 * self.quads
        self.scalar_A = A.shape[1] == 1
        chunk, size = chunk_tokens(self.quads), channels // groups
        tiles, self.chunks = -(-size // (THREADS // self.quads)), -(-length // chunk)
        fit = _processors(u.device) * BLOCKS_A_PROCESSOR // (batch * groups * tiles)
        segment = -(-self.chunks // max(1, min(fit, self.chunks)))
        self.segments = -(-self.chunks // segment)
        self.blocks = batch * groups * tiles * self.segments
        self.chain = -(-tiles // PARTS)
        self.parts = -(-tiles // self.chain)
        if _side_by_side(u, 2) and _side_by_side(delta, 2):
            self.owner = _TOKEN_RUNS
        elif size % 8 == 0 and _side_by_side(u, 1) and _side_by_side(delta, 1):
            self.owner = _CHANNEL_RUNS
        else:
            self.owner = _SINGLE
        self.packed = seq_idx is not None
        self.arguments = _Arguments(
            batch, channels, length, groups, size, state, tiles, self.segments, segment * chunk, self.chunks,
            self.parts, self.chain, int(softplus), 0, 0, int(_side_by_side(B, 3) and _side_by_side(C, 3)),
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
            place = _PLACES[name]
            self.arguments[place + 1 : place + 5] = t.stride()

    def give(self, **tensors: torch.Tensor | None) -> None:
        for name, t in tensors.items():
            if t is not None:
                self.arguments[_PLACES[name]] = t.data_ptr()
                self.kept.append(t)

    def give_activations(self, **tensors: torch.Tensor | None) -> None:
        along = 2 if self.owner == _TOKEN_RUNS else 1
        for name, t in tensors.items():
            if t is not None:
                runs = self.owner != _SINGLE and _side_by_side(t, along)
                place = _PLACES[name]
                self.arguments[place : place + 5] = (t.data_ptr(), *t.stride(), runs)
                self.kept.append(t)

    def give_segment_buffers(self) -> None:
        batch, channels = self.u.shape[:2]
        per_segment = (batch, self.segments, channels, self.padded)
        slots = self.floats(batch, self.segments + 1, channels, self.padded)
        self.give(ends=self.floats(*per_segment), decays=self.floats(*per_segment), slots=slots)

    def set(self, name: str, value: int) -> None:
        self.arguments[_PLACES[name]] = value

    def floats(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.u.device)

    def run(self, name: str, blocks: int | None = None, backward: bool = False) -> None:
        gated = backward and self.z is not None
        variant, small, large = options(
            _ELEMENTS[self.u.dtype], self.quads, self.scalar_A, gated, self.packed, self.owner
        )
        shared = large if name == "gradients" else 0 if name in ("join_segments", "add_parts") else small
        launch(name, variant, shared, self.blocks if blocks is None else blocks, self.arguments, self.u.device)

    def join(self, backward: bool) -> None:
        """Pass the states between segments on, from the first or the last."""
        batch, channels = self.u.shape[:2]
        self.set("backwards", int(backward))
        self.run("join_segments", -(-batch * channels * self.padded // THREADS), backward)

    def sum(self, *wanted: tuple) -> list[torch.Tensor | None]:
        """Sums in one launch: of (blocks' floats, offset, like what, outer, parts, inner, next) each."""
        place, blocks, found = _SUMS_FROM, 0, []
        for given, offset, like, outer, parts, inner, step in wanted:
            if like is None:
                found.append(None)
                continue
            direct = like.dtype in (torch.float32, self.u.dtype)
            out = torch.empty(like.shape, dtype=like.dtype if direct else torch.float32, device=like.device)
            narrow = int(out.dtype != torch.float32)
            self.arguments[place : place + len(_SUM)] = (
                given.data_ptr() + 4 * offset, out.data_ptr(), outer, parts, inner, step, narrow,
            )  # fmt: skip
            place, blocks = place + len(_SUM), blocks + -(-outer * inner // THREADS)
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
    plan.give_activations(dy=dy.to(plan.u.dtype), du=du, ddelta=ddelta, dz=dz)
    plan.give(last_gradient=_float(dlast), dfirst=dfirst, states=states)
    if plan.segments > 1:
        plan.give_segment_buffers()
        plan.run("segment_coends", backward=True)
        plan.join(backward=True)
    copies, rates = batch * plan.segments, 1 if plan.scalar_A else state
    dA = plan.floats(copies, channels, rates)
    dD, dbias = (None if t is None else plan.floats(copies, channels) for t in (D, bias))
    parts = plan.floats(batch, groups, plan.parts, 2, state, length)
    plan.give(dA=dA, dD=dD, dbias=dbias, parts_out=parts)
    if plan.chain > 1:
        flags = 1 + batch * groups * plan.parts * plan.chunks
        plan.give(counters=torch.zeros(flags, dtype=torch.int32, device=u.device))
    plan.run("gradients", backward=True)
    per_matrix = state * length
    sum_A, sum_B, sum_C, sum_D, sum_bias = plan.sum(
        (dA, 0, A, 1, copies, channels * rates, channels * rates),
        (parts, 0, B, batch * groups, plan.parts, per_matrix, 2 * per_matrix),
        (parts, per_matrix, C, batch * groups, plan.parts, per_matrix, 2 * per_matrix),
        (dD, 0, D, 1, copies, channels, channels),
        (dbias, 0, bias, 1, copies, channels, channels),
    )
    dz = None if dz is None else dz.to(z.dtype)
    return du.to(u.dtype), ddelta.to(delta.dtype), sum_A, sum_B, sum_C, sum_D, dz, sum_bias, dfirst


run = register("cuda", forward, backward, states_shape)
