"""The operations of :mod:`tokendyn` on JAX arrays and tracers: pure functions, on any device.

One function per operation of the table, called with arguments that the table has checked; and the few
conversions that the rest of the package asks of every backend. Loading this module makes
:class:`tokendyn.Order` a pytree.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokendyn._order import Order
from tokendyn.backends.jax.ops._attention import hidden_attention
from tokendyn.backends.jax.ops._flow import attention_flow, autoregressive_flow, flow_rhs, sphere_flow
from tokendyn.backends.jax.ops._order import (
    effective_tokens,
    hard_order,
    importance_score,
    put_tokens,
    softsort,
    softsort_matrix,
    softsort_restore,
    take_tokens,
)
from tokendyn.backends.jax.ops._parametrize import io_projections
from tokendyn.backends.jax.ops._scan import selective_scan
from tokendyn.backends.jax.ops._spectrum import io_spectrum
from tokendyn.backends.jax.ops._step import selective_state_update
from tokendyn.errors import DTypeError

__all__ = [
    "attention_flow",
    "autoregressive_flow",
    "effective_tokens",
    "flow_rhs",
    "from_numpy",
    "hard_order",
    "hidden_attention",
    "importance_score",
    "io_projections",
    "io_spectrum",
    "permutation_matrix",
    "put_tokens",
    "selective_scan",
    "selective_state_update",
    "softsort",
    "softsort_matrix",
    "softsort_restore",
    "sphere_flow",
    "stop_gradient",
    "take_tokens",
    "to_numpy",
]

jax.tree_util.register_dataclass(
    Order, data_fields=["scores", "permutation"], meta_fields=["method", "tau", "power", "ascending"]
)


def stop_gradient(x: jax.Array) -> jax.Array:
    """``x`` as a constant to derivatives."""
    return jax.lax.stop_gradient(x)


def permutation_matrix(indices: jax.Array, like: jax.Array) -> jax.Array:
    """(b, L, L) in the dtype of ``like``: row k is 1 at ``indices[k]``."""
    batch, length = indices.shape
    return take_tokens(jnp.broadcast_to(jnp.eye(length, dtype=like.dtype), (batch, length, length)), indices)


def from_numpy(array: Any, dtype_name: str | None = None) -> jax.Array:
    """An array with ``array``'s values, in its own dtype or the one named.

    Raises:
        DTypeError: that is float64 and JAX's x64 mode, which is the user's to switch on, is off.
    """
    dtype = np.asarray(array).dtype if dtype_name is None else jnp.dtype(dtype_name)
    if dtype == np.float64 != jnp.result_type(float):
        raise DTypeError(
            "float64 needs JAX's x64 mode, which is off; switch it on with "
            "jax.config.update('jax_enable_x64', True), or ask for float32"
        )
    if dtype_name is None and not jnp.issubdtype(dtype, jnp.floating):
        return jnp.asarray(array)
    return jnp.asarray(array, dtype=dtype)


def to_numpy(x: jax.Array) -> np.ndarray:
    """``x``'s values as a NumPy array; bfloat16, which NumPy lacks, becomes float32."""
    values = np.asarray(x)
    return values.astype(np.float32) if x.dtype == jnp.bfloat16 else values
