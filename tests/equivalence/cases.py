"""On which arguments every implementation must agree with the spec.

One generator for each subject; a case is its name (what is awkward) and what differs from the subject's ordinary
arguments. Sizes are small, since the spec's loops are slow, and odd, since engines work in tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .check import Case

Rng = np.random.Generator

WIDE = ("float64", "float32")
#: Half precision costs a run of its own, so only the cases that say something new about it have it.
ALL = (*WIDE, "bfloat16", "float16")
#: Values or gradients leave float16's range (65504; smallest normal number 6e-5).
NO_FLOAT16 = (*WIDE, "bfloat16")


# ------------------------------------------------------------------------------------------- scans and attention


def scan_arguments(
    rng: Rng,
    *,
    b: int = 2,
    d: int = 4,
    L: int = 7,
    N: int = 3,
    groups: int | None = None,
    A: str | Callable[[Rng, int, int], np.ndarray] = "general",
    step: str | Callable[[Rng, tuple[int, ...]], np.ndarray] = "ordinary",
    softplus: bool = True,
    given: str = "D z delta_bias",
    last: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Arguments of ``selective_scan``.

    Args:
        rng: the source.
        b, d, L, N, groups: sizes; no groups: B and C are (b, N, L).
        A: ``"general"`` (d, N), ``"scalar"`` (d,), ``"column"`` (d, 1), or a function of (rng, d, N).
        step: of ``delta``: ``"ordinary"``, or a function of (rng, shape).
        softplus: whether softplus is applied to the step size; without it ``delta`` is made positive.
        given: the optional arrays that are given.
        last: return the last state.
        more: further arguments as they are.
    """
    optional = given.split()
    if callable(A):
        decay = A(rng, d, N)
    else:
        decay = -rng.uniform(0.2, 3.0, {"general": (d, N), "scalar": (d,), "column": (d, 1)}[A])
    if callable(step):
        delta = step(rng, (b, d, L))
    else:
        delta = rng.normal(-1.0, 1.0, (b, d, L)) if softplus else rng.uniform(0.05, 1.0, (b, d, L))
    maps = (b, N, L) if groups is None else (b, groups, N, L)
    arguments: dict[str, Any] = {
        "u": rng.standard_normal((b, d, L)),
        "delta": delta,
        "A": decay,
        "B": rng.standard_normal(maps),
        "C": rng.standard_normal(maps),
    }
    if "D" in optional:
        arguments["D"] = rng.standard_normal(d)
    if "z" in optional:
        arguments["z"] = rng.standard_normal((b, d, L))
    if "delta_bias" in optional:
        arguments["delta_bias"] = rng.normal(0.0, 0.5, d) if softplus else rng.uniform(0.1, 0.5, d)
    if softplus:
        arguments["delta_softplus"] = True
    if "initial_state" in optional:
        arguments["initial_state"] = rng.standard_normal((b, d, N))
    if last:
        arguments["return_last_state"] = True
    return {**arguments, **more}


def attention_arguments(rng: Rng, **options: Any) -> dict[str, Any]:
    """Arguments of ``hidden_attention``: a scan's, without those that it does not know."""
    arguments = scan_arguments(rng, **{"given": "delta_bias", "d": 2, "b": 1, **options})
    return {name: value for name, value in arguments.items() if name not in ("u", "D", "z")}


EVERYTHING: dict[str, Any] = {"given": "D z delta_bias initial_state", "last": True}


def constant(value: float) -> Callable[[Rng, tuple[int, ...]], np.ndarray]:
    """Step sizes of about ``value``, no two alike."""
    return lambda rng, shape: value * rng.uniform(0.5, 1.5, shape)


def extreme_steps(rng: Rng, shape: tuple[int, ...]) -> np.ndarray:
    """Step sizes before softplus from one end of its range to the other: softplus is e^x here and x there."""
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


PACKED = np.stack([packed(5, 1, 7, 4), packed(1, 1, 1, 14, values=(3, 0, 3, 2))])
PADDED = np.array([0, 17, 9])


