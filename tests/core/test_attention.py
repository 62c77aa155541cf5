"""The spec of hidden attention: what it does to an input is the scan, its options, its gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tokendyn import core

from .gradients import check_transpose, check_vjp
from .scans import scan_arguments

NAMES = ("delta", "A", "B", "C", "delta_bias")
PACKED = np.array([[0, 0, 0, 1, 1, 1, 2, 2, 2], [5, 5, 5, 5, 5, 5, 5, 5, 4]])
PADDED = np.array([9, 5])
OPTIONS = {
    "whole": {},
    "channel": {"channel": 2},
    "mean": {"aggregate": "mean"},
    "mean of absolute values": {"aggregate": "mean_abs"},
    "rows": {"rows": (3, 7)},
    "packed and padded": {"seq_idx": PACKED, "lengths": PADDED},
    "everything": {"aggregate": "mean_abs", "rows": (1, 8), "seq_idx": PACKED, "lengths": PADDED},
}


def attention_arguments(rng: np.random.Generator, **sizes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the attention, and all those of the scan that it belongs to."""
    arguments = scan_arguments(rng, **sizes)
    return {name: arguments[name] for name in NAMES}, arguments


@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("cut", ["whole", "packed and padded"])
def test_attention_times_input_is_the_scan(length: int, cut: str) -> None:
    rng = np.random.default_rng([length, len(cut)])
    attention, scan = attention_arguments(rng, length=length, groups=2)
    options: dict[str, Any] = {"delta_softplus": True}
    if cut != "whole":
        options |= {"seq_idx": PACKED[:, :length], "lengths": np.minimum(PADDED, length)}
    P = core.hidden_attention(**attention, **options)
    y = core.selective_scan(scan["u"], **attention, **options)
    np.testing.assert_array_equal(P, np.tril(P))
    np.testing.assert_allclose(np.einsum("bdlj,bdj->bdl", P, scan["u"]), y, rtol=1e-12, atol=1e-13)


def test_one_entry_by_hand() -> None:
    """(4)-(6) for l = 2, j = 0, with every factor written out."""
    delta = np.array([[[0.3, 0.2, 0.5]]])
    B, C = np.array([[[2.0, 7.0, 7.0]]]), np.array([[[7.0, 7.0, 3.0]]])
    P = core.hidden_attention(delta, np.array([-1.5]), B, C)
    assert P[0, 0, 2, 0] == pytest.approx(3.0 * 2.0 * 0.3 * np.exp(-1.5 * (0.2 + 0.5)), rel=1e-15)


def test_options_pick_from_one_array() -> None:
    attention, _ = attention_arguments(np.random.default_rng(1))
    P = core.hidden_attention(**attention, delta_softplus=True)

    def picked(**options: Any) -> np.ndarray:
        return core.hidden_attention(**attention, delta_softplus=True, **options)

    np.testing.assert_array_equal(picked(channel=2), P[:, 2])
    np.testing.assert_array_equal(picked(rows=(3, 7)), P[:, :, 3:7])
    np.testing.assert_allclose(picked(aggregate="mean"), P.mean(axis=1), rtol=1e-14)
    np.testing.assert_allclose(picked(aggregate="mean_abs", rows=(3, 7)), np.abs(P).mean(axis=1)[:, 3:7], rtol=1e-14)


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_gradients(option: str, scalar: bool) -> None:
    rng = np.random.default_rng([scalar, len(option)])
    attention, _ = attention_arguments(rng, scalar=scalar, groups=2)
    check_vjp("hidden_attention", attention, " ".join(NAMES), rng, delta_softplus=True, **OPTIONS[option])


def test_gradients_with_required_arguments_only() -> None:
    rng = np.random.default_rng(2)
    attention, _ = attention_arguments(rng, length=5)
    del attention["delta_bias"]
    check_vjp("hidden_attention", attention, "delta A B C", rng)


@pytest.mark.parametrize("linear", ["B", "C"])
def test_reverse_pass_is_the_transpose_where_attention_is_linear(linear: str) -> None:
    rng = np.random.default_rng(3)
    attention, _ = attention_arguments(rng, length=40)
    check_transpose("hidden_attention", attention, linear, rng, delta_softplus=True)


def test_long_range_keeps_its_digits() -> None:
    """After a step of 1e6, steps of 1e-3: a difference of cumulative sums would have 10 digits left."""
    length = 300
    delta = np.full((1, 1, length), 1e-3)
    delta[0, 0, 0] = 1e6
    ones = np.ones((1, 1, length))
    P = core.hidden_attention(delta, np.array([-1.0]), ones, ones, channel=0)[0]
    np.testing.assert_allclose(P[-1, 1:], 1e-3 * np.exp(-1e-3 * np.arange(length - 2, -1, -1)), rtol=2e-14)


def test_decays_past_the_smallest_number_are_zero_not_nan() -> None:
    length = 60
    ones = np.ones((1, 1, length))
    attention = {"delta": 10.0 * ones, "A": np.array([-3.0]), "B": ones, "C": ones}
    P = core.hidden_attention(**attention, channel=0)[0]
    assert np.isfinite(P).all()
    assert P[-1, 0] == 0.0
    gradients = core.hidden_attention_vjp(np.ones_like(P)[None], **attention, channel=0)
    assert all(np.isfinite(g).all() for g in gradients.values())
