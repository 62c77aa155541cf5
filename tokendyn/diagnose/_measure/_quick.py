"""A few numbers of one scan, cheap enough to be taken in training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokendyn.diagnose._capture import Capture

#: Tokens, and channels of the attention, that are looked at.
TOKENS, CHANNELS = 64, 8
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
    that grow by themselves; of some 8 channels, by their hidden attention P: ``growing``, the share of the movement
    Σ |x_dl (P x)_dl| that grows tokens, ``rate``, the mean of ⟨x_l, (P x)_l⟩ / |x_l|², ``first_token_sink`` and
    ``entropy`` as of :func:`tokendyn.diagnose`. ``cosine``: of two tokens of the residual stream after the block,
    those evenly spaced over the sequence.
    """
    length = min(TOKENS, capture.u.shape[-1])
    some = slice(0, None, max(1, capture.u.shape[1] // CHANNELS))
    delta = capture.delta[0, some, :length].float()
    A = capture.A.reshape(capture.A.shape[0], -1)[some].float()
    B, C = capture.B[0, :, :length].float(), capture.C[0, :, :length].float()
    weights = _attention(delta, A, B, C)
    x = capture.source[0, some, :length].float()
    moved = x * torch.einsum("clj,cj->cl", weights, x)
    tiny = torch.finfo(torch.float32).tiny
    alpha = weights.abs().mean(0)
    alpha = alpha / alpha.sum(-1, keepdim=True).clamp_min(tiny)
    seen = torch.arange(1, length + 1, device=alpha.device, dtype=torch.float32)
    entropy = -torch.special.xlogy(alpha, alpha).sum(-1)[1:] / seen[1:].log()
    product = (C * B).sum(0)
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


def _attention(delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """(c, L, L) hidden attention of a few tokens: delta (c, L), A (c, N), B and C (N, L), all pairs at once.

    A few large operations: many small ones cost more to start than to do.
    """
    total = delta.cumsum(-1)
    segments = (total[:, :, None] - total[:, None, :]).clamp_min_(0.0)  # Σ_{k=j+1..l}; 0 above the diagonal
    decays = (segments[..., None] * A[:, None, None, :]).exp_()  # (c, L, L, N)
    pairs = C.mT[:, None, :] * B.mT[None, :, :]  # (L, L, N)
    return ((decays * pairs).sum(-1) * delta[:, None, :]).tril_()


def _largest(values: Tensor) -> Tensor:
    least, most = torch.aminmax(values)
    return torch.maximum(-least, most)


def _cosine(tokens: Tensor | None, like: Tensor) -> Tensor:
    if tokens is None or tokens.shape[1] < 2:
        return like.new_tensor(torch.nan)
    unit = F.normalize(tokens[0, :: max(1, tokens.shape[1] // TOKENS)].float(), dim=-1)
    count = len(unit)
    return (unit.sum(0).square().sum() - count) / (count * (count - 1))
