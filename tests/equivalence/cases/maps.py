"""Input-output maps and their spectra."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..check import Case
from .common import ALL, ONCE, WIDE, Rng


def io_projections() -> Iterator[Case]:
    def case(name: str, N: int, D: int, regime: str, form: str = "paper", **more: Any) -> Case:
        def arguments(rng: Rng) -> dict[str, Any]:
            second = {"weight_C": (N, D)} if regime == "free" else {"diagonal": (N,)}
            arrays = {name: rng.standard_normal(shape) for name, shape in {"weight_B": (N, D), **second}.items()}
            return {**arrays, "regime": regime, "form": form}

        return Case("io_projections", name, arguments, **more)

    yield case("free", 3, 5, "free", dtypes=ALL)
    yield case("free, N above D", 5, 3, "free", compiled=ONCE)
    for regime in ("positive", "negative", "mixed"):
        for form in ("paper", "published_code", "scale_matched"):
            half = form == "paper" and regime == "mixed"
            yield case(
                f"{regime}, {form}", 3, 5, regime, form, dtypes=ALL if half else WIDE, compiled=None if half else ONCE
            )
        yield case(f"{regime}, N=1", 1, 4, regime, compiled=ONCE)
        yield case(f"{regime}, N=D", 4, 4, regime, compiled=ONCE)
    yield case("mixed, even N", 4, 7, "mixed", "scale_matched", compiled=ONCE)
    yield case("strided", 3, 5, "mixed", strided=True)


def io_spectrum() -> Iterator[Case]:
    def case(name: str, N: int, D: int, **more: Any) -> Case:
        def arguments(rng: Rng) -> dict[str, Any]:
            return {"S_B": rng.standard_normal((N, D)), "S_C": rng.standard_normal((N, D))}

        return Case("io_spectrum", name, arguments, **more)

    yield case("N=1, D=1", 1, 1, compiled=ONCE)
    yield case("N=1", 1, 4, compiled=ONCE)
    yield case("D above 2N", 4, 11)
    yield case("D = 2N", 3, 6, compiled=ONCE)
    yield case("D between N and 2N", 4, 6, compiled=ONCE)
    yield case("N=D", 4, 4, compiled=ONCE)
    yield case("N above D", 5, 3)
    yield case("strided", 3, 7, strided=True)
