# type: ignore  # triton.jit hides from type checkers what kernels are
"""Triton kernels of SoftSort and its inverse: tiles of the kernel matrix, made where they are used, never stored.

Tokens stay in their original places. With ``K_ij = exp(-|s_i - s_j|^p/τ)``, ``Z = K 1`` and ``rank`` the place of a
token in the order, SoftSort is ``(K x / Z)`` written to the rows ``rank``, and its inverse ``K w / M`` with ``w`` read
from the rows ``rank`` and divided by Z, ``M = K (1/Z)``. A rank is the number of tokens that come before, counted
while the same differences of scores are at hand: nothing is sorted. The gradients are products of the same form, and
with ``r = s_j - s_m``, ``h_mj = p |r|^(p-1) sgn(r) K_mj / τ`` (0 between equal scores)

    ds_m = Σ_j h_mj (⟨a_m, b_j⟩ + ⟨b_m, a_j⟩ - c_m/Z_j - c_j/Z_m - q_m - q_j).

For SoftSort b = x, a is the gradient of its output, read from the rows ``rank`` and divided by Z, c = 0 and
``q_m = Σ_j K_mj ⟨a_m, b_j⟩ / Z_m``. For the inverse a is the gradient of its output divided by M, b = w,
``c_m = Σ_j K_mj ⟨a_m, b_j⟩ / M_m`` and ``q_m = Σ_j K_mj ⟨b_m, a_j⟩ / Z_m - (K c)_m / Z_m²``. So c and q are made of
float32 sums over the very products that h multiplies; made of outputs rounded to half precision they would err by
more than what is left when they cancel. No sum is divided among programs: results are the same bits on every run.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

#: Tokens of a tile (rows and columns), channels, and warps a program, by the bytes of a number: of products, and of
#: the gradient of scores. Chosen so that nothing or little spills on capability 8.0 and 9.0. Tensor cores need 16.
PRODUCT_TILES = {2: (64, 64, 4), 4: (32, 32, 4)}
GRADIENT_TILES = {2: (64, 32, 8), 4: (32, 32, 4)}
STAGES = 2

#: Weights are rounded no more coarsely than the tokens that they multiply: TF32 holds every bfloat16 and float16.
_PRODUCTS = {torch.float32: "tf32x3", torch.float16: "tf32", torch.bfloat16: "tf32"}
#: The interpreter has no products of bfloat16.
_INTERPRETED = triton.knobs.runtime.interpret
_LARGEST = 3e38


@triton.jit
def _weights(row_scores, column_scores, exists, scale, POWER: tl.constexpr):
    """K between rows and columns; 0 where a column does not exist."""
    distance = row_scores[:, None] - column_scores[None, :]
    if POWER == 1:
        distance = tl.abs(distance)
    else:
        distance = distance * distance
    return tl.where(exists[None, :], tl.exp2(-distance * scale), 0.0)


@triton.jit
def _count_before(row_scores, rows, column_scores, columns, exists, ASCENDING: tl.constexpr):
    """How many of the columns come before each row in the stable order."""
    equal = column_scores[None, :] == row_scores[:, None]
    if ASCENDING:
        before = column_scores[None, :] < row_scores[:, None]
    else:
        before = column_scores[None, :] > row_scores[:, None]
    before = before | (equal & (columns[None, :] < rows[:, None]))
    return tl.sum((before & exists[None, :]).to(tl.int32), axis=1)


@triton.jit
def _load_tokens(pointer, rows, channels, row_stride, channel_stride, rows_exist, channels_exist):
    at = pointer + rows[:, None] * row_stride + channels[None, :] * channel_stride
    return tl.load(at, mask=rows_exist[:, None] & channels_exist[None, :], other=0.0)


@triton.jit
def masses(
    scores, rank, mass, scores_b, scores_l, scale, length, blocks,
    POWER: tl.constexpr, ASCENDING: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """rank and Z of one block of tokens; NaN and the original places where a score is not finite."""
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)
    scores += batch * scores_b
    s_i = tl.load(scores + i * scores_l, mask=i < length, other=0.0).to(tl.float32)
    total = tl.zeros([TOKENS], tl.float32)
    place = tl.zeros([TOKENS], tl.int32)
    poison = 0.0
    for start in range(0, length, TOKENS):
        j = start + tl.arange(0, TOKENS)
        s_j = tl.load(scores + j * scores_l, mask=j < length, other=0.0).to(tl.float32)
        poison += tl.sum(s_j * 0.0)
        total += tl.sum(_weights(s_i, s_j, j < length, scale, POWER), axis=1)
        place += _count_before(s_i, i, s_j, j, j < length, ASCENDING)
    at = batch * length + i
    tl.store(mass + at, total + poison, mask=i < length)
    tl.store(rank + at, tl.where(poison == poison, place, i), mask=i < length)


@triton.jit
def product(
    scores, source, rank, column_mass, row_mass, out, new_rank, new_mass,
    scores_b, scores_l, source_b, source_l, source_d, out_b, out_l, out_d,
    scale, length, width, blocks, parts,
    POWER: tl.constexpr, ASCENDING: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr,
    NORMALIZE: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``K v`` of a block of tokens and channels.

    v is read from the rows ``rank`` if GATHER, and divided by ``column_mass`` if given. The product is divided by
    the same product of ones if NORMALIZE, which is kept as ``new_mass``; or by ``row_mass`` if given; and written to
    the rows ``rank`` if SCATTER, which are counted and kept as ``new_rank`` if not given.
    """
    program = tl.program_id(0)
    part, block = program % parts, program // parts % blocks
    batch = (program // (parts * blocks)).to(tl.int64)
    i = block * TOKENS + tl.arange(0, TOKENS)
    exists = i < length
    d = part * CHANNELS + tl.arange(0, CHANNELS)
    scores += batch * scores_b
    source += batch * source_b
    s_i = tl.load(scores + i * scores_l, mask=exists, other=0.0).to(tl.float32)
    result = tl.zeros([TOKENS, CHANNELS], tl.float32)
    total = tl.zeros([TOKENS], tl.float32)
    place = tl.zeros([TOKENS], tl.int32)
    poison = 0.0
    for start in range(0, length, TOKENS):
        j = start + tl.arange(0, TOKENS)
        inside = j < length
        s_j = tl.load(scores + j * scores_l, mask=inside, other=0.0).to(tl.float32)
        weights = _weights(s_i, s_j, inside, scale, POWER)
        if column_mass is not None:
            weights /= tl.load(column_mass + batch * length + j, mask=inside, other=1.0)[None, :]
        if NORMALIZE:
            poison += tl.sum(s_j * 0.0)
            total += tl.sum(weights, axis=1)
        if new_rank is not None:
            place += _count_before(s_i, i, s_j, j, inside, ASCENDING)
        if GATHER:
            j = tl.load(rank + batch * length + j, mask=inside, other=0)
        tokens = _load_tokens(source, j, d, source_l, source_d, inside, d < width)
        result = tl.dot(weights, tokens.to(tl.float32), result, input_precision=PRECISION)
    at = batch * length + i
    if NORMALIZE:
        total = tl.where(exists, total, 1.0) + poison
        result /= total[:, None]
    if row_mass is not None:
        result /= tl.load(row_mass + at, mask=exists, other=1.0)[:, None]
    if new_rank is not None:
        place = tl.where(poison == poison, place, i)
    elif SCATTER:
        place = tl.load(rank + at, mask=exists, other=0)
    else:
        place = i
    if part == 0:
        if NORMALIZE:
            tl.store(new_mass + at, total, mask=exists)
        if new_rank is not None:
            tl.store(new_rank + at, place, mask=exists)
    to = out + batch * out_b + place[:, None] * out_l + d[None, :] * out_d
    tl.store(to, result.to(out.dtype.element_ty), mask=exists[:, None] & (d < width)[None, :])


@triton.jit
def _slopes(weights, row_scores, column_scores, POWER: tl.constexpr):
    """h without its constant factor p/τ."""
    r = column_scores[None, :] - row_scores[:, None]
    if POWER == 1:
        r = tl.where(r > 0, 1.0, tl.where(r < 0, -1.0, 0.0))
    return weights * r


@triton.jit
def pair_sums(
    scores, a, b, rank, a_mass, b_mass, slopes, forth_sums, back_sums,
    scores_b, scores_l, a_b, a_l, a_d, b_b, b_l, b_d, scale, length, width, blocks,
    POWER: tl.constexpr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Of a block of tokens m, over all j: ``Σ h (⟨a_m, b_j⟩ + ⟨b_m, a_j⟩)``, ``Σ K ⟨a_m, b_j⟩``, ``Σ K ⟨b_m, a_j⟩``.

    a and b enter the products as they are stored, their masses divide the sums: half precision loses nothing.
    """
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)
    exists = i < length
    scores += batch * scores_b
    a += batch * a_b
    b += batch * b_b
    at = batch * length + i
    s_i = tl.load(scores + i * scores_l, mask=exists, other=0.0).to(tl.float32)
    a_i = 1.0 / tl.load(a_mass + at, mask=exists, other=1.0)
    row = tl.load(rank + at, mask=exists, other=0)
    rows_a = row if GATHER_A else i
    rows_b = row if GATHER_B else i
    slope = tl.zeros([TOKENS], tl.float32)
    forth_sum = tl.zeros([TOKENS], tl.float32)
    back_sum = tl.zeros([TOKENS], tl.float32)
    for start in range(0, length, TOKENS):
        j = start + tl.arange(0, TOKENS)
        inside = j < length
        near = batch * length + j
        column = tl.load(rank + near, mask=inside, other=0)
        columns_a = column if GATHER_A else j
        columns_b = column if GATHER_B else j
        forth = tl.zeros([TOKENS, TOKENS], tl.float32)
        back = tl.zeros([TOKENS, TOKENS], tl.float32)
        for first in range(0, width, CHANNELS):
            d = first + tl.arange(0, CHANNELS)
            here = d < width
            a_rows = _load_tokens(a, rows_a, d, a_l, a_d, exists, here)
            b_columns = _load_tokens(b, columns_b, d, b_l, b_d, inside, here)
            b_rows = _load_tokens(b, rows_b, d, b_l, b_d, exists, here)
            a_columns = _load_tokens(a, columns_a, d, a_l, a_d, inside, here)
            if UPCAST:
                a_rows, b_rows = a_rows.to(tl.float32), b_rows.to(tl.float32)
                a_columns, b_columns = a_columns.to(tl.float32), b_columns.to(tl.float32)
            forth = tl.dot(a_rows, tl.trans(b_columns), forth, input_precision=PRECISION)
            back = tl.dot(b_rows, tl.trans(a_columns), back, input_precision=PRECISION)
        forth *= a_i[:, None]
        back *= (1.0 / tl.load(a_mass + near, mask=inside, other=1.0))[None, :]
        if b_mass is not None:
            forth *= (1.0 / tl.load(b_mass + near, mask=inside, other=1.0))[None, :]
            back *= (1.0 / tl.load(b_mass + at, mask=exists, other=1.0))[:, None]
        s_j = tl.load(scores + j * scores_l, mask=inside, other=0.0).to(tl.float32)
        weights = _weights(s_i, s_j, inside, scale, POWER)
        slope += tl.sum(_slopes(weights, s_i, s_j, POWER) * (forth + back), axis=1)
        forth_sum += tl.sum(weights * forth, axis=1)
        back_sum += tl.sum(weights * back, axis=1)
    tl.store(slopes + at, slope, mask=exists)
    tl.store(forth_sums + at, forth_sum, mask=exists)
    tl.store(back_sums + at, back_sum, mask=exists)


@triton.jit
def finish_scores(
    scores, slopes, q, c, mass, ds, scores_b, scores_l, scale, factor, length, blocks,
    POWER: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """ds from ``slopes`` of :func:`pair_sums`, q and c. Without c, q is still to be divided by Z."""
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)
    exists = i < length
    scores += batch * scores_b
    at = batch * length + i
    s_i = tl.load(scores + i * scores_l, mask=exists, other=0.0).to(tl.float32)
    q_i = tl.load(q + at, mask=exists, other=0.0)
    share_i = 1.0 / tl.load(mass + at, mask=exists, other=1.0)
    if c is not None:
        c_i = tl.load(c + at, mask=exists, other=0.0)
    else:
        q_i *= share_i
    slope = tl.load(slopes + at, mask=exists, other=0.0)
    for start in range(0, length, TOKENS):
        j = start + tl.arange(0, TOKENS)
        inside = j < length
        near = batch * length + j
        s_j = tl.load(scores + j * scores_l, mask=inside, other=0.0).to(tl.float32)
        q_j = tl.load(q + near, mask=inside, other=0.0)
        share_j = 1.0 / tl.load(mass + near, mask=inside, other=1.0)
        if c is not None:
            c_j = tl.load(c + near, mask=inside, other=0.0)
            taken = q_i[:, None] + q_j[None, :] + c_i[:, None] * share_j[None, :] + share_i[:, None] * c_j[None, :]
        else:
            taken = q_i[:, None] + (q_j * share_j)[None, :]
        weights = _weights(s_i, s_j, inside, scale, POWER)
        slope -= tl.sum(_slopes(weights, s_i, s_j, POWER) * taken, axis=1)
    tl.store(ds + at, (slope * factor).to(ds.dtype.element_ty), mask=exists)


# Launches -------------------------------------------------------------------------------------------------------------


class _Plan:
    """What the launches of one call share: scores (b, L) and tokens like x (b, L, D)."""

    def __init__(self, scores: torch.Tensor, x: torch.Tensor, tau: float, power: int, ascending: bool = True) -> None:
        self.scores = scores
        self.batch, self.length, self.width = x.shape
        # Finite, so that equal scores keep the weight 1 at any temperature.
        self.scale = min(math.log2(math.e) / tau, _LARGEST)
        self.factor = min(power / tau, _LARGEST)
        self.power, self.ascending = power, ascending

    def tiles(self, sizes: dict[int, tuple[int, int, int]], like: torch.Tensor) -> tuple[int, dict[str, int]]:
        """Blocks of tokens in a sequence, and the options that fix a tile."""
        tokens, channels, warps = sizes[like.element_size()]
        tokens = min(tokens, max(16, triton.next_power_of_2(self.length)))
        channels = min(channels, max(16, triton.next_power_of_2(self.width)))
        options = {"POWER": self.power, "TOKENS": tokens, "CHANNELS": channels, "num_warps": warps}
        return triton.cdiv(self.length, tokens), {**options, "num_stages": STAGES}

    def per_token(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty((self.batch, self.length), dtype=dtype, device=self.scores.device)

    def masses(self) -> tuple[torch.Tensor, torch.Tensor]:
        """rank and Z."""
        rank, mass = self.per_token(torch.int32), self.per_token()
        blocks, options = self.tiles(PRODUCT_TILES, mass)
        del options["CHANNELS"]
        masses[(self.batch * blocks,)](
            self.scores, rank, mass, *self.scores.stride(), self.scale, self.length, blocks,
            ASCENDING=self.ascending, **options,
        )  # fmt: skip
        return rank, mass

    def product(
        self, source, out, *, rank=None, column_mass=None, row_mass=None, new_rank=None, new_mass=None,
        gather=False, scatter=False,
    ):  # fmt: skip
        """Launch :func:`product` and return ``out``."""
        blocks, options = self.tiles(PRODUCT_TILES, source)
        parts = triton.cdiv(self.width, options["CHANNELS"])
        product[(self.batch * blocks * parts,)](
            self.scores, source, rank, column_mass, row_mass, out, new_rank, new_mass,
            *self.scores.stride(), *source.stride(), *out.stride(), self.scale, self.length, self.width, blocks, parts,
            ASCENDING=self.ascending, GATHER=gather, SCATTER=scatter, NORMALIZE=new_mass is not None,
            PRECISION=_PRODUCTS[source.dtype], **options,
        )  # fmt: skip
        return out

    def pair_sums(self, a, b, *, rank, a_mass, b_mass=None, gather_a=False, gather_b=False):
        """Launch :func:`pair_sums` and return its three sums."""
        sums = tuple(self.per_token() for _ in range(3))
        blocks, options = self.tiles(GRADIENT_TILES, a)
        pair_sums[(self.batch * blocks,)](
            self.scores, a, b, rank, a_mass, b_mass, *sums, *self.scores.stride(), *a.stride(), *b.stride(),
            self.scale, self.length, self.width, blocks,
            GATHER_A=gather_a, GATHER_B=gather_b, PRECISION=_PRODUCTS[a.dtype], UPCAST=_INTERPRETED, **options,
        )  # fmt: skip
        return sums

    def finish_scores(self, slopes, q, mass, c=None):
        """Launch :func:`finish_scores` and return ds."""
        ds = self.per_token(self.scores.dtype)
        blocks, options = self.tiles(PRODUCT_TILES, mass)
        del options["CHANNELS"]
        finish_scores[(self.batch * blocks,)](
            self.scores, slopes, q, c, mass, ds, *self.scores.stride(), self.scale, self.factor, self.length, blocks,
            **options,
        )  # fmt: skip
        return ds


def softsort(scores, x, tau: float, power: int, ascending: bool):
    """P x, and Z and rank for the backward pass: one launch."""
    plan = _Plan(scores, x, tau, power, ascending)
    rank, mass = plan.per_token(torch.int32), plan.per_token()
    return plan.product(x, torch.empty_like(x), new_rank=rank, new_mass=mass, scatter=True), mass, rank


def softsort_backward(dy, scores, x, mass, rank, tau: float, power: int, for_scores: bool, for_x: bool):
    """Gradients of scores (two launches), x (one), or None. ``dx = K g / Z``, g read from the rows ``rank`` of dy."""
    plan = _Plan(scores, x, tau, power)
    dscores = dx = None
    if for_x:
        dx = plan.product(dy, torch.empty_like(x), rank=rank, column_mass=mass, gather=True)
    if for_scores:
        slopes, forth, _ = plan.pair_sums(dy, x, rank=rank, a_mass=mass, gather_a=True)
        dscores = plan.finish_scores(slopes, forth, mass)
    return dscores, dx


def restore(scores, y, tau: float, power: int, ascending: bool):
    """The inverse's x, and M, Z, rank for the backward pass: two launches."""
    plan = _Plan(scores, y, tau, power, ascending)
    rank, mass = plan.masses()
    total = plan.per_token()
    x = plan.product(y, torch.empty_like(y), rank=rank, column_mass=mass, new_mass=total, gather=True)
    return x, total, mass, rank


def restore_backward(dx, scores, y, total, mass, rank, tau: float, power: int, for_scores: bool, for_y: bool):
    """Gradients of scores and y, or None. ``dy_rank(i) = (K a)_i / Z_i``."""
    plan = _Plan(scores, y, tau, power)
    dscores = dy = None
    if for_y:
        dy = plan.product(dx, torch.empty_like(y), rank=rank, column_mass=total, row_mass=mass, scatter=True)
    if for_scores:
        slopes, forth, back = plan.pair_sums(dx, y, rank=rank, a_mass=total, b_mass=mass, gather_b=True)
        c = (forth / total).unsqueeze(-1)
        summed = _Plan(scores, c, tau, power).product(c, torch.empty_like(c))
        q = (back - (summed / mass.unsqueeze(-1)).squeeze(-1)) / mass
        dscores = plan.finish_scores(slopes, q, mass, c)
    return dscores, dy
