"""The faults: what one could get wrong in an operation, written against the operation as it is.

A fault takes the backend's own implementation and returns a faulty one. Most change what goes in or what comes out,
in the array language that NumPy, PyTorch and JAX share, so one description serves every backend, gradients included.
``MAIN`` faults are planted on every backend; the others on PyTorch, which has gradients for all and is fast.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

import tokendyn
from tokendyn._checks import dtype_name
from tokendyn._dispatch import kind_of, load_backend

from ..equivalence.compositions import SCAN_TOKENS
from ..equivalence.frameworks import Implementation

Arguments = dict[str, Any]
Plant = Callable[[Implementation], Implementation]


@dataclass(frozen=True)
class Fault:
    """A fault in one subject.

    Attributes:
        name: what is wrong.
        subject: where.
        plant: makes the faulty implementation from the right one.
        backends: where it is planted.
        caught_by: the check that must catch it, if only one will do.
    """

    name: str
    subject: str
    plant: Plant
    backends: tuple[str, ...] = ("torch",)
    caught_by: str | None = None


MAIN = ("numpy", "torch", "jax")
DIFFERENTIATED = ("torch", "jax")


# ------------------------------------------------------------------------------------------ the shared array language


def xp(array: Any) -> ModuleType:
    """numpy, torch or jax.numpy: ``exp``, ``log1p``, ``expm1`` and ``where`` are called the same in all three."""
    return importlib.import_module({"numpy": "numpy", "torch": "torch", "jax": "jax.numpy"}[str(kind_of(array))])


def ops(array: Any) -> Any:
    return load_backend(str(kind_of(array)))


def cast(array: Any, dtype: str) -> Any:
    return array.to(getattr(xp(array), dtype)) if kind_of(array) == "torch" else array.astype(dtype)


def constant(values: Any, like: Any) -> Any:
    return ops(like).from_numpy(np.asarray(values, np.float64), dtype_name(like))


def single(shape: tuple[int, ...], value: float) -> np.ndarray:
    """Zeros with ``value`` in the middle."""
    array = np.zeros(shape)
    array[tuple(size // 2 for size in shape)] = value
    return array


def earlier(array: Any, axis: int = -1) -> Any:
    """Every token in the place of the next one; the first stays."""
    length = array.shape[axis]
    index = np.maximum(np.arange(length) - 1, 0)
    return array[..., index] if axis == -1 else array[:, index]


def step(a: Arguments) -> Any:
    """Δ (b, d, L) of a scan's arguments."""
    delta = a["delta"]
    if a.get("delta_bias") is not None:
        delta = delta + a["delta_bias"][:, None]
    # max(x, 0) + log(1 + e^-|x|)
    return xp(delta).log1p(xp(delta).exp(-abs(delta))) + delta * (delta > 0) if a.get("delta_softplus") else delta


def decay(a: Arguments) -> Any:
    """A (d, N) or (d, 1)."""
    return a["A"] if len(a["A"].shape) == 2 else a["A"][:, None]


