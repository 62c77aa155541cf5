"""Orders of tokens on NumPy arrays: SoftSort of power 1 by two scans, of other powers by the spec's dense form."""

from __future__ import annotations

from typing import Any

import numpy as np

from tokendyn._checks import expect_choice
from tokendyn.backends.numpy.ops._arrays import expect_dtype
from tokendyn.core import _order as spec
from tokendyn.errors import EngineError


def importance_score(x: np.ndarray, s_delta: np.ndarray | None, k: np.ndarray) -> np.ndarray:
    """See :func:`tokendyn.importance_score`."""
    expect_dtype("importance_score", x)
    with np.errstate(invalid="ignore"):  # BLAS may raise the flag for lanes of a register that it does not use
        return x @ (k if s_delta is None else k @ s_delta)


def softsort(
    scores: np.ndarray,
    x: np.ndarray,
    *,
    tau: float = 1.0,
    power: float = 1,
    ascending: bool = True,
    engine: str = "auto",
) -> np.ndarray:
    """See :func:`tokendyn.softsort`. Engines: ``"numba"``, which takes power 1, and ``"spec"``."""
    expect_dtype("softsort", scores)
    dtype = expect_dtype("softsort", x)
    if _compiled("softsort", engine, power):
        from tokendyn.core import _order_numba

        return _order_numba.softsort(scores, x, tau=tau, ascending=ascending)
    return spec.softsort(scores, x, tau=tau, power=power, ascending=ascending).astype(dtype)


def softsort_restore(
    scores: np.ndarray,
    y: np.ndarray,
    *,
    tau: float = 1.0,
    power: float = 1,
    ascending: bool = True,
    engine: str = "auto",
) -> np.ndarray:
    """See :func:`tokendyn.softsort_restore`. Engines: ``"numba"``, which takes power 1, and ``"spec"``."""
    expect_dtype("softsort_restore", scores)
    dtype = expect_dtype("softsort_restore", y)
    if _compiled("softsort_restore", engine, power):
        from tokendyn.core import _order_numba

        return _order_numba.softsort_restore(scores, y, tau=tau, ascending=ascending)
    return spec.softsort_restore(scores, y, tau=tau, power=power, ascending=ascending).astype(dtype)


def _compiled(operation: str, engine: str, power: float) -> bool:
    """Whether the Numba engine takes a call."""
    expect_choice(f"{operation} on NumPy", "engine", engine, ("auto", "numba", "spec"))
    if engine == "numba" and power != 1:
        raise EngineError(
            f"{operation}: engine 'numba' cannot take this call: the power is {power}, it takes 1; choose "
            f"engine='auto' or another"
        )
    return power == 1 and engine != "spec"


def softsort_matrix(scores: np.ndarray, **options: Any) -> np.ndarray:
    """See :func:`tokendyn.softsort_matrix`."""
    return spec.softsort_matrix(scores, **options).astype(expect_dtype("softsort_matrix", scores))


def effective_tokens(scores: np.ndarray, *, tau: float = 1.0, power: float = 1, ascending: bool = True) -> np.ndarray:
    """See :func:`tokendyn.effective_tokens`."""
    dtype = expect_dtype("effective_tokens", scores)
    if power == 1:
        from tokendyn.core import _order_numba

        return _order_numba.effective_tokens(scores, tau=tau, ascending=ascending)
    return spec.effective_tokens(scores, tau=tau, power=power, ascending=ascending).astype(dtype)


def hard_order(scores: np.ndarray, *, ascending: bool = True) -> np.ndarray:
    """See :func:`tokendyn.hard_order`."""
    expect_dtype("hard_order", scores)
    return np.argsort(scores if ascending else -scores, axis=1, kind="stable")


def take_tokens(x: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """See :func:`tokendyn.take_tokens`."""
    return np.take_along_axis(x, indices[:, :, None], axis=1)


def put_tokens(y: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """See :func:`tokendyn.put_tokens`."""
    out = np.empty_like(y)
    np.put_along_axis(out, indices[:, :, None], y, axis=1)
    return out
