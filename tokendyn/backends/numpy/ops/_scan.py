"""Selective scan on NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from tokendyn._checks import expect_choice
from tokendyn.backends.numpy.ops._arrays import expect_dtype
from tokendyn.core import _scan as spec

ENGINES = ("auto", "numba", "spec")


def selective_scan(u: np.ndarray, *args: Any, engine: str = "auto", **kwargs: Any) -> Any:
    """See :func:`tokendyn.selective_scan`. Engines: ``"numba"`` (``"auto"``) and ``"spec"``."""
    dtype = expect_dtype("selective_scan", u)
    expect_choice("selective_scan on NumPy", "engine", engine, ENGINES)
    out = spec.selective_scan(u, *args, **kwargs)
    if isinstance(out, tuple):
        return tuple(part.astype(dtype) for part in out)
    return out.astype(dtype)


def selective_scan_vjp(dout: Any, u: np.ndarray, *args: Any, engine: str = "auto", **kwargs: Any) -> Any:
    """Gradients of ``⟨dout, selective_scan(...)⟩`` by argument name, each in the dtype of its argument."""
    dtype = expect_dtype("selective_scan_vjp", u)
    expect_choice("selective_scan_vjp on NumPy", "engine", engine, ENGINES)
    return {k: v.astype(dtype) for k, v in spec.selective_scan_vjp(dout, u, *args, **kwargs).items()}
