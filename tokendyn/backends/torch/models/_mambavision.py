"""MambaVision: a hybrid of convolutions, selective mixers and window attention for images."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokendyn._layers import OrderConfig
from tokendyn._mambavision import expect_options, sized
from tokendyn.backends.torch.models._mambavision_blocks import (
    Attention,
    ConvBlock,
    Downsample,
    MixerBlock,
    Stage,
    Stem,
)
from tokendyn.backends.torch.models._mambavision_mixer import MambaVisionMixer
from tokendyn.errors import ShapeError


class MambaVision(nn.Module):
    """MambaVision: a stem, two stages of convolution blocks, two of selective mixers followed by window attention.

    In stages 3 and 4 the first half of the blocks (the larger half of an odd number) holds selective mixers, the rest
    attention. The defaults are MambaVision-T; names and shapes of its parameters are the public model's.

    Args:
        dims: width of the four stages.
        in_dim: width inside the stem.
        depths: blocks of the four stages.
        num_heads: heads of the attention in stages 3 and 4.
        window_size: side of the windows in stages 3 and 4; its square is the number of tokens that are mixed, and
            reordered, together.
        stem_stride: 4, 2 or 1.
        downsample: halve the resolution after stages 1, 2, 3; where False the width still changes.
        mlp_ratio, drop_rate, attn_drop_rate: hidden width of the MLPs over the stage's width; dropout.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        in_chans, num_classes: channels of the image; outputs, 0 for the pooled features themselves.
        qkv_bias, qk_norm, layer_scale, layer_scale_conv: as in the public model.
        d_state, d_conv, expand, conv_bias: of the mixers, see
            :class:`~tokendyn.torch.models.MambaVisionMixer`. The public model says ``conv_bias=True`` and, through an
            integer division, has none; here False means none.
        io_regime, io_form: see :class:`~tokendyn.torch.S6`.
        order: reorder tokens in the mixers of ``order_blocks``: an :class:`~tokendyn.OrderConfig`, ``"published"``, a
            method's name, or None. Orders by score add one parameter ``mixer.order.K`` each: 160 + 320 numbers in
            MambaVision-T.
        order_blocks: which blocks of stages 3 and 4 reorder; each a selective mixer.
        parity: ``"clean"``, or ``"published"`` for the public model's quirks: the bias of Δ counts twice, and the
            initialisation of all linear layers also overwrites Mamba's start of ``dt_proj`` (bias 0, so Δ starts at
            0.69 instead of 0.001 ... 0.1). Names and shapes are the same in both. Public weights want
            ``parity="published"``, or clean with ``dt_proj.bias`` doubled.

    Shapes:
        (b, in_chans, H, W) → (b, num_classes). H and W need not divide by anything. ``channels_last`` images stay so
        throughout, and their windows are made without a copy where one window covers the image.

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
    ) -> None:
        super().__init__()
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

        self.in_chans = in_chans
        self.num_classes = num_classes
        self.parity = parity
        self.patch_embed = Stem(in_chans, in_dim, dims[0], stem_stride)

        def mixer(stage: int, index: int) -> nn.Module:
            if index >= selective[stage - 2]:
                return Attention(
                    dims[stage],
                    num_heads[stage - 2],
                    qkv_bias=qkv_bias,
                    qk_norm=qk_norm,
                    attn_drop=attn_drop_rate,
                    proj_drop=drop_rate,
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
            )

        def block(stage: int, index: int, drop_path: float) -> nn.Module:
            if stage < 2:
                return ConvBlock(dims[stage], drop_path, layer_scale_conv)
            return MixerBlock(
                mixer(stage, index),
                dims[stage],
                mlp_ratio=mlp_ratio,
                drop=drop_rate,
                drop_path=drop_path,
                layer_scale=layer_scale,
            )

        blocks = sum(depths)
        rates = iter(drop_path_rate * i / max(blocks - 1, 1) for i in range(blocks))
        self.levels = nn.ModuleList()
        for stage in range(4):
            to_next = None
            if stage < 3:
                to_next = Downsample(dims[stage], dims[stage + 1], stride=2 if downsample[stage] else 1)
            self.levels.append(
                Stage(
                    [block(stage, index, next(rates)) for index in range(depths[stage])],
                    to_next,
                    None if stage < 2 else window_size[stage - 2],
                )
            )
        self.norm = nn.BatchNorm2d(dims[3])
        self.head = nn.Linear(dims[3], num_classes) if num_classes > 0 else nn.Identity()
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """Linear layers start at a truncated normal of deviation 0.02 and bias 0; in clean parity not ``dt_proj``."""
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and (name != "dt_proj" or self.parity == "published"):
                nn.init.trunc_normal_(child.weight, std=0.02)
                if child.bias is not None:
                    nn.init.zeros_(child.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """(b, in_chans, H, W) → (b, dims[3]): the pooled features before the head.

        Raises:
            ShapeError: x is no batch of images with ``in_chans`` channels.
        """
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ShapeError(
                f"MambaVision: the input has shape {tuple(x.shape)}, expected (b, {self.in_chans}, H, W); a model for "
                f"other images is made with in_chans="
            )
        x = self.patch_embed(x)
        for level in self.levels:
            x = level(x)
        return self.norm(x).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Images x (b, in_chans, H, W) → logits (b, num_classes).

        Raises:
            ShapeError: x is no batch of images with ``in_chans`` channels.
        """
        return self.head(self.forward_features(x))


def mambavision_t(**options: Any) -> MambaVision:
    """MambaVision-T for 224 x 224 images: 31,794,248 parameters, 480 more with an order by score.

    Args:
        options: arguments of :class:`MambaVision`, such as ``order="published"``, ``parity="published"``.

    Returns:
        The model, freshly initialised.

    Raises:
        OptionError, RegimeError, ShapeError: see :class:`MambaVision`.

    Source:
        Hatamizadeh and Kautz (2024), Table 1; paper 1, Tables 3 and 8.
    """
    return MambaVision(**options)


def mambavision_16px(**options: Any) -> MambaVision:
    """A MambaVision for 16 x 16 images that trains on a CPU; stages 3 and 4 see all 8 x 8 = 64 places at once.

    Args:
        options: arguments of :class:`MambaVision`; ``num_classes=10`` unless given.

    Returns:
        The model, freshly initialised.

    Raises:
        OptionError, RegimeError, ShapeError: see :class:`MambaVision`.
    """
    return MambaVision(**sized("mambavision_16px", options))


def mambavision_32px(**options: Any) -> MambaVision:
    """A MambaVision for 32 x 32 images (CIFAR); stages 3 and 4 see all 8 x 8 = 64 places at once.

    Args:
        options: arguments of :class:`MambaVision`; ``num_classes=10`` unless given.

    Returns:
        The model, freshly initialised.

    Raises:
        OptionError, RegimeError, ShapeError: see :class:`MambaVision`.
    """
    return MambaVision(**sized("mambavision_32px", options))


def mambavision_64px(**options: Any) -> MambaVision:
    """A MambaVision for 64 x 64 images (Imagenette); stages 3 and 4 see all 8 x 8 = 64 places at once.

    Args:
        options: arguments of :class:`MambaVision`; ``num_classes=10`` unless given.

    Returns:
        The model, freshly initialised.

    Raises:
        OptionError, RegimeError, ShapeError: see :class:`MambaVision`.
    """
    return MambaVision(**sized("mambavision_64px", options))
