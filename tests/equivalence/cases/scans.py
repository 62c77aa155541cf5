"""Selective scans, their single step, their hidden attention, and a scan between an order and its inverse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..check import Case
from .common import ALL, NEVER, NO_FLOAT16, ONCE, WIDE, Rng
from .orders import Scores, ordinary, tied

Steps = Callable[[Rng, tuple[int, ...]], np.ndarray]
Decay = Callable[[Rng, int, int], np.ndarray]


def scan_arguments(
    rng: Rng,
    *,
    b: int = 2,
    d: int = 4,
    L: int = 63,
    N: int = 3,
    groups: int | None = None,
    A: str | Decay = "general",
    step: Steps | None = None,
    softplus: bool = True,
    given: str = "D z delta_bias initial_state",
    last: bool = True,
    **more: Any,
) -> dict[str, Any]:
    """Arguments of ``selective_scan``, with everything that it takes unless asked otherwise.

    Args:
        rng: the source.
        b, d, L, N, groups: sizes; no groups: B and C are (b, N, L).
        A: ``"general"`` (d, N), ``"scalar"`` (d,), ``"column"`` (d, 1), or a function of (rng, d, N).
        step: makes ``delta`` from (rng, shape).
        softplus: whether softplus is applied to the step size; without it ``delta`` is made positive.
        given: the optional arrays that are given.
        last: return the last state.
        more: further arguments as they are.
    """
    if callable(A):
        decay = A(rng, d, N)
    else:
        decay = -rng.uniform(0.2, 3.0, {"general": (d, N), "scalar": (d,), "column": (d, 1)}[A])
    if step is None:
        step = (lambda r, shape: r.normal(-1.0, 1.0, shape)) if softplus else uniform_steps
    maps = (b, N, L) if groups is None else (b, groups, N, L)
    optional = {
        "D": lambda: rng.standard_normal(d),
        "z": lambda: rng.standard_normal((b, d, L)),
        "delta_bias": lambda: rng.normal(0.0, 0.5, d) if softplus else rng.uniform(0.1, 0.5, d),
        "initial_state": lambda: rng.standard_normal((b, d, N)),
    }
    return {
        "u": rng.standard_normal((b, d, L)),
        "delta": step(rng, (b, d, L)),
        "A": decay,
        "B": rng.standard_normal(maps),
        "C": rng.standard_normal(maps),
        **{name: make() for name, make in optional.items() if name in given.split()},
        **({"delta_softplus": True} if softplus else {}),
        **({"return_last_state": True} if last else {}),
        **more,
    }


def attention_arguments(rng: Rng, *, d: int = 2, b: int = 1, L: int = 17, **options: Any) -> dict[str, Any]:
    """Arguments of ``hidden_attention``: a scan's, without those that it does not know."""
    arguments = scan_arguments(rng, **{"given": "delta_bias", "d": d, "b": b, "L": L, "last": False, **options})
    return {name: value for name, value in arguments.items() if name not in ("u", "D", "z")}


def poisoned_padding(arguments: dict[str, Any]) -> dict[str, Any]:
    """NaN wherever there is padding: it stands for whatever memory held."""
    padding = np.arange(arguments["delta"].shape[-1]) >= arguments["lengths"][:, None]
    for name in ("u", "delta", "z", "B", "C"):
        if name in arguments:
            arguments[name][np.broadcast_to(padding[:, None], arguments[name].shape)] = np.nan
    return arguments


def uniform_steps(rng: Rng, shape: tuple[int, ...]) -> np.ndarray:
    return rng.uniform(0.05, 1.0, shape)


def huge_steps(rng: Rng, shape: tuple[int, ...]) -> np.ndarray:
    """About 1000, of which softplus is the identity."""
    return 1e3 * rng.uniform(0.5, 1.5, shape)


def tiny_steps(rng: Rng, shape: tuple[int, ...]) -> np.ndarray:
    """About 1e-6 after softplus, where ``log(1 + exp(x))`` in float32 has no digits left."""
    return rng.uniform(-14.5, -13.0, shape)


