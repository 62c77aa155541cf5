"""What the measurements say, in sentences, the gravest first.

Every rule is a function from the measurements to findings and has its thresholds beside it. Causes stand before what
they cause: a weight that is NaN before the layers that it made NaN, a step size that explodes before the overflow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

SEVERITIES = ("critical", "warning", "note")

#: Δ beyond which exp(Δ A) forgets everything at once and Δ B x swamps the state. Trained layers stay under 10 or so.
STEP_EXPLODED, STEP_LARGE = 1e3, 1e2
#: Decay rates below which a state never forgets: sums over 10⁴ tokens and more at a step size of 0.1.
RATE_VANISHED = 1e-3
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
        return f"{self.severity}: {self.title}. {self.detail} {self.advice}".rstrip()

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
    for rule in (_headroom, _unexplained, _sinks, _regimes):
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
            f"The first stands at {weight['first']}. Everything that this weight touches is not finite.",
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
                f"The first is at (sequence, channel, token) {health['first']}; the tokens that came in were finite.",
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
        rate = layer["memory"]["decay_rate"]
        if rate["median"] is None or rate["median"] >= RATE_VANISHED:
            continue
        horizon = layer["memory"]["horizon"]["median"]
        yield Finding(
            "critical",
            layer["name"],
            f"{layer['name']}: A has been pushed to 0 (median decay rate {_n(rate['median'])})",
            f"Nothing is forgotten: the median horizon is {_n(horizon)} tokens for {layer['shape']['tokens']} given, "
            f"so the state is a running sum that grows with the sequence.",
            "Keep A_log out of weight decay and check its learning rate; A = -exp(A_log) should stay near 1 to N.",
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
    yield Finding(
        "note",
        strongest["name"],
        f"Attention sinks in {len(with_sinks)} of {len(layers)} layers, most often token {token} ({count} layers)",
        f"The strongest is token {strongest['attention']['top_token']} in {strongest['name']}: later tokens give it "
        f"{strongest['attention']['top_sink']:.0%} of their attention on average.",
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


def _layer_of(name: str, layers: list[dict[str, Any]]) -> str | None:
    for layer in layers:
        if name == layer["name"] or name.startswith(f"{layer['name']}."):
            return layer["name"]
    return None


def _n(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
