"""The cuda engine of SoftSort and its inverse: launches of the kernels in ``_softsort_cuda.cu``.

No value is looked at, so that CUDA graphs can capture it.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import torch

from tokendyn.backends.cuda._scan_cuda_layout import FOLDER
from tokendyn.backends.torch.ops._softsort_operator import register

LANES = 32
#: Tokens of a warp, and warps in a row, of a block that has a whole sequence; longer ones are cut into spans of the
#: last.
RUNS = ((8, 1), (8, 2), (8, 4), (7, 7), (16, 8), (14, 14), (16, 16))
SPAN = math.prod(RUNS[-1])
#: Up to this length a block counts the tokens before each in less time than sorting takes.
COUNTED = 1024
#: Threads of a block that sees single numbers a token.
SUMMING = 1024
#: Threads of a block that joins spans: few, so that there are blocks enough.
JOINING = 64
#: Multiprocessors of an H100. Channels are divided among so many blocks as fill them.
PROCESSORS = 132

_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FIELDS = (
    "batch", "length", "width", "slabs", "spans", "parts", "slabs_a_part", "scale", "factor", "ascending", "sorts",
    "scores", "scores_b", "scores_l", "given_order", "order", "placed", "mass", "total",
    "ends", "partial", "work", "dscores",
    *(f"{name}{suffix}" for name in ("a", "b", "out") for suffix in ("", "_b", "_l", "_d")),
)  # fmt: skip
_PLACES = {name: place for place, name in enumerate(_FIELDS)}
_Arguments = ctypes.c_int64 * len(_FIELDS)
_LARGEST = 3e38


@functools.cache
def source(kernel: str) -> str:
    """What a kernel is compiled from, below the structure of its arguments."""
    fields = "".join(f"    long long {name};\n" for name in _FIELDS)
    own = ("_softsort_cuda_sums.cu", "_softsort_cuda.cu")[: 1 if kernel in ("arrange", "finish") else 2]
    files = (FOLDER / "_cuda_numbers.cu", *(Path(__file__).with_name(name) for name in own))
    return "".join((f"struct Args {{\n{fields}}};\n", *(file.read_text() for file in files)))


@dataclass(frozen=True)
class Variant:
    """A kernel as it is compiled: the compiler's options, and what its launch must know."""

    kernel: str
    options: tuple[str, ...]
    threads: int
    shared: int
    #: Channels of a block at a time, by 32.
    beside: int = 1
    #: Blocks that fill the GPU.
    blocks: int = 1


@functools.cache
def summing(kernel: str) -> Variant:
    """``arrange`` or ``finish``, whose blocks have a sequence each and see single numbers a token."""
    shared = 4 * 2 * (1 + 2 * 4) * SUMMING // 32 + (8 * COUNTED + 4 if kernel == "arrange" else 0)
    options = {kernel.upper(): 1, "ELEMENT": 0, "THREADS": SUMMING, "SORTED": COUNTED, "SHARED_BYTES": shared}
    return Variant(kernel, _defined(options), SUMMING, shared)