def extreme_steps(rng: Rng, shape: tuple[int, ...]) -> np.ndarray:
    """From one end of softplus to the other: it is e^x here and x there."""
    return rng.choice([-14.0, -3.0, 0.0, 3.0, 25.0, 1e3], shape) * rng.uniform(0.9, 1.1, shape)


def growing(rng: Rng, d: int, N: int) -> np.ndarray:
    return rng.uniform(0.05, 0.3, (d, N))


def mixed_signs(rng: Rng, d: int, N: int) -> np.ndarray:
    return rng.uniform(-1.0, 0.2, (d, N))


def remembering(rng: Rng, d: int, N: int) -> np.ndarray:
    """Decay rates so small that the first token is still there at the end; one of them is exactly 0."""
    A = -1e-6 * rng.uniform(0.1, 1.0, (d, N))
    A[0, 0] = 0.0
    return A


def packed(*lengths: int, values: tuple[int, ...] | None = None) -> np.ndarray:
    """seq_idx of one batch row from the lengths of its sequences."""
    return np.repeat(np.array(values or range(len(lengths))), lengths)


#: Sequences of one token, long ones, and a value that comes back: only a change of value resets the state.
PACKED = np.stack([packed(20, 1, 32, 10), packed(1, 1, 1, 60, values=(3, 0, 3, 2))])
SHORT_PACKED = np.stack([packed(5, 1, 7, 4), packed(1, 1, 1, 14, values=(3, 0, 3, 2))])


def selective_scan() -> Iterator[Case]:
    def case(
        name: str, dtypes: tuple[str, ...] = WIDE, *, compiled: tuple[str, ...] | None = None, **options: Any
    ) -> Case:
        return Case("selective_scan", name, lambda rng: scan_arguments(rng, **options), dtypes, compiled=compiled)

    # Lengths and numbers.
    yield case("L=1", L=1, compiled=ONCE)
    yield case("L=2", L=2, compiled=ONCE)
    yield case("L=63", ALL)
    yield case("L=197", L=197, compiled=ONCE)
    yield case("long memory", A=remembering)
    yield case("longer memory", A=remembering, L=197, compiled=ONCE)
    yield case("growth", A=growing)
    yield case("mixed signs of A", A=mixed_signs)
    yield case("huge steps", NO_FLOAT16, step=huge_steps)
    yield case("tiny steps", step=tiny_steps)
    yield case("extreme steps", step=extreme_steps)
    # Packed and padded sequences.
    yield case("packed", NO_FLOAT16, seq_idx=PACKED)
    yield case("packed singly", seq_idx=np.arange(126).reshape(2, 63))
    yield case("packed long memory", seq_idx=PACKED, A=remembering)
    yield case("padded", NO_FLOAT16, lengths=np.array([0, 40]), compiled=ONCE)
    yield case("padded, one of them full", lengths=np.array([63, 1]), compiled=ONCE)
    yield case("all padding", lengths=np.array([0, 0]), compiled=ONCE)
    yield Case(
        "selective_scan",
        "padded with NaN",
        lambda rng: poisoned_padding(scan_arguments(rng, lengths=np.array([0, 40]))),
        NO_FLOAT16,
        compiled=ONCE,
    )
    yield case("packed and padded", seq_idx=PACKED.astype(np.int32), lengths=np.array([6, 62], np.int32), compiled=ONCE)
    # Forms of A, B and C.
    yield case("scalar A", ALL, A="scalar", compiled=WIDE)
    yield case("scalar growth", A=lambda rng, d, N: rng.uniform(0.05, 0.3, d))
    yield case("scalar A as a column", A="column", compiled=ONCE)
    yield case("groups", NO_FLOAT16, groups=2, compiled=ONCE)
    yield case("one group of four axes", groups=1, compiled=NEVER)
    yield case("a group a channel", groups=4, compiled=NEVER)
    yield case(
        "scalar A, groups of three, packed and padded",
        A="scalar",
        d=6,
        groups=2,
        seq_idx=PACKED,
        lengths=np.array([40, 63]),
        compiled=ONCE,
    )
    # Options on and off; every array is left out at least twice.
    yield case("bare", softplus=False, given="", last=False, compiled=ONCE)
    yield case("softplus, D, last state", given="D", compiled=NEVER)
    yield case("bias and gate", softplus=False, given="delta_bias z", last=False, compiled=ONCE)
    yield case("initial state and D", softplus=False, given="initial_state D", last=False, compiled=NEVER)
    yield case("scalar A bare", A="scalar", softplus=False, given="", last=False, compiled=NEVER)
    # Sizes.
    yield case("one of everything", b=1, d=1, N=1, L=7, compiled=ONCE)
    yield case("tiles left over", b=1, d=19, N=17, L=5, compiled=ONCE)
    # Arrays that are views.
    yield Case("selective_scan", "strided", lambda rng: scan_arguments(rng, seq_idx=PACKED), strided=True)
    yield Case(
        "selective_scan",
        "strided with groups and lengths",
        lambda rng: scan_arguments(rng, groups=2, lengths=np.array([3, 63])),
        strided=True,
    )
    yield Case(
        "selective_scan",
        "every parameter in half precision",
        scan_arguments,
        ("bfloat16", "float16"),
        half_parameters=True,
        compiled=("bfloat16",),
    )