def selective_scan() -> Iterator[Case]:
    def case(name: str, *, dtypes: tuple[str, ...] = WIDE, strided: bool = False, **options: Any) -> Case:
        return Case("selective_scan", name, lambda rng: scan_arguments(rng, **options), dtypes, strided=strided)

    for L in (1, 2, 63, 197):
        yield case(f"L={L}", L=L, dtypes=ALL if L in (2, 197) else WIDE, **EVERYTHING)
    yield case("bare", softplus=False, given="")
    yield case("softplus alone", given="")
    yield case("D alone", softplus=False, given="D")
    yield case("z alone", softplus=False, given="z", dtypes=ALL)
    yield case("bias alone", softplus=False, given="delta_bias")
    yield case("initial state alone", softplus=False, given="initial_state")
    yield case("last state alone", softplus=False, given="", last=True, dtypes=ALL)
    yield case("one of everything", b=1, d=1, N=1, **EVERYTHING)
    yield case("tiles left over", b=1, d=19, N=17, L=5, **EVERYTHING)
    yield case("scalar A", A="scalar", L=21, **EVERYTHING, dtypes=ALL)
    yield case("scalar A bare", A="scalar", softplus=False, given="")
    yield case("scalar A as a column", A="column", L=21, **EVERYTHING)
    yield case("N=1 general A", A="general", N=1, **EVERYTHING)
    yield case("groups", groups=2, L=21, **EVERYTHING, dtypes=NO_FLOAT16)
    yield case("one group of four axes", groups=1, **EVERYTHING)
    yield case("a group a channel", groups=4, **EVERYTHING)
    yield case("groups of three with scalar A", groups=2, d=6, A="scalar", **EVERYTHING)
    yield case("long memory", A=remembering, L=197, **EVERYTHING)
    yield case("growth", A=growing, L=63, **EVERYTHING)
    yield case("mixed signs of A", A=mixed_signs, L=63, **EVERYTHING)
    yield case("scalar growth", A=lambda rng, d, N: rng.uniform(0.05, 0.3, d), L=63, **EVERYTHING)
    yield case("huge steps", step=constant(1e3), softplus=False, **EVERYTHING, dtypes=NO_FLOAT16)
    yield case("tiny steps", step=constant(1e-6), softplus=False, given="initial_state", last=True)
    yield case("extreme steps before softplus", step=extreme_steps, L=63, **EVERYTHING)
    yield case("packed", seq_idx=PACKED, L=17, **EVERYTHING, dtypes=ALL)
    yield case("packed bare", seq_idx=PACKED.astype(np.int32), L=17, softplus=False, given="")
    yield case("packed singly", seq_idx=np.arange(14).reshape(2, 7), **EVERYTHING)
    yield case("packed with scalar A and groups", seq_idx=PACKED, L=17, A="scalar", groups=2, **EVERYTHING)
    yield case("packed long memory", seq_idx=PACKED, L=17, A=remembering, **EVERYTHING)
    yield case("padded", lengths=PADDED, b=3, L=17, **EVERYTHING, dtypes=ALL)
    yield case("padded bare", lengths=PADDED.astype(np.int32), b=3, L=17, softplus=False, given="")
    yield case("all padding", lengths=np.zeros(2, np.int64), **EVERYTHING)
    yield case("padded and packed", seq_idx=PACKED, lengths=np.array([6, 16]), L=17, **EVERYTHING)
    yield case("padded with scalar A", lengths=PADDED, b=3, L=17, A="scalar", **EVERYTHING)
    yield case("strided", strided=True, L=21, seq_idx=np.repeat([[0, 1, 2]], 7, 1).repeat(2, 0), **EVERYTHING)
    yield case("strided with groups and lengths", strided=True, groups=2, lengths=np.array([3, 7]), **EVERYTHING)
    yield Case(
        "selective_scan",
        "every parameter in half precision",
        lambda rng: scan_arguments(rng, L=21, **EVERYTHING),
        ("bfloat16", "float16"),
        half_parameters=True,
    )


