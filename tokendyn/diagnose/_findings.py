"""What the measurements say, in sentences, the gravest first.

Every rule is a function from the measurements to findings and has its thresholds beside it. Causes stand before what
they cause: a weight that is NaN before the layers that it made NaN, a step size that explodes before the overflow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tokendyn.diagnose._measure._memory import RATE_VANISHED
from tokendyn.diagnose._measure._statistics import rank_correlation
from tokendyn.diagnose._words import printable

SEVERITIES = ("critical", "warning", "note")

#: Δ beyond which exp(Δ A) forgets everything at once and Δ B x swamps the state. Trained layers stay under 10 or so.
STEP_EXPLODED, STEP_LARGE = 1e3, 1e2
#: Share of A's entries next to 0 from which it is told.
SOME_VANISHED = 0.02
#: Powers of ten left before overflow.
HEADROOM_LOW, HEADROOM_NONE = 4.0, 1.0
#: Residual streams whose tokens are as good as one.
COLLAPSED_COSINE, COLLAPSED_RANK = 0.98, 1.5
#: Growth of the median token norm in one block.
GROWTH = 10.0
#: Share of a layer's output that hidden attention may miss: float32 gives 1e-6.
UNEXPLAINED = 1e-3


@dataclass(frozen=True)
class Finding:
    """One thing found.

    Attributes:
        severity: ``"critical"``, ``"warning"`` or ``"note"``.
        layer: the layer's name, or None for the whole model.
        title: the layer and the cause, in one sentence.
        detail: the measurements behind it.
        advice: what to do.
    """

    severity: str
    layer: str | None
    title: str
    detail: str
    advice: str

    def __str__(self) -> str:
        return printable(f"{self.severity}: {self.title}. {self.detail} {self.advice}".rstrip())

    def to_json(self) -> dict[str, Any]:
        """As a dictionary."""
        return asdict(self)


def find_findings(
    layers: list[dict[str, Any]], weights: list[dict[str, Any]], origin: list[dict[str, Any]]
) -> list[Finding]:
    """All findings, gravest first; of one severity causes before consequences, early layers before late ones."""
    found = [*_weights(layers, weights), *_steps(layers), *_rates(layers)]
    explained = any(finding.severity == "critical" for finding in found)
    found += _not_finite(layers, origin, explained)
    for rule in (_headroom, _unexplained, _sinks, _regimes, _agreement):
        found += rule(layers)
    blocks = [layer for layer in layers if layer["scan"] == 0]  # several scans of a block share its tokens
    found += [*_growth(blocks), *_collapse(blocks)]
    if not any(finding.severity != "note" for finding in found):
        found.insert(0, Finding("note", None, "Nothing wrong found", f"{len(layers)} layers measured.", ""))
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def _weights(layers: list[dict[str, Any]], weights: list[dict[str, Any]]) -> Iterator[Finding]:
    for weight in weights:
        layer = _layer_of(weight["name"], layers)
        inside = weight["name"].removeprefix(f"{layer}.") if layer else weight["name"]
        kind = "NaN" if weight["value"] == "nan" else "infinite"
        entries = "entry" if weight["count"] == 1 else "entries"
        yield Finding(
            "critical",
            layer or weight["name"].rpartition(".")[0] or None,
            f"{layer or 'The model'}: the weight {inside} holds {weight['count']} {kind} {entries}",
            f"The first is at index {weight['first']}. Everything that this weight touches is not finite.",
            "Go back to the last checkpoint without it, and stop training at the first gradient that is not finite.",
        )


def _steps(layers: list[dict[str, Any]]) -> Iterator[Finding]:
    for layer in layers:
        delta, health = layer["memory"]["delta"], layer["health"]["quantities"]["delta"]
        if health["not_finite"] and not layer["health"]["quantities"]["u"]["not_finite"]:
            yield Finding(
                "critical",
                layer["name"],
                f"{layer['name']}: the step size Δ is not finite in {health['not_finite']} places",
                f"The first is at index {health['first']} of (sequence, channel, token); what came in was finite.",
                "Look at dt_proj's weights and bias, and clip Δ or lower the learning rate of dt_proj.",
            )
        elif delta["max"] is not None and delta["max"] > STEP_LARGE:
            exploded = delta["max"] > STEP_EXPLODED
            yield Finding(
                "critical" if exploded else "warning",
                layer["name"],
                f"{layer['name']}: the step size Δ {'explodes' if exploded else 'is large'}, up to {_n(delta['max'])}",
                f"Its median is {_n(delta['median'])}; where Δ is that large exp(ΔA) is 0, the layer forgets all that "
                f"came before, and Δ·B·x is what overflows.",
                "Look at dt_proj's weights and bias; give Δ an upper limit, or weight decay to dt_proj.",
            )


def _rates(layers: list[dict[str, Any]]) -> Iterator[Finding]:
    for layer in layers:
        memory = layer["memory"]
        median, vanished, wrong = memory["decay_rate"]["median"], memory["vanished"], memory["not_decaying"]
        if median is None or not vanished:
            continue
        horizon = memory["horizon"]["median"]
        kept = "Keep A_log out of weight decay and check its learning rate; A = -exp(A_log) should stay near 1 to N."
        if memory["decay_rate"]["min"] < 0:
            yield Finding(
                "critical",
                layer["name"],
                f"{layer['name']}: A is not negative in {wrong:.0%} of its entries, up to "
                f"{_n(-memory['decay_rate']['min'])}",
                "There exp(ΔA) is above 1: the state grows with every token instead of forgetting.",
                "Write A as -exp(A_log), or look for a sign lost when the weights were converted.",
            )
        elif median < RATE_VANISHED:
            yield Finding(
                "critical",
                layer["name"],
                f"{layer['name']}: A has been pushed to 0 (median decay rate {_n(median)})",
                f"Nothing is forgotten: the median horizon is {_n(horizon)} tokens for {layer['shape']['tokens']} "
                f"given, so the state is a running sum that grows with the sequence.",
                kept,
            )
        elif vanished >= SOME_VANISHED:
            yield Finding(
                "warning",
                layer["name"],
                f"{layer['name']}: A has been pushed to 0 in {vanished:.0%} of its entries",
                f"These states have decay rates below {RATE_VANISHED:g} and sum up all that they ever saw.",
                kept,
            )


def _not_finite(layers: list[dict[str, Any]], origin: list[dict[str, Any]], explained: bool) -> Iterator[Finding]:
    wrong = [layer for layer in layers if not layer["health"]["finite"]]
    if not wrong and not origin:
        return
    started = origin[0]["module"] if origin else None
    first = wrong[0] if wrong else None
    where = _layer_of(started, layers) if started else None
    name = where or started or (first["name"] if first else None)
    if first is None:
        detail = f"It begins in {started}; the scans themselves stay finite."
    else:
        quantities = first["health"]["quantities"]
        names = [q for q, entry in quantities.items() if entry["not_finite"]]
        finite = ", ".join(f"|{q}| ≤ {_n(entry['max'])}" for q, entry in quantities.items() if not entry["not_finite"])
        detail = (
            f"{len(wrong)} of {len(layers)} layers are touched, first {first['name']} in {', '.join(names)}"
            f"{f'; still finite there: {finite}' if finite else ''}."
        )
    advice = (
        "It follows from the finding above."
        if explained
        else ("If values only grew too large, bfloat16 or float32 instead of float16 is the first thing to try.")
    )
    yield Finding("critical", name, f"{name}: values that are not finite begin here", detail, advice)


def _headroom(layers: list[dict[str, Any]]) -> Iterator[Finding]:
    for layer in layers:
        left = layer["health"]["headroom"]
        if left is None or left >= HEADROOM_LOW or not layer["health"]["finite"]:
            continue
        quantities = layer["health"]["quantities"]
        name = max((q for q in quantities if quantities[q]["max"] is not None), key=lambda q: quantities[q]["max"])
        yield Finding(
            "critical" if left < HEADROOM_NONE else "warning",
            layer["name"],
            f"{layer['name']}: {name} is within a factor of 10^{left:.1f} of overflow",
            f"Its largest value is {_n(quantities[name]['max'])}.",
            "Use a dtype with a wider range (bfloat16, float32), or normalise before this layer.",
        )


def _unexplained(layers: list[dict[str, Any]]) -> Iterator[Finding]:
    for layer in layers:
        error = (layer["attention"] or {}).get("reconstruction")
        if error is not None and error > UNEXPLAINED:
            yield Finding(
                "warning",
                layer["name"],
                f"{layer['name']}: hidden attention explains the layer's output only to {_n(error)}",
                "The layer computes something beside the scan that was seen, so its measurements may mislead.",
                "Look at what it does between the scan and its output projection.",
            )
        if layer["fused"] is not None and layer["fused"] > UNEXPLAINED:
            yield Finding(
                "warning",
                layer["name"],
                f"{layer['name']}: its fused path differs from its other one by {_n(layer['fused'])}",
                "What was measured is of the other path, run beside the model on the same tokens.",
                "Expect rounding alone; more means that the kernel computes something else than the layer's own words.",
            )


def _growth(layers: list[dict[str, Any]]) -> Iterator[Finding]:
    for layer in layers:
        before, after = ((layer[key] or {}).get("norm") for key in ("tokens_in", "tokens"))
        if before and after and before["median"] and after["median"] > GROWTH * before["median"]:
            yield Finding(
                "warning",
                layer["name"],
                f"{layer['name']}: tokens grow {_n(after['median'] / before['median'])}-fold in one block",
                f"The median norm goes from {_n(before['median'])} to {_n(after['median'])}.",
                "Look at this block's output projection; a smaller scale at the start or a norm after it helps.",
            )


def _collapse(layers: list[dict[str, Any]]) -> Iterator[Finding]:
    for layer in layers:
        tokens = layer["tokens"] or {}
        if (tokens.get("cosine") or 0) > COLLAPSED_COSINE and tokens["effective_rank"] < COLLAPSED_RANK:
            yield Finding(
                "warning",
                layer["name"],
                f"{layer['name']}: the tokens have collapsed into one direction",
                f"Mean cosine of two tokens {tokens['cosine']:.3f}, effective rank {tokens['effective_rank']:.2f} of "
                f"{tokens['tokens']}; later layers get as good as one token.",
                "Try tokendyn.refine with a positive spectrum, or token reordering; paper 1 finds convergence to hurt.",
            )
            return


def _sinks(layers: list[dict[str, Any]]) -> Iterator[Finding]:
    with_sinks = [layer for layer in layers if (layer["attention"] or {}).get("sinks")]
    if not with_sinks:
        return
    tokens = Counter(token for layer in with_sinks for token in layer["attention"]["sinks"])
    strongest = max(with_sinks, key=lambda layer: layer["attention"]["top_sink"])
    token, count = tokens.most_common(1)[0]
    places = f"{len(with_sinks)} of {len(layers)} layers"
    yield Finding(
        "note",
        strongest["name"],
        f"Attention sinks in {places}, most often token {token + 1} ({count} layer{'s' if count > 1 else ''})",
        f"The strongest is token {strongest['attention']['top_token'] + 1} in {strongest['name']}: later tokens give "
        f"it {strongest['attention']['top_sink']:.0%} of their attention on average.",
        "A sink carries weight only where the token's own value is large: compare with its contribution.",
    )


def _regimes(layers: list[dict[str, Any]]) -> Iterator[Finding]:
    kinds = Counter(layer["regime"]["kind"] for layer in layers if layer["regime"])
    if not kinds:
        return
    shrinking = [layer["name"] for layer in layers if layer["regime"] and layer["regime"]["kind"] == "convergence"]
    text = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    advice = (
        f"Convergence shrinks tokens: {', '.join(shrinking[:4])}; a positive spectrum excludes it (tokendyn.refine)."
        if shrinking
        else ""
    )
    yield Finding(
        "note",
        None,
        f"Regimes on these inputs: {text}",
        "Judged from the signs and sizes of x_lᵀ M x_j and Δ along the sequences, not from eigenvalue counts.",
        advice,
    )


def _agreement(layers: list[dict[str, Any]]) -> Iterator[Finding]:
    """Where the token dynamics of the scans predict what happened to the tokens, and where they do not."""
    said = []
    known = [layer["growth"] for layer in layers if layer["growth"]]
    pairs = [(g["predicted"]["median"], g["measured"]["median"]) for g in known]
    pairs = [(p, m) for p, m in pairs if p is not None and m is not None]
    if pairs:
        right = sum((p > 0) == (m > 0) for p, m in pairs)
        said.append(
            f"the sign of the median token's growth across the block is as predicted in {right} of {len(pairs)}"
        )
        correlation = rank_correlation(*(torch.tensor(values) for values in zip(*pairs, strict=True)))
        if correlation is not None:
            said.append(f"rank correlation over layers {correlation:.2f}")
    spheres = [layer["sphere"] for layer in layers if layer["sphere"]]
    towards = [sphere["agrees"] for sphere in spheres if "agrees" in sphere]
    if towards:
        said.append(f"most tokens turn to or from ±x₁ as predicted in {sum(towards)} of {len(towards)}")
    poles = [sphere["towards_pole"] for sphere in spheres if sphere.get("towards_pole") is not None]
    if poles:
        right = sum(share > 0.5 for share in poles)
        said.append(f"most tokens move towards their nearest stable pole in {right} of {len(poles)}")
    if said:
        yield Finding(
            "note",
            None,
            "Theory beside measurement",
            f"By layers: {'; '.join(said)}. Half is what chance would give.",
            "The theory is of the scan alone; gates, projections and norms stand between it and the residual stream.",
        )


def _layer_of(name: str, layers: list[dict[str, Any]]) -> str | None:
    for layer in layers:
        if name == layer["name"] or name.startswith(f"{layer['name']}."):
            return layer["name"]
    return None


def _n(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
