"""Hidden attention on NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from tokendyn.backends.numpy.ops._arrays import expect_dtype


def hidden_attention(delta: np.ndarray, *args: Any, **kwargs: Any) -> np.ndarray:
    """See :func:`tokendyn.hidden_attention`."""
    from tokendyn.core import _attention_numba

    expect_dtype("hidden_attention", delta)
    return _attention_numba.hidden_attention(delta, *args, **kwargs)
