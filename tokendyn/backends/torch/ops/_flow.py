"""Token dynamics on PyTorch tensors: each right-hand side is one selective scan, or attention by rows."""

from __future__ import annotations

from typing import Any

import torch

from tokendyn.backends.torch.ops._scan import selective_scan

#: Rows of softmax attention that are held at once.
_ROWS = 128


def flow_rhs(
    x: torch.Tensor,
    *,
    s_delta: Any,
    a: Any,
    mu: Any = None,
    M: Any = None,
    S_B: Any = None,
    S_C: Any = None,
    bias: Any = None,
) -> torch.Tensor:
    """See :func:`tokendyn.flow_rhs`."""
    if mu is None:
        return _channels(x, x, M, S_B, S_C, s_delta, a, bias)
    rows = x.reshape(-1, x.shape[-1])  # the sequences of an ensemble are the scan's channels: each has its a
    mu, s_delta, a, bias = (_column(parameter) for parameter in (mu, s_delta, a, bias))
    ones = rows.new_ones(1, 1, rows.shape[-1])
    decay = (-a * rows.new_ones(rows.shape[0], 1)).squeeze(1)
    w = selective_scan((rows**2)[None], (s_delta * rows + bias)[None], decay, ones, ones, delta_softplus=True)
    return (mu * rows * w[0]).reshape(x.shape)


def sphere_flow(
    x: torch.Tensor,
    *,
    s_delta: Any,
    a: Any,
    M: Any = None,
    S_B: Any = None,
    S_C: Any = None,
    bias: Any = None,
    W: Any = None,
) -> torch.Tensor:
    """See :func:`tokendyn.sphere_flow`."""
    value = x if W is None else x @ W.mT
    return _tangent(x, _channels(x, value, M, S_B, S_C, s_delta, a, bias))


def attention_flow(
    x: torch.Tensor,
    *,
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor | None = None,
    kind: str = "softmax",
    causal: bool = True,
    sphere: bool = False,
) -> torch.Tensor:
    """See :func:`tokendyn.attention_flow`."""
    tokens = x if x.ndim == 3 else x[None]
    q, k = tokens @ Q.mT, tokens @ K.mT
    value = tokens if V is None else tokens @ V.mT
    if kind == "softmax":
        out = _softmax_attention(q, k, value, causal)
    elif causal:  # the scan with Δ = 1 that forgets nothing
        u = value.mT
        out = selective_scan(u, torch.ones_like(u), u.new_zeros(u.shape[1]), k.mT, q.mT).mT
    else:
        out = q @ (k.mT @ value)
    out = out.reshape(x.shape)
    return _tangent(x, out) if sphere else out


def autoregressive_flow(x: torch.Tensor, *, phi: torch.Tensor, sphere: bool = True) -> torch.Tensor:
    """See :func:`tokendyn.autoregressive_flow`."""
    out = torch.zeros_like(x)
    for k in range(1, phi.shape[0] + 1):
        out = out + phi[k - 1] * torch.nn.functional.pad(x, (0, 0, k, 0))[..., : x.shape[-2], :]
    return _tangent(x, out) if sphere else out


def _column(parameter: Any) -> Any:
    """A parameter of the line as something that multiplies (b, L); None is 0."""
    if parameter is None:
        return 0.0
    return parameter.reshape(-1, 1) if isinstance(parameter, torch.Tensor) else parameter


def _channels(
    x: torch.Tensor, value: torch.Tensor, M: Any, S_B: Any, S_C: Any, s_delta: torch.Tensor, a: Any, bias: Any
) -> torch.Tensor:
    """``Σ_{j≤l} (x_lᵀ M x_j) D_{lj} value_j``: one scan of ``value`` with the B, C and Δ of x."""
    D = x.shape[-1]
    tokens = x if x.ndim == 3 else x[None]
    delta = tokens @ (s_delta if s_delta.ndim == 2 else s_delta[None]).mT
    if bias is not None:
        delta = delta + bias
    B = tokens @ (M if S_B is None else S_B).mT
    C = tokens if S_C is None else tokens @ S_C.mT
    A = -a if isinstance(a, torch.Tensor) and a.ndim > 0 else -a * x.new_ones(D)
    u = value.reshape(tokens.shape).mT
    out = selective_scan(u, delta.mT.expand(u.shape), A, B.mT, C.mT, delta_softplus=True)
    return out.mT.reshape(x.shape)


def _softmax_attention(q: torch.Tensor, k: torch.Tensor, value: torch.Tensor, causal: bool) -> torch.Tensor:
    """Attention in blocks of rows; of each block only the keys it may see."""
    length = q.shape[1]
    place = torch.arange(length, device=q.device)
    blocks = []
    for start in range(0, length, _ROWS):
        stop = min(start + _ROWS, length)
        seen = stop if causal else length
        scores = q[:, start:stop] @ k[:, :seen].mT
        if causal:
            scores = scores.masked_fill(place[:seen] > place[start:stop, None], -torch.inf)
        blocks.append(scores.softmax(-1) @ value[:, :seen])
    return torch.cat(blocks, 1)


def _tangent(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """``(I - x_l x_lᵀ) v_l`` for every token."""
    return v - x * (x * v).sum(-1, keepdim=True)
