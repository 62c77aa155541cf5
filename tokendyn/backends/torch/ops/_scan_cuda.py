"""The cuda engine: launches of the kernels in ``_scan_cuda.cu``.

No value is looked at, so that CUDA graphs can capture it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib.resources import files

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
_ACTIVATIONS = ("u", "delta", "z", "y", "dy", "du", "ddelta", "dz")
_FIELDS = (
    "batch", "channels", "length", "groups", "group_size", "state", "tiles", "segments", "segment_tokens", "chunks",
    "parts", "chain", "softplus", "keep", "backwards", "matrix_runs",
    "A", "D", "bias", "seq_idx", "lengths", "first_state", "last_state", "last_gradient", "dfirst",
    "states", "slots", "ends", "decays", "dA", "dD", "dbias", "parts_out", "counters",
    *(f"{name}{suffix}" for name in _ACTIVATIONS for suffix in ("", "_b", "_d", "_l", "_runs")),
    *(f"{name}{suffix}" for name in ("B", "C") for suffix in ("", "_b", "_g", "_n", "_l")),
)  # fmt: skip


@functools.cache
def source() -> str:
    """The kernels, below the structure of their arguments."""
    fields = "".join(f"    long long {name};\n" for name in _FIELDS)
    return f"struct Args {{\n{fields}}};\n" + files(__package__).joinpath("_scan_cuda.cu").read_text()


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
    name: str, variant: tuple[str, ...], shared: int, blocks: int, arguments: Sequence[int], device: torch.device
):
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


def _side_by_side(t: torch.Tensor, along: int, across: tuple[int, ...]) -> bool:
    """Whether eight neighbours along a dimension are whole 16-byte words wherever they start at a multiple of eight."""
    wide = all(t.stride(axis) * t.element_size() % 16 == 0 for axis in across)
    return t.stride(along) == 1 and wide and t.data_ptr() % 16 == 0


def _float(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.float().contiguous()


class _Plan:
    """What the launches of one call share: sizes, the variant of the kernels, and their arguments."""

    def __init__(self, u, delta, A, B, C, D, z, bias, seq_idx, lengths, softplus) -> None:
        batch, channels, length = u.shape
        groups, state = B.shape[1], B.shape[2]
        if any(t is not None and t.dtype != u.dtype for t in (delta, B, C, z)) or u.dtype not in _ELEMENTS:
            u, delta, B, C, z = (None if t is None else t.float() for t in (u, delta, B, C, z))
        self.u, self.delta, self.z, self.B, self.C = u, delta, z, B, C
        self.A, self.D, self.bias = _float(A), _float(D), _float(bias)
        self.seq_idx = None if seq_idx is None else seq_idx.long().contiguous()
        self.lengths = None if lengths is None else lengths.long().contiguous()
        self.quads = quads(state)
        rows, chunk = THREADS // self.quads, chunk_tokens(self.quads)
        size = channels // groups
        tiles, chunks = -(-size // rows), -(-length // chunk)
        fit = _processors(u.device) * BLOCKS_A_PROCESSOR // (batch * groups * tiles)
        segment = -(-chunks // max(1, min(fit, chunks)))
        self.segments = -(-chunks // segment)
        self.blocks = batch * groups * tiles * self.segments
        parts = min(tiles, PARTS)
        self.chain = -(-tiles // parts)
        self.parts = -(-tiles // self.chain)
        self.padded = 4 * self.quads
        self.chunks = chunks
        self.channel_runs = size % 8 == 0
        self.owner = _SINGLE
        for owner in (_TOKEN_RUNS, _CHANNEL_RUNS):
            self.owner = owner
            if self._runs(u) and self._runs(delta):
                break
        else:
            self.owner = _SINGLE
        self.scalar_A = A.shape[1] == 1
        self.values = {
            "batch": batch, "channels": channels, "length": length, "groups": groups, "group_size": size,
            "state": state, "tiles": tiles, "segments": self.segments, "segment_tokens": segment * chunk,
            "chunks": chunks, "parts": self.parts, "chain": self.chain, "softplus": int(softplus),
        }  # fmt: skip
        self.kept: list[torch.Tensor] = []
        self.give(A=self.A, D=self.D, bias=self.bias, seq_idx=self.seq_idx, lengths=self.lengths)
        self.give_activations(u=u, delta=delta, z=z)
        self.give_matrices(B=B, C=C)
        self.values["matrix_runs"] = int(_side_by_side(B, 3, (0, 1, 2)) and _side_by_side(C, 3, (0, 1, 2)))

    def _runs(self, t: torch.Tensor) -> bool:
        """Whether a thread's eight elements lie side by side in whole 16-byte words."""
        if self.owner == _CHANNEL_RUNS:
            return self.channel_runs and _side_by_side(t, 1, (0, 2))
        return self.owner == _TOKEN_RUNS and _side_by_side(t, 2, (0, 1))

    def give(self, **tensors: torch.Tensor | None) -> None:
        self.values |= {name: 0 if t is None else t.data_ptr() for name, t in tensors.items()}
        self.kept += [t for t in tensors.values() if t is not None]

    def give_activations(self, **tensors: torch.Tensor | None) -> None:
        self.give(**tensors)
        for name, t in tensors.items():
            strides = (0, 0, 0) if t is None else t.stride()
            runs = t is not None and self._runs(t)
            self.values |= dict(
                zip((f"{name}_b", f"{name}_d", f"{name}_l", f"{name}_runs"), (*strides, int(runs)), strict=True)
            )

    def give_matrices(self, **tensors: torch.Tensor) -> None:
        self.give(**tensors)
        for name, t in tensors.items():
            self.values |= dict(zip((f"{name}_b", f"{name}_g", f"{name}_n", f"{name}_l"), t.stride(), strict=True))

    def run(self, name: str, blocks: int | None = None, backward: bool = False) -> None:
        gated = backward and self.z is not None
        variant, small, large = options(
            _ELEMENTS[self.u.dtype], self.quads, self.scalar_A, gated, self.seq_idx is not None, self.owner
        )
        shared = large if name == "gradients" else 0 if name == "join_segments" else small
        arguments = [int(self.values.get(field, 0)) for field in _FIELDS]
        launch(name, variant, shared, self.blocks if blocks is None else blocks, arguments, self.u.device)

    def join(self, backward: bool) -> None:
        """Pass the states between segments on, from the first or the last."""
        batch, channels = self.u.shape[:2]
        self.values["backwards"] = int(backward)
        self.run("join_segments", -(-batch * channels * self.padded // THREADS), backward)

    def floats(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.u.device)

    def give_segment_buffers(self) -> None:
        batch, channels = self.u.shape[:2]
        per_segment = (batch, self.segments, channels, self.padded)
        slots = self.floats(batch, self.segments + 1, channels, self.padded)
        self.give(ends=self.floats(*per_segment), decays=self.floats(*per_segment), slots=slots)


def forward(u, delta, A, B, C, D, z, bias, initial_state, seq_idx, lengths, softplus, return_last_state, keep_states):
    """y, the last state and the states every CHUNK tokens."""
    plan = _Plan(u, delta, A, B, C, D, z, bias, seq_idx, lengths, softplus)
    y = torch.empty_like(plan.u)
    last = plan.floats(u.shape[0], u.shape[1], B.shape[2]) if return_last_state else None
    states = plan.floats(*states_shape(u, A, B)) if keep_states else None
    plan.give_activations(y=y)
    plan.give(first_state=_float(initial_state), last_state=last, states=states)
    plan.values["keep"] = int(keep_states)
    if plan.segments > 1:
        plan.give_segment_buffers()
        plan.run("segment_ends")
        plan.join(backward=False)
    plan.run("outputs")
    return y.to(u.dtype), last, states


def backward(
    dy, dlast, states, u, delta, A, B, C, D, z, bias, seq_idx, lengths, softplus, initial_gradient
):  # fmt: skip
    """Gradients of u, delta, A, B, C, D, z, bias and the initial state."""
    plan, (batch, channels, length), (groups, state) = (
        _Plan(u, delta, A, B, C, D, z, bias, seq_idx, lengths, softplus), u.shape, B.shape[1:3],
    )  # fmt: skip
    du, ddelta = torch.empty_like(plan.u), torch.empty_like(plan.delta)
    dz = None if z is None else torch.empty_like(plan.z)
    dfirst = plan.floats(batch, channels, state) if initial_gradient else None
    plan.give_activations(dy=dy.to(plan.u.dtype), du=du, ddelta=ddelta, dz=dz)
    plan.give(last_gradient=_float(dlast), dfirst=dfirst, states=states)
    if plan.segments > 1:
        plan.give_segment_buffers()
        plan.run("segment_coends", backward=True)
        plan.join(backward=True)
    dA = plan.floats(batch * plan.segments, channels, 1 if plan.scalar_A else state)
    dD = None if D is None else plan.floats(batch * plan.segments, channels)
    dbias = None if bias is None else plan.floats(batch * plan.segments, channels)
    parts = plan.floats(batch, groups, plan.parts, 2, state, length)
    flags = 1 + (batch * groups * plan.parts * plan.chunks if plan.chain > 1 else 0)
    counters = torch.zeros(flags, dtype=torch.int32, device=u.device)
    plan.give(dA=dA, dD=dD, dbias=dbias, parts_out=parts, counters=counters)
    plan.run("gradients", backward=True)
    dB, dC = (parts[:, :, :, i].sum(2) for i in range(2))
    return (
        du.to(u.dtype), ddelta.to(delta.dtype), dA.sum(0).to(A.dtype), dB.to(B.dtype),
        dC.to(C.dtype), None if D is None else dD.sum(0).to(D.dtype),
        None if z is None else dz.to(z.dtype), None if bias is None else dbias.sum(0).to(bias.dtype), dfirst,
    )  # fmt: skip


run = register("selective_scan_cuda", forward, backward, states_shape)
