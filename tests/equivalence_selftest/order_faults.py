"""Faults in scores and orders, and in a mixer that reorders its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import tokendyn
from tokendyn._checks import dtype_name

from ..equivalence.compositions import SCAN_TOKENS
from .planting import (
    BOTH,
    DIFFERENTIATED,
    MAIN,
    Arguments,
    Fault,
    cast,
    constant,
    cut,
    given,
    gradient,
    instead,
    made,
    ops,
    xp,
)

# ------------------------------------------------------------------------------------------------------------- orders


def ties_reversed(call: Callable[..., Any], a: Arguments) -> Any:
    """A sort that is not stable: equal scores in the opposite order."""
    length = a["scores"].shape[1]
    back = np.arange(length)[::-1].copy()
    return length - 1 - call(**{**a, "scores": a["scores"][:, back]})


def descending_by_flipping(call: Callable[..., Any], a: Arguments) -> Any:
    """Descending as the ascending order read backwards: equal scores come out reversed."""
    if a.get("ascending", True):
        return call(**a)
    return call(**{**a, "ascending": True})[:, np.arange(a["scores"].shape[1])[::-1].copy()]


def inverse_order(call: Callable[..., Any], a: Arguments) -> Any:
    indices = call(**a)
    places = np.arange(indices.shape[1])[None, :, None].repeat(indices.shape[0], 0)
    placed = ops(indices).put_tokens(constant(places, a["scores"]), indices)[..., 0]
    return cast(placed, dtype_name(indices))


def softsort_with(slope: Callable[[Any, np.ndarray], Any]) -> Callable[..., Any]:
    """SoftSort by its dense definition with another |·|: ``slope(r, positions)`` is its derivative."""

    def call(right: Callable[..., Any], a: Arguments) -> Any:
        if a.get("power", 1) != 1:
            return right(**a)
        backend = ops(a["scores"])
        indices = tokendyn.hard_order(a["scores"], ascending=a.get("ascending", True))
        sorted_scores = backend.take_tokens(a["scores"][..., None], indices)[..., 0]
        tokens = backend.take_tokens(a["x"], indices)
        r = sorted_scores[:, None, :] - sorted_scores[:, :, None]
        places = np.arange(r.shape[1])
        distance = r * slope(backend.stop_gradient(r), np.sign(places[None, :] - places[:, None]))
        weights = xp(r).exp(-distance / a.get("tau", 1.0))
        return (weights / weights.sum(-1)[..., None]) @ tokens

    return call


def by_position(r: Any, later: np.ndarray) -> Any:
    """Where r = 0 the derivative is that of the position: scans over the sorted sequence that forget ties."""
    return xp(r).where(r == 0, constant(later, r), 2.0 * cast(r > 0, dtype_name(r)) - 1.0)


def one_at_zero(r: Any, later: np.ndarray) -> Any:
    """The derivative of |·| at 0 is 1, as some frameworks have it."""
    return 2.0 * cast(r >= 0, dtype_name(r)) - 1.0


ORDERS = (
    Fault(
        "transposed permutation",
        "take_tokens",
        instead(lambda call, a: tokendyn.put_tokens(a["x"], a["indices"])),
        MAIN,
        where="L=63",
    ),
    Fault(
        "transposed permutation",
        "put_tokens",
        instead(lambda call, a: tokendyn.take_tokens(a["y"], a["indices"])),
        MAIN,
        where="L=63",
    ),
    Fault("inverse permutation returned", "hard_order", instead(inverse_order), BOTH, where="L=63"),
    Fault("unstable sort", "hard_order", instead(ties_reversed), MAIN, "exact", where="ties"),
    Fault(
        "descending order by flipping",
        "hard_order",
        instead(descending_by_flipping),
        BOTH,
        "exact",
        where="ties descending",
    ),
    Fault("ascending ignored", "softsort", given(lambda a: {"ascending": True}), MAIN, where="descending"),
    Fault("tau ignored", "softsort", given(lambda a: {"tau": 1.0}), BOTH, where="L=197"),
    Fault("power ignored", "softsort", given(lambda a: {"power": 1}), BOTH, where="ties, square"),
    Fault(
        "hard in place of soft",
        "softsort",
        instead(lambda call, a: tokendyn.token_order(a["scores"], "hard").apply(a["x"])),
        BOTH,
    ),
    Fault(
        "restore is apply",
        "softsort_restore",
        instead(
            lambda call, a: tokendyn.softsort(a["scores"], a["y"], **{k: a[k] for k in a if k not in ("scores", "y")})
        ),
        MAIN,
        where="L=63",
    ),
    Fault(
        "restore not normalised",
        "softsort_restore",
        instead(
            lambda call, a: (
                tokendyn.softsort_matrix(a["scores"], **{k: a[k] for k in a if k not in ("scores", "y")}).swapaxes(1, 2)
                @ a["y"]
            )
        ),
        ("torch",),
        where="L=63",
    ),
    Fault("matrix transposed", "softsort_matrix", made(lambda P: P.swapaxes(1, 2)), MAIN, where="L=63"),
    Fault("half as many effective tokens", "effective_tokens", given(lambda a: {"tau": a.get("tau", 1.0) / 2}), MAIN),
    Fault("tie gradient by position", "softsort", instead(softsort_with(by_position)), DIFFERENTIATED, where="ties"),
    Fault("derivative of |.| at 0 is 1", "softsort", instead(softsort_with(one_at_zero)), DIFFERENTIATED, where="ties"),
    Fault(
        "gradient of scores missing",
        "softsort",
        gradient("scores", None, cut),
        ("torch",),
    ),
    Fault(
        "gradient of scores missing",
        "softsort_restore",
        gradient("scores", None, cut),
        ("torch",),
    ),
    Fault(
        "projection transposed",
        "importance_score",
        given(
            lambda a: (
                {"s_delta": a["s_delta"].swapaxes(0, 1)}
                if a["s_delta"] is not None and a["s_delta"].shape[0] == a["s_delta"].shape[1]
                else {}
            )
        ),
        MAIN,
        where="L=63",
    ),
    Fault(
        "gradient of k missing",
        "importance_score",
        gradient("k", None, cut),
        ("torch",),
    ),
)


def mixer(*, leave_out: str | None = None, undo: bool = True, restore: str = "restore") -> Callable[..., Any]:
    """The mixer of ``compositions`` with one of its steps done wrong."""

    def call(right: Callable[..., Any], a: Arguments) -> Any:
        del right
        order = tokendyn.token_order(a["scores"], a["method"], tau=a.get("tau", 1.0))
        scan = {k: a[k] for k in ("u", "delta", "A", "B", "C", "D", "z")}
        for name in SCAN_TOKENS:
            if name != leave_out:
                scan[name] = order.apply(scan[name], axis=-1)
        y = tokendyn.selective_scan(**scan)
        return getattr(order, restore)(y, axis=-1) if undo else y

    return call


COMPOSITIONS = (
    *(
        Fault(
            f"order not applied to {label}",
            "reordered_scan",
            instead(mixer(leave_out=name)),
            MAIN if name == "z" else BOTH,
        )
        for name, label in (("z", "the gate"), ("delta", "the step size"), ("B", "B"), ("C", "C"), ("u", "the input"))
    ),
    Fault("order not undone", "reordered_scan", instead(mixer(undo=False)), BOTH),
    Fault("restore is apply", "reordered_scan", instead(mixer(restore="apply")), BOTH),
    Fault("gradient of the scores missing", "reordered_scan", gradient("scores", None, cut), ("torch",), where="soft"),
)
