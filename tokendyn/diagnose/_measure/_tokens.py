"""Tokens of the residual stream: norms, similarity, effective rank, clusters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokendyn.diagnose._measure._statistics import number, quantiles

#: Tokens with a cosine above this are in one cluster.
CLOSE = 0.95
#: Tokens looked at: beyond, every k-th.
_MOST = 512


@torch.no_grad()
def measure_tokens(tokens: Tensor) -> dict[str, Any]:
    """Of tokens (b, L, D): norms, mean pairwise cosine, effective rank, clusters, cosine with the first token.

    Effective rank: exp of the entropy of the normalised singular values. Clusters: components of the graph that joins
    tokens whose cosine exceeds 0.95. Means over the batch; of long sequences every k-th token is looked at.
    """
    if not torch.isfinite(tokens).all():
        return {"finite": False}
    every = max(1, -(-tokens.shape[1] // _MOST))
    x = tokens[:8, ::every].double()  # squares of large float32 numbers overflow in float32
    count = x.shape[1]
    unit = F.normalize(x, dim=-1)
    cosine = unit @ unit.mT
    mean = (cosine.sum(dim=(1, 2)) - count) / max(1, count * (count - 1))
    ranks, clusters = [], []
    for tokens_of, similar in zip(x, cosine, strict=True):
        sequence = tokens_of / tokens_of.abs().max().clamp_min(1e-300)  # the rank has no scale
        gram = sequence @ sequence.mT if count <= x.shape[-1] else sequence.mT @ sequence
        singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
        share = singular / singular.sum().clamp_min(1e-300)
        ranks.append(float(torch.exp(-torch.special.xlogy(share, share).sum())))
        clusters.append(_components(similar > CLOSE))
    first = cosine[:, 0, 1:]
    return {
        "finite": True,
        "norm": quantiles(x.norm(dim=-1)),
        "cosine": number(mean.mean()) if count > 1 else None,
        "cosine_with_first": number(first.mean()) if count > 1 else None,
        "effective_rank": sum(ranks) / len(ranks),
        "clusters": sum(clusters) / len(clusters),
        "tokens": count,
    }


def _components(near: Tensor) -> int:
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    return int(connected_components(csr_array(near.cpu().numpy()), directed=False)[0])
