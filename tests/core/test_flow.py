"""Right-hand sides of the token dynamics: what equivalence with the spec cannot see."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from numba import njit

import tokendyn
from tokendyn import core
from tokendyn.core._elementary_numba import exp, softplus
from tokendyn.errors import DTypeError, OptionError, ShapeError

from .gradients import check_vjp


def generator(*key: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def line(rng: np.random.Generator, b: int | None = None, L: int = 7) -> dict:
    shape = () if b is None else (b,)
    return {
        "x": rng.normal(size=(*shape, L)),
        "mu": np.asarray(rng.normal(size=shape)),
        "s_delta": np.asarray(rng.normal(size=shape)),
        "a": np.asarray(rng.uniform(0.3, 2, shape)),
        "bias": np.asarray(rng.normal(size=shape)),
    }


def channels(rng: np.random.Generator, *, L: int = 6, D: int = 3, N: int | None = None, shared: bool = False) -> dict:
    matrices = {"M": (D, D)} if N is None else {"S_B": (N, D), "S_C": (N, D)}
    return {
        "x": rng.normal(size=(2, L, D)),
        **{name: rng.normal(size=shape) for name, shape in matrices.items()},
        "s_delta": rng.normal(size=(D,) if shared else (D, D)),
        "a": rng.uniform(0.3, 2, (D,) if N is None else (D, N)),
        "bias": np.asarray(rng.normal(size=() if shared else (D,))),
    }


def attention(rng: np.random.Generator, **options: object) -> dict:
    shapes = {"x": (2, 6, 3), "Q": (2, 3), "K": (2, 3), "V": (3, 3)}
    return {**{name: rng.normal(size=shape) for name, shape in shapes.items()}, **options}


PROBLEMS = {
    "line": ("flow_rhs", lambda rng: line(rng)),
    "lines": ("flow_rhs", lambda rng: line(rng, b=3)),
    "matrix": ("flow_rhs", lambda rng: channels(rng)),
    "general A": ("flow_rhs", lambda rng: channels(rng, N=2, shared=True)),
    "sphere": ("sphere_flow", lambda rng: {**channels(rng, N=2), "W": rng.normal(size=(3, 3))}),
    "softmax": ("attention_flow", lambda rng: attention(rng, sphere=True)),
    "full": ("attention_flow", lambda rng: attention(rng, causal=False)),
    "linear": ("attention_flow", lambda rng: attention(rng, kind="linear", sphere=True)),
    "AR": ("autoregressive_flow", lambda rng: {"x": rng.normal(size=(2, 6, 3)), "phi": rng.normal(size=2)}),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_vjp_agrees_with_differences(problem: str) -> None:
    name, make = PROBLEMS[problem]
    rng = generator("vjp", problem)
    arguments = make(rng)
    arrays = " ".join(key for key, value in arguments.items() if isinstance(value, np.ndarray))
    check_vjp(name, arguments, arrays, rng)


def test_line_is_hidden_attention_times_tokens() -> None:
    p = line(generator("attention"))
    x, B, C = p["x"], p["x"], p["mu"] * p["x"]
    delta = p["s_delta"] * x + p["bias"]
    P = core.hidden_attention(delta[None, None], -p["a"][None], B[None, None], C[None, None], delta_softplus=True)
    np.testing.assert_allclose(tokendyn.flow_rhs(**p), P[0, 0] @ x, rtol=1e-13)


@pytest.mark.parametrize("shared", [False, True])
def test_channels_are_hidden_attention_times_tokens(shared: bool) -> None:
    p = channels(generator("channels", shared), N=2, shared=shared)
    x = p["x"]
    delta = np.moveaxis(x @ np.atleast_2d(p["s_delta"]).T + p["bias"], 1, 2)
    delta = np.broadcast_to(delta, (2, 3, 6))
    B, C = (np.moveaxis(x @ p[name].T, 1, 2) for name in ("S_B", "S_C"))
    P = core.hidden_attention(delta, -p["a"], B, C, delta_softplus=True)
    np.testing.assert_allclose(tokendyn.flow_rhs(**p), np.einsum("bdlj,bjd->bld", P, x), rtol=1e-12)


def test_one_channel_is_the_line() -> None:
    p = line(generator("one channel"))
    matrix = {
        "x": p["x"][:, None],
        "M": p["mu"].reshape(1, 1),
        "s_delta": p["s_delta"].reshape(1, 1),
        "a": p["a"].reshape(1),
        "bias": p["bias"].reshape(1),
    }
    np.testing.assert_allclose(tokendyn.flow_rhs(**matrix)[:, 0], tokendyn.flow_rhs(**p), rtol=1e-14)


def test_sphere_flow_is_tangent_and_attention_of_one_token_vanishes() -> None:
    p = channels(generator("tangent"), N=2)
    p["x"] /= np.linalg.norm(p["x"], axis=-1, keepdims=True)
    dx = tokendyn.sphere_flow(**p)
    assert np.abs((dx * p["x"]).sum(-1)).max() < 1e-14
    x = p["x"][:, :1]
    assert np.abs(tokendyn.attention_flow(x, Q=p["S_B"], K=p["S_C"], sphere=True)).max() < 1e-15


@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
def test_without_a_batch_axis(backend: str) -> None:
    pytest.importorskip(backend)
    with tokendyn.backend(backend):
        for name, options in (("flow_rhs", {"channels": None}), ("flow_rhs", {}), ("sphere_flow", {"value": True})):
            batch = tokendyn.random_inputs(name, dtype="float64", batch=2, length=5, **options)
            whole = getattr(tokendyn, name)(**batch)
            for b in range(2):
                one = {
                    key: value[b] if key == "x" or options.get("channels", 0) is None else value
                    for key, value in batch.items()
                }
                difference = getattr(tokendyn, name)(**one) - whole[b]
                assert float(abs(difference).max()) < 1e-14


WRONG = {
    "both forms": ({"mu": 1.0, "M": np.eye(2)}, OptionError, "mu and M were given"),
    "no form": ({}, OptionError, "no input-output matrix"),
    "half a form": ({"S_B": np.eye(2)}, OptionError, "S_B was given, expected M, or both"),
    "general A with M": ({"M": np.eye(2), "a": np.ones((2, 2))}, ShapeError, "a has shape"),
    "a number for S_Δ": ({"M": np.eye(2), "s_delta": 0.5}, ShapeError, r"expected an array of shape \(D\) or \(D, D\)"),
    "integers": ({"M": np.eye(2, dtype=int)}, DTypeError, "M has dtype int64"),
    "two dtypes": ({"M": np.eye(2, dtype=np.float32)}, DTypeError, "M has dtype float32 but x has float64"),
    "infinite a": ({"M": np.eye(2), "a": float("inf")}, OptionError, "a is inf"),
    "bias a channel, Δ shared": ({"M": np.eye(2), "s_delta": np.ones(2), "bias": np.ones(2)}, ShapeError, "bias has"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case: str) -> None:
    arguments, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        tokendyn.flow_rhs(**{"x": np.ones((3, 2)), "s_delta": np.eye(2), "a": 1.0, **arguments})


def test_half_precision_is_refused() -> None:
    with pytest.raises(DTypeError, match="float16"):
        tokendyn.flow_rhs(np.ones(3, np.float16), mu=1.0, s_delta=1.0, a=1.0)


@njit
def _apply(x: np.ndarray, exponential: np.ndarray, soft: np.ndarray) -> None:
    for i in range(len(x)):
        exponential[i] = exp(x[i])
        soft[i] = softplus(x[i])


def test_elementary_functions_to_three_units_in_the_last_place() -> None:
    rng = generator("elementary")
    x = np.concatenate(
        [rng.uniform(-708, 709, 20_000), rng.normal(size=20_000), 10 ** rng.uniform(-300, 0, 1000), [0.0, -0.0]]
    )
    exponential, soft = np.empty_like(x), np.empty_like(x)
    _apply(x, exponential, soft)
    exact = np.exp(x.astype(np.longdouble))
    assert np.abs(exponential / exact - 1).max() < 3 * np.finfo(float).eps
    exact = np.maximum(x, 0).astype(np.longdouble) + np.log1p(np.exp(-np.abs(x.astype(np.longdouble))))
    assert np.abs(soft / exact - 1).max() < 3 * np.finfo(float).eps
    x = np.array([-np.inf, -1e300, -709.0, 710.0, 1e300, np.inf, np.nan])
    exponential, soft = np.empty_like(x), np.empty_like(x)
    _apply(x, exponential, soft)
    np.testing.assert_array_equal(exponential, [0, 0, 0, np.inf, np.inf, np.inf, np.nan])
    np.testing.assert_array_equal(soft, [0, 0, 0, 710, 1e300, np.inf, np.nan])
