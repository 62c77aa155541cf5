"""A mixer that reorders its tokens, scans them and puts them back: three operations that must agree on one order.

Everything indexed by token (input, step size, B, C and the gate) goes through the same order. The spec composes
the specs of the operations, and its VJP their VJPs by the chain rule.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import tokendyn
from tokendyn import core

SCAN_TOKENS = ("u", "delta", "B", "C", "z")


def reordered_scan(
    u: Any, scores: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, *, method: str, tau: float = 1.0
) -> Any:
    """Scan in the order of ``scores``; y comes back in the original order. All of (b, channels, L)."""
    order = tokendyn.token_order(scores, method, tau=tau)
    u, delta, B, C, z = (order.apply(v, axis=-1) for v in (u, delta, B, C, z))
    return order.restore(tokendyn.selective_scan(u, delta, A, B, C, D, z), axis=-1)


def _swap(x: np.ndarray) -> np.ndarray:
    return np.swapaxes(x, 1, 2)


def reordered_scan_spec(*, method: str, tau: float = 1.0, scores: Any, **scan: Any) -> np.ndarray:
    """The specs of the three operations, one after another."""
    y, _ = _ordered(scores, method, tau, scan)
    if method == "softsort":
        return _swap(core.softsort_restore(scores, _swap(y), tau=tau))
    return _swap(core.put_tokens(_swap(y), core.hard_order(scores)))


def _ordered(scores: Any, method: str, tau: float, scan: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """y in sorted order, and the scan's arguments in sorted order."""
    arguments = dict(scan)
    indices = core.hard_order(scores)
    for name in SCAN_TOKENS:
        tokens = _swap(scan[name])
        ordered = core.softsort(scores, tokens, tau=tau) if method == "softsort" else core.take_tokens(tokens, indices)
        arguments[name] = _swap(ordered)
    return core.selective_scan(**arguments), arguments


def reordered_scan_spec_vjp(
    dout: np.ndarray, *, method: str, tau: float = 1.0, scores: Any, **scan: Any
) -> dict[str, np.ndarray]:
    """The chain rule through restore, scan and apply.

    For ``"hard"`` the scores have no gradient; for ``"straight_through"`` they have that of SoftSort, at the
    tokens that the permutation gave.
    """
    y, arguments = _ordered(scores, method, tau, scan)
    indices = core.hard_order(scores)
    dscores = np.zeros(np.shape(scores))
    dy = _swap(dout)
    if method == "softsort":
        back = core.softsort_restore_vjp(dy, scores, _swap(y), tau=tau)
        dy, dscores = back["y"], dscores + back["scores"]
    else:
        if method == "straight_through":
            dscores = dscores + core.softsort_restore_vjp(dy, scores, _swap(y), tau=tau)["scores"]
        dy = core.take_tokens(dy, indices)
    gradients = core.selective_scan_vjp(_swap(dy), **arguments)
    for name in SCAN_TOKENS:
        dordered = _swap(gradients[name])
        if method != "hard":
            through = core.softsort_vjp(dordered, scores, _swap(scan[name]), tau=tau)
            dscores = dscores + through["scores"]
        gradients[name] = _swap(through["x"] if method == "softsort" else core.put_tokens(dordered, indices))
    if method != "hard":
        gradients["scores"] = dscores
    return gradients
