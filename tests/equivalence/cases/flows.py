"""Right-hand sides of the token dynamics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..check import Case
from .common import NEVER, ONCE, WIDE, Rng

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

        more = {"compiled": ONCE, **more}
        return Case("flow_rhs", name, arguments, **{key: value for key, value in more.items() if key != "options"})

    for L in (1, 2, 63, 197):
        yield line(f"line, L={L}", L, compiled={1: ONCE, 63: None}.get(L, NEVER))
    yield line("line, one set of parameters", each=False)
    yield line("line, numbers", each=False, options=NUMBERS, constant=tuple(NUMBERS))
    yield line("line, bias", options={"bias": np.array([-4.0, 0.0, 3.0])})
    yield line("line, far from 0", 63, scale=30.0, compiled=None)
    yield line("line, close to 0", 63, scale=1e-4, compiled=None)
    yield line("line, strided", strided=True)

    def space(name: str, **options: Any) -> Case:
        numbers = tuple(key for key, value in options.items() if isinstance(value, float) and key != "scale")
        compiled = options.pop("compiled", ONCE)
        return Case(
            "flow_rhs", name, lambda rng: channel_arguments(rng, **options), constant=numbers, compiled=compiled
        )

    for L in (1, 2, 63):
        yield space(f"L={L}", L=L, compiled={1: ONCE, 63: None}.get(L, NEVER))
    yield space("one channel as a matrix", D=1)
    yield space("shared step size", shared=True, bias="number")
    yield space("shared step size, one a", shared=True, a=0.8)
    yield space("bias", bias="array")
    yield space("low rank", N=2, bias="array")
    yield space("more states than channels", N=7, D=3)
    yield space("general A", N=3, a="general")
    yield space("general A, shared step size", N=3, a="general", shared=True)
    yield space("number a", a=1.3, bias=-0.5)
    yield space("far from 0", L=63, scale=20.0, compiled=None)
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
            "sphere_flow",
            name,
            lambda rng: channel_arguments(rng, **arguments),
            strided=strided,
            constant=numbers,
            compiled={"L=2": NEVER, "L=63": None}.get(name, ONCE),
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

        return Case(
            "attention_flow", name, arguments, dtypes, strided=strided, compiled={2: NEVER, 63: None}.get(L, ONCE)
        )

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

        return Case("autoregressive_flow", name, arguments, strided=strided, compiled={2: NEVER, 63: None}.get(L, ONCE))

    yield case("L=1", 2, L=1)
    yield case("p=1", 1)
    yield case("p=3", 3, L=63)
    yield case("more lags than tokens", 5, L=3)
    yield case("in space", 2, sphere=False)
    yield case("strided", 2, strided=True)
