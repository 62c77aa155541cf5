"""Hidden attention over all channels: where a layer looks, how sharply, and whether some token is a sink."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tokendyn.diagnose._attention import attention_blocks
from tokendyn.diagnose._capture import Capture

#: Multiplications c L² N / 2 allowed a sequence; beyond, evenly spaced channels are looked at.
BUDGET = 1.5e9
#: A token is a sink if later tokens give it, on average, more than this share of their attention...
SINK = 0.3
#: ...which is at least this many times what an even spread would give it.
OVER_EVEN = 3.0
#: Rows and columns of the picture.
PICTURE = 96
_EXACT_CHANNELS = 8


def measure_attention(capture: Capture, channels: tuple[int, ...] = (), sequences: int = 1) -> dict[str, Any]:
    """Attention |P_dlj| averaged over channels, its rows normalised to 1: α_lj.

    ``sink`` of token j: the mean of α_lj over later tokens l > j; ``even`` what it would be if every token spread its
    attention evenly over what it sees; ``entropy``: mean over rows of entropy / ln(l), 1 where spread evenly.
    ``contribution`` is the same of |P_dlj x_dj|: what a token adds, since a token with a small x weighs little whatever
    attention it gets. ``reconstruction``: the largest error of (P u + D u) ∘ silu(z) against the layer's output, over
    its largest value, by an independent path in float64 on some channels.
    """
    d, length = capture.u.shape[1:]
    chosen = channels_within(d, length, capture.B.shape[1])
    alphas, contributions = [], []
    for sequence in range(min(sequences, capture.u.shape[0])):
        weights, added = aggregate(capture, sequence, chosen)
        alphas.append(rows_to_one(weights))
        contributions.append(rows_to_one(added))
    alpha = torch.stack(alphas).mean(0)
    contribution = torch.stack(contributions).mean(0)
    sink, even = sinks(alpha)
    # A mean over the last few rows is no sink: an eighth of the sequence must come after.
    candidates = max(1, length - max(1, length // 8))
    strong = [j for j in range(candidates) if sink[j] >= SINK and sink[j] >= OVER_EVEN * even[j]]
    seen = torch.arange(1, length + 1, dtype=alpha.dtype)
    rows = -torch.special.xlogy(alpha, alpha).sum(-1)
    entropy = (rows[1:] / seen[1:].log()).mean() if length > 1 else None
    distance = ((seen[:, None] - seen[None, :]) * alpha).sum(-1)
    top = int(sink[:candidates].argmax())
    added_sink, _ = sinks(contribution)
    return {
        "channels": len(chosen),
        "of": d,
        "sequences": len(alphas),
        "entropy": None if entropy is None else float(entropy),
        "mean_distance": float(distance.mean()),
        "sink": [round(v, 6) for v in sink.tolist()],
        "even": [round(v, 6) for v in even.tolist()],
        "first_token_sink": float(sink[0]),
        "first_token_contribution": float(added_sink[0]),
        "first_token_even": float(even[0]),
        "top_token": top,
        "top_sink": float(sink[top]),
        "sinks": strong,
        "picture": _picture(alpha),
        "reconstruction": _reconstruction(capture, chosen),
        "of_channel": {str(c): _picture(rows_to_one(capture.attention(c).abs().float())) for c in channels},
    }


def channels_within(d: int, length: int, state: int) -> list[int]:
    wanted = max(min(d, 16), min(d, int(2 * BUDGET / (length * length * state))))
    return torch.linspace(0, d - 1, wanted).round().long().unique().tolist()


def aggregate(capture: Capture, sequence: int, channels: list[int]) -> tuple[Tensor, Tensor]:
    """(L, L) means over channels of |P_dlj| and of |P_dlj x_dj|, on the CPU; blocks of channels, never (d, L, L)."""
    length = capture.u.shape[-1]
    source = capture.source[sequence].float().abs()
    weights = torch.zeros(length, length, device=source.device)  # summed where the blocks are: these are large
    added = torch.zeros_like(weights)
    for first in range(0, len(channels), 256):
        part = channels[first : first + 256]
        size = source[part]
        for rows, columns, block in attention_blocks(capture, sequence, part, torch.float32):
            block = block.abs()
            weights[rows, columns] += block.sum(0)
            added[rows, columns] += (block * size[:, None, columns]).sum(0)
    return weights.cpu() / len(channels), added.cpu() / len(channels)


def rows_to_one(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)


def sinks(alpha: Tensor) -> tuple[Tensor, Tensor]:
    """(L,) mean attention that later tokens give each token, and the same of an even spread; 0 for the last."""
    length = len(alpha)
    later = torch.ones(length, length, dtype=alpha.dtype).tril(-1)
    count = later.sum(0).clamp_min(1)
    even = (later / torch.arange(1, length + 1, dtype=alpha.dtype)[:, None]).sum(0) / count
    return (alpha * later).sum(0) / count, even


def _picture(alpha: Tensor) -> dict[str, Any]:
    """At most 96 x 96 cells of α: blocks of rows averaged, blocks of columns summed, so that rows keep their sum."""
    length = len(alpha)
    size = math.ceil(length / PICTURE)
    cells = math.ceil(length / size)
    padded = torch.zeros(cells * size, cells * size)
    padded[:length, :length] = alpha
    blocks = padded.view(cells, size, cells, size).sum(dim=3).sum(dim=1)
    counts = torch.full((cells,), float(size))
    counts[-1] = length - size * (cells - 1)
    return {"size": size, "cells": [[round(v, 5) for v in row] for row in (blocks / counts[:, None]).tolist()]}


def _reconstruction(capture: Capture, channels: list[int]) -> float | None:
    if capture.notes and any("hidden attention" in note for note in capture.notes):
        return None
    some = channels[:: max(1, len(channels) // _EXACT_CHANNELS)][:_EXACT_CHANNELS]
    wanted = capture.y[0, some].double()
    error = (capture.reconstruct(0, some) - wanted).abs().max()
    return float(error / wanted.abs().max().clamp_min(torch.finfo(wanted.dtype).tiny))
