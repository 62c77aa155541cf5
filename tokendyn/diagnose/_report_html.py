"""The report as one page that needs nothing else: no network, no other file. All text of the model's is escaped."""

from __future__ import annotations

import json
from html import escape
from importlib.resources import files
from typing import Any

from tokendyn.diagnose._measure import entry
from tokendyn.diagnose._words import readable

#: Channels of a layer whose rates are drawn; report.json has all.
_CHANNELS = 512

_COLUMNS = (
    ("regime", ("regime", "kind")),
    ("growth predicted", ("regime", "rate", "median")),
    ("growth measured", ("growth", "measured", "median")),
    ("Δ median", ("memory", "delta", "median")),
    ("horizon", ("memory", "horizon", "median")),
    ("‖M‖", ("spectrum", "norm")),
    ("entropy", ("attention", "entropy")),
    ("sink, 1st token", ("attention", "first_token_sink")),
    ("cosine", ("tokens", "cosine")),
    ("effective rank", ("tokens", "effective_rank")),
    ("to overflow", ("health", "headroom")),
)


def render(content: dict[str, Any]) -> str:
    """The page for ``Diagnosis.to_json()``. Findings and the table stand in it as text, plots are drawn in it."""
    page = files("tokendyn.diagnose") / "_page"
    content = readable({**content, "layers": [_thinned(layer) for layer in content["layers"]]})
    model = content["model"]
    title = escape(str(model.get("name", "model")))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title} – token dynamics</title>
<style>
{(page / "page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<a class="skip" href="#findings">Skip to the findings</a>
<header>
<h1>{title}</h1>
<ul class="meta">{"".join(f"<li>{escape(fact)}</li>" for fact in _facts(model))}</ul>
</header>
<main>
<h2 id="findings">What was found</h2>
<ul class="findings">
{"".join(_finding(finding) for finding in content["findings"])}</ul>
<h2>Layers</h2>
{_table(content["layers"])}
<h2>Over depth</h2>
<p class="soft">Point at a plot to read it. With a plot focused: <kbd>←</kbd> <kbd>→</kbd> walk through its points,
<kbd>+</kbd> <kbd>−</kbd> or the wheel zoom, dragging moves, <kbd>0</kbd> or a double click resets.</p>
<div class="grid" id="overview"></div>
<h2 id="one">One layer</h2>
<div class="picker"><label for="pick">Layer</label><select id="pick"></select></div>
<div id="detail"></div>
<noscript><p>The plots need JavaScript; the same numbers are in report.json and in the pictures.</p></noscript>
</main>
<footer>Regimes are judged from the signs and sizes of x<sub>l</sub>ᵀ M x<sub>j</sub> and Δ along the inputs. Made by
tokendyn.</footer>
<script type="application/json" id="data">{_embedded(content)}</script>
<script>
{(page / "page.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def _thinned(layer: dict[str, Any]) -> dict[str, Any]:
    """``layer`` with evenly spaced channels only, where it has very many."""
    regime = layer["regime"]
    if regime is None:
        return layer
    count = len(regime["channels"]["rate"])
    places = list(range(0, count, -(-count // _CHANNELS)))
    chosen = {key: [regime["channels"][key][place] for place in places] for key in ("rate", "kind")}
    memory = {**layer["memory"], "channels": {"delta": [layer["memory"]["channels"]["delta"][p] for p in places]}}
    channels = {**chosen, "place": places, "kinds": regime["channels"]["kinds"]}
    return {**layer, "memory": memory, "regime": {**regime, "channels": channels}}


def _embedded(content: dict[str, Any]) -> str:
    """JSON that cannot end the element it stands in, whatever names it holds."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e").replace("\u2028", "\\u2028")


def _facts(model: dict[str, Any]) -> list[str]:
    facts = []
    if model.get("parameters") is not None:
        facts.append(f"{model['parameters']:,} parameters")
    if model.get("dtype"):
        facts.append(str(model["dtype"]))
    if model.get("layers"):
        facts.append(f"{model['layers']} selective scans")
    if model.get("inputs"):
        facts.append("inputs " + " × ".join(map(str, model["inputs"])))
    if model.get("about"):
        facts.append(str(model["about"]))
    if model.get("seconds") is not None:
        facts.append(f"measured in {model['seconds']:g} s")
    return facts


def _finding(finding: dict[str, Any]) -> str:
    severity = escape(finding["severity"])
    detail = " ".join(part for part in (finding["detail"], finding["advice"]) if part)
    return (
        f'<li class="{severity}"><span class="tag">{severity}</span> <b>{escape(finding["title"])}</b>'
        f"<p>{escape(detail)}</p></li>\n"
    )


def _table(layers: list[dict[str, Any]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name, _ in _COLUMNS)
    rows = []
    for place, layer in enumerate(layers):
        name = escape(str(layer["name"]))
        cells = "".join(f"<td>{_cell(entry(layer, *keys))}</td>" for _, keys in _COLUMNS)
        rows.append(
            f'<tr><td title="{name}"><button type="button" data-layer="{place}">{name}</button></td>{cells}</tr>\n'
        )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table of layers"><table id="layers"><thead><tr>'
        f'<th scope="col">layer</th>{head}</tr></thead><tbody>\n{"".join(rows)}</tbody></table></div>'
    )


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return f'<span class="pill {escape(value.split()[0])}">{escape(value)}</span>'
    return f"{value:.3g}" if abs(value) < 1e5 else f"{value:.2e}"