def hidden_attention() -> Iterator[Case]:
    def case(name: str, *, dtypes: tuple[str, ...] = WIDE, strided: bool = False, **options: Any) -> Case:
        return Case("hidden_attention", name, lambda rng: attention_arguments(rng, **options), dtypes, strided=strided)

    for L in (1, 2, 63):
        yield case(f"L={L}", L=L, dtypes=ALL if L == 2 else WIDE)
    yield case("L=197", L=197, d=1, N=1)
    yield case("bare", softplus=False, given="", b=2)
    yield case("bias without softplus", softplus=False, b=2, d=3)
    yield case("scalar A", A="scalar", b=2, L=9, dtypes=ALL)
    yield case("scalar A as a column", A="column", b=2)
    yield case("groups", groups=2, d=4, b=2)
    yield case("one channel", channel=2, d=3, b=2, dtypes=ALL)
    yield case("one channel of a group", channel=3, d=4, groups=2)
    yield case("mean", aggregate="mean", d=3, b=2, dtypes=ALL)
    yield case("mean of absolute values", aggregate="mean_abs", d=3, b=2)
    yield case("rows", rows=(3, 6), d=3, b=2)
    yield case("the last row", rows=(6, 7), aggregate="mean", b=2)
    yield case("the first row of a channel", rows=(0, 1), channel=0)
    yield case("packed", seq_idx=PACKED, b=2, L=17)
    yield case("packed rows", seq_idx=PACKED, b=2, L=17, rows=(4, 9), aggregate="mean_abs")
    yield case("padded", lengths=PADDED, b=3, L=17)
    yield case("padded and packed, mean", seq_idx=PACKED, lengths=np.array([6, 16]), b=2, L=17, aggregate="mean")
    yield case("long memory", A=remembering, L=63)
    yield case("growth", A=growing, L=63)
    yield case("huge steps", step=constant(1e3), softplus=False)
    yield case("tiny steps", step=constant(1e-6), softplus=False, given="")
    yield case("extreme steps before softplus", step=extreme_steps, L=21)
    yield case("strided", strided=True, groups=2, b=2)


# -------------------------------------------------------------------------------------------------------- orders


def ordinary(rng: Rng, b: int, L: int) -> np.ndarray:
    return rng.standard_normal((b, L))


def tied(rng: Rng, b: int, L: int) -> np.ndarray:
    """Few distinct values, zeros of both signs among them: padding and uniform patches make such scores."""
    return rng.choice([-1.0, -0.0, 0.0, 0.5, 0.5, 2.0], (b, L))


def uniform(rng: Rng, b: int, L: int) -> np.ndarray:
    return np.full((b, L), rng.standard_normal())


def initial(rng: Rng, b: int, L: int) -> np.ndarray:
    """Scores as a fresh model has them."""
    return 5e-3 * rng.standard_normal((b, L))


def far_apart(rng: Rng, b: int, L: int) -> np.ndarray:
    """So far apart that most weights are 0 in float64 too; some pairs close, so that something is left to see."""
    return 1e4 * rng.standard_normal((b, L)).round(1) + 0.1 * rng.standard_normal((b, L))


def sorted_already(rng: Rng, b: int, L: int) -> np.ndarray:
    return np.sort(rng.standard_normal((b, L)), axis=1)


Scores = Callable[[Rng, int, int], np.ndarray]

#: name -> (L, scores, options, dtypes)
ORDERS: dict[str, tuple[int, Scores, dict[str, Any], tuple[str, ...]]] = {
    "L=1": (1, ordinary, {}, WIDE),
    "L=2": (2, ordinary, {}, ALL),
    "L=63": (63, ordinary, {}, WIDE),
    "L=197": (197, ordinary, {"tau": 0.1}, WIDE),
    "descending": (21, ordinary, {"ascending": False}, ALL),
    "ties": (21, tied, {}, ALL),
    "ties descending": (21, tied, {"ascending": False, "tau": 0.3}, WIDE),
    "ties, square": (21, tied, {"power": 2}, WIDE),
    "all equal": (9, uniform, {}, WIDE),
    "all equal descending": (9, uniform, {"ascending": False}, WIDE),
    "fresh scores": (49, initial, {}, WIDE),
    "tau 0.01": (21, ordinary, {"tau": 0.01}, WIDE),
    "far apart": (21, far_apart, {}, WIDE),
    "sorted already": (21, sorted_already, {"tau": 0.2}, WIDE),
    "sorted already, descending": (21, sorted_already, {"tau": 0.2, "ascending": False}, WIDE),
    "power 2": (21, ordinary, {"power": 2, "tau": 0.5}, ALL),
    "power 1.5 descending": (21, ordinary, {"power": 1.5, "ascending": False}, WIDE),
}


