"""What the integrator integrates: the parameters of one trajectory or an ensemble, and its right-hand side.

One compiled right-hand side serves all models, chosen by a number: a branch a call costs nothing beside the call, and
the integrator is compiled once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tokendyn.core._elementary_numba import exp
from tokendyn.core._flow_numba import (
    autoregression,
    dot,
    line_states,
    line_terms,
    linear_attention,
    softmax_attention,
    space,
    tangent,
)
from tokendyn.core._parallel import kernel

LINE, SPACE, SOFTMAX, LINEAR, AUTOREGRESSIVE = range(5)


class Problem(NamedTuple):
    """Parameters of every model; those that a model lacks have no elements.

    An ensemble has one more axis in front of each array, as long as the ensemble, or 1 where all members share.

    Attributes:
        model: ``LINE`` and so on.
        D: channels, 1 on the line.
        sphere: project on the tangent space.
        causal: of attention.
        line: (4,) μ, S_Δ, a, bias.
        sign: (L,) the signs of the tokens on the line, which never change; 0 for a token that is 0.
        first, second, third: (D, N) matrices, transposed: S_B, S_C, W or Q, K, V.
        S_delta, a, bias: as :func:`tokendyn.core._flow_numba.space` takes them.
        phi: (p,).
    """

    model: int
    D: int
    sphere: bool
    causal: bool
    line: np.ndarray
    sign: np.ndarray
    first: np.ndarray
    second: np.ndarray
    third: np.ndarray
    S_delta: np.ndarray
    a: np.ndarray
    bias: np.ndarray
    phi: np.ndarray


class Work(NamedTuple):
    """Work space of a right-hand side; see :func:`work_space`."""

    x: np.ndarray
    source: np.ndarray
    decay: np.ndarray
    state: np.ndarray
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    keys: np.ndarray
    values: np.ndarray


@kernel()
def _member(stack, i):
    """Entry ``i`` of a stack, or its only one."""
    return stack[i if stack.shape[0] > 1 else 0]


@kernel()
def member(p, i):
    """The problem of trajectory ``i`` of an ensemble."""
    return Problem(
        p.model,
        p.D,
        p.sphere,
        p.causal,
        _member(p.line, i),
        _member(p.sign, i),
        _member(p.first, i),
        _member(p.second, i),
        _member(p.third, i),
        _member(p.S_delta, i),
        _member(p.a, i),
        _member(p.bias, i),
        _member(p.phi, i),
    )


@kernel()
def work_space(p, tokens):
    """Work space for one trajectory of ``tokens`` tokens."""
    N = p.first.shape[-1]
    attends = tokens if p.model == SOFTMAX else 0
    return Work(
        np.empty(tokens),
        np.empty(tokens),
        np.empty(tokens),
        np.empty((p.D, N)),
        np.empty(N),
        np.empty(N),
        np.empty(p.D),
        np.empty((N, attends)),
        np.empty((p.D, attends)),
    )


@kernel()
def right_hand_side(p, work, tokens, y, dy):
    """``dy/dt`` for the first ``tokens`` tokens, and a smooth bound on their rates of growth.

    On the line y_l = ln|x_l| (0 where x_l = 0), which moves at the rate μ w_l (12); elsewhere y is x itself, token by
    token. The bound is ``(Σ_l max(0, d ln|x_l|/dt)²)^½``, 0 for the models in which no token blows up.
    """
    squares = 0.0
    if p.model == LINE:
        mu, s_delta, a, bias = p.line[0], p.line[1], p.line[2], p.line[3]
        x, source, decay = work.x[:tokens], work.source[:tokens], work.decay[:tokens]
        for l in range(tokens):
            x[l] = p.sign[l] * exp(y[l])
        line_terms(x, s_delta, a, bias, source, decay)
        line_states(source, decay, source)
        for l in range(tokens):
            dy[l] = mu * source[l] * abs(p.sign[l])
        return np.sqrt(dot(dy[:tokens], dy[:tokens])) if mu > 0.0 else 0.0
    x, dx = y[: tokens * p.D].reshape((tokens, p.D)), dy[: tokens * p.D].reshape((tokens, p.D))
    if p.model == SPACE:
        space(x, p.first, p.second, p.S_delta, p.a, p.bias, p.third, dx, work.state, work.key, work.query, work.value)
        if not p.sphere:
            for l in range(tokens):
                norm = dot(x[l], x[l])
                if norm > 0.0:
                    squares += max(0.0, dot(x[l], dx[l]) / norm) ** 2
    elif p.model == SOFTMAX:
        softmax_attention(x, p.first, p.second, p.third, p.causal, dx, work.query, work.keys, work.values, work.source)
    elif p.model == LINEAR:
        linear_attention(x, p.first, p.second, p.third, p.causal, dx, work.query, work.key, work.value, work.state)
    else:
        autoregression(x, p.phi, dx)
    if p.sphere:
        tangent(x, dx)
    return np.sqrt(squares)
