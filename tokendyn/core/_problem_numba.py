"""What the integrator integrates: the parameters of a trajectory or an ensemble, and its right-hand side.

One type for each model. ``right_hand_side`` and the functions beside it are overloaded on the type, so that the
integrator is compiled anew for each model, and for each holds nothing but what that model needs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba.extending import overload

from tokendyn.core import _lanes_numba as lanes
from tokendyn.core._flow_numba import (
    autoregression,
    dot,
    line_states,
    linear_attention,
    padded,
    softmax_attention,
    space,
    tangent,
)
from tokendyn.core._lanes_numba import WIDTH, aligned_zeros, row, set_row
from tokendyn.core._parallel import kernel


class Line(NamedTuple):
    """One channel. In an ensemble every array of these types has one more axis in front, of its size or of 1.

    Attributes:
        D: channels, here 1.
        sphere: whether tokens are projected on the tangent space.
        parameters: (4,) μ, S_Δ, a, bias.
        sign: (≥ L,) the signs of the tokens, which never change; 0 for a token that is 0, and up to whole lanes.
    """

    D: int
    sphere: bool
    parameters: np.ndarray
    sign: np.ndarray


class Space(NamedTuple):
    """The selective model in D channels; arrays as :func:`tokendyn.core._flow_numba.space` takes them."""

    D: int
    sphere: bool
    S_B_T: np.ndarray
    S_C_T: np.ndarray
    W_T: np.ndarray
    S_delta: np.ndarray
    a: np.ndarray
    bias: np.ndarray


class Attention(NamedTuple):
    """Softmax or linear attention; matrices transposed, empty for an identity."""

    D: int
    sphere: bool
    softmax: bool
    causal: bool
    Q_T: np.ndarray
    K_T: np.ndarray
    V_T: np.ndarray


class Autoregression(NamedTuple):
    """AR(p) with coefficients phi (p,)."""

    D: int
    sphere: bool
    phi: np.ndarray


def member(p: Any, i: Any) -> Any:
    """The problem of trajectory ``i`` of an ensemble."""
    raise NotImplementedError("for kernels only")


def work_space(p: Any, tokens: Any) -> Any:
    """Work space for one trajectory of ``tokens`` tokens: a tuple of arrays."""
    raise NotImplementedError("for kernels only")


def logarithmic(p: Any) -> Any:
    """Whether the state holds ln|x_l| instead of x_l."""
    raise NotImplementedError("for kernels only")


def right_hand_side(p: Any, work: Any, tokens: Any, y: Any, dy: Any) -> Any:
    """``dy/dt`` for the first ``tokens`` tokens, and a smooth bound on their rates of growth.

    On the line y_l = ln|x_l| (0 where x_l = 0), which moves at the rate μ w_l (12); elsewhere y is x itself, token by
    token. The bound is ``(Σ_l max(0, d ln|x_l|/dt)²)^½``, 0 for the models in which no token blows up.
    """
    raise NotImplementedError("for kernels only")


@kernel()
def _of(stack, i):
    """A copy of entry ``i`` of a stack, or of its only one."""
    return stack[i if stack.shape[0] > 1 else 0].copy()


def _line_member(p, i):
    return Line(p.D, p.sphere, _of(p.parameters, i), _of(p.sign, i))


def _line_work(p, tokens):
    size = padded(tokens)
    return aligned_zeros(size, p.sign), aligned_zeros(size, p.sign), aligned_zeros(size, p.sign)


def _line_rhs(p, work, tokens, y, dy):
    x, decay, w = work
    mu = p.parameters[0]
    for l in range(tokens):
        x[l] = y[l]
    for k in range(padded(tokens) // WIDTH):
        set_row(x, k, row(p.sign, k) * lanes.exp(row(x, k)))
    line_states(tokens, x, p.parameters[1], p.parameters[2], p.parameters[3], decay, w, 0.0)
    for l in range(tokens):
        dy[l] = mu * w[l] * abs(p.sign[l])
    return np.sqrt(dot(dy[:tokens], dy[:tokens])) if mu > 0.0 else 0.0


def _space_member(p, i):
    return Space(
        p.D, p.sphere, _of(p.S_B_T, i), _of(p.S_C_T, i), _of(p.W_T, i), _of(p.S_delta, i), _of(p.a, i), _of(p.bias, i)
    )


def _space_work(p, tokens):
    N = p.S_B_T.shape[1]
    return np.empty((p.D, N)), np.empty(N), np.empty(N), np.empty(p.D)


def _space_rhs(p, work, tokens, y, dy):
    state, B, C, value = work
    x, dx = y[: tokens * p.D].reshape((tokens, p.D)), dy[: tokens * p.D].reshape((tokens, p.D))
    space(x, p.S_B_T, p.S_C_T, p.S_delta, p.a, p.bias, p.W_T, dx, state, B, C, value)
    if p.sphere:
        tangent(x, dx)
        return 0.0
    squares = 0.0
    for l in range(tokens):
        norm = dot(x[l], x[l])
        if norm > 0.0:
            squares += max(0.0, dot(x[l], dx[l]) / norm) ** 2
    return np.sqrt(squares)


def _attention_member(p, i):
    return Attention(p.D, p.sphere, p.softmax, p.causal, _of(p.Q_T, i), _of(p.K_T, i), _of(p.V_T, i))


def _attention_work(p, tokens):
    N = p.Q_T.shape[1]
    seen = tokens if p.softmax else 0
    return (
        np.empty(N),
        np.empty(N),
        np.empty(p.D),
        np.empty((p.D, N)),
        np.empty((N, seen)),
        np.empty((p.D, seen)),
        np.empty(seen),
    )


def _attention_rhs(p, work, tokens, y, dy):
    query, key, value, state, keys, values, weights = work
    x, dx = y[: tokens * p.D].reshape((tokens, p.D)), dy[: tokens * p.D].reshape((tokens, p.D))
    if p.softmax:
        softmax_attention(x, p.Q_T, p.K_T, p.V_T, p.causal, dx, query, keys, values, weights)
    else:
        linear_attention(x, p.Q_T, p.K_T, p.V_T, p.causal, dx, query, key, value, state)
    if p.sphere:
        tangent(x, dx)
    return 0.0


def _autoregression_member(p, i):
    return Autoregression(p.D, p.sphere, _of(p.phi, i))


def _autoregression_work(p, tokens):
    return (np.empty(0),)


def _autoregression_rhs(p, work, tokens, y, dy):
    x, dx = y[: tokens * p.D].reshape((tokens, p.D)), dy[: tokens * p.D].reshape((tokens, p.D))
    autoregression(x, p.phi, dx)
    if p.sphere:
        tangent(x, dx)
    return 0.0


_IMPLEMENTATIONS: dict[Any, tuple[Any, ...]] = {
    Line: (_line_member, _line_work, _line_rhs, lambda p: True),
    Space: (_space_member, _space_work, _space_rhs, lambda p: False),
    Attention: (_attention_member, _attention_work, _attention_rhs, lambda p: False),
    Autoregression: (_autoregression_member, _autoregression_work, _autoregression_rhs, lambda p: False),
}


def _enter(stub: Any, place: int) -> None:
    def choose(p: Any, *rest: Any) -> Any:
        return _IMPLEMENTATIONS[p.instance_class][place]

    overload(stub, strict=False, jit_options={"error_model": "numpy", "fastmath": {"contract"}})(choose)


for _place, _stub in enumerate((member, work_space, right_hand_side, logarithmic)):
    _enter(_stub, _place)
