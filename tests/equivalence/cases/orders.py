"""Scores, orders and permutations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..check import Case
from .common import ALL, ONCE, WIDE, Rng


def ordinary(rng: Rng, b: int, L: int) -> np.ndarray:
    return rng.standard_normal((b, L))


def tied(rng: Rng, b: int, L: int) -> np.ndarray:
    """Few distinct values, zeros of both signs among them: padding and uniform patches make such scores."""
    return rng.choice([-1.0, -0.0, 0.0, 0.5, 0.5, 2.0], (b, L))


def uniform(rng: Rng, b: int, L: int) -> np.ndarray:
    return np.full((b, L), rng.standard_normal())


def initial(rng: Rng, b: int, L: int) -> np.ndarray:
    """Scores as a fresh model has them."""
    return 5e-3 * rng.standard_normal((b, L))


def far_apart(rng: Rng, b: int, L: int) -> np.ndarray:
    """So far apart that most weights are 0 in float64 too; some pairs close, so that something is left to see."""
    return 1e4 * rng.standard_normal((b, L)).round(1) + 0.1 * rng.standard_normal((b, L))


def sorted_already(rng: Rng, b: int, L: int) -> np.ndarray:
    return np.sort(rng.standard_normal((b, L)), axis=1)


Scores = Callable[[Rng, int, int], np.ndarray]

#: name -> (L, scores, options, dtypes)
ORDERS: dict[str, tuple[int, Scores, dict[str, Any], tuple[str, ...]]] = {
    "L=1": (1, ordinary, {}, WIDE),
    "L=2": (2, ordinary, {}, WIDE),
    "L=63": (63, ordinary, {}, WIDE),
    "L=197": (197, ordinary, {"tau": 0.1}, WIDE),
    "descending": (21, ordinary, {"ascending": False}, WIDE),
    "ties": (21, tied, {}, ALL),
    "ties descending": (21, tied, {"ascending": False, "tau": 0.3}, WIDE),
    "ties, square": (21, tied, {"power": 2}, WIDE),
    "all equal": (21, uniform, {}, WIDE),
    "all equal descending": (21, uniform, {"ascending": False}, WIDE),
    "fresh scores": (63, initial, {}, WIDE),
    "tau 0.01": (21, ordinary, {"tau": 0.01}, WIDE),
    "far apart": (21, far_apart, {}, WIDE),
    "sorted already": (21, sorted_already, {"tau": 0.2}, WIDE),
    "sorted already, descending": (21, sorted_already, {"tau": 0.2, "ascending": False}, WIDE),
    "power 2": (21, ordinary, {"power": 2, "tau": 0.5}, ALL),
    "power 1.5 descending": (21, ordinary, {"power": 1.5, "ascending": False}, WIDE),
}
#: Those whose numbers float32 may find hard; the others JAX compiles once.
NUMERICAL = ("L=63", "fresh scores", "ties", "all equal", "tau 0.01", "far apart", "sorted already")


def _orders(subject: str, tokens: str | None, *, with_options: bool = True) -> Iterator[Case]:
    """The cases of an operation on scores, with its tokens if it has any."""

    def make(L: int, scores: Scores, options: dict[str, Any]) -> Callable[[Rng], dict[str, Any]]:
        def arguments(rng: Rng) -> dict[str, Any]:
            made: dict[str, Any] = {"scores": scores(rng, 2, L)}
            if tokens is not None:
                made[tokens] = rng.standard_normal((2, L, 3))
            return {**made, **options}

        return arguments

    for name, (L, scores, options, dtypes) in ORDERS.items():
        if not with_options:
            if not {"tau", "power"}.isdisjoint(options) and scores is ordinary:
                continue
            options = {key: value for key, value in options.items() if key == "ascending"}
        yield Case(subject, name, make(L, scores, options), dtypes, compiled=None if name in NUMERICAL else ONCE)
    yield Case(subject, "strided", make(21, ordinary, {}), strided=True)
    if tokens is not None:
        # Scores are best kept in float32: half precision would tie what the model tells apart.
        yield Case(subject, "float32 scores", make(21, ordinary, {}), ("bfloat16",), fixed_dtypes={"scores": "float32"})


def softsort() -> Iterator[Case]:
    yield from _orders("softsort", "x")


def softsort_restore() -> Iterator[Case]:
    yield from _orders("softsort_restore", "y")


def softsort_matrix() -> Iterator[Case]:
    yield from _orders("softsort_matrix", None)


def effective_tokens() -> Iterator[Case]:
    yield from _orders("effective_tokens", None)


def hard_order() -> Iterator[Case]:
    yield from _orders("hard_order", None, with_options=False)


def importance_score() -> Iterator[Case]:
    def case(name: str, b: int, L: int, D: int, Q: int, *, s_delta: bool = True, **more: Any) -> Case:
        def arguments(rng: Rng) -> dict[str, Any]:
            return {
                "x": rng.standard_normal((b, L, Q)),
                "s_delta": rng.standard_normal((D, Q)) if s_delta else None,
                "k": rng.standard_normal(D if s_delta else Q),
            }

        return Case("importance_score", name, arguments, **more)

    yield case("one of everything", 1, 1, 1, 1, compiled=ONCE)
    yield case("L=2", 2, 2, 5, 3, compiled=ONCE)
    yield case("L=63", 2, 63, 5, 5, dtypes=ALL)
    yield case("L=197", 1, 197, 19, 17)
    yield case("low rank", 2, 7, 16, 2, dtypes=ALL)
    yield case("wide", 2, 7, 2, 16, compiled=ONCE)
    yield case("no step size", 2, 7, 5, 5, s_delta=False, dtypes=ALL)
    yield case("strided", 2, 7, 5, 4, strided=True)


def _tokens(subject: str, name: str) -> Iterator[Case]:
    def case(label: str, L: int, integer: type = np.int64, **more: Any) -> Case:
        def arguments(rng: Rng) -> dict[str, Any]:
            indices = np.stack([rng.permutation(L) for _ in range(3)]).astype(integer)
            return {name: rng.standard_normal((3, L, 2)), "indices": indices}

        return Case(subject, label, arguments, **more)

    for L in (1, 2, 63, 197):
        yield case(f"L={L}", L, dtypes=ALL if L == 63 else WIDE, compiled=None if L == 63 else ONCE)
    yield case("int32", 7, np.int32, compiled=ONCE)
    yield case("strided", 7, strided=True)


def take_tokens() -> Iterator[Case]:
    yield from _tokens("take_tokens", "x")


def put_tokens() -> Iterator[Case]:
    yield from _tokens("put_tokens", "y")