def step_arguments(rng: Rng, **options: Any) -> dict[str, Any]:
    """Arguments of ``selective_state_update``: those of a scan of one token, by the step's names."""
    options = {"given": "D z dt_bias", **options}
    options["given"] = options["given"].replace("dt_bias", "delta_bias") + " initial_state"
    scan = scan_arguments(rng, L=1, last=False, **options)
    one_token = ("u", "delta", "B", "C", "z")
    scan = {name: value[..., 0] if name in one_token else value for name, value in scan.items()}
    return {
        "state": scan.pop("initial_state"),
        "x": scan.pop("u"),
        **{name.replace("delta", "dt"): value for name, value in scan.items()},
    }


def selective_state_update() -> Iterator[Case]:
    def case(
        name: str, dtypes: tuple[str, ...] = WIDE, *, compiled: tuple[str, ...] | None = None, **options: Any
    ) -> Case:
        return Case(
            "selective_state_update", name, lambda rng: step_arguments(rng, **options), dtypes, compiled=compiled
        )

    yield case("b=5", ALL, b=5)
    yield case("bare", softplus=False, given="", compiled=ONCE)
    yield case("D and bias", given="D dt_bias", compiled=NEVER)
    yield case("bias and gate without softplus", softplus=False, given="dt_bias z", compiled=ONCE)
    yield case("scalar A", ALL, A="scalar", compiled=ONCE)
    yield case("scalar A as a column", A="column", compiled=NEVER)
    yield case("groups", NO_FLOAT16, groups=2, compiled=ONCE)
    yield case("a group a channel, scalar A", groups=4, A="scalar", compiled=NEVER)
    yield case("huge steps", step=huge_steps)
    yield case("tiny steps", step=tiny_steps)
    yield case("extreme steps", step=extreme_steps)
    yield case("growth", A=growing)
    yield case("one of everything", b=1, d=1, N=1, compiled=ONCE)
    yield case("tiles left over", b=1, d=19, N=17, compiled=ONCE)
    yield Case("selective_state_update", "strided", lambda rng: step_arguments(rng, groups=2), strided=True)
    yield Case(
        "selective_state_update",
        "state and parameters in half precision",
        step_arguments,
        ("bfloat16", "float16"),
        half_parameters=True,
        compiled=NEVER,
    )


