"""Affine maps with PyTorch's parameter names, layouts and starting values, so that states are shared as they are."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def uniform(rngs: nnx.Rngs, shape: tuple[int, ...], bound: float, dtype: Any) -> nnx.Param:
    """A parameter uniform in ± bound."""
    return nnx.Param(jax.random.uniform(rngs.params(), shape, dtype, -bound, bound))


def compute_dtype(dtype: Any, *arrays: jax.Array) -> Any:
    """``dtype``, or without one the dtype that holds all ``arrays``."""
    return jnp.result_type(*arrays) if dtype is None else dtype


class Linear(nnx.Module):
    """``x Wᵀ + bias`` with W (outputs, inputs).

    Args:
        inputs, outputs: channels.
        bias: add one.
        dtype: in which to compute; None: that of the input and the parameters together.
        param_dtype: of the parameters.
        rngs: the stream ``params``.
    """

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool = True, dtype: Any = None, param_dtype: Any, rngs: nnx.Rngs
    ) -> None:
        bound = 1 / math.sqrt(inputs)
        self.weight = uniform(rngs, (outputs, inputs), bound, param_dtype)
        self.bias = uniform(rngs, (outputs,), bound, param_dtype) if bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.weight[...]
        dtype = compute_dtype(self.dtype, x, weight)
        y = x.astype(dtype) @ weight.astype(dtype).T
        return y if self.bias is None else y + self.bias[...].astype(dtype)


class DepthwiseConv(nnx.Module):
    """Every channel convolved with its own taps along the tokens, W (d, 1, taps).

    A sum of shifted products, which XLA fuses into one loop on every device; sums are made in float32 at least.

    Args:
        channels, taps: d and the length of the kernel.
        bias, dtype, param_dtype, rngs: see :class:`Linear`.
    """

    def __init__(
        self, channels: int, taps: int, *, bias: bool, dtype: Any = None, param_dtype: Any, rngs: nnx.Rngs
    ) -> None:
        bound = 1 / math.sqrt(taps)
        self.weight = uniform(rngs, (channels, 1, taps), bound, param_dtype)
        self.bias = uniform(rngs, (channels,), bound, param_dtype) if bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, L, d) → (b, L - taps + 1, d): only where the whole kernel lies on tokens; pad before."""
        weight = self.weight[...]
        dtype = compute_dtype(self.dtype, x, weight)
        exact = jnp.promote_types(dtype, jnp.float32)
        x, taps = x.astype(dtype).astype(exact), weight.shape[-1]
        length = x.shape[1] - taps + 1
        y = functools.reduce(jnp.add, (x[:, k : k + length] * weight[:, 0, k].astype(exact) for k in range(taps)))
        return (y if self.bias is None else y + self.bias[...].astype(exact)).astype(dtype)
