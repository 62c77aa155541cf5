"""The short convolution of Mamba, causal, or of MambaVision, centred, with its SiLU; channels last."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F

from tokendyn.backends.torch.ops._function import transformed

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_KERNEL_TAPS = 4  # at most: a program of the Triton kernel holds as many sums for the gradient of the weights


def convolve_silu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ahead: int = 0) -> torch.Tensor:
    """``silu(Σ_k w_k ∘ x_{l-K+1+ahead+k} + bias)``: each token with those around it, channel by channel.

    Args:
        x: (b, L, d).
        weight: (d, 1, K), the last token's last, as of a depthwise ``nn.Conv1d``.
        bias: (d,) or None.
        ahead: how many of the K tokens come after the one in question, 0 to K - 1: 0 is causal, (K - 1) / 2 centred.

    Returns:
        (b, L, d) of x's dtype; on a GPU contiguous, by a kernel of our own. Under torch.compile, and for sums that
        kernel does not take, the same by torch's operators.
    """
    taps = weight.shape[2]
    if torch.compiler.is_compiling():  # which makes one kernel of it
        exact = torch.promote_types(x.dtype, torch.float32)
        padded = F.pad(x.to(exact), (0, 0, taps - 1 - ahead, ahead))
        out = 0 if bias is None else bias.to(exact)
        for k in range(taps):
            out = out + padded[:, k : k + x.shape[1]] * weight[:, 0, k].to(exact)
        return F.silu(out).to(x.dtype)  # type: ignore[arg-type]
    if x.is_cuda and _HAS_TRITON and taps <= _KERNEL_TAPS and x.dtype != torch.float64 and not transformed():
        from tokendyn.backends.torch.ops import _convolution_triton

        return _convolution_triton.convolve_silu(x, weight.squeeze(1), bias, ahead)
    padding = max(taps - 1 - ahead, ahead)
    found = F.conv1d(x.mT, weight, bias, padding=padding, groups=x.shape[2])
    return F.silu(found.narrow(2, padding - (taps - 1 - ahead), x.shape[1])).mT
