"""The one table of tolerances, by operation and dtype.

Three checks are made together on every compared array: same shape, dtype and non-finite positions; the
normwise error ``|x - ref| / |ref|``; and the worst token, ``max_l |x_l - ref_l| / max(|ref_l|, floor)``.
Gradients have a column of their own. The reference is always the float64 spec, fed with the inputs
rounded to the dtype under test.

The half-precision rows do not hold absolute figures: an engine may err at most ``HALF_FACTOR`` times as
much as plain framework code in the same dtype, plus ``HALF_EPS`` units of the dtype's rounding.

To loosen a row is to change what the project promises: give the reason in ``reason``.
"""

from __future__ import annotations

from dataclasses import dataclass

HALF_FACTOR = 2.0
HALF_EPS = 4.0
#: A gradient's worst token may err this much more than its norm, as for values.
GRADIENT_WORST_TOKEN = 10.0


@dataclass(frozen=True)
class Tolerance:
    """Largest relative errors allowed: of the whole array, of its worst token, of the gradients."""

    values: float
    worst_token: float
    gradients: float
    reason: str = ""


DEFAULT: dict[str, Tolerance] = {
    "float64": Tolerance(1e-12, 1e-11, 1e-10),
    "float32": Tolerance(5e-6, 5e-5, 2e-5),
}

#: Exceptions to DEFAULT. Every entry needs a reason.
BY_OPERATION: dict[tuple[str, str], Tolerance] = {}


def tolerance(operation: str, dtype: str) -> Tolerance:
    """The tolerance of ``operation`` in ``dtype`` (``"float64"`` or ``"float32"``)."""
    return BY_OPERATION.get((operation, dtype), DEFAULT[dtype])
