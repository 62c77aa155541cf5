"""MambaVision: a hybrid of convolutions, selective mixers and window attention for images."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tokendyn._layers import OrderConfig
from tokendyn._mambavision import expect_options, sized
from tokendyn.backends.jax.layers._affine import Linear
from tokendyn.backends.jax.models._mambavision_blocks import (
    Attention,
    ConvBlock,
    Downsample,
    MixerBlock,
    Stage,
    Stem,
)
from tokendyn.backends.jax.models._mambavision_mixer import MambaVisionMixer
from tokendyn.backends.jax.models._norms import BatchNorm
from tokendyn.errors import ShapeError


class MambaVision(nnx.Module):
    """MambaVision: a stem, two stages of convolution blocks, two of selective mixers followed by window attention.

    Arguments, and names, shapes and starting distributions of the parameters, are those of
    :class:`tokendyn.torch.MambaVision`: dims, in_dim, depths, num_heads, window_size, stem_stride, downsample,
    mlp_ratio, drop_rate, attn_drop_rate, drop_path_rate, in_chans, num_classes, qkv_bias, qk_norm, layer_scale,
    layer_scale_conv, d_state, d_conv, expand, conv_bias, io_regime, io_form, order, order_blocks, parity. The
    defaults are MambaVision-T.

    Args:
        dtype: in which to compute; None: that of the images and the parameters together.
        param_dtype: of the parameters.
        rngs: the streams ``params``, ``dropout``, ``order``.

    Shapes:
        (b, in_chans, H, W) → (b, num_classes). H and W need not divide by anything.

    Raises:
        OptionError, RegimeError, ShapeError: an unknown option, a regime that the others exclude, an input that does
            not fit.

    Source:
        Hatamizadeh and Kautz (2024), arXiv 2407.08083; reordering: paper 1, Section 5.2.
    """

    def __init__(
        self,
        *,
        dims: tuple[int, int, int, int] = (80, 160, 320, 640),
        in_dim: int = 32,
        depths: tuple[int, int, int, int] = (1, 3, 8, 4),
        num_heads: tuple[int, int] = (8, 16),
        window_size: tuple[int, int] = (14, 7),
        stem_stride: int = 4,
        downsample: tuple[bool, bool, bool] = (True, True, True),
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        in_chans: int = 3,
        num_classes: int = 1000,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        layer_scale: float | None = None,
        layer_scale_conv: float | None = None,
        d_state: int = 8,
        d_conv: int = 3,
        expand: float = 1,
        conv_bias: bool = False,
        io_regime: str = "free",
        io_form: str = "paper",
        order: OrderConfig | str | None = None,
        order_blocks: tuple[int, ...] = (0,),
        parity: str = "clean",
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        selective = expect_options(
            dims=dims,
            in_dim=in_dim,
            in_chans=in_chans,
            depths=depths,
            num_heads=num_heads,
            window_size=window_size,
            downsample=downsample,
            order_blocks=() if order is None else order_blocks,
            drop_path_rate=drop_path_rate,
            parity=parity,
        )

        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.parity = parity
        self.patch_embed = Stem(in_chans, in_dim, dims[0], stem_stride, **options)

        def mixer(stage: int, index: int) -> nnx.Module:
            if index >= selective[stage - 2]:
                return Attention(
                    dims[stage],
                    num_heads[stage - 2],
                    qkv_bias=qkv_bias,
                    qk_norm=qk_norm,
                    attn_drop=attn_drop_rate,
                    proj_drop=drop_rate,
                    **options,
                )
            return MambaVisionMixer(
                dims[stage],
                d_state,
                d_conv,
                expand,
                conv_bias=conv_bias,
                io_regime=io_regime,
                io_form=io_form,
                order=order if index in order_blocks else None,
                parity=parity,
                **options,
            )

        def block(stage: int, index: int, drop_path: float) -> nnx.Module:
            if stage < 2:
                return ConvBlock(dims[stage], drop_path, layer_scale_conv, **options)
            return MixerBlock(
                mixer(stage, index),
                dims[stage],
                mlp_ratio=mlp_ratio,
                drop=drop_rate,
                drop_path=drop_path,
                layer_scale=layer_scale,
                **options,
            )

        blocks = sum(depths)
        rates = iter(drop_path_rate * i / max(blocks - 1, 1) for i in range(blocks))
        self.levels = nnx.List()
        for stage in range(4):
            to_next = None
            if stage < 3:
                to_next = Downsample(dims[stage], dims[stage + 1], stride=2 if downsample[stage] else 1, **options)
            self.levels.append(
                Stage(
                    [block(stage, index, next(rates)) for index in range(depths[stage])],
                    to_next,
                    None if stage < 2 else window_size[stage - 2],
                )
            )
        self.norm = BatchNorm(dims[3], param_dtype=param_dtype)
        self.head = Linear(dims[3], num_classes, **options) if num_classes > 0 else None
        for path, module in nnx.iter_modules(self):
            if isinstance(module, Linear) and (path[-1] != "dt_proj" or parity == "published"):
                _restart(module, rngs)

    def features(self, x: jax.Array) -> jax.Array:
        """(b, in_chans, H, W) → (b, dims[3]): the pooled features before the head.

        Raises:
            ShapeError: x is no batch of images with ``in_chans`` channels.
        """
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ShapeError(
                f"MambaVision: the input has shape {tuple(x.shape)}, expected (b, {self.in_chans}, H, W); a model for "
                f"other images is made with in_chans="
            )
        x = self.patch_embed(x.transpose(0, 2, 3, 1))
        for level in self.levels:
            x = level(x)
        return self.norm(x).mean((1, 2))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images x (b, in_chans, H, W) → logits (b, num_classes).

        Raises:
            ShapeError: x is no batch of images with ``in_chans`` channels.
        """
        x = self.features(x)
        return x if self.head is None else self.head(x)


