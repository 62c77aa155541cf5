"""Bad input: the right class of error, and a message that says what was given, what was expected, what to do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tokendyn
from tokendyn._dispatch import BACKENDS, load_backend
from tokendyn.errors import (
    DTypeError,
    EngineError,
    NonFiniteError,
    OptionError,
    RegimeError,
    ShapeError,
    TokendynError,
)

Arguments = dict[str, Any]


def inputs(operation: str, **options: Any) -> Arguments:
    """NumPy arguments; errors of the table's checks are the same for all backends."""
    with tokendyn.backend("numpy"):
        return tokendyn.random_inputs(operation, **options)


def scan(**change: Any) -> Callable[[], Any]:
    """A scan, b = 2, d = 8, N = 4, L = 32, with some arguments replaced."""
    arguments = {**inputs("selective_scan", with_state=True), **change}
    return lambda: tokendyn.selective_scan(**arguments)


def attention(**change: Any) -> Callable[[], Any]:
    arguments = {**inputs("hidden_attention"), **change}
    return lambda: tokendyn.hidden_attention(**arguments)


def order(operation: str, **change: Any) -> Callable[[], Any]:
    arguments = {**inputs(operation, length=5), **change}
    return lambda: getattr(tokendyn, operation)(**arguments)


def projections(**change: Any) -> Callable[[], Any]:
    arguments = {**inputs("io_projections"), **change}
    return lambda: tokendyn.io_projections(**arguments)