def _orders(subject: str, tokens: str | None, *, with_options: bool = True) -> Iterator[Case]:
    """The cases of an operation on scores, with its tokens if it has any."""

    def make(L: int, scores: Scores, options: dict[str, Any]) -> Callable[[Rng], dict[str, Any]]:
        def arguments(rng: Rng) -> dict[str, Any]:
            made: dict[str, Any] = {"scores": scores(rng, 2, L)}
            if tokens is not None:
                made[tokens] = rng.standard_normal((2, L, 3))
            return {**made, **options}

        return arguments

    for name, (L, scores, options, dtypes) in ORDERS.items():
        if not with_options:
            if not {"tau", "power"}.isdisjoint(options) and scores is ordinary:
                continue
            options = {key: value for key, value in options.items() if key == "ascending"}
        yield Case(subject, name, make(L, scores, options), dtypes)
    yield Case(subject, "strided", make(21, ordinary, {}), strided=True)
    if tokens is not None:
        # Scores are best kept in float32: half precision would tie what the model tells apart.
        yield Case(subject, "float32 scores", make(21, ordinary, {}), ("bfloat16",), fixed_dtypes={"scores": "float32"})


def softsort() -> Iterator[Case]:
    yield from _orders("softsort", "x")


def softsort_restore() -> Iterator[Case]:
    yield from _orders("softsort_restore", "y")


def softsort_matrix() -> Iterator[Case]:
    yield from _orders("softsort_matrix", None)


def effective_tokens() -> Iterator[Case]:
    yield from _orders("effective_tokens", None)


def hard_order() -> Iterator[Case]:
    yield from _orders("hard_order", None, with_options=False)


def importance_score() -> Iterator[Case]:
    def case(name: str, b: int, L: int, D: int, Q: int, *, s_delta: bool = True, **more: Any) -> Case:
        def arguments(rng: Rng) -> dict[str, Any]:
            return {
                "x": rng.standard_normal((b, L, Q)),
                "s_delta": rng.standard_normal((D, Q)) if s_delta else None,
                "k": rng.standard_normal(D if s_delta else Q),
            }

        return Case("importance_score", name, arguments, **more)

    yield case("one of everything", 1, 1, 1, 1)
    yield case("L=2", 2, 2, 5, 3)
    yield case("L=63", 2, 63, 5, 5, dtypes=ALL)
    yield case("L=197", 1, 197, 19, 17)
    yield case("low rank", 2, 7, 16, 2, dtypes=ALL)
    yield case("wide", 2, 7, 2, 16)
    yield case("no step size", 2, 7, 5, 5, s_delta=False, dtypes=ALL)
    yield case("strided", 2, 7, 5, 4, strided=True)


def _tokens(subject: str, name: str) -> Iterator[Case]:
    def case(label: str, L: int, integer: type = np.int64, **more: Any) -> Case:
        def arguments(rng: Rng) -> dict[str, Any]:
            indices = np.stack([rng.permutation(L) for _ in range(3)]).astype(integer)
            return {name: rng.standard_normal((3, L, 2)), "indices": indices}

        return Case(subject, label, arguments, **more)

    for L in (1, 2, 63, 197):
        yield case(f"L={L}", L, dtypes=ALL if L == 2 else WIDE)
    yield case("int32", 7, np.int32)
    yield case("strided", 7, strided=True)


def take_tokens() -> Iterator[Case]:
    yield from _tokens("take_tokens", "x")


def put_tokens() -> Iterator[Case]:
    yield from _tokens("put_tokens", "y")


def reordered_scan() -> Iterator[Case]:
    def case(name: str, L: int, scores: Scores, *, constant: tuple[str, ...] = (), **options: Any) -> Case:
        def arguments(rng: Rng) -> dict[str, Any]:
            scan = scan_arguments(rng, L=L, softplus=False, given="D z")
            return {"u": scan.pop("u"), "scores": scores(rng, 2, L), **scan, **options}

        return Case("reordered_scan", name, arguments, constant=constant)

    yield case("hard", 9, ordinary, method="hard", constant=("scores",))
    yield case("hard with ties", 9, tied, method="hard", constant=("scores",))
    yield case("soft", 9, ordinary, method="softsort", tau=0.3)
    yield case("soft with ties", 9, tied, method="softsort", tau=0.3)
    yield case("straight through", 9, ordinary, method="straight_through", tau=0.3)
    yield case("straight through with ties", 9, tied, method="straight_through", tau=0.3)


# ---------------------------------------------------------------------------------------------- input-output maps


