"""What is measured of one scan: one file a question, each a function from a capture to plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tokendyn.diagnose._capture import Capture
from tokendyn.diagnose._measure._attention import measure_attention
from tokendyn.diagnose._measure._growth import measure_growth
from tokendyn.diagnose._measure._health import measure_health
from tokendyn.diagnose._measure._memory import measure_memory
from tokendyn.diagnose._measure._regime import measure_regime
from tokendyn.diagnose._measure._spectrum import measure_spectrum
from tokendyn.diagnose._measure._sphere import measure_sphere
from tokendyn.diagnose._measure._statistics import quantiles
from tokendyn.diagnose._measure._tokens import measure_tokens

__all__ = ["entry", "measure", "measure_tokens"]


def entry(found: Any, *keys: str) -> Any:
    """An entry of what :func:`measure` found, by its path; None where there is none."""
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


@torch.no_grad()
def measure(capture: Capture, *, channels: tuple[int, ...] = (), sequences: int = 1) -> dict[str, Any]:
    """Everything about one scan, as numbers and lists; what cannot be had is None.

    Args:
        capture: the scan.
        channels: channels whose own attention is wanted.
        sequences: how many sequences of the batch the attention is averaged over.
    """
    found: dict[str, Any] = {
        "name": capture.title,
        "scan": capture.index,
        "family": capture.family,
        "shape": {"sequences": capture.u.shape[0], "channels": capture.u.shape[1], "tokens": capture.u.shape[2]},
        "state": capture.B.shape[1],
        "notes": list(capture.notes),
        "fused": capture.fused,
        "health": measure_health(capture),
        "spectrum": measure_spectrum(capture),
    }
    found["memory"] = measure_memory(capture)
    flow = capture.state_output() if found["health"]["finite"] else None  # P x
    for name, function in (("regime", measure_regime), ("growth", measure_growth), ("sphere", measure_sphere)):
        found[name] = None if flow is None else function(capture, flow)
    found["attention"] = None if flow is None else measure_attention(capture, channels, sequences)
    found["tokens"] = None if capture.tokens_out is None else measure_tokens(capture.tokens_out)
    found["tokens_in"] = None if capture.tokens_in is None else {"norm": quantiles(capture.tokens_in.norm(dim=-1))}
    return found
