"""The blow-up integral of one channel, for many tokens at once.

A token alone on the line, x > 0 and S_Δ x > 0, reaches infinity after ::

    ∫_x^∞ du / (μ u³ Δ(u)) = 1/(μ x²) ∫_0^1 v dv / softplus(z/v + b),    z = S_Δ x,  v = x/u

and no later beside other tokens, whose part in w_l is positive.
"""

from __future__ import annotations

import numpy as np

from tokendyn.core._elementary_numba import softplus
from tokendyn.core._parallel import kernel

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(12)
_NODES, _WEIGHTS = 0.5 * (_NODES + 1.0), 0.5 * _WEIGHTS
#: From here on softplus(y) is y in all digits.
_LINEAR = 38.0


@kernel()
def _panel(low, high, z, b, values):
    """∫ v / softplus(z/v + b) dv from low to high, by Gauss and Legendre; ``values`` (12,) is work space."""
    for k in range(_NODES.shape[0]):  # apart from the sum, so that it becomes vector instructions
        v = low + (high - low) * _NODES[k]
        values[k] = _WEIGHTS[k] * v / softplus(z / v + b)
    total = 0.0
    for k in range(_NODES.shape[0]):
        total += values[k]
    return total * (high - low)


@kernel()
def _end(high, z, b):
    """∫_0^high v² / (z + b v) dv."""
    beta = b * high / z
    if abs(beta) > 0.5:
        return high * high * high / z * (np.log1p(beta) - beta + 0.5 * beta * beta) / (beta * beta * beta)
    total = 0.0
    for k in range(_NODES.shape[0]):
        total += _WEIGHTS[k] * _NODES[k] * _NODES[k] / (1.0 + beta * _NODES[k])
    return total * high * high * high / z


@kernel()
def blow_up_integral(z, b, values):
    """``∫_0^1 v dv / softplus(z/v + b)`` for z ≥ 0, to about 1e-14; panels that halve, then the closed form.

    ``values`` (12,) is work space.
    """
    if z == 0.0:
        return 0.5 / softplus(b)
    total, high = 0.0, 1.0
    while z / high + b < _LINEAR:
        total += _panel(0.5 * high, high, z, b, values)
        high *= 0.5
    return total + _end(high, z, b)


@kernel()
def blow_up_bounds(first, last, x0, mu, s_delta, bias, bounds):
    """For rows ``first`` to ``last``: the time before which each token has ended, infinity where there is none.

    ``bounds[i, l]`` is the least integral of the tokens up to l, since a blow-up takes all later tokens with it.
    """
    values = np.empty(_NODES.shape[0])
    for i in range(first, last):
        least = np.inf
        for l in range(x0.shape[1]):
            z = s_delta[i] * x0[i, l]
            if mu[i] > 0.0 and z >= 0.0 and x0[i, l] != 0.0:
                least = min(least, blow_up_integral(z, bias[i], values) / (mu[i] * x0[i, l] * x0[i, l]))
            bounds[i, l] = least