def io_projections() -> Iterator[Case]:
    def case(name: str, N: int, D: int, regime: str, form: str = "paper", **more: Any) -> Case:
        def arguments(rng: Rng) -> dict[str, Any]:
            second = {"weight_C": (N, D)} if regime == "free" else {"diagonal": (N,)}
            arrays = {name: rng.standard_normal(shape) for name, shape in {"weight_B": (N, D), **second}.items()}
            return {**arrays, "regime": regime, "form": form}

        return Case("io_projections", name, arguments, **more)

    yield case("free", 3, 5, "free", dtypes=ALL)
    yield case("free, N above D", 5, 3, "free")
    for regime in ("positive", "negative", "mixed"):
        for form in ("paper", "published_code", "scale_matched"):
            yield case(f"{regime}, {form}", 3, 5, regime, form, dtypes=ALL if form == "paper" else WIDE)
        yield case(f"{regime}, N=1", 1, 4, regime)
        yield case(f"{regime}, N=D", 4, 4, regime)
    yield case("mixed, even N", 4, 7, "mixed", "scale_matched")
    yield case("strided", 3, 5, "mixed", strided=True)


def io_spectrum() -> Iterator[Case]:
    def case(name: str, N: int, D: int, **more: Any) -> Case:
        def arguments(rng: Rng) -> dict[str, Any]:
            return {"S_B": rng.standard_normal((N, D)), "S_C": rng.standard_normal((N, D))}

        return Case("io_spectrum", name, arguments, **more)

    yield case("N=1, D=1", 1, 1)
    yield case("N=1", 1, 4)
    yield case("D above 2N", 4, 11)
    yield case("D = 2N", 3, 6)
    yield case("D between N and 2N", 4, 6)
    yield case("N=D", 4, 4)
    yield case("N above D", 5, 3)
    yield case("strided", 3, 7, strided=True)


# ------------------------------------------------------------------------------------------------- token dynamics


#: Parameters of the line as Python numbers, which have no gradient.
NUMBERS = {"mu": 0.7, "s_delta": -0.4, "a": 1.5, "bias": 0.2}


def flow_rhs() -> Iterator[Case]:
    def line(name: str, L: int = 9, *, each: bool = True, scale: float = 1.0, **more: Any) -> Case:
        """One channel; ``each``: every sequence of an ensemble has parameters of its own."""

        def arguments(rng: Rng) -> dict[str, Any]:
            shape = (3,) if each else ()
            return {
                "x": scale * rng.standard_normal((3, L)),
                "mu": np.asarray(rng.standard_normal(shape)),
                "s_delta": np.asarray(rng.standard_normal(shape)),
                "a": np.asarray(rng.uniform(0.3, 2.0, shape)),
                **more.get("options", {}),
            }

        return Case("flow_rhs", name, arguments, **{key: value for key, value in more.items() if key != "options"})

    for L in (1, 2, 63, 197):
        yield line(f"line, L={L}", L)
    yield line("line, one set of parameters", each=False)
    yield line("line, numbers", each=False, options=NUMBERS, constant=tuple(NUMBERS))
    yield line("line, bias", options={"bias": np.array([-4.0, 0.0, 3.0])})
    yield line("line, far from 0", scale=30.0)
    yield line("line, close to 0", scale=1e-4)
    yield line("line, strided", strided=True)

    def space(name: str, **options: Any) -> Case:
        numbers = tuple(key for key, value in options.items() if isinstance(value, float) and key != "scale")
        return Case("flow_rhs", name, lambda rng: channel_arguments(rng, **options), constant=numbers)

    for L in (1, 2, 63):
        yield space(f"L={L}", L=L)
    yield space("one channel as a matrix", D=1)
    yield space("shared step size", shared=True, bias="number")
    yield space("shared step size, one a", shared=True, a=0.8)
    yield space("bias", bias="array")
    yield space("low rank", N=2, bias="array")
    yield space("more states than channels", N=7, D=3)
    yield space("general A", N=3, a="general")
    yield space("general A, shared step size", N=3, a="general", shared=True)
    yield space("number a", a=1.3, bias=-0.5)
    yield space("far from 0", scale=20.0)
    yield Case("flow_rhs", "strided", lambda rng: channel_arguments(rng, N=3, a="general"), strided=True)