def by_channel(a: Arguments, name: str, group: Callable[[int, int], np.ndarray] | None = None) -> Any:
    """B or C as (b, d, N, L), a group of its own for every channel."""
    maps, d = a[name], a["delta"].shape[1]
    if len(maps.shape) == 3:
        maps = maps[:, None]
    groups = maps.shape[1]
    return maps[:, np.arange(d) // (d // groups) if group is None else group(d, groups)]


def scaled_gradient(array: Any, factor: float) -> Any:
    """The same value; its gradient times ``factor``."""
    stop = ops(array).stop_gradient
    return array * factor + stop(array) * (1.0 - factor)


# --------------------------------------------------------------------------------------------------- ways of planting


def given(change: Callable[[Arguments], Arguments]) -> Plant:
    """Change what goes in. On NumPy only the values are compared then."""
    return lambda right: Implementation(lambda **a: right.call(**{**a, **change(a)}))


def made(change: Callable[[Any], Any]) -> Plant:
    """Change the first output."""

    def plant(right: Implementation) -> Implementation:
        def call(**a: Any) -> Any:
            out = right.call(**a)
            return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

        return Implementation(call)

    return plant


def instead(call: Callable[..., Any]) -> Plant:
    """Something else in its place; ``call(right, arguments)``."""
    return lambda right: Implementation(lambda **a: call(right.call, a))


def gradient(name: str, change: Callable[[np.ndarray], np.ndarray] | None, through: Callable[[Any], Any]) -> Plant:
    """A wrong gradient of argument ``name`` beside right values.

    Args:
        name: the argument.
        change: of the gradient that NumPy's VJP returns; None drops it.
        through: of the argument itself, for frameworks that differentiate.
    """

    def plant(right: Implementation) -> Implementation:
        if right.vjp is None:
            return Implementation(lambda **a: right.call(**({**a, name: through(a[name])} if name in a else a)))
        vjp = right.vjp

        def wrong(dout: Any, **a: Any) -> dict[str, Any]:
            found = vjp(dout, **a)
            if name in found:
                g = found.pop(name)
                if change is not None:
                    found[name] = change(g)
            return found

        return Implementation(right.call, wrong)

    return plant


def without(*names: str) -> Plant:
    return given(lambda a: dict.fromkeys((n for n in names if n in a), None))


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
        "one infinity", "selective_scan", made(lambda y: y + constant(single(y.shape, np.inf), y)), MAIN, "non-finite"
    ),
    Fault("one element off by 0.3", "selective_scan", made(lambda y: y + constant(single(y.shape, 0.3), y)), MAIN),
    Fault("groups interleaved", "selective_scan", given(interleaved), MAIN),
    Fault("state leaking across seq_idx", "selective_scan", without("seq_idx"), MAIN),
    Fault(
        "state reset one token late",
        "selective_scan",
        given(lambda a: {"seq_idx": earlier(a["seq_idx"])} if "seq_idx" in a else {}),
        MAIN,
    ),
    Fault("lengths ignored", "selective_scan", without("lengths"), MAIN),
    Fault("padded token leaking", "selective_scan", given(longer), MAIN),
    Fault("last state off by one token", "selective_scan", instead(state_too_early), MAIN),
    Fault("initial state ignored", "selective_scan", without("initial_state"), MAIN),
    Fault("sign of A lost", "selective_scan", given(lambda a: {"A": -abs(a["A"])})),
    Fault(
        "wrong dtype returned",
        "selective_scan",
        made(lambda y: cast(y, "float32" if dtype_name(y) == "float64" else "float64")),
        MAIN,
        "dtype",
    ),
    Fault("rounded on the way", "selective_scan", made(rounded_inside), MAIN),
    Fault(
        "last state missing",
        "selective_scan",
        instead(lambda call, a: call(**{**a, "return_last_state": False})),
        MAIN,
        "structure",
    ),
    *(
        Fault(
            f"gradient of {name} missing",
            "selective_scan",
            gradient(name, None, lambda v: ops(v).stop_gradient(v)),
            MAIN if name in ("A", "initial_state") else ("torch",),
        )
        for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
    ),
    Fault(
        "gradient of C is zero",
        "selective_scan",
        gradient("C", lambda g: 0 * g, lambda v: scaled_gradient(v, 0.0)),
        MAIN,
    ),
    Fault(
        "gradient of delta 0.4 % off",
        "selective_scan",
        gradient("delta", lambda g: g * 1.004, lambda v: scaled_gradient(v, 1.004)),
        MAIN,
    ),
    Fault("gradient of delta_bias not summed over the batch", "selective_scan", bias_gradient_of_one_row, MAIN),
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
    Fault("decay counts the token's own step", "hidden_attention", given(counting_its_own_step), MAIN),
    Fault("attention crosses packed sequences", "hidden_attention", without("seq_idx"), MAIN),
    Fault("padded rows filled", "hidden_attention", without("lengths"), MAIN),
    Fault("rows counted from the start", "hidden_attention", instead(rows_from_the_start), MAIN),
    Fault("absolute values left out of the mean", "hidden_attention", instead(unsigned_mean), MAIN),
    Fault(
        "another channel",
        "hidden_attention",
        given(lambda a: {"channel": (a["channel"] + 1) % a["delta"].shape[1]} if "channel" in a else {}),
        MAIN,
    ),
    Fault("groups interleaved", "hidden_attention", given(interleaved)),
    Fault(
        "rows and columns swapped",
        "hidden_attention",
        instead(lambda call, a: call(**a) if "rows" in a else call(**a).swapaxes(-1, -2)),
        MAIN,
    ),
    Fault("gradient of A missing", "hidden_attention", gradient("A", None, lambda v: ops(v).stop_gradient(v))),
)