@functools.cache
def across_channels(kernel: str, length: int, slabs: int, element: int, ordered: bool, two: bool) -> Variant:
    """``product``, ``gradients`` or ``ends``, whose warps have tokens and 32 channels, for ``slabs`` such channels."""
    run, segments = next((entry for entry in RUNS if math.prod(entry) >= length), RUNS[-1])
    few = run <= 8  # registers: more warps fit
    at_once = 1 if kernel == "gradients" else 2
    most_warps = 28 if few and kernel == "gradients" else 16
    rounds = -(-slabs // (most_warps // segments))
    beside = -(-slabs // rounds)
    span, warps, arrays = run * segments, beside * segments, 1 + two
    ends = 2 * arrays * arrays * beside * segments * LANES
    shared = 4 * (4 * (span + 1) + 2 * segments + ends + 2 * (1 + 2 * 4) * warps)
    shared += {"product": 4 * (6 * span + 1), "gradients": 4 * (7 + 3 * beside) * span, "ends": 0}[kernel] + 16
    options = {
        kernel.upper(): 1, "ELEMENT": element, "ORDERED": int(ordered), "TWO": int(two), "LONG": int(length > SPAN),
        "RUN": run, "SEGMENTS": segments, "SLABS": beside, "THREADS": warps * LANES, "AT_ONCE": at_once,
        "SORTED": span, "SHARED_BYTES": shared,
    }  # fmt: skip
    return Variant(kernel, _defined(options), warps * LANES, shared, beside, at_once * PROCESSORS)


@functools.cache
def joining(two: bool) -> Variant:
    """``join``, whose threads have a channel each."""
    run, segments = RUNS[-1]
    options = {
        "JOIN": 1, "ELEMENT": 0, "ORDERED": 0, "TWO": int(two), "LONG": 1, "RUN": run, "SEGMENTS": segments, "SLABS": 1,
        "THREADS": JOINING, "SORTED": SPAN, "SHARED_BYTES": 48 << 10,
    }  # fmt: skip
    return Variant("join", _defined(options), JOINING, 0)


def _defined(options: dict[str, int]) -> tuple[str, ...]:
    return tuple(f"-D{name}={value}" for name, value in options.items())


def launch(variant: Variant, blocks: int, arguments: ctypes.Array[ctypes.c_int64], device: torch.device) -> None:
    """Run a kernel on the current stream of ``device``."""
    from tokendyn.backends.torch.ops import _nvrtc

    text = source(variant.kernel)
    _nvrtc.launch(text, variant.options, variant.kernel, variant.threads, variant.shared, blocks, arguments, device)


def _bits(value: float) -> int:
    """A float32 as the kernels read it from an integer; finite, so that equal scores keep the weight 1 at any τ."""
    return struct.unpack("<I", struct.pack("<f", min(value, _LARGEST)))[0]


class _Plan:
    """What the launches of one call share: sizes, the tokens' order, and the kernels' arguments."""

    def __init__(self, x: torch.Tensor, tau: float, ascending: bool, ordered: bool) -> None:
        """``ordered``: ``a`` is read through the order, and ``b`` and ``out`` lie in order; else the other way."""
        self.batch, self.length, self.width = x.shape
        self.device, self.dtype, self.ordered = x.device, x.dtype, ordered
        self.slabs, self.spans = -(-self.width // LANES), -(-self.length // SPAN)
        self.arguments = _Arguments(*(0 for _ in _FIELDS))
        self.set(
            batch=self.batch, length=self.length, width=self.width, slabs=self.slabs, spans=self.spans,
            scale=_bits(math.log2(math.e) / tau), factor=_bits(1.0 / tau), ascending=int(ascending),
        )  # fmt: skip
        self.kept: list[torch.Tensor] = []  # until the launches are under way

    def set(self, **numbers: int) -> None:
        for name, number in numbers.items():
            self.arguments[_PLACES[name]] = number

    def give(self, **tensors: torch.Tensor) -> None:
        self.set(**{name: t.data_ptr() for name, t in tensors.items()})
        self.kept.extend(tensors.values())

    def give_tokens(self, name: str, t: torch.Tensor) -> None:
        """Tokens (b, L, D)."""
        if abs(t.stride(1)) * t.element_size() >= 1 << 31:
            t = t.contiguous()
        place, (b, length, d) = _PLACES[name], t.stride()
        self.arguments[place : place + 4] = (t.data_ptr(), b, length * t.element_size(), d)
        self.kept.append(t)

    def floats(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def run(self, variant: Variant, blocks: int) -> None:
        launch(variant, blocks, self.arguments, self.device)

    def sort(self, scores: torch.Tensor, ascending: bool, with_total: bool) -> tuple[torch.Tensor, ...]:
        """The order, the scores in it, Z, and M if asked for; of short sequences `product` fills them in."""
        scores = scores.detach().float()
        order = torch.empty((self.batch, self.length), dtype=torch.int32, device=self.device)
        made = {name: self.floats(self.batch, self.length) for name in ("placed", "mass", "total")[: 2 + with_total]}
        self.give(scores=scores, order=order, **made)
        self.set(scores_b=scores.stride(0), scores_l=scores.stride(1), sorts=int(self.spans == 1))
        if self.spans > 1:
            if self.length > COUNTED:
                self.give(given_order=torch.sort(scores, stable=True, descending=not ascending).indices)
            self.run(summing("arrange"), self.batch)
        return order, *made.values()

    def divide(self, kernel: str, two: bool) -> tuple[Variant, int]:
        """A kernel whose blocks have tokens and channels, and how many of its blocks share the channels."""
        variant = across_channels(kernel, self.length, self.slabs, _ELEMENTS[self.dtype], self.ordered, two)
        rounds = -(-self.slabs // variant.beside)
        most = max(1, variant.blocks // (self.batch * self.spans))
        slabs_a_part = -(-rounds // min(rounds, most)) * variant.beside
        parts = -(-self.slabs // slabs_a_part)
        self.set(parts=parts, slabs_a_part=slabs_a_part)
        return variant, self.batch * self.spans * parts

    def ends(self, two: bool) -> None:
        """What spans of tokens start and end with, where there are several."""
        if self.spans > 1:
            self.give(ends=self.floats(self.batch, self.spans, 8 if two else 2, self.slabs * LANES))
            variant, blocks = self.divide("ends", two)
            self.run(variant, blocks)
            threads = self.batch * (4 if two else 2) * self.slabs * LANES
            self.run(joining(two), -(-threads // JOINING))

    def product(self) -> None:
        self.ends(two=False)
        self.run(*self.divide("product", two=False))

    def score_gradient(self, dtype: torch.dtype) -> torch.Tensor:
        """The gradient of the scores; the tokens' product beside it where it was given an output."""
        self.ends(two=True)
        variant, blocks = self.divide("gradients", two=True)
        dscores = self.floats(self.batch, self.length)
        if blocks == self.batch:  # which have whole sequences
            self.give(dscores=dscores)
            self.run(variant, blocks)
        else:
            self.give(partial=self.floats(3, blocks // self.spans, self.length))
            self.run(variant, blocks)
            self.give(work=self.floats(3, self.batch, self.length), dscores=dscores)
            self.run(summing("finish"), self.batch)
        return dscores.to(dtype)


def _softsort(scores, x, tau: float, power: int, ascending: bool):
    """P x; order, ordered scores and Z."""
    plan = _Plan(x, tau, ascending, ordered=True)
    saved = plan.sort(scores, ascending, with_total=False)
    y = torch.empty_like(x)
    plan.give_tokens("a", x)
    plan.give_tokens("out", y)
    plan.product()
    return y, *saved


def _restore(scores, y, tau: float, power: int, ascending: bool):
    """The inverse's x; order, ordered scores, Z and M."""
    plan = _Plan(y, tau, ascending, ordered=False)
    saved = plan.sort(scores, ascending, with_total=True)
    x = torch.empty_like(y)
    plan.give_tokens("a", y)
    plan.give_tokens("out", x)
    plan.product()
    return x, *saved


def _backward(dout, scores, x, saved, tau: float, power: int, ascending: bool, for_scores: bool, for_x: bool):
    """The gradients of both, x being the tokens given: SoftSort's output lies in order, its inverse's does not."""
    plan = _Plan(x, tau, ascending, ordered=len(saved) == 4)
    plan.give(**dict(zip(("order", "placed", "mass", "total"), saved, strict=False)))
    plan.give_tokens("a", dout)
    dx = torch.empty_like(x) if for_x else None
    if dx is not None:
        plan.give_tokens("out", dx)
    if not for_scores:
        plan.product()
        return None, dx
    plan.give_tokens("b", x)
    return plan.score_gradient(scores.dtype), dx


_PER_TOKEN = (torch.int32, torch.float32, torch.float32)

softsort = register("softsort", "cuda", _softsort, _backward, _PER_TOKEN)
softsort_restore = register("softsort_restore", "cuda", _restore, _backward, (*_PER_TOKEN, torch.float32))
