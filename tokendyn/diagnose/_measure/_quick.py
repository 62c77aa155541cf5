"""A few numbers of one scan, cheap enough to be taken in training."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from tokendyn.diagnose._attention import attention_blocks
from tokendyn.diagnose._capture import Capture

#: Tokens, and channels of the attention, that are looked at.
TOKENS, CHANNELS = 64, 16
NAMES = (
    "delta_mean",
    "delta_max",
    "output_max",
    "self_product_positive",
    "growing",
    "rate",
    "first_token_sink",
    "entropy",
    "cosine",
)


@torch.no_grad()
def measure_quickly(capture: Capture) -> Tensor:
    """The numbers of ``NAMES``, on the model's device; NaN for what cannot be had.

    ``delta_max`` and ``output_max`` are over everything, since one channel is enough for an overflow. The others are of
    the first sequence's first 64 tokens: ``self_product_positive``, the share of tokens with x_lᵀ M x_l > 0, those
    that grow by themselves; of 16 channels, by their hidden attention P: ``growing``, the share of the movement
    Σ |x_dl (P x)_dl| that grows tokens, ``rate``, the mean of ⟨x_l, (P x)_l⟩ / |x_l|², ``first_token_sink`` and
    ``entropy`` as of :func:`tokendyn.diagnose`. ``cosine``: of two tokens of the residual stream after the block,
    those evenly spaced over the sequence.
    """
    length = min(TOKENS, capture.u.shape[-1])
    some = list(range(0, capture.u.shape[1], max(1, capture.u.shape[1] // CHANNELS)))[:CHANNELS]
    part = dataclasses.replace(
        capture,
        delta=capture.delta[:1, some, :length],
        A=capture.A.reshape(capture.A.shape[0], -1)[some],
        B=capture.B[:1, :, :length],
        C=capture.C[:1, :, :length],
    )
    weights = capture.delta.new_zeros(len(some), length, length, dtype=torch.float32)
    for rows, columns, block in attention_blocks(part, 0, range(len(some)), torch.float32):
        weights[:, rows, columns] = block
    x = capture.source[0, some, :length].float()
    moved = x * torch.einsum("clj,cj->cl", weights, x)
    tiny = torch.finfo(torch.float32).tiny
    alpha = weights.abs().mean(0)
    alpha = alpha / alpha.sum(-1, keepdim=True).clamp_min(tiny)
    seen = torch.arange(1, length + 1, device=alpha.device, dtype=torch.float32)
    entropy = -torch.special.xlogy(alpha, alpha).sum(-1)[1:] / seen[1:].log()
    product = (part.C[0].float() * part.B[0].float()).sum(0)
    return torch.stack(
        [
            capture.delta.float().mean(),
            capture.delta.amax().float(),
            _largest(capture.y).float(),
            (product > 0).float().mean(),
            moved.clamp_min(0).sum() / moved.abs().sum().clamp_min(tiny),
            (moved.sum(0) / x.square().sum(0).clamp_min(tiny)).mean(),
            alpha[1:, 0].mean(),
            entropy.mean(),
            _cosine(capture.tokens_out, alpha),
        ]
    )


def _largest(values: Tensor) -> Tensor:
    least, most = torch.aminmax(values)
    return torch.maximum(-least, most)


def _cosine(tokens: Tensor | None, like: Tensor) -> Tensor:
    if tokens is None or tokens.shape[1] < 2:
        return like.new_tensor(torch.nan)
    unit = F.normalize(tokens[0, :: max(1, tokens.shape[1] // TOKENS)].float(), dim=-1)
    count = len(unit)
    return (unit.sum(0).square().sum() - count) / (count * (count - 1))
