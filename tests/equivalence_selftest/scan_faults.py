"""Faults in the selective scan and its hidden attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tokendyn._checks import dtype_name
from tokendyn._dispatch import kind_of

from ..equivalence.frameworks import Implementation
from .planting import (
    BOTH,
    MAIN,
    Arguments,
    Fault,
    by_channel,
    cast,
    constant,
    cut,
    decay,
    earlier,
    given,
    gradient,
    instead,
    made,
    ops,
    scaled_gradient,
    single,
    step,
    without,
    xp,
)

# ---------------------------------------------------------------------------------------------------------- the scan


def euler_replaced(a: Arguments) -> Arguments:
    """Zero-order hold for B: (e^{ΔA} - 1)/A in place of Δ."""
    product = step(a)[:, :, None, :] * decay(a)[None, :, :, None]
    safe = xp(product).where(product == 0, xp(product).ones_like(product), product)
    ratio = xp(product).where(product == 0, xp(product).ones_like(product), xp(product).expm1(safe) / safe)
    return {"B": by_channel(a, "B") * ratio, "C": by_channel(a, "C")}


def interleaved(a: Arguments) -> Arguments:
    """Channel d reads group d mod G."""
    return {name: by_channel(a, name, lambda d, groups: np.arange(d) % groups) for name in ("B", "C")}


def longer(a: Arguments) -> Arguments:
    """One padded token is let in."""
    return {"lengths": a["lengths"] + (a["lengths"] < a["u"].shape[2])} if "lengths" in a else {}


def state_too_early(call: Callable[..., Any], a: Arguments) -> Any:
    out = call(**a)
    if not isinstance(out, tuple):
        return out
    batch, _, length = a["u"].shape
    lengths = np.full(batch, length) if a.get("lengths") is None else np.asarray(a["lengths"])
    shorter = ops(a["u"]).from_numpy(np.maximum(lengths - 1, 0))
    return out[0], call(**{**a, "lengths": shorter})[1]


def skip_after_gate(call: Callable[..., Any], a: Arguments) -> Any:
    out = call(**{**a, "D": None})
    if a.get("D") is None:
        return out
    skip = a["D"][:, None] * a["u"]
    return (out[0] + skip, *out[1:]) if isinstance(out, tuple) else out + skip


def bias_after_softplus(a: Arguments) -> Arguments:
    if not a.get("delta_softplus") or a.get("delta_bias") is None:
        return {}
    return {"delta": step({**a, "delta_bias": None}), "delta_softplus": False}


def bias_gradient_of_one_row(right: Implementation) -> Implementation:
    """The gradient of delta_bias is that of the first batch entry."""
    if right.vjp is not None:
        vjp = right.vjp

        def wrong(dout: Any, **a: Any) -> dict[str, Any]:
            found = vjp(dout, **a)
            if "delta_bias" in found:
                found["delta_bias"] = found["delta"][0].sum(axis=-1)
            return found

        return Implementation(right.call, wrong)

    def call(**a: Any) -> Any:
        bias = a.get("delta_bias")
        if bias is None:
            return right.call(**a)
        first = np.zeros((a["u"].shape[0], 1, 1))
        first[0] = 1.0
        mask = constant(first, a["delta"])
        wanted = (bias * mask[:, 0]) + ops(bias).stop_gradient(bias) * (1.0 - mask[:, 0])
        return right.call(**{**a, "delta": a["delta"] + wanted[:, :, None], "delta_bias": None})

    return Implementation(call)


def rounded_inside(out: Any) -> Any:
    """Values rounded to the next narrower dtype, in the right dtype."""
    narrow = {"float64": "float32", "float32": "bfloat16" if kind_of(out) != "numpy" else "float16"}[dtype_name(out)]
    return cast(cast(out, narrow), dtype_name(out))


SCAN = (
    Fault("one token shifted", "selective_scan", made(earlier), MAIN),
    Fault("input one token late", "selective_scan", given(lambda a: {"u": earlier(a["u"])})),
    Fault("B and C swapped", "selective_scan", given(lambda a: {"B": a["C"], "C": a["B"]}), MAIN),
    Fault("D dropped", "selective_scan", without("D"), MAIN),
    Fault("D added after the gate", "selective_scan", instead(skip_after_gate)),
    Fault("gate ignored", "selective_scan", without("z")),
    Fault("softplus missing", "selective_scan", given(lambda a: {"delta_softplus": False}), MAIN),
    Fault(
        "bias added twice",
        "selective_scan",
        given(lambda a: {"delta_bias": a["delta_bias"] * 2} if "delta_bias" in a else {}),
        MAIN,
    ),
    Fault("bias added after softplus", "selective_scan", given(bias_after_softplus)),
    Fault("zero-order hold for B", "selective_scan", given(euler_replaced), MAIN),
    Fault("0.4 % scale error", "selective_scan", made(lambda y: y * 1.004), MAIN),
    Fault("one NaN", "selective_scan", made(lambda y: y + constant(single(y.shape, np.nan), y)), MAIN, "non-finite"),
    Fault(
        "one infinity", "selective_scan", made(lambda y: y + constant(single(y.shape, np.inf), y)), BOTH, "non-finite"
    ),
    Fault("one element off by 0.3", "selective_scan", made(lambda y: y + constant(single(y.shape, 0.3), y)), MAIN),
    Fault("groups interleaved", "selective_scan", given(interleaved), MAIN, where="groups"),
    Fault("state leaking across seq_idx", "selective_scan", without("seq_idx"), MAIN, where="packed"),
    Fault(
        "state reset one token late",
        "selective_scan",
        given(lambda a: {"seq_idx": earlier(a["seq_idx"])} if "seq_idx" in a else {}),
        BOTH,
        where="packed",
    ),
    Fault("lengths ignored", "selective_scan", without("lengths"), MAIN, where="padded"),
    Fault("padded token leaking", "selective_scan", given(longer), MAIN, where="padded"),
    Fault("last state off by one token", "selective_scan", instead(state_too_early), MAIN),
    Fault("initial state ignored", "selective_scan", without("initial_state"), BOTH),
    Fault("sign of A lost", "selective_scan", given(lambda a: {"A": -abs(a["A"])}), where="long memory"),
    Fault(
        "wrong dtype returned",
        "selective_scan",
        made(lambda y: cast(y, "float32" if dtype_name(y) == "float64" else "float64")),
        MAIN,
        "dtype",
    ),
    Fault("rounded on the way", "selective_scan", made(rounded_inside), BOTH),
    Fault(
        "last state missing",
        "selective_scan",
        instead(lambda call, a: call(**{**a, "return_last_state": False})),
        BOTH,
        "structure",
    ),
    *(
        Fault(
            f"gradient of {name} missing",
            "selective_scan",
            gradient(name, None, cut),
            MAIN if name in ("A", "initial_state") else ("torch",),
        )
        for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
    ),
    Fault(
        "gradient of C is zero",
        "selective_scan",
        gradient("C", lambda g: 0 * g, lambda v: scaled_gradient(v, 0.0)),
        BOTH,
    ),
    Fault(
        "gradient of delta 0.4 % off",
        "selective_scan",
        gradient("delta", lambda g: g * 1.004, lambda v: scaled_gradient(v, 1.004)),
        BOTH,
    ),
    Fault("gradient of delta_bias not summed over the batch", "selective_scan", bias_gradient_of_one_row, MAIN),
)


# ---------------------------------------------------------------------------------------------------- the single step


def state_unchanged(call: Callable[..., Any], a: Arguments) -> Any:
    return call(**a)[0], a["state"]


def output_of_the_state_before(call: Callable[..., Any], a: Arguments) -> Any:
    """y reads the state that the token found, as if it were the next one's."""
    y, new_state = call(**a)
    still = {**a, "x": 0 * a["x"], "dt": 0 * a["dt"], "dt_bias": None, "dt_softplus": False}
    return y - call(**{**a, "D": None})[0] + call(**{**still, "D": None})[0], new_state


