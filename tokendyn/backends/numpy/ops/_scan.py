"""Selective scan on NumPy arrays."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import numpy as np

from tokendyn._checks import expect_choice
from tokendyn.backends.numpy.ops._arrays import expect_dtype

ENGINES = ("auto", "numba", "spec")


def selective_scan(u: np.ndarray, *args: Any, engine: str = "auto", **kwargs: Any) -> Any:
    """See :func:`tokendyn.selective_scan`.

    Engines: ``"numba"``, which ``"auto"`` takes, and ``"spec"``, the plain loops of :mod:`tokendyn.core` in float64.
    Results of ``"numba"`` are the same bits on every call, whatever the number of threads (``NUMBA_NUM_THREADS``).
    """
    dtype = expect_dtype("selective_scan", u)
    out = _engine(engine, "_scan").selective_scan(u, *args, **kwargs)
    if isinstance(out, tuple):
        return tuple(part.astype(dtype, copy=False) for part in out)
    return out.astype(dtype, copy=False)


def selective_scan_vjp(
    dout: Any, u: np.ndarray, *args: Any, engine: str = "auto", **kwargs: Any
) -> dict[str, np.ndarray]:
    """Gradients of ``⟨dout, selective_scan(...)⟩`` by argument name, in the dtype of u.

    Args:
        dout: gradient of the output; with ``return_last_state`` the pair of those of (y, last_state), of which
            either may be None.
        u, and the rest: as given to :func:`tokendyn.selective_scan`, which checks them; here they are not checked.

    Returns:
        One array for every differentiable argument that was given.

    Cost:
        About five times the forward pass. Memory: a state for every 32 tokens of the channels in work, and sums for
        dB and dC of at most 32 times their size.
    """
    dtype = expect_dtype("selective_scan_vjp", u)
    gradients = _engine(engine, "_scan_vjp").selective_scan_vjp(dout, u, *args, **kwargs)
    return {name: gradient.astype(dtype, copy=False) for name, gradient in gradients.items()}


def _engine(name: str, module: str) -> ModuleType:
    """The module of ``engine``. Numba is imported when first needed."""
    expect_choice("selective_scan on NumPy", "engine", name, ENGINES)
    if name == "spec":
        from tokendyn.core import _scan

        return _scan
    return importlib.import_module(f"tokendyn.core.{module}_numba")
