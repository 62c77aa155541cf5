"""One step of the selective scan on NumPy arrays."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from tokendyn._checks import expect_choice
from tokendyn.backends.numpy.ops._arrays import expect_dtype
from tokendyn.backends.numpy.ops._scan import ENGINES


def selective_state_update(
    state: np.ndarray, x: np.ndarray, *args: Any, engine: str = "auto", **kwargs: Any
) -> tuple[np.ndarray, np.ndarray]:
    """See :func:`tokendyn.selective_state_update`. Engines as for :func:`selective_scan`."""
    dtype = expect_dtype("selective_state_update", x)
    y, new_state = _engine(engine).selective_state_update(state, x, *args, **kwargs)
    return y.astype(dtype, copy=False), new_state.astype(dtype, copy=False)


def selective_state_update_vjp(
    dout: Any, state: np.ndarray, x: np.ndarray, *args: Any, engine: str = "auto", **kwargs: Any
) -> dict[str, np.ndarray]:
    """Gradients of ``⟨dout, selective_state_update(...)⟩`` by argument name, in the dtype of x."""
    dtype = expect_dtype("selective_state_update_vjp", x)
    gradients = _engine(engine).selective_state_update_vjp(dout, state, x, *args, **kwargs)
    return {name: gradient.astype(dtype, copy=False) for name, gradient in gradients.items()}


def _engine(name: str) -> ModuleType:
    expect_choice("selective_state_update on NumPy", "engine", name, ENGINES)
    if name == "spec":
        from tokendyn.core import _step

        return _step
    from tokendyn.core import _step_numba

    return _step_numba