# ------------------------------------------------------------------------------------------------------------- orders


def ties_reversed(call: Callable[..., Any], a: Arguments) -> Any:
    """A sort that is not stable: equal scores in the opposite order."""
    length = a["scores"].shape[1]
    back = np.arange(length)[::-1].copy()
    return length - 1 - call(**{**a, "scores": a["scores"][:, back]})


def descending_by_flipping(call: Callable[..., Any], a: Arguments) -> Any:
    """Descending as the ascending order read backwards: equal scores come out reversed."""
    if a.get("ascending", True):
        return call(**a)
    return call(**{**a, "ascending": True})[:, np.arange(a["scores"].shape[1])[::-1].copy()]


def inverse_order(call: Callable[..., Any], a: Arguments) -> Any:
    indices = call(**a)
    places = np.arange(indices.shape[1])[None, :, None].repeat(indices.shape[0], 0)
    placed = ops(indices).put_tokens(constant(places, a["scores"]), indices)[..., 0]
    return cast(placed, dtype_name(indices))


def softsort_with(slope: Callable[[Any, np.ndarray], Any]) -> Callable[..., Any]:
    """SoftSort by its dense definition with another |·|: ``slope(r, positions)`` is its derivative."""

    def call(right: Callable[..., Any], a: Arguments) -> Any:
        if a.get("power", 1) != 1:
            return right(**a)
        backend = ops(a["scores"])
        indices = tokendyn.hard_order(a["scores"], ascending=a.get("ascending", True))
        sorted_scores = backend.take_tokens(a["scores"][..., None], indices)[..., 0]
        tokens = backend.take_tokens(a["x"], indices)
        r = sorted_scores[:, None, :] - sorted_scores[:, :, None]
        places = np.arange(r.shape[1])
        distance = r * slope(backend.stop_gradient(r), np.sign(places[None, :] - places[:, None]))
        weights = xp(r).exp(-distance / a.get("tau", 1.0))
        return (weights / weights.sum(-1)[..., None]) @ tokens

    return call


def by_position(r: Any, later: np.ndarray) -> Any:
    """Where r = 0 the derivative is that of the position: scans over the sorted sequence that forget ties."""
    return xp(r).where(r == 0, constant(later, r), 2.0 * cast(r > 0, dtype_name(r)) - 1.0)


def one_at_zero(r: Any, later: np.ndarray) -> Any:
    """The derivative of |·| at 0 is 1, as some frameworks have it."""
    return 2.0 * cast(r >= 0, dtype_name(r)) - 1.0


ORDERS = (
    Fault(
        "transposed permutation",
        "take_tokens",
        instead(lambda call, a: tokendyn.put_tokens(a["x"], a["indices"])),
        MAIN,
    ),
    Fault(
        "transposed permutation",
        "put_tokens",
        instead(lambda call, a: tokendyn.take_tokens(a["y"], a["indices"])),
        MAIN,
    ),
    Fault("inverse permutation returned", "hard_order", instead(inverse_order), MAIN),
    Fault("unstable sort", "hard_order", instead(ties_reversed), MAIN, "exact"),
    Fault("descending order by flipping", "hard_order", instead(descending_by_flipping), MAIN, "exact"),
    Fault("ascending ignored", "softsort", given(lambda a: {"ascending": True}), MAIN),
    Fault("tau ignored", "softsort", given(lambda a: {"tau": 1.0}), MAIN),
    Fault("power ignored", "softsort", given(lambda a: {"power": 1}), MAIN),
    Fault(
        "hard in place of soft",
        "softsort",
        instead(lambda call, a: tokendyn.token_order(a["scores"], "hard").apply(a["x"])),
        MAIN,
    ),
    Fault(
        "restore is apply",
        "softsort_restore",
        instead(
            lambda call, a: tokendyn.softsort(a["scores"], a["y"], **{k: a[k] for k in a if k not in ("scores", "y")})
        ),
        MAIN,
    ),
    Fault(
        "restore not normalised",
        "softsort_restore",
        instead(
            lambda call, a: (
                tokendyn.softsort_matrix(a["scores"], **{k: a[k] for k in a if k not in ("scores", "y")}).swapaxes(1, 2)
                @ a["y"]
            )
        ),
        ("torch",),
    ),
    Fault("matrix transposed", "softsort_matrix", made(lambda P: P.swapaxes(1, 2)), MAIN),
    Fault("half as many effective tokens", "effective_tokens", given(lambda a: {"tau": a.get("tau", 1.0) / 2}), MAIN),
    Fault("tie gradient by position", "softsort", instead(softsort_with(by_position)), DIFFERENTIATED),
    Fault("derivative of |.| at 0 is 1", "softsort", instead(softsort_with(one_at_zero)), DIFFERENTIATED),
    Fault(
        "gradient of scores missing",
        "softsort",
        gradient("scores", None, lambda v: ops(v).stop_gradient(v)),
        DIFFERENTIATED,
    ),
    Fault(
        "gradient of scores missing",
        "softsort_restore",
        gradient("scores", None, lambda v: ops(v).stop_gradient(v)),
        DIFFERENTIATED,
    ),
    Fault(
        "projection transposed",
        "importance_score",
        given(
            lambda a: (
                {"s_delta": a["s_delta"].swapaxes(0, 1)}
                if a["s_delta"] is not None and a["s_delta"].shape[0] == a["s_delta"].shape[1]
                else {}
            )
        ),
        MAIN,
    ),
    Fault(
        "gradient of k missing",
        "importance_score",
        gradient("k", None, lambda v: ops(v).stop_gradient(v)),
        DIFFERENTIATED,
    ),
)


