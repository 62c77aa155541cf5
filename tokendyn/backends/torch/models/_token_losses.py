"""-ln p of the next token without its logits in memory: made again in the backward pass, or their gradient kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokendyn.backends.torch.ops._precision import without_autocast

_TOKENS = 4096  # whose logits are in memory at one time


def token_losses(features: Tensor, head: nn.Module, targets: Tensor, *, keep: bool) -> Tensor:
    """``-ln softmax(head(features))`` at the targets, in float32.

    Args:
        features: (n, d).
        head: features to logits (n, V).
        targets: (n,) ids.
        keep: on a GPU in half precision, where ``head`` is a matrix alone, keep the gradient of all logits, (n, V),
            for the backward pass instead of making the logits again there.
    """
    wanted = torch.is_grad_enabled() and features.requires_grad
    one: Any = functools.partial(_losses, head)
    keep = keep and wanted and features.is_cuda and not torch.compiler.is_compiling()
    if keep and type(head) is nn.Linear and head.bias is None:
        half = head.weight.dtype
        if torch.is_autocast_enabled("cuda"):
            half = torch.get_autocast_dtype("cuda")
        if half.itemsize == 2:
            features, weight = features.to(half), head.weight.to(half)
            return _pieces(lambda some, ids: KeptGradient.apply(some, weight, ids), features, targets)
    if wanted and len(targets) > _TOKENS:
        again = functools.partial(checkpoint, one, use_reentrant=False, preserve_rng_state=False)
        return _pieces(again, features, targets)
    return _pieces(one, features, targets)


def _pieces(one: Callable[..., Any], features: Tensor, targets: Tensor) -> Tensor:
    return torch.cat([one(*some) for some in zip(features.split(_TOKENS), targets.split(_TOKENS), strict=True)])


def _losses(head: nn.Module, features: Tensor, targets: Tensor) -> Tensor:
    # cross_entropy would keep a copy of half-precision logits in float32 beside their log-softmax.
    return F.nll_loss(_log_p(head(features)), targets, reduction="none")


def _log_p(logits: Tensor) -> Tensor:
    with without_autocast(logits):  # or it would make a copy in float32 first
        return F.log_softmax(logits, dim=-1, dtype=torch.float32)


class KeptGradient(torch.autograd.Function):
    """The losses; in the logits' place softmax - onehot, which a token's gradient only scales."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = features @ weight.mT
        log_p = _log_p(logits)
        chosen = log_p.gather(1, targets.unsqueeze(1))
        torch.exp(log_p, out=logits)
        logits.scatter_(1, targets.unsqueeze(1), chosen.expm1().to(logits.dtype))
        ctx.save_for_backward(features, weight, logits)
        return -chosen.squeeze(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        features, weight, gradient = ctx.saved_tensors
        scale = dloss.unsqueeze(1)  # in float32: of a mean it is the same number for all, and so would be its rounding
        dfeatures = (gradient @ weight) * scale
        dweight = gradient.mT @ (features * scale).to(features.dtype)
        return dfeatures.to(features.dtype), dweight, None
