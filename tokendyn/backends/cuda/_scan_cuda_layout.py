"""How the scan's CUDA kernels divide a call: blocks, segments, shared memory, the compiler's options."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

#: Where the CUDA sources are.
FOLDER = Path(__file__).parent
#: The kernels' argument: a structure of 64-bit integers, at whose end stand the numbers of SUMS sums.
SUM = ("in", "out", "outer", "parts", "inner", "next", "columns", "element")
SUMS = 5  # of A, D, delta_bias, B, C
FIELDS = (
    "batch", "channels", "length", "groups", "group_size", "state", "block_rows", "tiles", "segments", "segment_tokens",
    "chunks", "parts", "chain", "softplus", "keep", "backwards", "matrix_runs",
    "A", "D", "bias", "seq_idx", "lengths", "first_state", "last_state", "last_gradient", "dfirst",
    "states", "slots", "ends", "decays", "dA", "dB", "dC", "dD", "dbias", "parts_out", "counters",
    *(f"{name}{suffix}" for name in ("u", "delta", "z", "y", "dy", "du", "ddelta", "dz")
      for suffix in ("", "_b", "_d", "_l", "_runs")),
    *(f"{name}{suffix}" for name in ("B", "C") for suffix in ("", "_b", "_g", "_n", "_l")),
    f"sums[{SUMS * len(SUM)}]",
)  # fmt: skip
PLACES = {name: place for place, name in enumerate(FIELDS)}
SUMS_FROM = len(FIELDS) - 1
#: How many integers it is.
ARGUMENTS = SUMS_FROM + SUMS * len(SUM)
#: Largest N.
STATE = 32
#: Blocks of 128 threads that keep a multiprocessor busy: sequences are cut until there are so many.
BLOCKS_A_PROCESSOR = {"general": 3, "scalar": 4}
#: For memory's sake, in sequences from some length on: copies of dB and dC that clusters of blocks add to, one after
#: the other, and chunks between two states that the general kernels keep. Shorter ones have twice as many copies, since
#: they have more to lose by waiting, and twice as many states. For PART_ROWS channels more, times N, there is one more
#: copy: beside the activations of so many it takes no more memory.
PARTS, PART_ROWS, KEPT, LONG = 2, 48, 4, 1024
#: Blocks of a cluster of the general kernels, best first: of seven or eight an H100 runs fewer at a time.
CLUSTERS = (6, 4, 3, 5, 2)
_TEXTS = {"general": ("_common", ""), "scalar": ("_common", "_tiles", "_scalar", "_scalar_backward")}
#: Shared memory of an H100's multiprocessor, of which each block's share is 1,024 bytes larger than what it asks for.
_SHARED = 228 << 10
#: What a block may ask for on an A100.
_LARGEST = 163 << 10
#: Tiles of 16 channels that a block of the scalar kernels can work on.
_MOST_TILES = 6


class Costs(NamedTuple):
    """What a block of the scalar kernels takes, in units of what a span of tokens takes for each tile of channels.

    Fitted to times on an H100. Of 443 divisions of 22 calls the cheapest by this account took 3 % longer than the
    fastest forward and 1 % backward, on average, and 28 % at most, in float32.
    """

    #: A span of tokens, beside its tiles.
    span: float
    #: How many times as long a sequence in segments takes, whose ends are found first, and joining them.
    segments: float
    joining: float
    #: A block before it along the channels, whose sums of dB and dC it waits for.
    waiting: float
    #: By how much the last block to end takes longer than the others if there is no second round.
    straggling: float


FORWARD, BACKWARD = Costs(0.54, 1.66, 4.5, 0.0, 0.02), Costs(1.03, 1.21, 0.3, 0.37, 0.0)
#: In the same units: a block's start; how long a round of blocks takes that fills no more than half of the places.
_START, _HALF_FULL = 1.8, 0.7


@dataclass(frozen=True)
class Layout:
    """One call's division among the blocks of one set of kernels."""

    kernels: str
    threads: int
    #: N as states are stored.
    padded: int
    #: Tokens between two states that are kept for the backward pass, and how many such chunks there are.
    chunk: int
    chunks: int
    #: Channels of a block, and blocks along the channels of a group.
    block_rows: int
    tiles: int
    segments: int
    segment_tokens: int
    #: Blocks along the channels that add up dB and dC in each other's shared memory.
    cluster: int
    #: Copies of dB and dC, at most.
    copies: int
    #: Elements that a thread can load as one word along tokens, best first, and along channels.
    token_runs: tuple[int, ...]
    channel_run: ClassVar[int] = 8

    def options(
        self, element: int, gated: bool, packed: bool, owner: int, runs: tuple[int, int], narrow: bool = False
    ) -> tuple[str, ...]:
        """The compiler's options of a variant. With ``narrow`` the scalar kernels keep states in bfloat16.

        ``runs``: tokens of an activation, and of B and C, that can be loaded as one word; 0 if single ones alone.
        """
        chosen = {"ELEMENT": element, "THREADS": self.threads, "STATE": self.padded, "GATED": int(gated)}
        chosen |= {"PACKED": int(packed), "OWNER": owner}
        chosen["FORWARD_BYTES"], chosen["BACKWARD_BYTES"] = self.shared_bytes(gated, 1)
        if self.kernels == "scalar":
            chosen["NARROW"] = int(narrow)
        else:
            chosen |= {"QUADS": self.padded // 4, "KEPT": self.kept}
            chosen |= {"CLUSTER": self.cluster, "WHOLE": int(self.whole)}
            chosen |= {name: run or self.token_runs[0] for name, run in zip(("RUN", "MATRIX_RUN"), runs, strict=True)}
        return tuple(f"-D{name}={value}" for name, value in chosen.items())

    @property
    def chain(self) -> int:
        """Clusters along the channels that add to one copy of dB and dC, one after the other."""
        return -(-self.tiles // self.cluster // self.copies)

    @property
    def parts(self) -> int:
        """Copies of dB and dC."""
        return -(-self.tiles // self.cluster // self.chain)

    @property
    def whole(self) -> bool:
        """Whether one cluster has all channels of a group, so that its sums are dB and dC."""
        return self.kernels == "general" and self.cluster == self.tiles

    def counters(self, sequences: int) -> int:
        """Integers, 0 at first, by which blocks of a chain know whose turn it is."""
        return 1 + sequences * self.parts * self.chunks * (
            self.threads // 32 if self.kernels == "scalar" else self.kept * self.cluster
        )

    @property
    def kept(self) -> int:
        """Chunks of the general kernels for each state that is kept."""
        return self.chunk // (4 * self.padded)

    def shared_bytes(self, gated: bool, tiles: int | None = None) -> tuple[int, int]:
        """Shared memory of a block of the forward and of the backward kernels, had it so many tiles of 16 channels."""
        if self.kernels == "general":
            return _general_bytes(self.padded // 4, gated)
        return _scalar_bytes(self.threads // 32, self.padded, self.block_rows // 16 if tiles is None else tiles)


@functools.cache
def source(kernels: str) -> str:
    """A set of kernels, below what all share and below the structure of their arguments."""
    fields = "".join(f"    long long {name};\n" for name in FIELDS)
    names = ("_cuda_numbers.cu", *(f"_scan_cuda{name}.cu" for name in _TEXTS[kernels]))
    texts = [(FOLDER / name).read_text() for name in names]
    return "".join((f"struct Args {{\n{fields}}};\n", *texts))


def sum_blocks(outer: int, parts: int, inner: int, threads: int) -> int:
    """Blocks of ``add_parts`` for a sum: many parts are added by eight threads each."""
    return -(-outer * inner * (8 if parts > 16 else 1) // threads)


def _general_bytes(quads: int, gated: bool) -> tuple[int, int]:
    rows, half, state, tile = 128 // quads, 8 * quads, 4 * quads, 8

    def arrays(tokens: int, per_token: int) -> int:
        return 4 * (per_token * rows * (tokens + 4) + 2 * tokens * (state + 4) + tokens + 2 * rows)

    forward = arrays(half, 2)
    starts, sums = 2 * half // tile * 128 * 16, 2 * 4 * (2 * tile * 36) * 4
    backward = arrays(2 * half, 3 + gated) + starts + sums + 4
    return forward, -(-backward // 16) * 16


def _scalar_bytes(warps: int, state: int, tiles: int) -> tuple[int, int]:
    entries, square, rows = 16 * state, 256, 4 * 16 * _MOST_TILES + 16
    forward = warps * (entries + max(20 * state, square) + 320 + 1024 + 16) + 2 * _MOST_TILES * entries + rows
    per_warp = 4 * entries + 512 + 320 + 32 * (state + 4) + 768 + 3 * 16
    backward = warps * per_warp + rows + 4 + tiles * (entries + 3 * 16 * warps)
    return 4 * forward, -(-4 * backward // 16) * 16


def _most_copies(group_size: int, length: int, state: int) -> int:
    most = max(PARTS, group_size // (PART_ROWS * state))
    return most if length >= LONG else 2 * most


def kept_states(scalar_A: bool, length: int, state: int) -> tuple[int, int]:
    """Tokens between two states that are kept for the backward pass, and the N that they are padded to."""
    if scalar_A:
        return 64 if length <= 64 else 128, 8 if state <= 8 else 16 if state <= 16 else 32
    quads = 1 if state <= 4 else 2 if state <= 8 else 4 if state <= 16 else 8
    return 16 * quads * (KEPT if length >= LONG else KEPT // 2), 4 * quads


@functools.cache
def layout(
    scalar_A: bool, batch: int, groups: int, group_size: int, length: int, state: int, processors: int, fill: int,
    clusters: bool, backward: bool,
) -> Layout:  # fmt: skip
    """The division of a pass of a call on a GPU of ``processors`` multiprocessors, ``fill`` blocks of 128 threads each.

    ``clusters``: blocks side by side can read each other's shared memory there.
    """
    if scalar_A:
        return _scalar(batch * groups, group_size, length, state, processors * fill, backward)
    chunk, padded = kept_states(False, length, state)
    block_rows = 512 // padded
    tiles, chunks = -(-group_size // block_rows), -(-length // chunk)
    fit = processors * fill // (batch * groups * tiles)
    tokens = 4 * padded  # on which a block works at a time
    pieces, kept = -(-length // tokens), chunk // tokens
    segment = -(-pieces // max(1, fit))
    if segment > kept:  # a shorter one goes back, in the backward pass, to the state that was kept last before it
        segment = -(-segment // kept) * kept
    segments = -(-pieces // segment)
    cluster = next((size for size in CLUSTERS if clusters and tiles % size == 0), 1)
    copies = _most_copies(group_size, length, state)
    return Layout(
        "general", 128, padded, chunk, chunks, block_rows, tiles, segments, segment * tokens, cluster, copies, (8, 4)
    )


def _scalar(sequences: int, group_size: int, length: int, state: int, places: int, backward: bool) -> Layout:
    """The cheapest number of tiles for a block and of segments for a sequence."""
    chunk, padded = kept_states(True, length, state)
    warps, tiles, chunks = chunk // 16, -(-group_size // 16), -(-length // chunk)
    copies, costs = _most_copies(group_size, length, state), BACKWARD if backward else FORWARD
    shared = [_scalar_bytes(warps, padded, most)[backward] for most in range(_MOST_TILES + 1)]
    # There are as many places as a multiprocessor has registers for, at N = 32 half as many by its shared memory: then
    # a block has none beside it, be all places taken or not.
    wide = padded > 16
    fit, half_full = max(1, places * 4 // warps // (2 if wide else 1)), 1.0 if wide else _HALF_FULL

    def cost(choice: tuple[int, int]) -> float:
        most, segment = choice
        along = -(-tiles // most)
        full, rest = divmod(sequences * along * -(-chunks // segment), fit)
        rounds = full + (0 if rest == 0 else half_full if rest <= fit / 2 else 1)
        work = segment * (most + costs.span) * (1 + costs.straggling / (full + (rest > 0)))
        waiting = costs.waiting * -(-along // copies)
        if segment >= chunks:
            return rounds * (_START + work) + waiting
        return rounds * (_START + work * costs.segments) + costs.joining + waiting

    choices = []
    for most in range(min(_MOST_TILES, tiles), 0, -1):
        if shared[most] > _LARGEST or _SHARED // (shared[most] + 1024) < _SHARED // (shared[1] + 1024):
            continue  # fewer blocks would be beside each other on a multiprocessor
        choices.append((most, chunks))
        for rounds in (1, 2):
            segments = max(1, min(chunks, rounds * fit // (sequences * -(-tiles // most))))
            choices.append((most, -(-chunks // segments)))
    most, segment = min(choices, key=cost)
    along, segments = -(-tiles // most), -(-chunks // segment)
    return Layout(
        "scalar", 32 * warps, padded, chunk, chunks, 16 * most, along, segments, segment * chunk, 1, copies, (4,)
    )