def hidden_attention() -> Iterator[Case]:
    def case(
        name: str, dtypes: tuple[str, ...] = WIDE, *, compiled: tuple[str, ...] | None = None, **options: Any
    ) -> Case:
        return Case(
            "hidden_attention", name, lambda rng: attention_arguments(rng, **options), dtypes, compiled=compiled
        )

    yield case("L=1", L=1, compiled=ONCE)
    yield case("L=2", L=2, compiled=ONCE)
    yield case("L=17", ALL)
    yield case("L=63", L=63, compiled=ONCE)
    yield case("L=197", L=197, d=1, N=1, compiled=ONCE)
    yield case("long memory", A=remembering)
    yield case("longer memory", A=remembering, L=63, compiled=ONCE)
    yield case("growth", A=growing)
    yield case("huge steps", step=huge_steps)
    yield case("tiny steps", step=tiny_steps)
    yield case("extreme steps", step=extreme_steps)
    yield case("bare", softplus=False, given="", b=2, compiled=ONCE)
    yield case("bias without softplus", softplus=False, b=2, compiled=NEVER)
    yield case("scalar A", A="scalar", b=2, compiled=ONCE)
    yield case("scalar A as a column", A="column", b=2, compiled=ONCE)
    yield case("groups", groups=2, d=4, b=2, compiled=ONCE)
    yield case("one channel", ALL, channel=1, b=2, compiled=WIDE)
    yield case("one channel of a group", channel=3, d=4, groups=2, compiled=ONCE)
    yield case("mean", aggregate="mean", d=3, b=2, compiled=ONCE)
    yield case("mean of absolute values", aggregate="mean_abs", d=3, b=2, compiled=ONCE)
    yield case("rows", rows=(3, 6), b=2, compiled=ONCE)
    yield case("the last row", rows=(16, 17), aggregate="mean", b=2, compiled=NEVER)
    yield case("the first row of a channel", rows=(0, 1), channel=0, compiled=ONCE)
    yield case("packed", seq_idx=SHORT_PACKED, b=2, compiled=ONCE)
    yield case("packed rows", seq_idx=SHORT_PACKED, b=2, rows=(4, 9), aggregate="mean_abs", compiled=ONCE)
    yield case("padded", lengths=np.array([0, 9]), b=2, compiled=ONCE)
    yield case("padded, one of them full", lengths=np.array([17, 1]), b=2, compiled=ONCE)
    yield Case(
        "hidden_attention",
        "padded with NaN",
        lambda rng: poisoned_padding(attention_arguments(rng, lengths=np.array([0, 9]), b=2)),
        compiled=ONCE,
    )
    yield case(
        "packed and padded, mean",
        seq_idx=SHORT_PACKED,
        lengths=np.array([6, 16]),
        b=2,
        aggregate="mean",
        compiled=ONCE,
    )
    yield Case("hidden_attention", "strided", lambda rng: attention_arguments(rng, groups=2, b=2, L=7), strided=True)


def reordered_scan() -> Iterator[Case]:
    def case(
        name: str,
        L: int,
        scores: Scores,
        *,
        constant: tuple[str, ...] = (),
        compiled: tuple[str, ...] | None = None,
        **options: Any,
    ) -> Case:
        def arguments(rng: Rng) -> dict[str, Any]:
            scan = scan_arguments(rng, L=L, softplus=False, given="D z", last=False)
            return {"u": scan.pop("u"), "scores": scores(rng, 2, L), **scan, **options}

        return Case("reordered_scan", name, arguments, constant=constant, compiled=compiled)

    yield case("hard", 9, ordinary, compiled=ONCE, method="hard", constant=("scores",))
    yield case("hard with ties", 9, tied, compiled=ONCE, method="hard", constant=("scores",))
    yield case("soft", 9, ordinary, method="softsort", tau=0.3)
    yield case("soft with ties", 9, tied, method="softsort", tau=0.3)
    yield case("straight through", 9, ordinary, compiled=ONCE, method="straight_through", tau=0.3)
    yield case("straight through with ties", 9, tied, compiled=ONCE, method="straight_through", tau=0.3)
