"""The cuda engine of SoftSort and its inverse: launches of the kernels in ``_softsort_cuda.cu``.

No value is looked at, so that CUDA graphs can capture it.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from pathlib import Path

import torch

from tokendyn.backends.cuda._scan_cuda_layout import FOLDER
from tokendyn.backends.torch.ops._permute import sorting
from tokendyn.backends.torch.ops._softsort_operator import register

THREADS, CHUNK, LANES = 128, 16, 32
#: Up to this length a block counts the tokens before each in less time than sorting takes.
COUNTED = 1024

#: Shared memory of a block that sees single numbers a token: what four runs hand on both ways, and the scores.
SHARED_BYTES = 4 * (2 * (1 + 2 * 4) * THREADS + COUNTED + 1)

_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FIELDS = (
    "batch", "length", "width", "parts", "chunks", "scale", "factor", "ascending",
    "scores", "scores_b", "scores_l", "given_order", "order", "placed", "mass", "total",
    "starts", "partial", "work", "dscores",
    *(f"{name}{suffix}" for name in ("a", "b", "out") for suffix in ("", "_b", "_l", "_d", "_ordered", "_divisor")),
)  # fmt: skip
_PLACES = {name: place for place, name in enumerate(_FIELDS)}
_Arguments = ctypes.c_int64 * len(_FIELDS)
_LARGEST = 3e38


@functools.cache
def source() -> str:
    """The kernels, below the structure of their arguments."""
    fields = "".join(f"    long long {name};\n" for name in _FIELDS)
    files = (FOLDER / "_cuda_numbers.cu", Path(__file__).with_name("_softsort_cuda.cu"))
    texts = (file.read_text() for file in files)
    return "".join((f"struct Args {{\n{fields}}};\n", *texts))


@functools.cache
def options(element: int) -> tuple[str, ...]:
    """The compiler's options of a variant."""
    return f"-DELEMENT={element}", f"-DTHREADS={THREADS}", f"-DCOUNTED={COUNTED}", f"-DSHARED_BYTES={SHARED_BYTES}"


def launch(
    name: str, variant: tuple[str, ...], blocks: int, arguments: ctypes.Array[ctypes.c_int64], device: torch.device
) -> None:
    """Run a kernel on the current stream of ``device``."""
    from tokendyn.backends.torch.ops import _nvrtc

    index = torch.cuda.current_device() if device.index is None else device.index
    shared = SHARED_BYTES if name in ("arrange", "finish") else 0
    kernel = _nvrtc.kernel(source(), variant, name, shared, index)
    with torch.cuda.device(index):
        kernel(blocks, THREADS, torch.cuda.current_stream().cuda_stream, arguments)


def _bits(value: float) -> int:
    """A float32 as the kernels read it from an integer; finite, so that equal scores keep the weight 1 at any τ."""
    return struct.unpack("<I", struct.pack("<f", min(value, _LARGEST)))[0]


