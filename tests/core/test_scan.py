"""The spec of the selective scan: against formulas that do not step through time, and its reverse pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tokendyn import core

from .gradients import check_transpose, check_vjp
from .scans import of_tokens, scan_arguments

EVERY = "u delta A B C D z delta_bias initial_state"
PACKED = np.array([[0, 0, 0, 1, 1, 1, 2, 2, 2], [5, 5, 5, 5, 5, 5, 5, 5, 4]])
PADDED = np.array([9, 5])


def dense_scan(a: dict[str, Any]) -> np.ndarray:
    """The scan as a sum over all earlier tokens, with exponents from differences of cumulative sums."""
    step = np.logaddexp(0.0, a["delta"] + a["delta_bias"][:, None])
    elapsed = np.cumsum(step, axis=-1)
    gap = elapsed[..., :, None] - elapsed[..., None, :]
    causal = np.tril(np.ones(gap.shape[-2:]))
    decay = np.exp(np.where(causal, gap, 0.0)[..., None] * a["A"][:, None, None, :])
    attention = np.einsum("bnl,bdljn,bnj,lj,bdj->bdlj", a["C"], decay, a["B"], causal, step)
    started = np.exp(elapsed[..., None] * a["A"][:, None, :]) * a["initial_state"][:, :, None, :]
    y = np.einsum("bdlj,bdj->bdl", attention, a["u"]) + np.einsum("bnl,bdln->bdl", a["C"], started)
    return (y + a["D"][:, None] * a["u"]) * a["z"] / (1.0 + np.exp(-a["z"]))


@pytest.mark.parametrize("length", [1, 2, 17])
def test_equals_the_sum_over_all_earlier_tokens(length: int) -> None:
    arguments = scan_arguments(np.random.default_rng(length), length=length)
    want = dense_scan(arguments)
    got = core.selective_scan(**arguments, delta_softplus=True)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rate", [-0.7, 0.3])
def test_constant_inputs_give_a_geometric_series(rate: float) -> None:
    step, length = 0.25, 30
    ones = np.ones((1, 1, length))
    y, last = core.selective_scan(ones, step * ones, np.array([[rate]]), ones, 2.0 * ones, return_last_state=True)
    r = np.exp(step * rate)
    h = step * (1 - r ** np.arange(1, length + 1)) / (1 - r)
    np.testing.assert_allclose(y[0, 0], 2.0 * h, rtol=1e-13)
    np.testing.assert_allclose(last, [[[h[-1]]]], rtol=1e-13)


def test_scalar_decay_and_groups_stand_for_repeated_entries() -> None:
    rng = np.random.default_rng(7)
    grouped = scan_arguments(rng, channels=6, groups=3, scalar=True)
    channel_wise = {name: np.repeat(grouped[name], 2, axis=1) for name in ("B", "C")}
    spread = {**grouped, **channel_wise, "A": np.tile(grouped["A"][:, None], (1, 3))}
    column = {**grouped, "A": grouped["A"][:, None]}
    want = core.selective_scan(**spread, delta_softplus=True)
    for arguments in (grouped, column):
        np.testing.assert_allclose(core.selective_scan(**arguments, delta_softplus=True), want, rtol=1e-14)


@pytest.mark.parametrize("last_state", [False, True])
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("cut", ["whole", "packed and padded"])
def test_gradients(last_state: bool, scalar: bool, cut: str) -> None:
    rng = np.random.default_rng([last_state, scalar, len(cut)])
    arguments = scan_arguments(rng, scalar=scalar, groups=2)
    options: dict[str, Any] = {"delta_softplus": True, "return_last_state": last_state}
    if cut != "whole":
        options |= {"seq_idx": PACKED, "lengths": PADDED}
    check_vjp("selective_scan", arguments, EVERY, rng, **options)


def test_gradients_with_required_arguments_only() -> None:
    rng = np.random.default_rng(1)
    arguments = scan_arguments(rng, length=5)
    required = {name: arguments[name] for name in ("u", "delta", "A", "B", "C")}
    check_vjp("selective_scan", required, "u delta A B C", rng)
    check_vjp("selective_scan", {**required, "A": required["A"][:, :1]}, "u delta A B C", rng)


def test_a_missing_member_of_dout_counts_as_zero() -> None:
    rng = np.random.default_rng(2)
    arguments = scan_arguments(rng)
    options: dict[str, Any] = {"delta_softplus": True, "return_last_state": True}
    dy, dlast = rng.standard_normal(arguments["u"].shape), rng.standard_normal(arguments["initial_state"].shape)
    both, first, second = (
        core.selective_scan_vjp(d, **arguments, **options) for d in ((dy, dlast), (dy, None), (None, dlast))
    )
    for name in EVERY.split():
        np.testing.assert_allclose(first[name] + second[name], both[name], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("linear", ["C", "z"])
def test_shapes_of_gradients_follow_the_arguments(linear: str) -> None:
    arguments = scan_arguments(np.random.default_rng(3))
    dy = np.ones(arguments["u"].shape)
    assert core.selective_scan_vjp(dy, **arguments)[linear].shape == arguments[linear].shape


def test_reverse_pass_is_the_transpose_where_the_scan_is_linear() -> None:
    rng = np.random.default_rng(4)
    arguments = scan_arguments(rng, length=63)
    options: dict[str, Any] = {"delta_softplus": True}
    without_state = {**arguments, "initial_state": np.zeros_like(arguments["initial_state"])}
    check_transpose("selective_scan", without_state, "u", rng, **options)
    without_input = {**arguments, "u": np.zeros_like(arguments["u"])}
    check_transpose("selective_scan", without_input, "initial_state", rng, **options, return_last_state=True)


def test_splitting_and_carrying_the_state_back_is_one_reverse_pass() -> None:
    rng = np.random.default_rng(5)
    arguments = scan_arguments(rng, length=12)
    options: dict[str, Any] = {"delta_softplus": True, "return_last_state": True}
    y, last = core.selective_scan(**arguments, **options)
    dy, dlast = rng.standard_normal(y.shape), rng.standard_normal(last.shape)
    whole = core.selective_scan_vjp((dy, dlast), **arguments, **options)

    head, tail = of_tokens(arguments, 0, 5), of_tokens(arguments, 5, 12)
    y_head, carried = core.selective_scan(**head, **options)
    tail["initial_state"] = carried
    y_tail, end = core.selective_scan(**tail, **options)
    np.testing.assert_allclose(np.concatenate([y_head, y_tail], -1), y, rtol=1e-12)
    np.testing.assert_allclose(end, last, rtol=1e-12)
    after = core.selective_scan_vjp((dy[..., 5:], dlast), **tail, **options)
    before = core.selective_scan_vjp((dy[..., :5], after["initial_state"]), **head, **options)
    for name in ("u", "delta", "B", "C", "z"):
        np.testing.assert_allclose(np.concatenate([before[name], after[name]], -1), whole[name], rtol=1e-10, atol=1e-12)
    for name in ("A", "D", "delta_bias"):
        np.testing.assert_allclose(before[name] + after[name], whole[name], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(before["initial_state"], whole["initial_state"], rtol=1e-10, atol=1e-12)


def test_packed_sequences_are_separate_sequences() -> None:
    rng = np.random.default_rng(6)
    arguments = scan_arguments(rng, batch=1)
    options: dict[str, Any] = {"delta_softplus": True, "return_last_state": True}
    y, last = core.selective_scan(**arguments, **options, seq_idx=PACKED[:1])
    dy, dlast = rng.standard_normal(y.shape), rng.standard_normal(last.shape)
    packed = core.selective_scan_vjp((dy, dlast), **arguments, **options, seq_idx=PACKED[:1])
    for start, stop in ((0, 3), (3, 6), (6, 9)):
        alone = of_tokens(arguments, start, stop)
        if start:
            alone["initial_state"] = np.zeros_like(alone["initial_state"])
        y_alone, last_alone = core.selective_scan(**alone, **options)
        np.testing.assert_array_equal(y[..., start:stop], y_alone)
        dout = (dy[..., start:stop], dlast if stop == 9 else None)
        gradients = core.selective_scan_vjp(dout, **alone, **options)
        for name in ("u", "delta", "B", "C", "z"):
            np.testing.assert_array_equal(packed[name][..., start:stop], gradients[name])
        if start == 0:
            np.testing.assert_array_equal(packed["initial_state"], gradients["initial_state"])
        if stop == 9:
            np.testing.assert_array_equal(last, last_alone)


def test_padded_sequences_are_trimmed_sequences() -> None:
    rng = np.random.default_rng(8)
    arguments = scan_arguments(rng, batch=3)
    lengths = np.array([9, 4, 0])
    options: dict[str, Any] = {"delta_softplus": True, "return_last_state": True}
    for name in ("u", "delta", "B", "C", "z"):
        arguments[name][1, ..., 4:] = np.nan  # what stands in the padding must not matter
        arguments[name][2] = np.inf
    y, last = core.selective_scan(**arguments, **options, lengths=lengths)
    dy, dlast = rng.standard_normal(y.shape), rng.standard_normal(last.shape)
    padded = core.selective_scan_vjp((dy, dlast), **arguments, **options, lengths=lengths)
    for entry, length in enumerate(lengths):
        assert not y[entry, :, length:].any()
        assert not any(padded[name][entry, ..., length:].any() for name in ("u", "delta", "B", "C", "z"))
        if length == 0:
            np.testing.assert_array_equal(last[entry], arguments["initial_state"][entry])
            np.testing.assert_array_equal(padded["initial_state"][entry], dlast[entry])
            continue
        alone = of_tokens(arguments, 0, length, entry)
        y_alone, last_alone = core.selective_scan(**alone, **options)
        np.testing.assert_array_equal(y[entry, :, :length], y_alone[0])
        np.testing.assert_array_equal(last[entry], last_alone[0])
        dout = (dy[entry : entry + 1, :, :length], dlast[entry : entry + 1])
        gradients = core.selective_scan_vjp(dout, **alone, **options)
        for name in ("u", "delta", "B", "C", "z"):
            np.testing.assert_array_equal(padded[name][entry, ..., :length], gradients[name][0])


def test_long_memory_keeps_its_digits() -> None:
    """With a step of 1e-6 and A = -1 the state is a plain sum with weights within 1e-3 of 1."""
    length = 500
    u = np.random.default_rng(9).standard_normal((1, 1, length))
    ones = np.ones((1, 1, length))
    y = core.selective_scan(u, 1e-6 * ones, np.array([[-1.0]]), ones, ones)
    weights = np.exp(-1e-6 * (length - 1 - np.arange(length)))
    np.testing.assert_allclose(y[0, 0, -1], 1e-6 * (weights @ u[0, 0]), rtol=1e-12)


def test_huge_steps_forget_at_once() -> None:
    rng = np.random.default_rng(10)
    arguments = scan_arguments(rng, length=6)
    for name in ("D", "z", "delta_bias", "initial_state"):
        del arguments[name]
    arguments["delta"] = np.full_like(arguments["delta"], 1e3)
    arguments["A"] = -10.0 + 0.0 * arguments["A"]
    y = core.selective_scan(**arguments, delta_softplus=True)
    np.testing.assert_allclose(y, 1e3 * arguments["u"] * (arguments["B"] * arguments["C"]).sum(1)[:, None], rtol=1e-13)


@pytest.mark.parametrize("value", [-800.0, -40.0, -1e-9, 0.0, 1e-9, 40.0, 800.0])
def test_softplus_and_its_derivative_keep_their_digits(value: float) -> None:
    ones = np.ones((1, 1, 1))
    arguments = {"u": ones, "delta": value * ones, "A": np.array([[-1.0]]), "B": ones, "C": ones}
    y = core.selective_scan(**arguments, delta_softplus=True)
    softplus = np.logaddexp(np.longdouble(0), np.longdouble(value))
    np.testing.assert_allclose(y.item(), float(softplus), rtol=1e-15)
    gradient = core.selective_scan_vjp(ones, **arguments, delta_softplus=True)["delta"].item()
    sigmoid = 1 / (1 + np.exp(-np.longdouble(value)))
    np.testing.assert_allclose(gradient, float(sigmoid), rtol=4e-15)


def test_infinities_and_nan_travel_on() -> None:
    rng = np.random.default_rng(11)
    arguments = scan_arguments(rng)
    arguments["u"][0, 1, 4] = np.nan
    arguments["u"][1, 2, 3] = np.inf
    y = core.selective_scan(**arguments, delta_softplus=True)
    expected = np.zeros(y.shape, bool)
    expected[0, 1, 4:] = expected[1, 2, 3:] = True
    np.testing.assert_array_equal(~np.isfinite(y), expected)
    growing = {**arguments, "u": np.ones_like(y), "A": 500.0 + 0 * arguments["A"]}
    assert not np.isfinite(core.selective_scan(**growing, delta_softplus=True)[..., -1]).any()


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("groups", [None, 2])
def test_the_scan_is_its_steps_one_after_another(scalar: bool, groups: int | None) -> None:
    arguments = scan_arguments(np.random.default_rng([scalar, groups or 0]), length=6, scalar=scalar, groups=groups)
    want, last = core.selective_scan(**arguments, delta_softplus=True, return_last_state=True)
    state = arguments["initial_state"]
    for l in range(6):
        u, delta, B, C, z = (arguments[name][..., l] for name in ("u", "delta", "B", "C", "z"))
        y, state = core.selective_state_update(
            state, u, delta, arguments["A"], B, C, arguments["D"], z, arguments["delta_bias"], dt_softplus=True
        )
        np.testing.assert_allclose(y, want[..., l], rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(state, last, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("scalar", [False, True])
def test_gradients_of_a_step(scalar: bool) -> None:
    rng = np.random.default_rng([2, scalar])
    scan = scan_arguments(rng, length=1, scalar=scalar, groups=2)
    arguments = {"state": scan["initial_state"], "A": scan["A"], "D": scan["D"], "dt_bias": scan["delta_bias"]}
    arguments |= {"x": scan["u"], "dt": scan["delta"]} | {name: scan[name] for name in ("B", "C", "z")}
    arguments = {name: v[..., 0] if name in ("x", "dt", "B", "C", "z") else v for name, v in arguments.items()}
    check_vjp("selective_state_update", arguments, "state x dt A B C D z dt_bias", rng, dt_softplus=True)
    bare = {name: arguments[name] for name in ("state", "x", "dt", "A", "B", "C")}
    check_vjp("selective_state_update", bare, "state x dt A B C", rng)
