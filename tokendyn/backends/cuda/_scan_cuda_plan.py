"""The launches of one pass of the scan's CUDA kernels: their arguments, their order, and the sums at their end."""

from __future__ import annotations

import abc
from typing import Any

from tokendyn.backends.cuda import _scan_cuda_layout
from tokendyn.backends.cuda._scan_cuda_layout import PLACES, SUM, SUMS_FROM, Layout, sum_blocks

#: Who loads elements: threads, whole words along tokens or along channels, or single elements.
TOKEN_RUNS, SINGLE, CHANNEL_RUNS = range(3)
#: The first compute capability (its whole number) whose blocks can be in clusters.
CLUSTERS_FROM = 9
#: The kernels' numbers of dtypes.
ELEMENTS = {"float32": 0, "bfloat16": 1, "float16": 2}


def divide(scalar_A: bool, sizes: tuple[int, ...], backward: bool, processors: int, capability: int) -> Layout:
    """The division of a pass with (b, d, L, G, N) on a GPU of so many multiprocessors and this compute capability."""
    batch, channels, length, groups, state = sizes
    fill = _scan_cuda_layout.BLOCKS_A_PROCESSOR["scalar" if scalar_A else "general"]
    rows, clusters = channels // groups, capability >= CLUSTERS_FROM
    return _scan_cuda_layout.layout(scalar_A, batch, groups, rows, length, state, processors, fill, clusters, backward)


class Plan(abc.ABC):
    """A pass over a call's arrays. A framework says how it makes arrays, names them to kernels, and launches these."""

    arguments: Any  # a sequence of integers

    def __init__(
        self, sizes: tuple[int, ...], layout: Layout, options: tuple[str, ...], gated: bool, softplus: bool, runs: bool
    ) -> None:
        """``runs``: B and C are whole words along tokens. ``gated``: the pass is a backward pass with z."""
        self.sizes, self.layout, self.options, self.gated = sizes, layout, options, gated
        batch, channels, length, groups, state = sizes
        self.blocks = batch * groups * layout.tiles * layout.segments
        self.set(
            batch=batch, channels=channels, length=length, groups=groups, group_size=channels // groups, state=state,
            block_rows=layout.block_rows, tiles=layout.tiles, segments=layout.segments,
            segment_tokens=layout.segment_tokens, chunks=layout.chunks, parts=layout.parts, chain=layout.chain,
            softplus=int(softplus), matrix_runs=int(runs),
        )  # fmt: skip

    @abc.abstractmethod
    def floats(self, name: str, *shape: int) -> object:
        """Make the array of float32 that the kernels' argument ``name`` is."""

    @abc.abstractmethod
    def zeros(self, name: str, count: int) -> object:
        """Make the array of int32 zeros that the argument ``name`` is."""

    @abc.abstractmethod
    def total(self, name: str, place: int) -> bool:
        """Make the gradient of ``name``, whose address goes to ``place``; return whether it has 16 bits."""

    @abc.abstractmethod
    def address(self, place: int, name: str, offset: int) -> None:
        """Put the address of the argument ``name``, and so many floats more, at ``place``."""

    @abc.abstractmethod
    def launch(self, name: str, shared: int, blocks: int) -> None:
        """Launch a kernel."""

    def set(self, **values: int) -> None:
        for name, value in values.items():
            self.arguments[PLACES[name]] = value

    def outputs(self) -> None:
        """What the forward pass launches."""
        self._states_of_segments("segment_ends", backward=False)
        self._run("outputs")

    def gradients(self, *vectors: str) -> None:
        """What the backward pass launches; ``vectors`` names which of D and bias were given."""
        self._states_of_segments("segment_coends", backward=True)
        batch, channels, length, groups, state = self.sizes
        layout, scalar_A = self.layout, self.layout.kernels == "scalar"
        copies, rates = batch * layout.segments, 1 if scalar_A else state
        columns = layout.padded if scalar_A else 0  # parts are (L, columns) there, (N, L) else
        self.floats("dA", copies, channels, rates)
        for name in vectors:
            self.floats(f"d{name}", copies, channels)
        if layout.whole:
            for name in ("B", "C"):
                self.total(name, PLACES[f"d{name}"])
        else:
            self.floats("parts_out", batch, groups, layout.parts, 2, columns or state, length)
        if layout.chain > 1:
            self.zeros("counters", layout.counters(batch * groups))
        self._run("gradients")
        per_matrix = (columns or state) * length
        matrix = (batch * groups, layout.parts, per_matrix, 2 * per_matrix, columns)
        vector = (1, copies, channels, channels, 0)
        place, blocks = SUMS_FROM, 0
        matrices = () if layout.whole else (("B", "parts_out", 0, matrix), ("C", "parts_out", per_matrix, matrix))
        for name, source, offset, numbers in (
            ("A", "dA", 0, (1, copies, channels * rates, channels * rates, 0)),
            *matrices,
            *((name, f"d{name}", 0, vector) for name in vectors),
        ):
            self.address(place, source, offset)
            narrow = self.total(name, place + 1)
            self.arguments[place + 2 : place + len(SUM)] = (*numbers, int(narrow))
            place += len(SUM)
            blocks += sum_blocks(*numbers[:3], layout.threads)
        self._run("add_parts", blocks)

    def _states_of_segments(self, kernel: str, backward: bool) -> None:
        """Where sequences are cut: states at the segments' ends, passed on from the first or from the last."""
        layout, (batch, channels, *_) = self.layout, self.sizes
        if layout.segments == 1:
            return
        for name, more in (("ends", 0), ("decays", 0), ("slots", 1)):
            self.floats(name, batch, layout.segments + more, channels, layout.padded)
        self.set(backwards=int(backward))
        self._run(kernel)
        self._run("join_segments", -(-batch * channels * layout.padded // layout.threads))

    def _run(self, name: str, blocks: int | None = None) -> None:
        small, large = self.layout.shared_bytes(self.gated)
        shared = large if name == "gradients" else 0 if name in ("join_segments", "add_parts") else small
        self.launch(name, shared, self.blocks if blocks is None else blocks)
