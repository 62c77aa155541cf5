"""One number a layer and sequence for each quantity that theory or a control would have explain sinks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokendyn.diagnose import Capture
from tokendyn.diagnose._adapters import find_sites
from tokendyn.diagnose._capture import watching
from tokendyn.diagnose._measure._attention import aggregate, channels_within, rows_to_one, sinks
from tokendyn.experiments.sinks._interventions import intervene

#: What might explain a sink on the first token: name -> what it is.
EXPLANATIONS = {
    "attraction": "x_1ᵀ M x_1 of the first token: theory's condition for tokens to be drawn to ±x_1",
    "clustering": "mean |cosine| of the scan's tokens with the first one: attraction that has happened",
    "drift": "mean rate at which |cosine| with the first one grows under the normalised flow",
    "step_ratio": "log of Δ at the first token over the mean Δ of the others: theory's condition for a sink",
    "memory": "log of the mean of exp(-a Σ Δ) kept of the first token halfway through: how much can be left of it",
    "norm_ratio": "control: log of the first token's norm over the others'",
}


@dataclass(frozen=True)
class Row:
    """One layer (and direction) on one sequence."""

    layer: str
    depth: int
    sequence: int
    sink: float
    contribution: float
    even: float
    values: dict[str, float]
    interventions: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def measure_sequences(
    model: nn.Module, sequences: list[Tensor], rolled: bool = False, *, first_depth: int = 0, intervened: int = 0
) -> list[Row]:
    """A row a scan and sequence.

    Args:
        model: with selective layers.
        sequences: ids (1, L) each.
        rolled: the control that a sequence begins elsewhere, at its middle.
        first_depth: number of the first scan, so that rows of several models can stand together.
        intervened: on how many of the sequences the interventions are made.
    """
    rows: list[Row] = []
    for place, ids in enumerate(sequences):
        if rolled:
            ids = ids.roll(ids.shape[1] // 2, 1)
        depth = first_depth

        def receive(capture: Capture, place: int = place) -> None:
            nonlocal depth
            row = _row(capture, depth, place)
            rows.append(replace(row, interventions=intervene(capture)) if place < intervened else row)
            depth += 1

        with watching(find_sites(model), receive):
            model(ids)
    return rows


def _row(capture: Capture, depth: int, sequence: int) -> Row:
    d, length = capture.u.shape[1:]
    weights, added = aggregate(capture, 0, channels_within(d, length, capture.B.shape[1]))
    score, even = sinks(rows_to_one(weights))
    contribution, _ = sinks(rows_to_one(added))
    x = capture.source[0].mT.double()
    velocity = capture.state_output()[0].mT.double()
    norm = x.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    unit = x / norm
    tangent = (velocity - (velocity * unit).sum(-1, keepdim=True) * unit) / norm
    cosine = unit[1:] @ unit[0]
    change = tangent[1:] @ unit[0] + unit[1:] @ tangent[0]
    step = capture.delta[0].double()
    # What is left of token 1 halfway: slowest state of every channel, averaged over channels.
    rate = (-capture.A.double()).amin(-1)
    kept = torch.exp(-rate * step[:, 1 : length // 2 + 1].sum(-1)).mean()
    values = {
        "attraction": float(capture.C[0, :, 0].double() @ capture.B[0, :, 0].double()),
        "clustering": float(cosine.abs().mean()),
        "drift": float((change * cosine.sign()).mean()),
        "step_ratio": float((step[:, 0].mean() / step[:, 1:].mean()).log()),
        "memory": float(kept.clamp_min(1e-300).log()),
        "norm_ratio": float((norm[0] / norm[1:].mean()).log()),
    }
    return Row(capture.title, depth, sequence, float(score[0]), float(contribution[0]), float(even[0]), values)


def explain(rows: list[Row], quantity: str = "sink", draws: int = 1000) -> dict[str, Any]:
    """Spearman's correlation of every explanation with the sink on the first token, within layers.

    Ranks are taken inside a layer over the sequences, so that differences between layers explain nothing by themselves;
    ``interval`` is of a bootstrap over sequences, ``p`` of permutations of sequences inside layers (two-sided).
    ``p_holm`` is p corrected (Holm) for the number of explanations tried.
    ``between_layers`` is the correlation of the layers' means, the number that a study without controls would report.
    """
    layers = sorted({row.depth for row in rows})
    count = len({row.sequence for row in rows})
    target = _matrix(rows, layers, lambda row: getattr(row, quantity))
    rng = np.random.default_rng(len(rows))
    found: dict[str, Any] = {}
    for name in EXPLANATIONS:
        value = _matrix(rows, layers, lambda row, name=name: row.values[name])
        a, b = _ranks(value), _ranks(target)
        observed = float(_correlation(a, b))
        draw = rng.integers(count, size=(draws, count))
        resampled = _correlation(a[:, draw], b[:, draw])
        shuffled = np.stack([rng.permutation(count) for _ in range(draws)])
        permuted = _correlation(a[:, shuffled], b[:, None])
        means = (_ranks(value.mean(1)[None]), _ranks(target.mean(1)[None]))
        found[name] = {
            "correlation": observed,
            "interval": [float(v) for v in np.quantile(resampled, [0.025, 0.975])],
            "p": float((1 + np.sum(np.abs(permuted) >= abs(observed))) / (1 + draws)),
            "between_layers": float(_correlation(*means)) if len(layers) > 2 else None,
        }
    worst = 0.0
    for place, name in enumerate(sorted(found, key=lambda name: found[name]["p"])):
        worst = max(worst, min(1.0, (len(found) - place) * found[name]["p"]))
        found[name]["p_holm"] = worst
    return found


def _matrix(rows: list[Row], layers: list[int], value: Any) -> np.ndarray:
    """(layers, sequences)."""
    table = {(row.depth, row.sequence): value(row) for row in rows}
    sequences = sorted({row.sequence for row in rows})
    return np.array([[table[depth, sequence] for sequence in sequences] for depth in layers])


def _ranks(values: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    return rankdata(values, axis=1)


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean over layers, the first axis, of Pearson's correlation of ranks over sequences, the last; those that are
    constant in a layer are left out, 0 where all are."""
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    size = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    known = size > 0
    each = np.where(known, (a * b).sum(-1) / np.where(known, size, 1.0), 0.0)
    return each.sum(0) / np.maximum(known.sum(0), 1)
