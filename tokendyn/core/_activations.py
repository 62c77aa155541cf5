"""Softplus, the logistic function and SiLU, right for every float: no overflow, no lost digits."""

from __future__ import annotations

from typing import Any

import numpy as np


def softplus(v: Any) -> Any:
    """``ln(1 + e^v)``; for large v it is v, for very negative v it is e^v."""
    v = np.asarray(v, np.float64)
    return np.maximum(v, 0.0) + np.log1p(np.exp(-np.abs(v)))


def sigmoid(v: Any) -> Any:
    """``1 / (1 + e^-v)``, the derivative of :func:`softplus`. The exponential never overflows."""
    v = np.asarray(v, np.float64)
    e = np.exp(-np.abs(v))
    return np.where(v >= 0, 1.0, e) / (1.0 + e)


def silu(v: Any) -> Any:
    """``v · sigmoid(v)``."""
    return v * sigmoid(v)


def silu_derivative(v: Any) -> Any:
    """``sigmoid(v) · (1 + v · (1 - sigmoid(v)))``, with ``1 - sigmoid(v) = sigmoid(-v)`` to keep its digits."""
    return sigmoid(v) * (1.0 + v * sigmoid(-v))
