"""Arguments of scans for the tests of the core."""

from __future__ import annotations

from typing import Any

import numpy as np


def scan_arguments(
    rng: np.random.Generator,
    *,
    batch: int = 2,
    channels: int = 4,
    length: int = 9,
    state: int = 3,
    groups: int | None = None,
    scalar: bool = False,
    dtype: str = "float64",
) -> dict[str, Any]:
    """Every array argument of a scan with softplus, of moderate size, A negative."""
    inner = (batch, state, length) if groups is None else (batch, groups, state, length)
    arguments = {
        "u": rng.standard_normal((batch, channels, length)),
        "delta": rng.standard_normal((batch, channels, length)),
        "A": -np.exp(rng.standard_normal(channels if scalar else (channels, state))),
        "B": rng.standard_normal(inner),
        "C": rng.standard_normal(inner),
        "D": rng.standard_normal(channels),
        "z": rng.standard_normal((batch, channels, length)),
        "delta_bias": rng.standard_normal(channels),
        "initial_state": rng.standard_normal((batch, channels, state)),
    }
    return {name: array.astype(dtype) for name, array in arguments.items()}


def of_tokens(arguments: dict[str, Any], start: int, stop: int, entry: int | None = None) -> dict[str, Any]:
    """The arguments cut to tokens start..stop, and to one batch entry if it is given."""
    cut = {}
    for name, value in arguments.items():
        if name in ("u", "delta", "B", "C", "z", "seq_idx"):
            value = value[..., start:stop]
        if entry is not None and name in ("u", "delta", "B", "C", "z", "seq_idx", "initial_state"):
            value = value[entry : entry + 1]
        cut[name] = value
    return cut