def zeros(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.zeros(shape, dtype)


# ------------------------------------------------------------------------------------------------------------- shapes

SHAPES = {
    "u has two axes": (scan(u=zeros(8, 32)), r"selective_scan: u has shape \(8, 32\), expected \(b, d, L\)"),
    "delta of another length": (
        scan(delta=zeros(2, 8, 31)),
        r"delta has shape \(2, 8, 31\), expected \(b, d, L\) with b = 2, d = 8, L = 32",
    ),
    "z of other channels": (scan(z=zeros(2, 7, 32)), r"z has shape \(2, 7, 32\), expected \(b, d, L\)"),
    "B tokens first": (scan(B=zeros(2, 32, 4)), r"B has shape \(2, 32, 4\), expected \(b, N, L\) or \(b, G, N, L\)"),
    "C of another state": (scan(C=zeros(2, 5, 32)), r"C has shape \(2, 5, 32\), expected \(b, N, L\) with .*N = 4"),
    "C without the groups of B": (
        scan(B=zeros(2, 2, 4, 32)),
        r"C has shape \(2, 4, 32\), expected \(b, G, N, L\) with .*G = 2",
    ),
    "groups that do not divide": (
        scan(B=zeros(2, 3, 4, 32), C=zeros(2, 3, 4, 32)),
        r"B has G = 3 groups, expected a divisor of d = 8",
    ),
    "A of another state": (scan(A=zeros(8, 5)), r"A has shape \(8, 5\), expected \(d,\) or \(d, N\) with .*N = 4"),
    "A of other channels": (scan(A=zeros(7)), r"A has shape \(7,\), expected \(d,\) or \(d, N\) with .*d = 8"),
    "D of another size": (scan(D=zeros(4)), r"D has shape \(4,\), expected \(d,\) with .*d = 8"),
    "delta_bias a column": (scan(delta_bias=zeros(8, 1)), r"delta_bias has shape \(8, 1\), expected \(d,\)"),
    "initial state transposed": (
        scan(initial_state=zeros(2, 4, 8)),
        r"initial_state has shape \(2, 4, 8\), expected \(b, d, N\)",
    ),
    "seq_idx without batch": (scan(seq_idx=zeros(32, dtype="int64")), r"seq_idx has shape \(32,\), expected \(b, L\)"),
    "lengths of another batch": (scan(lengths=zeros(3, dtype="int64")), r"lengths has shape \(3,\), expected \(b,\)"),
    "B tokens first, told what to do": (
        scan(B=zeros(2, 32, 4)),
        r"; are the last two axes of B, or of the arrays before it, exchanged\?$",
    ),
    "everything tokens first": (
        scan(
            u=zeros(2, 32, 8),
            delta=zeros(2, 32, 8),
            z=zeros(2, 32, 8),
            B=zeros(2, 32, 4),
            C=zeros(2, 32, 4),
        ),
        r"with b = 2, d = 32, L = 8.*; are the last two axes of \w+, or of the arrays before it, exchanged\?$",
    ),
    "u tokens first": (
        scan(u=zeros(2, 32, 8), delta=zeros(2, 32, 8)),
        r"z has shape \(2, 8, 32\), .*; are the last two axes of \w+, or of the arrays before it, exchanged\?$",
    ),
    "tokens to permute channels first": (
        order("take_tokens", x=zeros(2, 3, 5)),
        r"indices has shape \(2, 5\), expected \(b, L\) with b = 2, L = 3",
    ),
    "x channels first": (
        order("softsort", x=zeros(2, 3, 5)),
        r"x has shape \(2, 3, 5\), expected \(b, L, D\) with .*; are the last two axes of x, or of",
    ),
    "a state of another size, no hint": (
        scan(initial_state=zeros(2, 8, 5)),
        r"initial_state has shape \(2, 8, 5\), expected \(b, d, N\) .*every size at least 1$",
    ),
    "no tokens": (
        lambda: tokendyn.softsort_matrix(zeros(2, 0)),
        r"scores has shape \(2, 0\), expected \(b, L\), every size at least 1$",
    ),
    "negative length": (
        scan(lengths=np.array([3, -1])),
        r"selective_scan: lengths holds -1, expected values from 0 to L = 32",
    ),
    "length beyond the end": (scan(lengths=np.array([33, 0])), r"lengths holds 33, expected values from 0 to L = 32"),
    "attention, negative length": (
        attention(lengths=np.array([-7, 0])),
        r"hidden_attention: lengths holds -7, expected values from 0 to L = 32",
    ),
    "k of another size": (
        order("importance_score", k=zeros(3)),
        r"importance_score: k has shape \(3,\), expected \(D,\)",
    ),
    "k without s_delta": (
        order("importance_score", s_delta=None, k=zeros(3)),
        r"k has shape \(3,\), expected \(Q,\) with .*Q = 8",
    ),
    "x of another length": (
        order("softsort", x=zeros(2, 6, 3)),
        r"softsort: x has shape \(2, 6, 3\), expected \(b, L, D\)",
    ),
    "scores with three axes": (
        order("hard_order", scores=zeros(2, 5, 1)),
        r"scores has shape \(2, 5, 1\), expected \(b, L\)",
    ),
    "indices of another length": (
        order("take_tokens", indices=zeros(2, 4, dtype="int64")),
        r"take_tokens: indices has shape \(2, 4\), expected \(b, L\)",
    ),
    "an index beyond the end": (
        order("take_tokens", indices=np.array([[0, 1, 2, 3, 4], [0, 1, 2, 3, 5]])),
        r"take_tokens: indices\[1\] holds 5, expected a permutation of 0 to L - 1 = 4; take them from hard_order",
    ),
    "a negative index": (
        order("put_tokens", indices=np.array([[0, 1, 2, 3, -1], [0, 1, 2, 3, 4]])),
        r"put_tokens: indices\[0\] holds -1, expected a permutation of 0 to L - 1 = 4",
    ),
    "an index twice": (
        order("put_tokens", indices=np.array([[4, 3, 2, 1, 0], [3, 1, 2, 3, 4]])),
        r"put_tokens: indices\[1\] holds 3 2 times, expected a permutation",
    ),
    "weights of other states": (
        projections(weight_C=zeros(3, 8)),
        r"io_projections: weight_C has shape \(3, 8\), expected \(N, D\) with N = 4 from weight_B, D = 8",
    ),
    "projections that do not match": (
        lambda: tokendyn.io_spectrum(zeros(2, 5), zeros(2, 6)),
        r"io_spectrum: S_C has shape \(2, 6\), expected \(N, D\) with N = 2, D = 5",
    ),
    "an order applied to two axes": (
        lambda: tokendyn.token_order(zeros(2, 5)).apply(zeros(2, 5)),
        r"Order.apply: x has shape \(2, 5\) and axis is -2, expected three axes",
    ),
    "an order along the batch": (
        lambda: tokendyn.token_order(zeros(2, 5)).apply(zeros(2, 5, 3), axis=0),
        r"axis is 0, expected three axes, batch first, and tokens along axis 1 \(-2\) or 2 \(-1\)",
    ),
    "an order of other tokens": (
        lambda: tokendyn.token_order(zeros(2, 5), "hard").restore(zeros(2, 6, 3)),
        r"Order.restore: y has shape \(2, 6, 3\), expected b = 2 and L = 5 tokens along axis -2, as the scores",
    ),
    "an order of other sequences": (
        lambda: tokendyn.token_order(zeros(2, 5)).apply(zeros(3, 5, 3)),
        r"Order.apply: x has shape \(3, 5, 3\), expected b = 2 and L = 5 tokens",
    ),
    "an order along the other axis": (
        lambda: tokendyn.token_order(zeros(2, 5), "hard").apply(zeros(2, 3, 5)),
        r"Order.apply: x has shape \(2, 3, 5\), expected .* along axis -2, .*; give axis=2$",
    ),
    "B of another state": (scan(B=zeros(2, 5, 32)), r"B has shape \(2, 5, 32\), expected \(b, N, L\) .*N = 4 from A,"),
    "B of another state, one token": (
        lambda: tokendyn.selective_state_update(**{**inputs("selective_state_update"), "B": zeros(2, 5)}),
        r"selective_state_update: B has shape \(2, 5\), expected \(b, N\) or \(b, G, N\) with .*N = 4 from state,",
    ),
    "C of another state, A scalar": (
        scan(A=zeros(8), C=zeros(2, 5, 32), initial_state=None),
        r"C has shape \(2, 5, 32\), expected \(b, N, L\) with b = 2, d = 8, L = 32, N = 4 from B,",
    ),
    "delta of another length, and whose the other is": (
        scan(delta=zeros(2, 8, 31)),
        r"with b = 2, d = 8, L = 32 from u, every size",
    ),
}

# ------------------------------------------------------------------------------------------------------------- dtypes

DTYPES = {
    "spectrum in half precision": (
        lambda: tokendyn.io_spectrum(zeros(2, 5, dtype="float16"), zeros(2, 5, dtype="float16")),
        r"io_spectrum: S_B has dtype float16, expected a real floating dtype \(float32, float64\); convert it first",
    ),
    "integer input": (
        scan(u=zeros(2, 8, 32, dtype="int64")),
        r"selective_scan: u has dtype int64, expected a real floating dtype .*convert it first",
    ),
    "boolean input": (
        scan(delta=zeros(2, 8, 32, dtype="bool")),
        r"delta has dtype bool, expected a real floating dtype",
    ),
    "complex input": (
        scan(B=zeros(2, 4, 32, dtype="complex64")),
        r"B has dtype complex64, expected a real floating dtype",
    ),
    "two dtypes": (
        scan(delta=zeros(2, 8, 32, dtype="float64")),
        r"delta has dtype float64 but u has float32; give both in one dtype",
    ),
    "wider parameters": (
        scan(A=zeros(8, 4, dtype="float64")),
        r"A has dtype float64, expected float32 beside float32 activations; convert it first",
    ),
    "complex parameters": (
        scan(A=zeros(8, 4, dtype="complex64")),
        r"A has dtype complex64, expected float32 beside float32 activations; complex parameters are not taken",
    ),
    "integer parameters": (scan(A=zeros(8, 4, dtype="int32")), r"A has dtype int32, expected float32"),
    "seq_idx in floats": (
        scan(seq_idx=zeros(2, 32)),
        r"seq_idx has dtype float32, expected an integer dtype such as int64",
    ),
    "lengths in floats": (scan(lengths=zeros(2)), r"lengths has dtype float32, expected an integer dtype"),
    "boolean indices": (order("take_tokens", indices=zeros(2, 5, dtype="bool")), r"indices has dtype bool"),
    "integer scores": (order("softsort", scores=zeros(2, 5, dtype="int64")), r"softsort: scores has dtype int64"),
    "integer tokens": (order("softsort", x=zeros(2, 5, 3, dtype="int32")), r"softsort: x has dtype int32"),
    "integer scores of an order": (
        lambda: tokendyn.token_order(zeros(2, 5, dtype="int64")),
        r"token_order: scores has dtype int64",
    ),
    "a list to order": (
        lambda: tokendyn.token_order(zeros(2, 5)).apply([[[1.0]]]),
        r"Order.apply: x is builtins\.list, expected an array of NumPy, PyTorch or JAX; convert it first",
    ),
    "a list": (scan(u=[[[1.0]]]), r"u is builtins\.list, expected an array of NumPy, PyTorch or JAX; convert it first"),
    "a list of scores": (
        lambda: tokendyn.token_order([[1.0, 2.0]]),
        r"token_order: scores is builtins\.list, expected an array",
    ),
    "half precision on NumPy": (
        order("softsort_matrix", scores=zeros(2, 5, dtype="float16")),
        r"NumPy backend computes in float32 and float64, got float16; convert with .astype\('float32'\)",
    ),
    "half precision scan on NumPy": (
        lambda: tokendyn.selective_scan(**{k: np.float16(v) for k, v in inputs("selective_scan").items()}),
        r"NumPy backend computes in float32 and float64, got float16",
    ),
}

# ------------------------------------------------------------------------------------------------------------ options

BAD_TAUS = (0, 0.0, -1.0, float("inf"), float("nan"), True, "1", None, np.float32(1))

OPTIONS = {
    "unknown engine": (scan(engine="fastest"), r"engine is 'fastest', expected one of 'auto', "),
    "channel beyond the last": (attention(channel=8), r"hidden_attention: channel is 8, expected 0 to 7"),
    "negative channel": (attention(channel=-1), r"channel is -1, expected 0 to 7"),
    "channel and aggregate": (
        attention(channel=0, aggregate="mean"),
        r"channel and aggregate were both given, expected at most one",
    ),
    "unknown aggregate": (attention(aggregate="sum"), r"aggregate is 'sum', expected one of None, 'mean', 'mean_abs'"),
    "empty rows": (attention(rows=(3, 3)), r"rows is \(3, 3\), expected 0 <= start < stop <= L = 32"),
    "rows beyond the end": (attention(rows=(0, 33)), r"rows is \(0, 33\), expected 0 <= start < stop <= L = 32"),
    "unknown method": (
        lambda: tokendyn.token_order(zeros(2, 5), "sort"),
        r"method is 'sort', expected one of 'softsort', 'hard', 'straight_through'",
    ),
    **{
        f"tau {tau!r}": (order("softsort", tau=tau), r"softsort: tau is .*, expected a finite Python number above 0")
        for tau in BAD_TAUS
    },
    "power 0": (order("softsort_matrix", power=0), r"power is 0, expected a finite Python number above 0"),
    "tau of an order": (lambda: tokendyn.token_order(zeros(2, 5), tau=-1.0), r"token_order: tau is -1\.0"),
    "unknown regime": (projections(regime="neutral"), r"regime is 'neutral', expected one of 'free', 'positive'"),
    "unknown form": (projections(form="code"), r"form is 'code', expected one of 'paper', 'published_code'"),
    "random inputs of nothing": (
        lambda: tokendyn.random_inputs("selective_scam"),
        r"random_inputs: operation is 'selective_scam', expected one of ",
    ),
    "random inputs of unknown size": (
        lambda: tokendyn.random_inputs("softsort", state=4),
        r"softsort has no option 'state', expected some of batch, channels, length",
    ),
    "random inputs of unknown dtype": (
        lambda: tokendyn.random_inputs("softsort", dtype="int64"),
        r"dtype is 'int64', expected one of 'float16', 'bfloat16', 'float32', 'float64'",
    ),
    "random inputs in a dtype that NumPy has not": (
        lambda: tokendyn.random_inputs("softsort", dtype="bfloat16"),
        r"dtype is 'bfloat16', but numpy computes in float64 and float32; .* tokendyn.use\('torch'\) or ",
    ),
}

# ------------------------------------------------------------------------------------------- regimes, values

REGIMES = {
    "more states than channels": (
        lambda: tokendyn.io_projections(zeros(5, 4), diagonal=zeros(5), regime="positive"),
        r"N = 5 exceeds D = 4; .*choose a smaller state or regime='free'",
    ),
    "free with a diagonal": (
        projections(diagonal=zeros(4)),
        r"regime 'free' takes weight_B and weight_C and no diagonal",
    ),
    "free without weight_C": (projections(weight_C=None), r"regime 'free' takes weight_B and weight_C and no diagonal"),
    "positive with weight_C": (
        projections(diagonal=zeros(4), regime="positive"),
        r"regime 'positive' takes weight_B and diagonal and no weight_C",
    ),
    "mixed without a diagonal": (
        projections(weight_C=None, regime="mixed"),
        r"regime 'mixed' takes weight_B and diagonal and no weight_C",
    ),
}


def spoilt(value: float) -> np.ndarray:
    values = zeros(2, 5)
    values[1, 3] = value
    return values


VALUES = {
    f"{operation}, {value}": (
        order(operation, scores=spoilt(value)),
        rf"{operation}: scores\[1, 3\] is {value}, expected finite values \(1 of 10 are not\); look for the layer",
    )
    for operation in (
        "softsort",
        "softsort_restore",
        "softsort_matrix",
        "effective_tokens",
        "hard_order",
        "token_order",
    )
    for value in (float("nan"), float("-inf"))
}

TABLE: list[Any] = [
    pytest.param(error, call, message, id=f"{error.__name__}-{name.replace(' ', '_')}")
    for error, rows in (
        (ShapeError, SHAPES),
        (DTypeError, DTYPES),
        (OptionError, OPTIONS),
        (RegimeError, REGIMES),
        (NonFiniteError, VALUES),
    )
    for name, (call, message) in rows.items()
]


@pytest.mark.parametrize(("error", "call", "message"), TABLE)
def test_bad_input(error: type[TokendynError], call: Callable[[], Any], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        call()
    assert type(raised.value) is error


# --------------------------------------------------------------------------------------- the same on every backend


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_on_every_backend(backend: str) -> None:
    """Checks that look at values, and those that the backends make themselves."""
    array = load_backend(backend).from_numpy
    with tokendyn.backend(backend):
        arguments = tokendyn.random_inputs("selective_scan")
    with pytest.raises(ShapeError, match="lengths holds -1"):
        tokendyn.selective_scan(**arguments, lengths=array(np.array([-1, 3], np.int32)))
    with pytest.raises(OptionError, match="engine is 'fastest', expected one of 'auto'"):
        tokendyn.selective_scan(**arguments, engine="fastest")
    with pytest.raises(NonFiniteError, match=r"scores\[1, 3\] is nan"):
        tokendyn.hard_order(array(spoilt(float("nan"))))
    with pytest.raises(DTypeError, match="u has dtype int32, expected a real floating dtype"):
        tokendyn.selective_scan(**{**arguments, "u": array(np.zeros((2, 8, 32), np.int32))})
    for other in set(BACKENDS) - {backend}:
        foreign = load_backend(other).from_numpy(np.zeros((2, 8, 32), np.float32))
        with pytest.raises(DTypeError, match=rf"u is a {backend} array but delta is a {other} array"):
            tokendyn.selective_scan(**{**arguments, "delta": foreign})


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_half_precision_values_are_looked_at_too(backend: str) -> None:
    for dtype in ("bfloat16", "float16"):
        scores = load_backend(backend).from_numpy(spoilt(float("nan")), dtype)
        with pytest.raises(NonFiniteError, match=r"scores\[1, 3\] is nan"):
            tokendyn.softsort_matrix(scores)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"power": 2}], ids=["scans", "dense"])
