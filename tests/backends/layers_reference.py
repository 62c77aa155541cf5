"""Parts of the layers once more, by loops over tokens, straight from the equations: what the tests compare with."""

from __future__ import annotations

import torch
from torch import Tensor


def randomize(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """``module`` in float64 with every parameter and running statistic at a generic value, so that no term is idle."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if not value.is_floating_point():
                continue
            draw = torch.rand(value.shape, generator=generator, dtype=torch.float64)
            if value.ndim > 1 and not name.endswith("A_log"):
                value.copy_((2 * draw - 1) * (3 / value[0].numel()) ** 0.5)
            else:  # biases, decay rates, scales, running variances
                value.copy_(0.2 + 0.6 * draw)
    return module


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def softplus(v: Tensor) -> Tensor:
    return torch.log1p(torch.exp(-v.abs())) + v.clamp(min=0)


def sigmoid_gate(v: Tensor) -> Tensor:
    return v / (1 + torch.exp(-v))


def recurrence(
    u: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None = None
) -> Tensor:
    """Eq. (1) with (2): tokens u, step (b, L, d), B, C (b, L, N), A (d, N) or (d, 1); the output (b, L, d)."""
    batch, length, channels = u.shape
    out = torch.zeros_like(u)
    h = torch.zeros(batch, channels, B.shape[-1], dtype=u.dtype) if state is None else state
    for t in range(length):
        held = torch.exp(step[:, t, :, None] * A) * h
        h = held + step[:, t, :, None] * B[:, t, None, :] * u[:, t, :, None]
        out[:, t] = (h * C[:, t, None, :]).sum(-1) + D * u[:, t]
    return out


def dense_softsort(scores: Tensor, tau: float, power: float = 1.0) -> Tensor:
    """P (b, L, L), entry by entry: softmax over l of -|s_l - s_[k]|^p / tau, smallest score first."""
    batch, length = scores.shape
    P = torch.zeros(batch, length, length, dtype=scores.dtype)
    for b in range(batch):
        ranked = torch.sort(scores[b], stable=True).values
        for k in range(length):
            weight = torch.exp(-((scores[b] - ranked[k]).abs() ** power) / tau)
            P[b, k] = weight / weight.sum()
    return P


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, before: int) -> Tensor:
    """Depthwise convolution of x (b, L, d) along the tokens, tap by tap; ``before``: taps on earlier tokens."""
    length, taps = x.shape[1], weight.shape[-1]
    out = torch.zeros_like(x)
    for t in range(length):
        for tap in range(taps):
            source = t - before + tap
            if 0 <= source < length:
                out[:, t] += weight[:, 0, tap] * x[:, source]
    return out if bias is None else out + bias
