"""Regimes and trajectories as tables and as JSON."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np

from tokendyn import Regime, SphereRegime, Trajectory
from tokendyn.core._regime import CERTAINTIES

#: Rows of tokens that a table shows.
_ROWS = 16


def _table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _number(value: float) -> str:
    return "-" if not np.isfinite(value) else f"{value:.6g}"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100)


def _json(value: Any) -> Any:
    """Arrays as lists; what is not finite as null."""
    if isinstance(value, np.ndarray):
        return _json(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_json(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _json(entry) for key, entry in value.items()}
    if isinstance(value, np.generic):
        return _json(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def regime_table(regime: Regime) -> str:
    """A row a token, and the regime in words."""
    laws = regime.one_channel
    header = [
        "token",
        "x0",
        "fate",
        "known by",
        *(["exponent", "constant", "from t about", "ends before"] if laws else []),
    ]
    rows = []
    for l, x in enumerate(regime.problem["x0"]):
        start = _number(x) if laws else "(" + ", ".join(map(_number, x)) + ")"
        row = [str(l + 1), start, regime.fates[l], CERTAINTIES[regime.certainty_codes[l]]]
        if laws:
            numbers = (regime.rates[l], regime.constants[l], regime.time_scales[l], regime.blow_up_bounds[l])
            row += [_number(value) for value in numbers]
        rows.append(row)
    summary = f"regime: {regime.kind}    certainty: {regime.certainty}    margin: {regime.margin:.6g}"
    return f"{summary}\n\n{_table(header, rows)}\n\n{_wrapped(regime.explain())}"


def regime_json(regime: Regime) -> dict[str, Any]:
    """Everything that the table shows."""
    found = {
        "kind": regime.kind,
        "fates": regime.fates,
        "certainty": regime.certainty,
        "certainties": [CERTAINTIES[code] for code in regime.certainty_codes],
        "margin": regime.margin,
        "boundaries": regime.boundaries,
        "explanation": regime.explain(),
    }
    if regime.one_channel:
        names = ("rates", "constants", "time_scales", "blow_up_bounds", "decay_bounds")
        found.update({name: getattr(regime, name) for name in names})
    return _json(found)


def sphere_table(regime: SphereRegime) -> str:
    """A row a token, and the regime in words."""
    rows = [
        [str(l + 1), {1: "+", -1: "-", 0: "?"}[int(sign)], _number(rate), _number(decay)]
        for l, (sign, rate, decay) in enumerate(zip(regime.signs, regime.rates, regime.decay, strict=True))
    ]
    table = _table(["token", "sign of the limit", "own rate", "rate of approach"], rows)
    return (
        f"case {regime.case}: {regime.kind}    certainty: {regime.certainty}\n\n{table}\n\n{_wrapped(regime.explain())}"
    )


def sphere_json(regime: SphereRegime) -> dict[str, Any]:
    """Everything that the table shows, and the limit points."""
    points = [
        {"name": p.name, "point": p.point, "eigenvalues": p.eigenvalues, "stable": p.stable}
        for p in regime.limit_points
    ]
    names = ("case", "kind", "certainty", "limit", "signs", "rates", "decay")
    return _json({**{name: getattr(regime, name) for name in names}, "limit_points": points})


def trajectory_table(trajectory: Trajectory) -> str:
    """What happened, and the tokens at some times: of vectors their norms, on the sphere cosines with token 1."""
    count = len(trajectory)
    shown = np.unique(np.linspace(0, count - 1, min(count, _ROWS)).astype(int))
    values = trajectory.tokens
    names = [f"x_{l + 1}" for l in range(values.shape[1])]
    if not trajectory.one_channel:
        with np.errstate(invalid="ignore"):
            if trajectory.sphere:
                values = (values * values[:, :1]).sum(axis=-1)
                names = [f"⟨x_{l + 1}, x_1⟩" for l in range(values.shape[1])]
            else:
                values = np.linalg.norm(values, axis=-1)
                names = [f"|x_{l + 1}|" for l in range(values.shape[1])]
    columns = min(len(names), 8)
    header = ["t", *names[:columns], *(["…"] if len(names) > columns else [])]
    rows = []
    for i in shown:
        cells = [
            f"{value:.6g}" if np.isfinite(value) else ("inf" if value > 0 else "-inf") for value in values[i, :columns]
        ]
        rows.append([f"{trajectory.times[i]:.6g}", *cells, *(["…"] if len(names) > columns else [])])
    return f"{trajectory}\n\n{_table(header, rows)}"


def trajectory_json(trajectory: Trajectory) -> dict[str, Any]:
    """Times, tokens (null once a token has ended) and what happened."""
    return _json(
        {
            "times": trajectory.times,
            "tokens": trajectory.tokens,
            "ended_at": trajectory.ended_at,
            "ended_by": trajectory.ended_by,
            "reason": trajectory.reason,
            "stopped_at": trajectory.stopped_at,
            "steps": trajectory.steps,
            "events": [str(event) for event in trajectory.events],
        }
    )