def channel_arguments(
    rng: Rng,
    *,
    L: int = 9,
    D: int = 4,
    N: int | None = None,
    shared: bool = False,
    a: str | float = "array",
    bias: str | float | None = None,
    value: bool = False,
    scale: float | None = 1.0,
) -> dict[str, Any]:
    """Arguments of the flow in D channels; M unless there is a state size N; ``scale`` None: on the unit sphere."""
    x = rng.standard_normal((2, L, D))
    made: dict[str, Any] = {
        "x": x / np.linalg.norm(x, axis=-1, keepdims=True) if scale is None else scale * x,
        "s_delta": rng.standard_normal(D if shared else (D, D)),
        "a": a if isinstance(a, float) else rng.uniform(0.3, 2.0, (D, N) if a == "general" else D),
    }
    if N is None:
        made["M"] = rng.standard_normal((D, D))
    else:
        made.update(S_B=rng.standard_normal((N, D)), S_C=rng.standard_normal((N, D)))
    if bias is not None:
        made["bias"] = (
            bias if isinstance(bias, float) else np.asarray(rng.standard_normal(D if bias == "array" else ()))
        )
    if value:
        made["W"] = rng.standard_normal((D, D))
    return made


def sphere_flow() -> Iterator[Case]:
    def case(name: str, *, strided: bool = False, **options: Any) -> Case:
        arguments = {"scale": None, **options}
        numbers = ("a",) if isinstance(options.get("a"), float) else ()
        return Case(
            "sphere_flow", name, lambda rng: channel_arguments(rng, **arguments), strided=strided, constant=numbers
        )

    for L in (1, 2, 63):
        yield case(f"L={L}", L=L, N=3)
    yield case("A: shared step size", shared=True, a=1.0)
    yield case("B: a step size a channel", bias="array")
    yield case("C: value matrix", shared=True, a=0.7, value=True)
    yield case("general A and value matrix", N=3, a="general", value=True)
    yield case("off the sphere", scale=1.5)
    yield case("strided", value=True, strided=True)


def attention_flow() -> Iterator[Case]:
    def case(name: str, *, L: int = 9, D: int = 4, N: int = 3, V: bool = False, temperature: float = 1.0, **more: Any):
        strided, dtypes = more.pop("strided", False), more.pop("dtypes", WIDE)

        def arguments(rng: Rng) -> dict[str, Any]:
            made = {"x": rng.standard_normal((2, L, D)), "Q": rng.standard_normal((N, D)) / temperature}
            made["K"] = rng.standard_normal((N, D))
            return {**made, **({"V": rng.standard_normal((D, D))} if V else {}), **more}

        return Case("attention_flow", name, arguments, dtypes, strided=strided)

    for L in (1, 2, 63):
        yield case(f"L={L}", L=L)
    yield case("more rows than one block", L=197, V=True)
    for kind in ("softmax", "linear"):
        for causal in (True, False):
            for sphere in (True, False):
                where = f"{kind}, {'causal' if causal else 'full'}, {'sphere' if sphere else 'space'}"
                yield case(where, kind=kind, causal=causal, sphere=sphere, V=sphere)
    # Scores of ±100, whose rounding in float32 moves the weights by 1e-5: a matter of the case, not of the code.
    yield case("cold", temperature=0.03, dtypes=("float64",))
    yield case("one of everything", L=3, D=1, N=1, V=True)
    yield case("strided", V=True, strided=True)


def autoregressive_flow() -> Iterator[Case]:
    def case(name: str, p: int, *, L: int = 9, strided: bool = False, **options: Any) -> Case:
        def arguments(rng: Rng) -> dict[str, Any]:
            return {"x": rng.standard_normal((2, L, 3)), "phi": rng.standard_normal(p), **options}

        return Case("autoregressive_flow", name, arguments, strided=strided)

    yield case("L=1", 2, L=1)
    yield case("p=1", 1)
    yield case("p=3", 3, L=63)
    yield case("more lags than tokens", 5, L=3)
    yield case("in space", 2, sphere=False)
    yield case("strided", 2, strided=True)


GENERATORS = (
    flow_rhs,
    sphere_flow,
    attention_flow,
    autoregressive_flow,
    selective_scan,
    hidden_attention,
    importance_score,
    softsort,
    softsort_restore,
    softsort_matrix,
    effective_tokens,
    hard_order,
    take_tokens,
    put_tokens,
    reordered_scan,
    io_projections,
    io_spectrum,
)

CASES: tuple[Case, ...] = tuple(case for generator in GENERATORS for case in generator())

assert len({case.id for case in CASES}) == len(CASES), "two cases have one name"