def _restart(linear: Linear, rngs: nnx.Rngs) -> None:
    """A linear layer at a normal of deviation 0.02 and bias 0."""
    weight = linear.weight[...]
    linear.weight = nnx.Param(0.02 * jax.random.normal(rngs.params(), weight.shape, weight.dtype))
    if linear.bias is not None:
        linear.bias = nnx.Param(jnp.zeros_like(linear.bias[...]))


def mambavision_t(**options: Any) -> MambaVision:
    """MambaVision-T for 224 x 224 images; see :func:`tokendyn.torch.mambavision_t`.

    Args:
        options: arguments of :class:`MambaVision`, ``rngs`` among them.

    Returns:
        The model, freshly initialised.

    Raises:
        OptionError, RegimeError, ShapeError: see :class:`MambaVision`.
    """
    return MambaVision(**options)


def mambavision_16px(**options: Any) -> MambaVision:
    """For 16 x 16 images; see :func:`tokendyn.torch.models.mambavision_16px`.

    Args:
        options: arguments of :class:`MambaVision`, ``rngs`` among them; ``num_classes=10`` unless given.

    Returns:
        The model, freshly initialised.

    Raises:
        OptionError, RegimeError, ShapeError: see :class:`MambaVision`.
    """
    return MambaVision(**sized("mambavision_16px", options))


def mambavision_32px(**options: Any) -> MambaVision:
    """For 32 x 32 images; see :func:`tokendyn.torch.models.mambavision_32px`.

    Args:
        options: arguments of :class:`MambaVision`, ``rngs`` among them; ``num_classes=10`` unless given.

    Returns:
        The model, freshly initialised.

    Raises:
        OptionError, RegimeError, ShapeError: see :class:`MambaVision`.
    """
    return MambaVision(**sized("mambavision_32px", options))


def mambavision_64px(**options: Any) -> MambaVision:
    """For 64 x 64 images; see :func:`tokendyn.torch.models.mambavision_64px`.

    Args:
        options: arguments of :class:`MambaVision`, ``rngs`` among them; ``num_classes=10`` unless given.

    Returns:
        The model, freshly initialised.

    Raises:
        OptionError, RegimeError, ShapeError: see :class:`MambaVision`.
    """
    return MambaVision(**sized("mambavision_64px", options))