STEP = (
    Fault("state left as it was", "selective_state_update", instead(state_unchanged), MAIN),
    Fault("state ignored", "selective_state_update", given(lambda a: {"state": 0 * a["state"]}), MAIN),
    Fault("output of the state before", "selective_state_update", instead(output_of_the_state_before), BOTH),
    Fault("B and C swapped", "selective_state_update", given(lambda a: {"B": a["C"], "C": a["B"]}), BOTH),
    Fault("softplus missing", "selective_state_update", given(lambda a: {"dt_softplus": False}), BOTH),
    Fault("gate ignored", "selective_state_update", without("z"), BOTH),
    Fault("D dropped", "selective_state_update", without("D"), BOTH),
    Fault("bias dropped", "selective_state_update", without("dt_bias"), BOTH),
    Fault("0.4 % scale error", "selective_state_update", made(lambda y: y * 1.004), BOTH),
    Fault(
        "states in half precision inside",
        "selective_state_update",
        instead(lambda call, a: (call(**a)[0], rounded_inside(call(**a)[1]))),
        BOTH,
    ),
    *(
        Fault(
            f"gradient of {name} missing",
            "selective_state_update",
            gradient(name, None, cut),
            BOTH if name == "state" else ("torch",),
        )
        for name in ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")
    ),
)


# --------------------------------------------------------------------------------------------------- hidden attention


def counting_its_own_step(a: Arguments) -> Arguments:
    """The decay starts at k = j in place of j + 1."""
    product = step(a)[:, :, None, :] * decay(a)[None, :, :, None]
    return {"B": by_channel(a, "B") * xp(product).exp(product), "C": by_channel(a, "C")}


def rows_from_the_start(call: Callable[..., Any], a: Arguments) -> Any:
    start, stop = a.get("rows") or (0, a["delta"].shape[2])
    return call(**{**a, "rows": (0, stop - start)})


def unsigned_mean(call: Callable[..., Any], a: Arguments) -> Any:
    return call(**{**a, "aggregate": "mean" if a.get("aggregate") == "mean_abs" else a.get("aggregate")})


ATTENTION = (
    Fault("decay counts the token's own step", "hidden_attention", given(counting_its_own_step), BOTH),
    Fault("attention crosses packed sequences", "hidden_attention", without("seq_idx"), MAIN, where="packed"),
    Fault("padded rows filled", "hidden_attention", without("lengths"), BOTH, where="padded"),
    Fault("rows counted from the start", "hidden_attention", instead(rows_from_the_start), BOTH, where="rows"),
    Fault(
        "absolute values left out of the mean",
        "hidden_attention",
        instead(unsigned_mean),
        BOTH,
        where="mean of absolute values",
    ),
    Fault(
        "another channel",
        "hidden_attention",
        given(lambda a: {"channel": (a["channel"] + 1) % a["delta"].shape[1]} if "channel" in a else {}),
        BOTH,
        where="one channel",
    ),
    Fault("groups interleaved", "hidden_attention", given(interleaved), where="groups"),
    Fault(
        "rows and columns swapped",
        "hidden_attention",
        instead(lambda call, a: call(**a) if "rows" in a else call(**a).swapaxes(-1, -2)),
        BOTH,
    ),
    Fault("gradient of A missing", "hidden_attention", gradient("A", None, cut)),
)