def test_values_that_cannot_be_seen_give_nan_and_no_order(dtype: str, value: float, options: Arguments) -> None:
    """Under a tracer nothing can be raised; then NaN must come out in that sequence, and in no other."""
    import jax
    import torch

    scores, x = spoilt(value), np.ones((2, 5, 3))
    for name in ("softsort", "softsort_restore", "softsort_matrix", "effective_tokens"):
        operation = functools.partial(getattr(tokendyn, name), **options)
        arrays = (scores, x) if name in ("softsort", "softsort_restore") else (scores,)
        traced = {
            "jax": jax.jit(operation)(*(load_backend("jax").from_numpy(v, dtype) for v in arrays)),
            "torch": torch.func.vmap(lambda *v, f=operation: f(*(w[None] for w in v))[0])(
                *(load_backend("torch").from_numpy(v, dtype) for v in arrays)
            ),
        }
        for backend, result in traced.items():
            values = load_backend(backend).to_numpy(result)
            assert np.isfinite(values[0]).all(), (backend, name)
            assert np.isnan(values[1]).all(), (backend, name)


@pytest.mark.parametrize("move", ["take_tokens", "put_tokens"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_hard_order_that_cannot_be_had_moves_nothing(value: float, move: str) -> None:
    import jax
    import torch

    def moved(s: Any, x: Any) -> Any:
        return getattr(tokendyn, move)(x, tokendyn.hard_order(s))

    arrays = (spoilt(value), np.ones((2, 5, 3)))
    for backend, result in {
        "jax": jax.jit(moved)(*(load_backend("jax").from_numpy(v) for v in arrays)),
        "torch": torch.func.vmap(lambda *v: moved(*(w[None] for w in v))[0])(*map(torch.from_numpy, arrays)),
    }.items():
        assert np.isfinite(np.asarray(result)[0]).all(), backend
        assert np.isnan(np.asarray(result)[1]).all(), backend


WRONG_INDICES = np.array([[1, 0, 2, 4, 3], [0, 1, 1, -1, 5]])


@pytest.mark.parametrize("move", ["take_tokens", "put_tokens"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_indices_that_are_no_permutation_are_refused_on_every_backend(backend: str, move: str) -> None:
    make = load_backend(backend).from_numpy
    with pytest.raises(ShapeError, match=rf"{move}: indices\[1\] holds -1, expected a permutation of 0 to L - 1 = 4"):
        getattr(tokendyn, move)(make(np.ones((2, 5, 3))), make(WRONG_INDICES))


@pytest.mark.parametrize("move", ["take_tokens", "put_tokens"])
@pytest.mark.parametrize("tracer", ["jit", "vmap", "compile"])
def test_indices_that_cannot_be_seen_give_nan_where_they_name_no_token(tracer: str, move: str) -> None:
    import jax
    import torch

    x = np.arange(30.0).reshape(2, 5, 3)
    operation = getattr(tokendyn, move)
    if tracer == "jit":
        moved = np.asarray(jax.jit(operation)(*map(load_backend("jax").from_numpy, (x, WRONG_INDICES))))
    else:
        tensors = torch.from_numpy(x), torch.from_numpy(WRONG_INDICES)
        if tracer == "vmap":
            moved = torch.func.vmap(lambda *v: operation(*(w[None] for w in v))[0])(*tensors).numpy()
        else:
            moved = torch.compile(operation, fullgraph=True, backend="eager")(*tensors).numpy()
    order = WRONG_INDICES[0]
    right = np.take_along_axis(x[:1], (order if move == "take_tokens" else order.argsort())[None, :, None], axis=1)
    np.testing.assert_array_equal(moved[0], right[0])
    nothing = [3, 4] if move == "take_tokens" else [2, 3, 4]  # no index is 2, 3 or 4; 1 stands there twice
    assert np.isnan(moved[1, nothing]).all()
    kept = np.setdiff1d(range(5), nothing)
    assert np.isfinite(moved[1, kept]).all()
    assert set(moved[1, kept].ravel()) <= set(x[1].ravel())  # nothing of another sequence


def test_an_engine_that_cannot_take_a_call_says_why() -> None:
    with tokendyn.backend("torch"):
        arguments = tokendyn.random_inputs("selective_scan", with_state=True)
    with pytest.raises(EngineError, match=r"mamba_ssm.*initial_state|mamba_ssm.*CUDA|mamba_ssm.*not installed"):
        tokendyn.selective_scan(**arguments, engine="mamba_ssm")


def test_messages_say_what_was_given_and_what_to_do() -> None:
    """Every message in this file's table names its operation and the offending argument or value."""
    for row in TABLE:
        error, call, _ = row.values
        with pytest.raises(error) as raised:
            call()
        text = str(raised.value)
        assert any(word in text for word in ("expected", "takes", "give both", "needs", "computes in")), text
        assert ":" in text or " on NumPy" in text, text
