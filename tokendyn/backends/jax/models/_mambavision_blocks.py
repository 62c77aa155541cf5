"""The parts of MambaVision around its mixer: stem, convolution blocks, window attention, stages.

Images run through them as (b, H, W, C); parameters have the names and layouts of the public model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tokendyn.backends.jax.layers._affine import Linear, compute_dtype, uniform
from tokendyn.backends.jax.models._norms import BatchNorm, Dropout, LayerNorm
from tokendyn.errors import OptionError


class Conv(nnx.Module):
    """3x3 convolution of images (b, H, W, C), padded by one; W (outputs, inputs, 3, 3) as PyTorch has it."""

    def __init__(
        self, inputs: int, outputs: int, stride: int = 1, *, bias: bool, dtype: Any, param_dtype: Any, rngs: nnx.Rngs
    ) -> None:
        bound = 1 / math.sqrt(9 * inputs)
        self.weight = uniform(rngs, (outputs, inputs, 3, 3), bound, param_dtype)
        self.bias = uniform(rngs, (outputs,), bound, param_dtype) if bias else None
        self.stride = stride
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.weight[...]
        dtype = compute_dtype(self.dtype, x, weight)
        y = jax.lax.conv_general_dilated(
            x.astype(dtype),
            weight.astype(dtype),
            (self.stride, self.stride),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "OIHW", "NHWC"),
        )
        return y if self.bias is None else y + self.bias[...].astype(dtype)


class Relu(nnx.Module):
    """A place in a sequence that PyTorch numbers too."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x)


