"""The input-output matrix M = S_Cᵀ S_B: parametrisations with a chosen spectrum, and the spectrum."""

from __future__ import annotations

from typing import Any, NamedTuple

from tokendyn import _checks as check
from tokendyn._operations._table import operation
from tokendyn.errors import RegimeError

IO_REGIMES = ("free", "positive", "negative", "mixed")
IO_FORMS = ("paper", "published_code", "scale_matched")


class IOSpectrum(NamedTuple):
    """Spectrum of the input-output matrix ``M = S_Cᵀ S_B``; see :func:`io_spectrum`.

    Attributes:
        eigenvalues: (min(N, D),) complex; those of M that are not zero by rank alone, by descending real
            part, of a conjugate pair the one with positive imaginary part first.
        symmetric: (min(2N, D),) real, descending; those of (M + Mᵀ)/2 that are not zero by rank alone.
    """

    eigenvalues: Any
    symmetric: Any


@operation(arrays="weight_B weight_C diagonal", differentiable="weight_B weight_C diagonal", source="paper 1, App. C.1")
def io_projections(
    weight_B: Any, weight_C: Any = None, diagonal: Any = None, *, regime: str = "free", form: str = "paper"
) -> Any:
    """Projections S_B, S_C whose input-output matrix ``M = S_Cᵀ S_B`` has the spectrum asked for.

    LDLᵀ: with U the upper trapezoid of ``weight_B`` with ones on its diagonal (L = Uᵀ is unit lower
    triangular), ``S_C = U``, ``S_B = diag(q) U``, so ``M = L diag(q) Lᵀ`` has rank N and, by Sylvester's
    law, as many positive and negative eigenvalues as q has entries of each sign. With p = softplus(diagonal):

    ==================  =================  =================  ============================
    form                positive           negative           mixed (v = +1 on the first
                                                              ⌈N/2⌉ places, -1 on the rest)
    ==================  =================  =================  ============================
    ``paper``           q = p              q = -p             q = v ∘ p
    ``published_code``  q = p + 0.7        q = -(p + 0.7)     q = v ∘ p
    ``scale_matched``   q = p + 0.7        q = -(p + 0.7)     q = v ∘ (p + 0.7)
    ==================  =================  =================  ============================

    ``published_code`` starts its regimes at different scales (1.39 against 0.69 at diagonal = 0), a
    confound; ``scale_matched`` differs from it in that alone.

    Args:
        weight_B: (N, D), raw weights, N ≤ D unless free.
        weight_C: (N, D), used and required by ``regime="free"`` only.
        diagonal: (N,), raw D', required by the other regimes only.
        regime: ``"free"`` (S_B = weight_B, S_C = weight_C), ``"positive"``, ``"negative"``, ``"mixed"``.
        form: see the table; no effect on ``"free"``.

    Returns:
        (S_B, S_C), each (N, D).

    Raises:
        ShapeError, DTypeError, OptionError: an argument has the wrong shape, the wrong dtype, or a value out of range.
        RegimeError: the regime cannot be had with what was given.

    Cost:
        O(N D).

    Source:
        Paper 1, App. C.1, and the differences of its public code.
    """
    name = "io_projections"
    check.expect_choice(name, "regime", regime, IO_REGIMES)
    check.expect_choice(name, "form", form, IO_FORMS)
    shapes = check.Shapes(name)
    shapes.expect("weight_B", weight_B, "N D")
    if regime == "free":
        if weight_C is None or diagonal is not None:
            raise RegimeError(f"{name}: regime 'free' takes weight_B and weight_C and no diagonal")
        shapes.expect("weight_C", weight_C, "N D")
    else:
        if weight_C is not None or diagonal is None:
            raise RegimeError(f"{name}: regime {regime!r} takes weight_B and diagonal and no weight_C")
        shapes.expect("diagonal", diagonal, "N")
        if shapes.sizes["N"] > shapes.sizes["D"]:
            raise RegimeError(
                f"{name}: N = {shapes.sizes['N']} exceeds D = {shapes.sizes['D']}; a regime of N eigenvalues "
                f"of one sign needs N <= D, choose a smaller state or regime='free'"
            )
    check.expect_floats(name, {"weight_B": weight_B, "weight_C": weight_C, "diagonal": diagonal})


@operation(
    arrays="S_B S_C",
    differentiable="S_B S_C",
    source="tokendyn; spectra of products and of M + Mᵀ from N x N and 2N x 2N matrices",
)
def io_spectrum(S_B: Any, S_C: Any) -> Any:
    """Spectrum of the input-output matrix ``M = S_Cᵀ S_B`` and of its symmetric part.

    The eigenvalues of M that are not zero by rank are those of the N x N matrix ``S_B S_Cᵀ``; those of
    ``(M + Mᵀ)/2`` are those of the 2N x 2N matrix ``½ J Q``, ``Q = [S_C; S_B] [S_C; S_B]ᵀ``, J the swap of
    the two halves. No D x D matrix is made where D > 2N.

    For free projections with D ≥ 2N the symmetric part always has N positive and N negative eigenvalues
    (Sylvester's law): their count says nothing about a model, their magnitudes do.

    Args:
        S_B, S_C: (N, D) float32 or float64.

    Returns:
        :class:`IOSpectrum`. Differentiable where the eigenvalues are distinct.

    Raises:
        ShapeError, DTypeError: an argument has the wrong shape, or the wrong dtype.

    Cost:
        O(N² D + N³).
    """
    shapes = check.Shapes("io_spectrum")
    shapes.expect("S_B", S_B, "N D")
    shapes.expect("S_C", S_C, "N D")
    check.expect_floats("io_spectrum", {"S_B": S_B, "S_C": S_C}, check.WIDE_FLOATS)
