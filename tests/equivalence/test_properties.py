"""What must hold whatever the numbers: identities that tie the operations to each other, on every backend."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tokendyn
from tokendyn._dispatch import load_backend
from tokendyn._tolerances import tolerance

from .compare import normwise

pytestmark = [
    pytest.mark.parametrize("backend", ["numpy", "torch", "jax"]),
    pytest.mark.usefixtures("quick_compilation"),
]

VALUES = tolerance("selective_scan", "float64").values
SIZES = st.sampled_from([{"batch": 1, "channels": 2, "state": 1}, {"batch": 2, "channels": 4, "state": 3}])
SEEDS = st.integers(0, 2**32 - 1)
LENGTH = 12
few = settings(max_examples=8)
#: JAX compiles anew for every shape and every option: there the values vary and the rest is this.
COMPILED: dict[str, Any] = {
    **{"batch": 2, "channels": 4, "state": 3, "groups": 2, "scalar_a": False, "with_z": True, "with_d": True},
    **{"cut": 5, "cuts": (0, 5, LENGTH), "packed": True, "padded": True},
    **{"power": 1, "ascending": True, "method": "straight_through", "form": "scale_matched"},
}


@pytest.fixture(autouse=True)
def _leave_out(backend: str, backends: tuple[str, ...]) -> None:
    if backend not in backends:
        pytest.skip(f"--backends leaves out {backend}")


def inputs(backend: str, operation: str, seed: int, **options: Any) -> dict[str, Any]:
    with tokendyn.backend(backend):
        return tokendyn.random_inputs(operation, seed=seed, dtype="float64", **options)


def settle(backend: str, **drawn: Any) -> Any:
    """What was drawn, as it is used on this backend; a single value alone, several as a dictionary."""
    if backend == "jax":
        drawn = {name: COMPILED.get(name, value) for name, value in drawn.items()}
    return drawn if len(drawn) > 1 else next(iter(drawn.values()))


def array(backend: str, values: Any) -> Any:
    return load_backend(backend).from_numpy(np.asarray(values))


def numbers(backend: str, array: Any) -> np.ndarray:
    return load_backend(backend).to_numpy(array)


def tokens(arguments: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    """The arguments of a scan, cut to tokens start..stop."""
    by_token = ("u", "delta", "B", "C", "z", "seq_idx")
    return {name: value[..., start:stop] if name in by_token else value for name, value in arguments.items()}


@st.composite
def scans(draw: st.DrawFn) -> dict[str, Any]:
    """Options of ``random_inputs`` for a scan."""
    sizes = draw(SIZES)
    return {
        "seed": draw(SEEDS),
        "length": LENGTH,
        **sizes,
        "scalar_a": draw(st.booleans()),
        "groups": draw(st.sampled_from([None, sizes["channels"] // 2])),
        "with_z": draw(st.booleans()),
        "with_d": draw(st.booleans()),
    }


# ------------------------------------------------------------------------------------------------------------- scans


@few
@given(options=scans(), cut=st.sampled_from([1, 5, LENGTH - 1]))
def test_splitting_a_sequence_and_carrying_the_state_is_one_pass(
    backend: str, options: dict[str, Any], cut: int
) -> None:
    options, cut = settle(backend, **options), settle(backend, cut=cut)
    arguments = inputs(backend, "selective_scan", **options, with_state=True)
    whole, last = tokendyn.selective_scan(**arguments, return_last_state=True)
    first, carried = tokendyn.selective_scan(**tokens(arguments, 0, cut), return_last_state=True)
    rest = {**tokens(arguments, cut, LENGTH), "initial_state": carried}
    second, end = tokendyn.selective_scan(**rest, return_last_state=True)
    parts = np.concatenate([numbers(backend, first), numbers(backend, second)], axis=-1)
    assert normwise(parts, numbers(backend, whole)) <= VALUES
    assert normwise(numbers(backend, end), numbers(backend, last)) <= VALUES


@few
@given(options=scans(), at=st.sampled_from([0, 4]))
def test_what_is_not_a_number_stays_in_its_packed_sequence(backend: str, options: dict[str, Any], at: int) -> None:
    arguments = inputs(backend, "selective_scan", **settle(backend, **options), with_state=True)
    batch = arguments["u"].shape[0]
    arguments["seq_idx"] = array(backend, np.tile(np.arange(LENGTH) >= 5, (batch, 1)).astype(np.int64))
    clean, last = tokendyn.selective_scan(**arguments, return_last_state=True)
    for name in ("u", "delta", "B", "C"):
        spoiled = numbers(backend, arguments[name]).copy()
        spoiled[..., at] = np.nan
        arguments[name] = array(backend, spoiled)
    y, end = tokendyn.selective_scan(**arguments, return_last_state=True)
    assert np.isnan(numbers(backend, y)[..., at:5]).all()
    for found, wanted in ((y[..., 5:], clean[..., 5:]), (end, last)):
        assert np.array_equal(numbers(backend, found), numbers(backend, wanted))
    of_attention = ("delta", "A", "B", "C", "delta_bias", "delta_softplus", "seq_idx")
    attention = tokendyn.hidden_attention(**{name: arguments[name] for name in of_attention if name in arguments})
    second = np.arange(LENGTH) >= 5
    seen = np.tril(second[:, None] == second)
    assert (numbers(backend, attention)[..., ~seen] == 0).all()


@few
@given(options=scans(), packed=st.booleans(), padded=st.booleans())
def test_attention_times_input_plus_skip_is_the_scan(
    backend: str, options: dict[str, Any], packed: bool, padded: bool
) -> None:
    padded = settle(backend, padded=padded)
    options = {**settle(backend, **options, packed=packed, padded=padded), "with_d": True, "with_z": False}
    arguments = inputs(backend, "selective_scan", **options)
    y = numbers(backend, tokendyn.selective_scan(**arguments))
    u, skip = (numbers(backend, arguments.pop(name)) for name in ("u", "D"))
    attention = numbers(backend, tokendyn.hidden_attention(**arguments))
    assert np.array_equal(attention, np.tril(attention))
    skipped = skip[:, None] * u
    if padded:
        lengths = numbers(backend, arguments["lengths"])
        skipped = skipped * (np.arange(LENGTH) < lengths[:, None])[:, None, :]
    assert normwise(np.einsum("bdlj,bdj->bdl", attention, u) + skipped, y) <= VALUES


@few
@given(options=scans(), length=st.sampled_from([0, 3, LENGTH - 1, LENGTH]))
def test_right_padding_changes_nothing_before_it(backend: str, options: dict[str, Any], length: int) -> None:
    """What stands in the padding reaches no real token, bit for bit. Nor does its being there, up to rounding: arrays
    of another length are cut into vector registers elsewhere, and vectorised exponentials round differently there.
    """
    options, length = settle(backend, **options), 5 if backend == "jax" and length else length
    arguments = inputs(backend, "selective_scan", **options, with_state=True)
    lengths = array(backend, np.full(arguments["u"].shape[0], length, np.int32))
    y, last = tokendyn.selective_scan(**arguments, lengths=lengths, return_last_state=True)
    rubbish = {
        name: array(backend, np.where(np.arange(LENGTH) < length, numbers(backend, arguments[name]), 1e3))
        for name in ("u", "delta", "B", "C")
    }
    y_rubbish, last_rubbish = tokendyn.selective_scan(
        **{**arguments, **rubbish}, lengths=lengths, return_last_state=True
    )
    assert np.array_equal(numbers(backend, y), numbers(backend, y_rubbish))
    assert np.array_equal(numbers(backend, last), numbers(backend, last_rubbish))
    assert not numbers(backend, y)[..., length:].any()
    if length == 0:
        assert np.array_equal(numbers(backend, last), numbers(backend, arguments["initial_state"]))
        return
    alone, alone_last = tokendyn.selective_scan(**tokens(arguments, 0, length), return_last_state=True)
    assert normwise(numbers(backend, y)[..., :length], numbers(backend, alone)) <= VALUES
    assert normwise(numbers(backend, last), numbers(backend, alone_last)) <= VALUES


@few
@given(options=scans(), cuts=st.sampled_from([(0, 1, 5, 12), (0, 6, 12), (0, 11, 12)]))
def test_packed_sequences_are_separate_sequences(backend: str, options: dict[str, Any], cuts: tuple[int, ...]) -> None:
    options, cuts = settle(backend, **options), settle(backend, cuts=cuts)
    arguments = inputs(backend, "selective_scan", **options)
    spans = list(itertools.pairwise(cuts))
    index = np.repeat(np.arange(len(spans), dtype=np.int32), np.diff(cuts))
    seq_idx = array(backend, np.broadcast_to(index, (arguments["u"].shape[0], LENGTH)).copy())
    packed, last = tokendyn.selective_scan(**arguments, seq_idx=seq_idx, return_last_state=True)
    alone = [tokendyn.selective_scan(**tokens(arguments, *span), return_last_state=True) for span in spans]
    separate = np.concatenate([numbers(backend, y) for y, _ in alone], axis=-1)
    assert normwise(numbers(backend, packed), separate) <= VALUES
    assert normwise(numbers(backend, last), numbers(backend, alone[-1][1])) <= VALUES


@few
@given(options=scans(), factors=st.tuples(st.floats(-3, 3), st.floats(-3, 3)), other=SEEDS)
def test_the_scan_is_linear_in_its_input(
    backend: str, options: dict[str, Any], factors: tuple[float, float], other: int
) -> None:
    arguments = inputs(backend, "selective_scan", **settle(backend, **options))
    u = arguments.pop("u")
    v = array(backend, np.random.default_rng(other).standard_normal(tuple(u.shape)))
    scan = [numbers(backend, tokendyn.selective_scan(x, **arguments)) for x in (u, v)]
    both = tokendyn.selective_scan(factors[0] * u + factors[1] * v, **arguments)
    expected = factors[0] * scan[0] + factors[1] * scan[1]
    scale = sum(abs(f) * np.linalg.norm(y) for f, y in zip(factors, scan, strict=True))
    assert np.linalg.norm(numbers(backend, both) - expected) <= VALUES * scale


def test_overflow_is_seen_and_stays_where_it_is(backend: str) -> None:
    """h_l = e^{2l}: float32 ends at token 44. From there on no finite number comes out, and nowhere else any other."""
    length = 60
    step = np.zeros((2, 1, length))
    step[0] = 2.0  # the first sequence grows, the second adds up
    arguments = {
        "u": np.ones((2, 1, length)),
        "delta": step + (step == 0) * 1e-3,
        "A": np.ones((1, 1)),
        "B": np.ones((2, 1, length)),
        "C": np.ones((2, 1, length)),
    }
    exact = tokendyn.core.selective_scan(**arguments)
    arrays = {name: load_backend(backend).from_numpy(v, "float32") for name, v in arguments.items()}
    with np.errstate(over="ignore"):
        y = numbers(backend, tokendyn.selective_scan(**arrays))
    representable = np.abs(exact) < np.finfo(np.float32).max
    assert not representable[0, 0, -1]
    assert np.array_equal(np.isfinite(y), representable)
    np.testing.assert_allclose(y[representable], exact[representable], rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------ orders


@st.composite
def scores(draw: st.DrawFn) -> np.ndarray:
    """(2, 9) scores of any scale; half of the time with ties."""
    rng = np.random.default_rng(draw(SEEDS))
    values = rng.standard_normal((2, 9))
    return (np.round(values) if draw(st.booleans()) else values) * draw(st.sampled_from([1e-3, 1.0, 1e3]))


TAUS = st.sampled_from([1e-3, 0.1, 1.0, 10.0])
POWERS = st.sampled_from([1, 1.5, 2, 3])


@few
@given(s=scores(), seed=SEEDS, ascending=st.booleans(), method=st.sampled_from(["hard", "straight_through"]))
def test_permuting_and_restoring_is_the_identity(
    backend: str, s: np.ndarray, seed: int, ascending: bool, method: str
) -> None:
    ascending, method = settle(backend, ascending=ascending), settle(backend, method=method)
    x = array(backend, np.random.default_rng(seed).standard_normal((2, 9, 3)))
    order = tokendyn.token_order(array(backend, s), method, ascending=ascending)
    assert np.array_equal(numbers(backend, order.restore(order.apply(x))), numbers(backend, x))
    expected = np.argsort(s if ascending else -s, axis=1, kind="stable")
    assert np.array_equal(numbers(backend, order.indices), expected)
    matrix = numbers(backend, order.matrix())
    assert np.array_equal(matrix @ numbers(backend, x), numbers(backend, order.apply(x)))


@few
@given(s=scores(), tau=TAUS, power=POWERS, ascending=st.booleans())
def test_rows_of_softsort_sum_to_one(backend: str, s: np.ndarray, tau: float, power: float, ascending: bool) -> None:
    options = settle(backend, tau=tau, power=power, ascending=ascending)
    matrix = numbers(backend, tokendyn.softsort_matrix(array(backend, s), **options))
    assert (matrix >= 0).all()
    assert np.abs(matrix.sum(-1) - 1.0).max() <= 1e-14
    effective = numbers(backend, tokendyn.effective_tokens(array(backend, s), **options))
    assert effective.min() >= 1.0 - 1e-12
    assert effective.max() <= s.shape[1] * (1.0 + 1e-12)


@few
@given(s=scores(), seed=SEEDS, tau=TAUS, power=POWERS, ascending=st.booleans())
def test_softsort_is_its_matrix(
    backend: str, s: np.ndarray, seed: int, tau: float, power: float, ascending: bool
) -> None:
    options = settle(backend, tau=tau, power=power, ascending=ascending)
    x = np.random.default_rng(seed).standard_normal((2, 9, 3))
    order = tokendyn.token_order(array(backend, s), "softsort", **options)
    matrix = numbers(backend, order.matrix())
    assert normwise(numbers(backend, order.apply(array(backend, x))), matrix @ x) <= VALUES
    back = matrix.swapaxes(1, 2) @ x / matrix.sum(1)[:, :, None]
    assert normwise(numbers(backend, order.restore(array(backend, x))), back) <= VALUES


@few
@given(seed=SEEDS, power=st.sampled_from([1, 2]), ascending=st.booleans())
def test_as_tau_vanishes_softsort_is_the_permutation(backend: str, seed: int, power: float, ascending: bool) -> None:
    """Scores a unit apart at tau = 1/100: the weights beside the largest are below e^-100."""
    power, ascending = settle(backend, power=power), settle(backend, ascending=ascending)
    s = array(backend, np.stack([np.random.default_rng([seed, i]).permutation(9) for i in range(2)]).astype(float))
    soft = tokendyn.token_order(s, "softsort", tau=0.01, power=power, ascending=ascending)
    hard = tokendyn.token_order(s, "hard", ascending=ascending)
    x = array(backend, np.random.default_rng(seed).standard_normal((2, 9, 3)))
    assert normwise(numbers(backend, soft.apply(x)), numbers(backend, hard.apply(x))) <= VALUES
    assert normwise(numbers(backend, soft.restore(x)), numbers(backend, hard.restore(x))) <= VALUES
    assert np.abs(numbers(backend, soft.matrix()) - numbers(backend, hard.matrix())).max() <= 1e-40


# -------------------------------------------------------------------------------------------------- input-output maps


@few
@given(
    seed=SEEDS,
    regime=st.sampled_from(["positive", "negative", "mixed"]),
    form=st.sampled_from(["paper", "published_code", "scale_matched"]),
    state=st.sampled_from([1, 3, 4]),
)
def test_regimes_have_the_signs_they_promise(backend: str, seed: int, regime: str, form: str, state: int) -> None:
    """Sylvester's law, seen through the spectrum."""
    state, form = settle(backend, state=state), settle(backend, form=form)
    made = inputs(backend, "io_projections", seed, state=state, channels=7, regime=regime, form=form)
    spectrum = tokendyn.io_spectrum(*tokendyn.io_projections(**made))
    eigenvalues = numbers(backend, spectrum.eigenvalues)
    positive = {"positive": state, "negative": 0, "mixed": (state + 1) // 2}[regime]
    assert np.abs(eigenvalues.imag).max() <= 1e-12
    assert (eigenvalues.real > 1e-6).sum() == positive
    assert (eigenvalues.real < -1e-6).sum() == state - positive
    # M is symmetric: its symmetric part has the same eigenvalues, and zeros.
    symmetric = numbers(backend, spectrum.symmetric)
    padded = np.sort(np.concatenate([eigenvalues.real, np.zeros(len(symmetric) - state)]))[::-1]
    assert np.abs(symmetric - padded).max() <= 1e-12


@few
@given(seed=SEEDS, state=st.sampled_from([1, 3, 5]), channels=st.sampled_from([2, 7]))
def test_spectrum_is_that_of_the_whole_matrix(backend: str, seed: int, state: int, channels: int) -> None:
    state = settle(backend, state=state)
    made = inputs(backend, "io_spectrum", seed, state=state, channels=channels)
    S_B, S_C = (numbers(backend, made[name]) for name in ("S_B", "S_C"))
    M = S_C.T @ S_B
    spectrum = tokendyn.io_spectrum(**made)

    def by_size(values: np.ndarray, count: int) -> np.ndarray:
        kept = values[np.argsort(-np.abs(values), kind="stable")[:count]]
        return np.sort_complex(np.round(kept.astype(complex), 10))

    eigenvalues = numbers(backend, spectrum.eigenvalues)
    symmetric = numbers(backend, spectrum.symmetric)
    assert np.abs(by_size(eigenvalues, 99) - by_size(np.linalg.eigvals(M), len(eigenvalues))).max() <= 1e-9
    whole = np.linalg.eigvalsh((M + M.T) / 2)
    assert np.abs(by_size(symmetric, 99) - by_size(whole, len(symmetric))).max() <= 1e-9
