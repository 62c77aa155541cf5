"""The nearest input-output matrix of a regime, as a parametrisation of ``x_proj.weight`` that training keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tokendyn import _operations as ops
from tokendyn.diagnose._adapters._mixer import norm_gains
from tokendyn.errors import RegimeError

REGIMES = ("positive", "negative", "mixed")


def parts(regime: str, state: int) -> list[tuple[str, int]]:
    """(sign, number of states) of each triangle: one for a definite spectrum, one a sign for a mixed one."""
    if regime == "mixed":
        return [("positive", -(-state // 2)), ("negative", state // 2)]
    return [(regime, state)]


class Regime(nn.Module):
    """(the rows of W_r, the rows of every L, raw diagonal) → ``x_proj.weight``."""

    def __init__(self, rank: int, state: int, regime: str, gain: Tensor | None) -> None:
        super().__init__()
        self.rank, self.state, self.parts = rank, state, parts(regime, state)
        self.gains = gain  # of the norms of B and C, where there are such; those at the start, for `right_inverse`

    def forward(self, other: Tensor, rows: Tensor, diagonal: Tensor) -> Tensor:
        sizes = [count for _, count in self.parts]
        maps = [
            ops.io_projections(r, diagonal=q, regime=sign)
            for (sign, _), r, q in zip(self.parts, rows.split(sizes), diagonal.split(sizes), strict=True)
            if len(r)
        ]
        return torch.cat([other, *(S_B for S_B, _ in maps), *(S_C for _, S_C in maps)])

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        other, S_B, S_C = weight.split([self.rank, self.state, self.state])
        gain = torch.ones(self.state, device=weight.device) if self.gains is None else self.gains
        rows, q = nearest(gain[:, None] * S_B, S_C, self.parts)
        q = q / gain.double()
        # The inverse of softplus, without overflow for large q and without log(0) for small ones.
        diagonal = q + torch.log(-torch.expm1(-q))
        return other.clone(), rows.to(weight.dtype), diagonal.to(weight.dtype)


def nearest(S_B: Tensor, S_C: Tensor, wanted: list[tuple[str, int]]) -> tuple[Tensor, Tensor]:
    """Rows U (N, d) and q > 0 (N,), for each part of ``wanted`` U unit upper triangular, whose sum of
    ``± Uᵀ diag(q) U`` is the nearest matrix to S_Cᵀ S_B with at most so many eigenvalues of each sign, in float64.

    These are the largest eigenvalues of that sign of the symmetric part, with their eigenvectors. Missing ones are made
    as small as rounding allows.
    """
    S_B, S_C = S_B.detach().double(), S_C.detach().double()
    Q, _ = torch.linalg.qr(torch.cat([S_C, S_B]).mT)  # (d, r) the row space of both
    half = (S_C @ Q).mT @ (S_B @ Q) / 2
    values, vectors = torch.linalg.eigh(half + half.mT)
    least = 1e-12 * float(values.abs().max().clamp_min(1e-300))
    found = []
    for sign, count in wanted:
        if not count:
            continue
        of_sign, chosen = (values, vectors) if sign == "positive" else (-values.flip(0), vectors.flip(1))
        kept = of_sign[-count:].clamp_min(least)
        root = (Q @ chosen[:, -count:]) * kept.sqrt()  # (d, N), ± M' = root rootᵀ
        R = torch.linalg.qr(root.mT).R  # (N, d) upper trapezoid, ± M' = Rᵀ R
        pivots = R.diagonal()
        found.append((R / pivots[:, None], pivots.square()))
    return torch.cat([rows for rows, _ in found]), torch.cat([q for _, q in found])


def constrain(name: str, module: Any, regime: str) -> tuple[float, Callable[[], None], Callable[[], None], bool]:
    """Put the regime on; ‖M' - M‖_F / ‖M‖_F, what undoes it, what writes it out, and whether norms follow B and C.

    Raises:
        RegimeError: see :func:`tokendyn.refine`.
    """
    projection = getattr(module, "x_proj", None)
    if not isinstance(projection, nn.Linear):
        raise RegimeError(f"refine: {name} has no x_proj to put into a regime")
    if getattr(module, "io_diagonal", None) is not None or parametrize.is_parametrized(projection, "weight"):
        raise RegimeError(f"refine: {name} has a parametrisation of its spectrum already; undo or bake it first")
    gain = _gain(name, module)
    rows, width = projection.weight.shape
    state = module.A_log.shape[1] if module.A_log.ndim == 2 and module.A_log.shape[1] > 1 else module.d_state
    if state > width:
        raise RegimeError(f"refine: {name} has N = {state} > d = {width}, and no matrix of that rank")
    rank = rows - 2 * state
    original = projection.weight.detach().clone()
    was_trained = projection.weight.requires_grad
    parametrize.register_parametrization(projection, "weight", Regime(rank, state, regime, gain), unsafe=True)

    def put_back() -> None:
        parametrize.remove_parametrizations(projection, "weight", leave_parametrized=True)
        with torch.no_grad():
            projection.weight.copy_(original)
        projection.weight.requires_grad_(was_trained)

    def write_out() -> None:
        parametrize.remove_parametrizations(projection, "weight", leave_parametrized=True)

    with torch.no_grad():
        before, after = original[rank:].double(), projection.weight[rank:].double()
        if gain is not None:
            scale = torch.cat([gain.double(), torch.ones_like(gain, dtype=torch.float64)])[:, None]
            before, after = scale * before, scale * after
        return _change(before, after, state), put_back, write_out, gain is not None


def _gain(name: str, module: Any) -> Tensor | None:
    """(N,) g_B ∘ g_C of the RMS norms of B and C, None where there are no norms.

    B = g_B ∘ S_B x / ρ and C likewise, ρ > 0: ⟨C_l, B_j⟩ has the sign of x_lᵀ S_Cᵀ diag(g_B ∘ g_C) S_B x_j, so that a
    regime of that matrix is one of the layer, as long as g stays positive.
    """
    if not hasattr(module, "b_layernorm"):
        return None
    gains = norm_gains(module)
    if gains is None:
        raise RegimeError(
            f"refine: {name} normalises B and C by something else than an RMS norm without bias, so that the sign of "
            f"x_lᵀ M x_j at the scan is not that of its projections; no regime of these can be kept"
        )
    gain = gains[1] * gains[2]
    if not bool((gain > 0).all()):
        raise RegimeError(
            f"refine: {name} has norms of B and C whose gains are not all of one sign, so that no regime of the "
            f"projections is one of the scan; make the gains positive first (change the sign of a row with its gain)"
        )
    return gain


def _change(before: Tensor, after: Tensor, state: int) -> float:
    """‖M' - M‖_F / ‖M‖_F from the rows of S_B and S_C, without a d x d matrix."""

    def inner(left: Tensor, right: Tensor) -> Tensor:  # ⟨S_C'ᵀ S_B', S_Cᵀ S_B⟩
        return ((left[state:] @ right[state:].mT) * (left[:state] @ right[:state].mT)).sum()

    square = inner(after, after) - 2 * inner(after, before) + inner(before, before)
    return float((square.clamp_min(0) / inner(before, before).clamp_min(1e-300)).sqrt())
