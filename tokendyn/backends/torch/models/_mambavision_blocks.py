"""The parts of MambaVision around its mixer: stem, convolution blocks, window attention, stages.

Module names are those of the public model, so that its states load.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokendyn.errors import OptionError


class DropPath(nn.Module):
    """Stochastic depth: in training a sample loses the whole branch with probability p; the others get it over 1-p."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1.0 - self.p)
        return x * (keep / (1.0 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Stem(nn.Module):
    """Two 3x3 convolutions, together of stride 4, 2 or 1."""

    def __init__(self, in_chans: int, in_dim: int, dim: int, stride: int) -> None:
        super().__init__()
        if stride not in (1, 2, 4):
            raise OptionError(f"MambaVision: stem_stride is {stride!r}, expected 1, 2 or 4")
        first, second = {1: (1, 1), 2: (2, 1), 4: (2, 2)}[stride]
        self.conv_down = nn.Sequential(
            nn.Conv2d(in_chans, in_dim, 3, first, 1, bias=False),
            nn.BatchNorm2d(in_dim, eps=1e-4),
            nn.ReLU(),
            nn.Conv2d(in_dim, dim, 3, second, 1, bias=False),
            nn.BatchNorm2d(dim, eps=1e-4),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_down(x)


class Downsample(nn.Module):
    """3x3 convolution to the next stage's width; stride 1 keeps the resolution."""

    def __init__(self, dim: int, dim_out: int, stride: int) -> None:
        super().__init__()
        self.reduction = nn.Sequential(nn.Conv2d(dim, dim_out, 3, stride, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(x)


class ConvBlock(nn.Module):
    """Residual block of two 3x3 convolutions."""

    def __init__(self, dim: int, drop_path: float, layer_scale: float | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(dim)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        branch = F.gelu(self.norm1(self.conv1(x)), approximate="tanh")
        branch = self.norm2(self.conv2(branch))
        if self.gamma is not None:
            branch = branch * self.gamma.view(1, -1, 1, 1)
        return x + self.drop_path(branch)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens of a window."""

    def __init__(
        self, dim: int, num_heads: int, *, qkv_bias: bool, qk_norm: bool, attn_drop: float, proj_drop: float
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise OptionError(
                f"MambaVision: a stage of width {dim} with num_heads = {num_heads}, expected a divisor of the width"
            )
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        dropout = self.attn_drop if self.training else 0.0
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, dropout_p=dropout)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))


class Mlp(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, dim: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class MixerBlock(nn.Module):
    """Pre-norm residual block: a sequence mixer (selective or attention), then an MLP."""

    def __init__(
        self, mixer: nn.Module, dim: int, *, mlp_ratio: float, drop: float, drop_path: float, layer_scale: float | None
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        self.drop_path = DropPath(drop_path)
        self.gamma_1 = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))
        self.gamma_2 = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.mixer(self.norm1(x))
        x = x + self.drop_path(branch if self.gamma_1 is None else self.gamma_1 * branch)
        branch = self.mlp(self.norm2(x))
        return x + self.drop_path(branch if self.gamma_2 is None else self.gamma_2 * branch)


class Stage(nn.Module):
    """Blocks at one resolution, then the convolution to the next stage.

    With ``window_size`` the blocks see the tokens of one window at a time, row by row. Images that the window does not
    divide are padded with zeros on the right and at the bottom; the padding takes part as tokens, as in the public
    model.
    """

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None, window_size: int | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.window_size = window_size

    def forward(self, x: Tensor) -> Tensor:
        if self.window_size is None:
            for block in self.blocks:
                x = block(x)
        else:
            height, width = x.shape[2:]
            tokens = to_windows(x, self.window_size)
            for block in self.blocks:
                tokens = block(tokens)
            x = from_windows(tokens, self.window_size, height, width)
        return x if self.downsample is None else self.downsample(x)


def to_windows(x: Tensor, size: int) -> Tensor:
    """(b, C, H, W) → (b · windows, size², C), padded where ``size`` does not divide H or W."""
    height, width = x.shape[2:]
    x = F.pad(x, (0, -width % size, 0, -height % size))
    x = x.permute(0, 2, 3, 1).unflatten(2, (-1, size)).unflatten(1, (-1, size))  # b, rows, size, columns, size, C
    return x.transpose(2, 3).flatten(0, 2).flatten(1, 2)


def from_windows(tokens: Tensor, size: int, height: int, width: int) -> Tensor:
    """Undo :func:`to_windows`; ``height`` and ``width`` of the image without padding."""
    rows, columns = -(-height // size), -(-width // size)
    x = tokens.unflatten(1, (size, size)).unflatten(0, (-1, rows, columns))
    x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # b, H, W, C
    return x[:, :height, :width].permute(0, 3, 1, 2)
