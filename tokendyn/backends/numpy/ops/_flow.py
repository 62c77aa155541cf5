"""Token dynamics on NumPy arrays: the Numba twins, computed in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tokendyn.backends.numpy.ops._arrays import expect_dtype
from tokendyn.core import _flow_numba as twin


def _operation(name: str) -> Callable[..., np.ndarray]:
    run = getattr(twin, name)

    def operation(x: np.ndarray, **parameters: Any) -> np.ndarray:
        return run(x, **parameters).astype(expect_dtype(name, x), copy=False)

    operation.__name__ = name
    operation.__doc__ = f"See :func:`tokendyn.{name}`."
    return operation


flow_rhs = _operation("flow_rhs")
sphere_flow = _operation("sphere_flow")
attention_flow = _operation("attention_flow")
autoregressive_flow = _operation("autoregressive_flow")