class Stem(nnx.Module):
    """Two 3x3 convolutions, together of stride 4, 2 or 1."""

    def __init__(self, in_chans: int, in_dim: int, dim: int, stride: int, *, param_dtype: Any, **options: Any) -> None:
        if stride not in (1, 2, 4):
            raise OptionError(f"MambaVision: stem_stride is {stride!r}, expected 1, 2 or 4")
        first, second = {1: (1, 1), 2: (2, 1), 4: (2, 2)}[stride]
        self.conv_down = nnx.List(
            [
                Conv(in_chans, in_dim, first, bias=False, param_dtype=param_dtype, **options),
                BatchNorm(in_dim, eps=1e-4, param_dtype=param_dtype),
                Relu(),
                Conv(in_dim, dim, second, bias=False, param_dtype=param_dtype, **options),
                BatchNorm(dim, eps=1e-4, param_dtype=param_dtype),
                Relu(),
            ]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.conv_down:
            x = layer(x)
        return x


class Downsample(nnx.Module):
    """3x3 convolution to the next stage's width; stride 1 keeps the resolution."""

    def __init__(self, dim: int, dim_out: int, stride: int, **options: Any) -> None:
        self.reduction = nnx.List([Conv(dim, dim_out, stride, bias=False, **options)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.reduction[0](x)


class ConvBlock(nnx.Module):
    """Residual block of two 3x3 convolutions."""

    def __init__(
        self, dim: int, drop_path: float, layer_scale: float | None, *, param_dtype: Any, rngs: nnx.Rngs, dtype: Any
    ) -> None:
        options: dict[str, Any] = {"bias": True, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.conv1 = Conv(dim, dim, **options)
        self.norm1 = BatchNorm(dim, param_dtype=param_dtype)
        self.conv2 = Conv(dim, dim, **options)
        self.norm2 = BatchNorm(dim, param_dtype=param_dtype)
        self.gamma = _scale(dim, layer_scale, param_dtype)
        self.drop_path = Dropout(drop_path, whole_samples=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        branch = jax.nn.gelu(self.norm1(self.conv1(x)), approximate=True)
        return x + self.drop_path(_scaled(self.norm2(self.conv2(branch)), self.gamma))


class Attention(nnx.Module):
    """Multi-head self-attention over all tokens of a window."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool,
        qk_norm: bool,
        attn_drop: float,
        proj_drop: float,
        param_dtype: Any,
        rngs: nnx.Rngs,
        dtype: Any,
    ) -> None:
        if dim % num_heads:
            raise OptionError(
                f"MambaVision: a stage of width {dim} with num_heads = {num_heads}, expected a divisor of the width"
            )
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **options)
        self.q_norm = LayerNorm(dim // num_heads, param_dtype=param_dtype) if qk_norm else None
        self.k_norm = LayerNorm(dim // num_heads, param_dtype=param_dtype) if qk_norm else None
        self.proj = Linear(dim, dim, **options)
        self.attn_drop = Dropout(attn_drop, rngs=rngs)
        self.proj_drop = Dropout(proj_drop, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, dim = x.shape
        heads = self.qkv(x).reshape(batch, length, 3, self.num_heads, -1)
        q, k, v = (heads[:, :, part] for part in range(3))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        exact = jnp.promote_types(q.dtype, jnp.float32)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=exact) / math.sqrt(q.shape[-1])
        weights = self.attn_drop(jax.nn.softmax(scores, axis=-1)).astype(v.dtype)
        return self.proj_drop(self.proj(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, dim)))


class Mlp(nnx.Module):
    """Two linear layers with GELU between."""

    def __init__(self, dim: int, hidden: int, drop: float, *, rngs: nnx.Rngs, **options: Any) -> None:
        self.fc1 = Linear(dim, hidden, rngs=rngs, **options)
        self.fc2 = Linear(hidden, dim, rngs=rngs, **options)
        self.drop = Dropout(drop, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(self.fc2(self.drop(jax.nn.gelu(self.fc1(x), approximate=False))))


class MixerBlock(nnx.Module):
    """Pre-norm residual block: a sequence mixer (selective or attention), then an MLP."""

    def __init__(
        self,
        mixer: nnx.Module,
        dim: int,
        *,
        mlp_ratio: float,
        drop: float,
        drop_path: float,
        layer_scale: float | None,
        param_dtype: Any,
        rngs: nnx.Rngs,
        dtype: Any,
    ) -> None:
        self.norm1 = LayerNorm(dim, param_dtype=param_dtype)
        self.mixer = mixer
        self.norm2 = LayerNorm(dim, param_dtype=param_dtype)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop, param_dtype=param_dtype, rngs=rngs, dtype=dtype)
        self.drop_path = Dropout(drop_path, whole_samples=True, rngs=rngs)
        self.gamma_1 = _scale(dim, layer_scale, param_dtype)
        self.gamma_2 = _scale(dim, layer_scale, param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.drop_path(_scaled(self.mixer(self.norm1(x)), self.gamma_1))  # type: ignore[operator]
        return x + self.drop_path(_scaled(self.mlp(self.norm2(x)), self.gamma_2))


class Stage(nnx.Module):
    """Blocks at one resolution, then the convolution to the next stage.

    With ``window_size`` the blocks see the tokens of one window at a time, row by row. Images that the window does not
    divide are padded with zeros on the right and at the bottom; the padding takes part as tokens, as in the public
    model.
    """

    def __init__(self, blocks: Sequence[nnx.Module], downsample: nnx.Module | None, window_size: int | None) -> None:
        self.blocks = nnx.List(blocks)
        self.downsample = downsample
        self.window_size = window_size

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.window_size is None:
            for block in self.blocks:
                x = block(x)  # type: ignore[operator]
        else:
            height, width = x.shape[1:3]
            tokens = to_windows(x, self.window_size)
            for block in self.blocks:
                tokens = block(tokens)  # type: ignore[operator]
            x = from_windows(tokens, self.window_size, height, width)
        return x if self.downsample is None else self.downsample(x)  # type: ignore[operator]


def to_windows(x: jax.Array, size: int) -> jax.Array:
    """(b, H, W, C) → (b · windows, size², C), padded where ``size`` does not divide H or W."""
    batch, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (0, -height % size), (0, -width % size), (0, 0)))
    x = x.reshape(batch, -(-height // size), size, -(-width // size), size, channels)
    return x.swapaxes(2, 3).reshape(-1, size * size, channels)


def from_windows(tokens: jax.Array, size: int, height: int, width: int) -> jax.Array:
    """Undo :func:`to_windows`; ``height`` and ``width`` of the image without padding."""
    rows, columns, channels = -(-height // size), -(-width // size), tokens.shape[-1]
    x = tokens.reshape(-1, rows, columns, size, size, channels).swapaxes(2, 3)
    return x.reshape(-1, rows * size, columns * size, channels)[:, :height, :width]


def _scale(dim: int, value: float | None, param_dtype: Any) -> nnx.Param | None:
    return None if value is None else nnx.Param(jnp.full(dim, value, param_dtype))


def _scaled(branch: jax.Array, gamma: nnx.Param | None) -> jax.Array:
    return branch if gamma is None else branch * gamma[...].astype(branch.dtype)
