"""Faults in input-output maps and in the token dynamics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import tokendyn
from tokendyn._dispatch import kind_of

from .planting import (
    BOTH,
    MAIN,
    Arguments,
    Fault,
    Plant,
    constant,
    cut,
    earlier,
    given,
    gradient,
    instead,
    made,
    without,
)

# ----------------------------------------------------------------------------------------------- input-output maps


def wrong_signs(call: Callable[..., Any], a: Arguments) -> Any:
    """The mixed regime with +1 on the first ⌊N/2⌋ places, or on the last."""
    if a["regime"] != "mixed":
        return call(**a)
    form = "paper" if a["form"] == "published_code" else a["form"]
    S_B, S_C = call(**{**a, "regime": "positive", "form": form})
    state = S_B.shape[0]
    signs = np.where(np.arange(state) < state // 2, 1.0, -1.0)
    return S_B * constant(signs[:, None], S_B), S_C


def reversed_places(out: Any) -> Any:
    return out[np.arange(out.shape[0])[::-1].copy()]


INPUT_OUTPUT = (
    Fault("mixed parametrisation with wrong v", "io_projections", instead(wrong_signs), MAIN, where="mixed, paper"),
    Fault(
        "positive for negative",
        "io_projections",
        given(lambda a: {"regime": "positive" if a["regime"] == "negative" else a["regime"]}),
        BOTH,
        where="negative, paper",
    ),
    Fault(
        "offset in the published mixed form",
        "io_projections",
        given(lambda a: {"form": "scale_matched" if a["form"] == "published_code" else a["form"]}),
        BOTH,
        where="mixed, published_code",
    ),
    Fault(
        "offset left out", "io_projections", given(lambda a: {"form": "paper"}), BOTH, where="positive, published_code"
    ),
    Fault("S_B and S_C swapped", "io_projections", instead(lambda call, a: call(**a)[::-1]), BOTH),
    Fault(
        "gradient of the diagonal missing",
        "io_projections",
        gradient("diagonal", None, cut),
        ("torch",),
        where="positive, paper",
    ),
    Fault("eigenvalue sign", "io_spectrum", made(lambda values: -values), MAIN),
    Fault("eigenvalues ascending", "io_spectrum", made(reversed_places), BOTH, where="D above 2N"),
    Fault("conjugate pairs swapped", "io_spectrum", made(lambda values: values.conj()), BOTH, where="D above 2N"),
    Fault(
        "half missing in the symmetric part",
        "io_spectrum",
        instead(lambda call, a: (call(**a)[0], call(**a)[1] * 2.0)),
        BOTH,
    ),
    Fault(
        "gradient of S_B missing",
        "io_spectrum",
        gradient("S_B", None, cut),
        ("torch",),
    ),
)


# ---------------------------------------------------------------------------------------------------- token dynamics


def backwards(array: Any) -> Any:
    """Tokens in reverse; of (L,), (b, L) and (b, L, D)."""
    axis = 0 if len(array.shape) == 1 else 1
    index = np.arange(array.shape[axis])[::-1].copy()
    return array[index] if axis == 0 else array[:, index]


def anticausal(call: Callable[..., Any], a: Arguments) -> Any:
    return backwards(call(**{**a, "x": backwards(a["x"])}))


def changed(**changes: Callable[[Any], Any]) -> Plant:
    """Those of the arguments changed that are given."""
    return given(lambda a: {name: change(a[name]) for name, change in changes.items() if a.get(name) is not None})


def transposed(array: Any) -> Any:
    return array.swapaxes(0, 1) if len(array.shape) == 2 and array.shape[0] == array.shape[1] else array


def maps_swapped(a: Arguments) -> Arguments:
    return {"S_B": a["S_C"], "S_C": a["S_B"]} if a.get("S_B") is not None else {}


def not_projected(call: Callable[..., Any], a: Arguments) -> Any:
    return call(**a) if "W" in a else tokendyn.flow_rhs(**a)


FLOWS = (
    Fault("sign of M", "flow_rhs", changed(mu=lambda v: -v, M=lambda v: -v, S_B=lambda v: -v), MAIN, where="line, L=1"),
    Fault("later tokens seen, not earlier ones", "flow_rhs", instead(anticausal), BOTH),
    Fault("M transposed", "flow_rhs", changed(M=transposed), BOTH),
    Fault("S_B and S_C swapped", "flow_rhs", given(maps_swapped), BOTH, where="low rank"),
    Fault("S_Δ transposed", "flow_rhs", changed(s_delta=lambda v: transposed(v) if kind_of(v) else v), BOTH),
    Fault("bias dropped", "flow_rhs", given(lambda a: {"bias": None}), BOTH),
    Fault("bias added twice", "flow_rhs", changed(bias=lambda v: v * 2)),
    Fault("sign of a lost", "flow_rhs", changed(a=lambda v: -v)),
    Fault("0.4 % scale error", "flow_rhs", made(lambda dx: dx * 1.004), BOTH, where="line, L=1"),
    Fault("gradient of s_delta missing", "flow_rhs", gradient("s_delta", None, cut), ("torch",), where="line, L=1"),
    Fault("gradient of a missing", "flow_rhs", gradient("a", None, cut), ("torch",), where="line, L=1"),
    Fault("not projected", "sphere_flow", instead(not_projected), MAIN),
    Fault("later tokens seen, not earlier ones", "sphere_flow", instead(anticausal), BOTH),
    Fault("value matrix transposed", "sphere_flow", changed(W=transposed), BOTH, where="C: value matrix"),
    Fault("value matrix ignored", "sphere_flow", without("W"), BOTH, where="C: value matrix"),
    Fault("gradient of x missing", "sphere_flow", gradient("x", None, cut)),
    Fault("causality ignored", "attention_flow", given(lambda a: {"causal": False}), MAIN),
    Fault(
        "softmax for every kind",
        "attention_flow",
        given(lambda a: {"kind": "softmax"}),
        BOTH,
        where="linear, causal, sphere",
    ),
    Fault("Q and K swapped", "attention_flow", given(lambda a: {"Q": a["K"], "K": a["Q"]}), BOTH),
    Fault("scores divided by √N", "attention_flow", changed(Q=lambda v: v * v.shape[0] ** -0.5), BOTH),
    Fault("value matrix ignored", "attention_flow", without("V"), BOTH, where="more rows than one block"),
    Fault(
        "sphere ignored", "attention_flow", given(lambda a: {"sphere": False}), BOTH, where="softmax, causal, sphere"
    ),
    Fault("gradient of K missing", "attention_flow", gradient("K", None, cut)),
    Fault("lags counted from the other end", "autoregressive_flow", changed(phi=reversed_places), BOTH, where="p=3"),
    Fault("sphere ignored", "autoregressive_flow", given(lambda a: {"sphere": True}), BOTH, where="in space"),
    Fault("one token shifted", "autoregressive_flow", made(lambda dx: earlier(dx, axis=1)), MAIN, where="p=1"),
    Fault("gradient of phi missing", "autoregressive_flow", gradient("phi", None, cut)),
)