class _Plan:
    """What the launches of one call share: sizes, the tokens' order, and the kernels' arguments."""

    def __init__(self, x: torch.Tensor, tau: float, ascending: bool) -> None:
        self.batch, self.length, self.width = x.shape
        self.device, self.dtype = x.device, x.dtype
        self.parts, self.chunks = -(-self.width // LANES), -(-self.length // CHUNK)
        self.arguments = _Arguments(
            self.batch, self.length, self.width, self.parts, self.chunks,
            _bits(math.log2(math.e) / tau), _bits(1.0 / tau), int(ascending),
        )  # fmt: skip
        self.kept: list[torch.Tensor] = []  # until the launches are under way

    def give(self, **tensors: torch.Tensor) -> None:
        for name, t in tensors.items():
            self.arguments[_PLACES[name]] = t.data_ptr()
            self.kept.append(t)

    def give_tokens(self, name: str, t: torch.Tensor, ordered: bool, divisor: torch.Tensor | None = None) -> None:
        """Tokens (b, L, D) that lie as the user's do (``ordered``: read through the order) or in order."""
        place = _PLACES[name]
        divided = 0 if divisor is None else divisor.data_ptr()
        self.arguments[place : place + 6] = (t.data_ptr(), *t.stride(), int(ordered), divided)
        self.kept.append(t)

    def floats(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def run(self, name: str, blocks: int) -> None:
        if blocks and self.length:
            launch(name, options(_ELEMENTS[self.dtype]), blocks, self.arguments, self.device)

    def arrange(self, scores: torch.Tensor, ascending: bool, with_total: bool) -> tuple[torch.Tensor, ...]:
        """The order, the scores in it, Z, and M if asked for."""
        scores = scores.detach().float()
        order = torch.empty((self.batch, self.length), dtype=torch.int32, device=self.device)
        made = {name: self.floats(self.batch, self.length) for name in ("placed", "mass", "total")[: 2 + with_total]}
        self.give(scores=scores, order=order, **made)
        place = _PLACES["scores"]
        self.arguments[place + 1 : place + 3] = scores.stride()
        if self.length > COUNTED:
            self.give(given_order=sorting(scores, ascending))
        self.run("arrange", self.batch)
        return order, *made.values()

    def across_channels(self, name: str, fields: int) -> None:
        """A kernel whose warps own 32 channels of a sequence each."""
        self.give(starts=self.floats(self.batch, self.chunks, fields, self.parts * LANES))
        self.run(name, -(-self.batch * self.parts // (THREADS // 32)))

    def product(self) -> None:
        self.across_channels("product", 1)

    def score_gradient(self, dtype: torch.dtype) -> torch.Tensor:
        """What `gradients` and `finish` make; the tokens' product beside it where it was given an output."""
        self.give(partial=self.floats(3, self.batch, self.parts, self.length))
        self.across_channels("gradients", 4)
        dscores = self.floats(self.batch, self.length)
        self.give(work=self.floats(3, self.batch, self.length), dscores=dscores)
        self.run("finish", self.batch)
        return dscores.to(dtype)


def _softsort(scores, x, tau: float, power: int, ascending: bool):
    """P x; order, ordered scores and Z."""
    plan = _Plan(x, tau, ascending)
    saved = plan.arrange(scores, ascending, with_total=False)
    y = torch.empty_like(x)
    plan.give_tokens("a", x, ordered=True)
    plan.give_tokens("out", y, ordered=False, divisor=saved[2])
    plan.product()
    return y, *saved


def _softsort_backward(dy, scores, x, saved, tau: float, power: int, ascending: bool, for_scores: bool, for_x: bool):
    order, placed, mass = saved
    plan = _Plan(x, tau, ascending)
    plan.give(order=order, placed=placed, mass=mass)
    plan.give_tokens("a", dy, ordered=False, divisor=mass)
    dx = torch.empty_like(x) if for_x else None
    if dx is not None:
        plan.give_tokens("out", dx, ordered=True)
    if not for_scores:
        plan.product()
        return None, dx
    plan.give_tokens("b", x, ordered=True)
    return plan.score_gradient(scores.dtype), dx


def _restore(scores, y, tau: float, power: int, ascending: bool):
    """The inverse's x; order, ordered scores, Z and M."""
    plan = _Plan(y, tau, ascending)
    saved = plan.arrange(scores, ascending, with_total=True)
    x = torch.empty_like(y)
    plan.give_tokens("a", y, ordered=False, divisor=saved[2])
    plan.give_tokens("out", x, ordered=True, divisor=saved[3])
    plan.product()
    return x, *saved


def _restore_backward(dx, scores, y, saved, tau: float, power: int, ascending: bool, for_scores: bool, for_y: bool):
    order, placed, mass, total = saved
    plan = _Plan(y, tau, ascending)
    plan.give(order=order, placed=placed, mass=mass, total=total)
    plan.give_tokens("a", dx, ordered=True, divisor=total)
    dy = torch.empty_like(y) if for_y else None
    if dy is not None:
        plan.give_tokens("out", dy, ordered=False, divisor=mass)
    if not for_scores:
        plan.product()
        return None, dy
    plan.give_tokens("b", y, ordered=False, divisor=mass)
    return plan.score_gradient(scores.dtype), dy


_PER_TOKEN = (torch.int32, torch.float32, torch.float32)

softsort = register("softsort", "cuda", _softsort, _softsort_backward, _PER_TOKEN)
softsort_restore = register("softsort_restore", "cuda", _restore, _restore_backward, (*_PER_TOKEN, torch.float32))
