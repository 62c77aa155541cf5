"""One step of the selective scan: (1)-(3) of paper 1 for a single token, and its reverse pass.

Arguments and results are those of :func:`tokendyn.selective_state_update`; everything is computed in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tokendyn.core._activations import silu, softplus
from tokendyn.core._scan import selective_scan_vjp

#: The step's arguments by the scan's names.
_NAMES = {"u": "x", "delta": "dt", "delta_bias": "dt_bias", "initial_state": "state"}


def selective_state_update(
    state: Any,
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    dt_bias: Any = None,
    dt_softplus: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Spec of :func:`tokendyn.selective_state_update`. Paper 1, (1)-(3)."""
    state, x, dt, A, B, C = (np.asarray(v, np.float64) for v in (state, x, dt, A, B, C))
    batch, channels, size = state.shape
    if B.ndim == 2:
        B, C = B[:, None], C[:, None]
    rate = np.broadcast_to(A if A.ndim == 2 else A[:, None], (channels, size))
    y, new_state = np.empty_like(x), np.empty_like(state)
    for b, d in np.ndindex(batch, channels):
        g = d // (channels // B.shape[1])
        step = dt[b, d] if dt_bias is None else dt[b, d] + np.float64(dt_bias[d])
        if dt_softplus:
            step = softplus(step)  # (3)
        h = np.exp(step * rate[d]) * state[b, d] + step * B[b, g] * x[b, d]  # (1), (2)
        y[b, d] = C[b, g] @ h  # (1)
        if D is not None:
            y[b, d] += np.float64(D[d]) * x[b, d]
        if z is not None:
            y[b, d] *= silu(z[b, d])
        new_state[b, d] = h
    return y, new_state


def selective_state_update_vjp(
    dout: Any,
    state: Any,
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    dt_bias: Any = None,
    dt_softplus: bool = False,
) -> dict[str, np.ndarray]:
    """Gradients of ``⟨dout, selective_state_update(...)⟩`` by argument name: those of the scan of one token.

    Args:
        dout: the pair of gradients of (y, new_state); either may be None.
    """
    one_token = as_scan(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    return of_step(selective_scan_vjp(cotangents_of_scan(dout), **one_token))


def as_scan(
    state: Any, x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, z: Any, dt_bias: Any, dt_softplus: bool
) -> dict[str, Any]:
    """The arguments of the selective scan of this one token."""
    return {
        "u": x[..., None],
        "delta": dt[..., None],
        "A": A,
        "B": B[..., None],
        "C": C[..., None],
        "D": D,
        "z": None if z is None else z[..., None],
        "delta_bias": dt_bias,
        "delta_softplus": dt_softplus,
        "initial_state": state,
        "return_last_state": True,
    }


def cotangents_of_scan(dout: Any) -> tuple[Any, Any]:
    """The gradients of (y, new_state) as those of the scan's (y, last_state)."""
    dy, dstate = dout
    return (None if dy is None else dy[..., None]), dstate


def of_step(gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The gradients of :func:`as_scan`'s arguments as those of the step's."""
    with_tokens = ("u", "delta", "B", "C", "z")
    return {
        _NAMES.get(name, name): gradient[..., 0] if name in with_tokens else gradient
        for name, gradient in gradients.items()
    }