def mixer(*, leave_out: str | None = None, undo: bool = True, restore: str = "restore") -> Callable[..., Any]:
    """The mixer of ``compositions`` with one of its steps done wrong."""

    def call(right: Callable[..., Any], a: Arguments) -> Any:
        del right
        order = tokendyn.token_order(a["scores"], a["method"], tau=a.get("tau", 1.0))
        scan = {k: a[k] for k in ("u", "delta", "A", "B", "C", "D", "z")}
        for name in SCAN_TOKENS:
            if name != leave_out:
                scan[name] = order.apply(scan[name], axis=-1)
        y = tokendyn.selective_scan(**scan)
        return getattr(order, restore)(y, axis=-1) if undo else y

    return call


COMPOSITIONS = (
    *(
        Fault(f"order not applied to {label}", "reordered_scan", instead(mixer(leave_out=name)), MAIN)
        for name, label in (("z", "the gate"), ("delta", "the step size"), ("B", "B"), ("C", "C"), ("u", "the input"))
    ),
    Fault("order not undone", "reordered_scan", instead(mixer(undo=False)), MAIN),
    Fault("restore is apply", "reordered_scan", instead(mixer(restore="apply")), MAIN),
    Fault(
        "gradient of the scores missing",
        "reordered_scan",
        gradient("scores", None, lambda v: ops(v).stop_gradient(v)),
        DIFFERENTIATED,
    ),
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
    Fault("mixed parametrisation with wrong v", "io_projections", instead(wrong_signs), MAIN),
    Fault(
        "positive for negative",
        "io_projections",
        given(lambda a: {"regime": "positive" if a["regime"] == "negative" else a["regime"]}),
        MAIN,
    ),
    Fault(
        "offset in the published mixed form",
        "io_projections",
        given(lambda a: {"form": "scale_matched" if a["form"] == "published_code" else a["form"]}),
        MAIN,
    ),
    Fault("offset left out", "io_projections", given(lambda a: {"form": "paper"}), MAIN),
    Fault("S_B and S_C swapped", "io_projections", instead(lambda call, a: call(**a)[::-1]), MAIN),
    Fault(
        "gradient of the diagonal missing",
        "io_projections",
        gradient("diagonal", None, lambda v: ops(v).stop_gradient(v)),
        DIFFERENTIATED,
    ),
    Fault("eigenvalue sign", "io_spectrum", made(lambda values: -values), MAIN),
    Fault("eigenvalues ascending", "io_spectrum", made(reversed_places), MAIN),
    Fault("conjugate pairs swapped", "io_spectrum", made(lambda values: values.conj()), MAIN),
    Fault(
        "half missing in the symmetric part",
        "io_spectrum",
        instead(lambda call, a: (call(**a)[0], call(**a)[1] * 2.0)),
        MAIN,
    ),
    Fault(
        "gradient of S_B missing",
        "io_spectrum",
        gradient("S_B", None, lambda v: ops(v).stop_gradient(v)),
        DIFFERENTIATED,
    ),
)

FAULTS = (*SCAN, *ATTENTION, *ORDERS, *COMPOSITIONS, *INPUT_OUTPUT)
