"""The pallas engine: the recurrence of a selective scan in GPU kernels, with a reverse pass from chunk states.

The forward pass keeps the state before every chunk; the reverse pass remakes the rest. Forward mode, and with it every
further derivative, is that of the XLA engine (``_derivatives.py``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from tokendyn.backends.jax.ops import _scan_pallas_kernels as kernels
from tokendyn.backends.jax.ops import _scan_xla
from tokendyn.backends.jax.ops._derivatives import change_of
from tokendyn.backends.jax.ops._recurrence import scan_by


@dataclass(frozen=True)
class Tiling:
    """How the work is cut; hashable, so that compiled code is kept by it. The default is the fastest of 15 on an H100.

    Attributes:
        chunk: tokens a program walks, at most; also the distance of the states that the forward pass keeps.
        tile: tokens whose states the reverse pass holds in registers.
        elements: entries of a program's state tile, at most; with N states so many channels.
        warps: of a program.
        interpret: run the kernels as plain XLA, on any device.
    """

    chunk: int = 128
    tile: int = 4
    elements: int = 256
    warps: int = 1
    interpret: bool = False


@dataclass(frozen=True)
class _Cut:
    """Padded sizes of one call: rows (batch times groups), channels a group, states, tokens, and their blocks."""

    rows: int
    groups: int
    channels: int
    state: int
    tokens: int
    block: int
    chunk: int

    @property
    def chunks(self) -> int:
        return self.tokens // self.chunk

    @property
    def blocks(self) -> int:
        return self.channels // self.block


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _cut(rows: int, groups: int, channels: int, state: int, tokens: int, tiling: Tiling) -> _Cut:
    state = pl.next_power_of_2(state)
    block = max(1, min(tiling.elements // state, pl.next_power_of_2(channels)))
    chunk = min(tiling.chunk, _up(tokens, tiling.tile))
    return _Cut(rows, groups, _up(channels, block), state, _up(tokens, chunk), block, chunk)


def _padded(v: jax.Array, *sizes: int, value: float = 0.0) -> jax.Array:
    """``v`` with its axes brought up to ``sizes``."""
    return jnp.pad(v, [(0, size - old) for old, size in zip(v.shape, sizes, strict=True)], constant_values=value)


class _Launch:
    """Calls of the kernels on one cut: which block of an array a program of the grid (row, block, chunk) sees."""

    def __init__(self, cut: _Cut, width: int, dtype: Any, tiling: Tiling) -> None:
        c = cut
        self.cut, self.dtype, self.tiling, self.tiles = c, dtype, tiling, c.chunk // tiling.tile
        groups = c.groups
        self.by_channel = pl.BlockSpec((None, c.chunk, c.block), lambda r, d, k: (r, k, d))
        self.by_state = pl.BlockSpec((None, c.chunk, c.state), lambda r, d, k: (r, k, 0))
        self.rates = pl.BlockSpec((None, c.block, width), lambda r, d, k: (r % groups, d, 0))
        self.kept = pl.BlockSpec((None, c.chunk), lambda r, d, k: (r // groups, k))
        self.bound = pl.BlockSpec((None, None, c.block, c.state), lambda r, d, k: (r, k, d, 0))
        self.inner = pl.BlockSpec((None, None, self.tiles, c.block, c.state), lambda r, d, k: (r, k, 0, d, 0))
        self.partial = pl.BlockSpec((None, None, c.chunk, c.state), lambda r, d, k: (r, d, k, 0))
        self.partial_rates = pl.BlockSpec((None, None, c.block, width), lambda r, d, k: (r, k, d, 0))
        # Of the grid (row, block), for what walks over the chunks.
        self.all_totals = pl.BlockSpec((None, c.chunks, c.block), lambda r, d: (r, 0, d))
        self.all_rates = pl.BlockSpec((None, c.block, width), lambda r, d: (r % groups, d, 0))
        self.all_kept = pl.BlockSpec((None, c.chunks), lambda r, d: (r // groups, 0))
        self.all_bounds = pl.BlockSpec((None, c.chunks, c.block, c.state), lambda r, d: (r, 0, d, 0))
        self.ends = pl.BlockSpec((None, c.block, c.state), lambda r, d: (r, d, 0))
        self.bound_shape = (c.rows, c.chunks, c.channels, c.state)
        self.end_shape = (c.rows, c.channels, c.state)
        self.channel_shape = (c.rows, c.tokens, c.channels)

    def __call__(
        self,
        kernel: Callable[..., None],
        inputs: list[tuple[jax.Array | None, Any]],
        results: list[tuple[tuple[int, ...], Any]],
        *,
        over_chunks: bool = False,
        **options: Any,
    ) -> list[jax.Array]:
        """Run ``kernel`` on arrays and their block specs; those that are None are given to it as None."""
        given = [i for i, (array, _) in enumerate(inputs) if array is not None]

        def body(*references: Any) -> None:
            arguments: list[Any] = [None] * len(inputs)
            for place, reference in zip(given, references, strict=False):
                arguments[place] = reference
            kernel(*arguments, *references[len(given) :], **options)

        grid = (self.cut.rows, self.cut.blocks) if over_chunks else (self.cut.rows, self.cut.blocks, self.cut.chunks)
        return pl.pallas_call(
            body,
            grid=grid,
            in_specs=[inputs[i][1] for i in given],
            out_specs=[spec for _, spec in results],
            out_shape=[jax.ShapeDtypeStruct(shape, self.dtype) for shape, _ in results],
            compiler_params=plgpu.CompilerParams(num_warps=self.tiling.warps, num_stages=1),
            interpret=self.tiling.interpret,
            name=f"tokendyn_scan_{kernel.__name__}",
        )(*(inputs[i][0] for i in given))

    def carry(self, p: _Padded, end: jax.Array, first: jax.Array, *, reverse: bool) -> tuple[jax.Array, jax.Array]:
        c = self.cut
        total = p.step.reshape(c.rows, c.chunks, c.chunk, c.channels).sum(2)
        kept = None if p.kept is None else p.kept.reshape(-1, c.chunks, c.chunk).min(2)
        before, last = self(
            kernels.carry,
            [
                (total, self.all_totals),
                (p.A, self.all_rates),
                (kept, self.all_kept),
                (end, self.all_bounds),
                (first, self.ends),
            ],
            [(self.bound_shape, self.all_bounds), (self.end_shape, self.ends)],
            over_chunks=True,
            reverse=reverse,
        )
        return before, last


@dataclass(frozen=True)
class _Padded:
    """The recurrence's arguments as kernels want them: whole blocks, time before channels, states last.

    u is in the dtype in which it was given, in which it takes less time to read; nothing is lost by it.
    """

    step: jax.Array
    u: jax.Array
    A: jax.Array
    B: jax.Array
    C: jax.Array
    kept: jax.Array | None


def _rows(v: jax.Array, *sizes: int) -> jax.Array:
    """(b, G, n, L) → (b G, L, n), padded."""
    return _padded(v.reshape(-1, *v.shape[2:]).mT, len(v) * v.shape[1], *sizes)


def _prepare(
    step: jax.Array,
    u: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    starts: jax.Array | None,
    tiling: Tiling,
    narrow: Any,
) -> tuple[_Padded, _Launch]:
    batch, groups, channels, tokens = step.shape
    cut = _cut(batch * groups, groups, channels, B.shape[2], tokens, tiling)
    width = 1 if A.shape[1] == 1 else cut.state
    kept = None
    if starts is not None:
        kept = _padded(jnp.where(starts, 0, 1).astype(step.dtype), batch, cut.tokens, value=1)
    padded = _Padded(
        _rows(step, cut.tokens, cut.channels),
        _rows(u.astype(narrow), cut.tokens, cut.channels),
        _padded(A.mT, groups, cut.channels, width),
        _rows(B, cut.tokens, cut.state),
        _rows(C, cut.tokens, cut.state),
        kept,
    )
    return padded, _Launch(cut, width, step.dtype, tiling)


def recurrence(
    step: jax.Array,
    u: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    h: jax.Array,
    starts: jax.Array | None,
    tiling: Tiling = Tiling(),
    narrow: Any = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
    """See :class:`~tokendyn.backends.jax.ops._recurrence.Recurrence`; ``narrow`` is a dtype that holds u exactly."""
    return _forward(step, u, A, B, C, h, starts, tiling, narrow)[:2]


@functools.partial(jax.custom_jvp, nondiff_argnums=(7, 8))
def _forward(
    step: jax.Array,
    u: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    h: jax.Array,
    starts: jax.Array | None,
    tiling: Tiling,
    narrow: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """y, the last state, and the state before every chunk, padded, for the reverse pass."""
    p, launch = _prepare(step, u, A, B, C, starts, tiling, narrow)
    cut = launch.cut
    shared = [(p.step, launch.by_channel), (p.u, launch.by_channel), (p.A, launch.rates), (p.B, launch.by_state)]
    kept = (p.kept, launch.kept)
    (end,) = launch(kernels.ends, [*shared, kept], [(launch.bound_shape, launch.bound)])
    first = _rows(h, cut.channels, cut.state)
    before, last = launch.carry(p, end, first, reverse=False)
    (y,) = launch(
        kernels.outputs,
        [*shared, (p.C, launch.by_state), kept, (before, launch.bound)],
        [(launch.channel_shape, launch.by_channel)],
    )
    return _by_channel(y, step), _by_state(last, h), before


def _by_channel(v: jax.Array, like: jax.Array) -> jax.Array:
    """(b G, tokens, channels) → (b, G, c, L)."""
    _, _, channels, length = like.shape
    return v[:, :length, :channels].mT.reshape(like.shape)


def _by_state(v: jax.Array, like: jax.Array) -> jax.Array:
    """(b G, channels, N) → (b, G, N, c)."""
    _, _, state, channels = like.shape
    return v[:, :channels, :state].mT.reshape(like.shape)


def _backward(
    step: jax.Array,
    u: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    h: jax.Array,
    starts: jax.Array | None,
    before: jax.Array,
    dy: jax.Array,
    dlast: jax.Array,
    tiling: Tiling,
    narrow: Any,
) -> tuple[jax.Array, ...]:
    """The gradients of step, u, A, B, C, h from those of y and the last state."""
    p, launch = _prepare(step, u, A, B, C, starts, tiling, narrow)
    cut = launch.cut
    dy = _rows(dy, cut.tokens, cut.channels)
    of_step, rates, kept = (p.step, launch.by_channel), (p.A, launch.rates), (p.kept, launch.kept)
    of_u, of_B, of_C = (p.u, launch.by_channel), (p.B, launch.by_state), (p.C, launch.by_state)
    of_dy = (dy, launch.by_channel)
    (end,) = launch(kernels.reverse_ends, [of_step, of_dy, rates, of_C, kept], [(launch.bound_shape, launch.bound)])
    after, dfirst = launch.carry(p, end, _rows(dlast, cut.channels, cut.state), reverse=True)
    states_shape = (cut.rows, cut.chunks, launch.tiles, cut.channels, cut.state)
    (states,) = launch(
        kernels.tile_states,
        [of_step, of_u, rates, of_B, kept, (before, launch.bound)],
        [(states_shape, launch.inner)],
    )
    maps_shape = (cut.rows, cut.blocks, cut.tokens, cut.state)
    dstep, du, dA, dB, dC = launch(
        kernels.gradients,
        [of_step, of_u, rates, of_B, of_C, of_dy, kept, (states, launch.inner), (after, launch.bound)],
        [
            (launch.channel_shape, launch.by_channel),
            (launch.channel_shape, launch.by_channel),
            ((cut.rows, cut.chunks, cut.channels, p.A.shape[2]), launch.partial_rates),
            (maps_shape, launch.partial),
            (maps_shape, launch.partial),
        ],
    )
    groups, width, channels = A.shape
    dA = dA.sum(1).reshape(-1, groups, *dA.shape[2:]).sum(0)[:, :channels, :width].mT

    def of_maps(v: jax.Array) -> jax.Array:
        """(b G, blocks, tokens, N) → (b, G, N, L)."""
        _, _, state, length = B.shape
        return v.sum(1)[:, :length, :state].mT.reshape(B.shape)

    return (
        _by_channel(dstep, step),
        _by_channel(du, u),
        dA,
        of_maps(dB),
        of_maps(dC),
        _by_state(dfirst, h),
    )


@_forward.defjvp
def _changes(tiling: Tiling, narrow: Any, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    step, u, A, B, C, h, starts = primals
    *outputs, before = _forward(step, u, A, B, C, h, starts, tiling, narrow)
    before = jax.lax.stop_gradient(before)  # how a system is solved has no derivative

    def apply(p: Any) -> Any:
        return list(jax.jvp(functools.partial(_scan_xla.recurrence, starts=starts), (step, u, A, B, C, h), p)[1])

    def transpose(dy: jax.Array, dlast: jax.Array) -> Any:
        return _backward(step, u, A, B, C, h, starts, before, dy, dlast, tiling, narrow)

    return (*outputs, before), (*change_of(outputs, tangents[:6], apply, transpose), jnp.zeros_like(before))


@functools.partial(jax.jit, static_argnames=("delta_softplus", "tiling"))
def run(*, tiling: Tiling = Tiling(), **arguments: Any) -> tuple[jax.Array, jax.Array]:
    """Output and last state; ``arguments`` are those of :func:`~tokendyn.backends.jax.ops._recurrence.scan_by`."""

    return scan_by(functools.partial(recurrence, tiling=tiling, narrow=arguments["u"].dtype), **arguments)
