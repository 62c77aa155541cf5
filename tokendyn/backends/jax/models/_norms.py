"""Normalisations and dropout with PyTorch's names and conventions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class LayerNorm(nnx.Module):
    """Over the last axis, in float32 at least; the result in the dtype of the input."""

    def __init__(self, channels: int, eps: float = 1e-5, *, param_dtype: Any) -> None:
        self.weight = nnx.Param(jnp.ones(channels, param_dtype))
        self.bias = nnx.Param(jnp.zeros(channels, param_dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = exact - exact.mean(-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        return (centred * scale * self.weight[...] + self.bias[...]).astype(x.dtype)


class BatchNorm(nnx.Module):
    """Of images (b, H, W, C) over all but the last axis, in float32 at least; the result in the dtype of the input.

    Attributes:
        use_running_average: normalise with the running statistics, as after ``model.eval()``, and leave them alone.
            Else (at first) with those of the batch, which move the running ones by a tenth; the variance that is kept
            is the unbiased one, as in PyTorch. Under :mod:`jax.sharding` the batch is the whole batch of all devices.
    """

    MOMENTUM = 0.1

    def __init__(self, channels: int, eps: float = 1e-5, *, param_dtype: Any) -> None:
        self.weight = nnx.Param(jnp.ones(channels, param_dtype))
        self.bias = nnx.Param(jnp.zeros(channels, param_dtype))
        self.running_mean = nnx.BatchStat(jnp.zeros(channels, param_dtype))
        self.running_var = nnx.BatchStat(jnp.ones(channels, param_dtype))
        self.num_batches_tracked = nnx.BatchStat(jnp.zeros((), jnp.int32))
        self.eps = eps
        self.use_running_average = False

    def __call__(self, x: jax.Array) -> jax.Array:
        exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.use_running_average:
            mean, variance = self.running_mean[...], self.running_var[...]
        else:
            axes = tuple(range(x.ndim - 1))
            mean = exact.mean(axes)
            variance = jnp.square(exact - mean).mean(axes)
            count = x.size // x.shape[-1]
            for kept, new in ((self.running_mean, mean), (self.running_var, variance * (count / max(count - 1, 1)))):
                old = kept[...]
                kept[...] = (old + self.MOMENTUM * (jax.lax.stop_gradient(new) - old)).astype(old.dtype)
            self.num_batches_tracked[...] = self.num_batches_tracked[...] + 1
        y = (exact - mean) * jax.lax.rsqrt(variance + self.eps)
        return (y * self.weight[...] + self.bias[...]).astype(x.dtype)


class Dropout(nnx.Module):
    """In training an entry is 0 with probability p, the others are divided by 1-p (stream ``dropout``).

    Args:
        p: the probability.
        whole_samples: draw once a sample instead of once an entry: stochastic depth.
        rngs: kept only where p is above 0.
    """

    def __init__(self, p: float, *, whole_samples: bool = False, rngs: nnx.Rngs) -> None:
        self.p = p
        self.whole_samples = whole_samples
        self.deterministic = False
        self.rngs = rngs.dropout.fork() if p > 0 else None

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.rngs is None or self.deterministic:
            return x
        shape = (len(x), *[1] * (x.ndim - 1)) if self.whole_samples else x.shape
        keep = jax.random.bernoulli(self.rngs(), 1 - self.p, shape)
        return jnp.where(keep, x / (1 - self.p), 0).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / √(mean(x²) + ε) ∘ w over the last axis, in float32 at least; the result in the dtype of the input."""

    def __init__(self, channels: int, eps: float = 1e-5, *, param_dtype: Any) -> None:
        self.weight = nnx.Param(jnp.ones(channels, param_dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        exact = exact * jax.lax.rsqrt(jnp.square(exact).mean(-1, keepdims=True) + self.eps)
        return (exact * self.weight[...]).astype(x.dtype)
