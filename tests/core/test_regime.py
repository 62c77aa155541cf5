"""Regimes: the classifier against formulas, bounds, constants and simulation."""

from __future__ import annotations

import zlib
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from scipy.integrate import quad

from tokendyn import Regime, classify, classify_sphere, simulate
from tokendyn._dispatch import load_backend
from tokendyn.core._blow_up_numba import blow_up_integral
from tokendyn.errors import DTypeError, OptionError


def generator(*key: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def integral(x: float, mu: float, s_delta: float, bias: float) -> float:
    """∫_x^∞ du / (μ u³ softplus(S_Δ u + bias)) by QUADPACK, interval by interval."""

    def integrand(v: float) -> float:
        return v / np.logaddexp(0.0, s_delta * x / v + bias)

    edges = 2.0 ** -np.arange(41)
    parts = (quad(integrand, low, high, epsabs=0, epsrel=1e-13)[0] for high, low in pairwise(edges))
    return sum(parts) / (mu * x * x)


# ------------------------------------------------------------------------------------------------- kinds and fates

KINDS = {
    "convergence": ({"mu": -1.0, "s_delta": 0.7, "x0": [1.0, -2.0]}, "convergence", ("convergence",) * 2, 1.0),
    "slow": ({"mu": 2.0, "s_delta": -0.5, "x0": [1.0, 3.0]}, "slow divergence", ("slow divergence",) * 2, 0.5),
    "fast": ({"mu": 2.0, "s_delta": 0.5, "x0": [1.0, 3.0]}, "fast divergence", ("blow-up",) * 2, 1.5),
    "before and after": (
        {"mu": 2.0, "s_delta": 0.5, "x0": [-1.0, 3.0, -2.0]},
        "fast divergence",
        ("slow divergence", "blow-up", "blow-up"),
        1.5,
    ),
    "no S_Δ": ({"mu": 2.0, "s_delta": 0.0, "x0": [-1.0, 3.0]}, "fast divergence", ("blow-up",) * 2, 0.0),
    "no μ": ({"mu": 0.0, "s_delta": 0.5, "x0": [-1.0, 3.0]}, "stationary", ("stationary",) * 2, 0.0),
    "only zeros": ({"mu": 1.0, "s_delta": 0.5, "x0": [0.0, 0.0]}, "stationary", ("stationary",) * 2, 0.0),
    "a zero": (
        {"mu": 1.0, "s_delta": 0.5, "x0": [-1.0, 0.0, 2.0]},
        "fast divergence",
        ("slow divergence", "stationary", "blow-up"),
        1.0,
    ),
}


@pytest.mark.parametrize("case", KINDS)
def test_kind_fates_and_margin(case: str) -> None:
    arguments, kind, fates, margin = KINDS[case]
    regime = classify(a=1.0, **arguments)
    assert isinstance(regime, Regime)
    assert regime.kind == kind
    assert regime.fates == fates
    assert regime.margin == margin
    assert kind in regime.explain()


def test_certainty_says_what_is_published() -> None:
    assert classify(mu=-1.0, s_delta=1.0, a=1.0, x0=[1.0]).certainty == "theorem"
    assert classify(mu=-1.0, s_delta=1.0, a=1.0, x0=[1.0], bias=0.1).certainty == "derived"
    assert classify(mu=-1.0, s_delta=1.0, a=1.0, x0=[1.0, 0.0]).certainty == "derived"
    fast = classify(mu=1.0, s_delta=1.0, a=1.0, x0=[-1.0, 2.0, -1.0])
    assert [int(code) for code in fast.certainty_codes] == [0, 0, 1]


def test_margin_is_the_smallest_change_that_changes_the_kind() -> None:
    rng = generator("margin")
    x0, s_delta = rng.normal(size=(200, 3)), rng.normal(size=200)
    regime = classify(mu=1.0, s_delta=s_delta, a=1.0, x0=x0)
    pulls = s_delta[:, None] * x0
    for kind, margin, pull, x in zip(regime.kind, regime.margin, pulls, x0, strict=True):
        if margin == 1.0:
            continue  # μ is nearer
        moved = pull + (-1 if kind == "fast divergence" else 1) * margin * 1.000001
        inside = pull + (-1 if kind == "fast divergence" else 1) * margin * 0.999999
        assert classify(mu=1.0, s_delta=1.0, a=1.0, x0=moved).kind != kind, x
        assert classify(mu=1.0, s_delta=1.0, a=1.0, x0=inside).kind == kind, x


def test_boundaries_are_named() -> None:
    assert classify(mu=0.0, s_delta=0.0, a=1.0, x0=[1.0, 0.0]).boundaries == ("μ = 0", "S_Δ = 0", "x_2 = 0")
    near = classify(mu=1.0, s_delta=1.0, a=1.0, x0=[1.0, -1e-12])
    assert near.boundaries == ("S_Δ x_2 = -1e-12 is within 1e-09 of 0",)
    assert "boundary" in near.explain()
    assert classify(mu=1.0, s_delta=1.0, a=1.0, x0=[1.0, -1e-12], tolerance=0.0).boundaries == ()


def test_an_ensemble_is_its_problems() -> None:
    rng = generator("ensemble")
    x0 = rng.normal(size=(50, 4)) * (rng.random((50, 4)) > 0.1)
    mu, s_delta, bias = rng.normal(size=50), rng.choice([-1.0, 0.0, 0.7], 50), rng.choice([0.0, 0.5], 50)
    many = classify(mu=mu, s_delta=s_delta, a=0.7, bias=bias, x0=x0)
    assert sum(int(part.split()[0]) for part in str(many).split(": ")[1].split(", ")) == 50
    for i in range(50):
        one = classify(mu=mu[i], s_delta=s_delta[i], a=0.7, bias=bias[i], x0=x0[i])
        assert (many.kind[i], tuple(many.fates[i]), many.margin[i]) == (one.kind, one.fates, one.margin)
        assert many.certainty[i] == one.certainty
        for name in ("rates", "constants", "time_scales", "blow_up_bounds", "decay_bounds"):
            np.testing.assert_allclose(getattr(many, name)[i], getattr(one, name), rtol=1e-15, err_msg=name)
            np.testing.assert_array_equal(getattr(many[i], name), getattr(one, name), err_msg=name)
        assert many[i].explain() == one.explain()
    with pytest.raises(OptionError, match="take one problem"):
        many.explain()


# -------------------------------------------------------------------------------------------------------- blow-ups


def test_blow_up_integral_is_the_integral() -> None:
    rng = generator("integral")
    for _ in range(100):
        z, b = 10 ** rng.uniform(-4, 2.5), rng.normal() * 10 ** rng.uniform(-2, 1.2)
        assert blow_up_integral(z, b, np.empty(12)) == pytest.approx(integral(1.0, 1.0, z, b), rel=1e-11)


def test_bounds_hold_and_are_exact_for_the_first_token() -> None:
    rng = generator("bounds")
    b = 200
    x0, mu, s_delta = rng.normal(size=(b, 5)), rng.uniform(0.3, 2, b), rng.normal(size=b)
    a, bias = rng.uniform(0.2, 3, b), rng.normal(size=b)
    regime = classify(mu=mu, s_delta=s_delta, a=a, bias=bias, x0=x0)
    ended = simulate(mu=mu, s_delta=s_delta, a=a, bias=bias, x0=x0, t_end=1e12, rtol=1e-10).ended_at
    np.testing.assert_array_equal(np.isfinite(ended), regime.fate_codes == 3)
    assert (ended <= regime.blow_up_bounds * (1 + 1e-9)).all()
    first = np.isfinite(ended[:, 0])
    np.testing.assert_allclose(ended[first, 0], regime.blow_up_time[first], rtol=1e-8)


def test_math_example_of_fast_divergence() -> None:
    arguments = {"mu": 1.0, "s_delta": 1.0, "a": 1.0, "x0": [0.5, 1.5, 0.7]}
    regime = classify(**arguments)
    assert regime.blow_up_bounds[1] == pytest.approx(0.0923411, abs=5e-8)
    assert simulate(**arguments, t_end=1.0).ended_at[1] == pytest.approx(0.0919060, abs=5e-8)


@pytest.mark.parametrize(("s_delta", "exponent"), [(0.9, -1 / 3), (0.0, -0.5)])
def test_blow_up_follows_its_law(s_delta: float, exponent: float) -> None:
    arguments = {"mu": 1.3, "s_delta": s_delta, "a": 1.0, "x0": [-0.2, 1.1, 0.4]}
    regime = classify(**arguments)
    trajectory = simulate(**arguments, t_end=10.0, rtol=1e-12, points_per_step=8)
    l = 1
    T, sizes = trajectory.ended_at[l], np.abs(trajectory.tokens[:, l])
    window = (sizes > 300) & (sizes < 3000)
    left = T - trajectory.times[window]
    slope = np.polyfit(np.log(left), np.log(sizes[window]), 1)[0]
    assert slope == pytest.approx(exponent, abs=1e-3)
    assert regime.rates[l] == pytest.approx(exponent)
    constant = np.exp(np.mean(np.log(sizes[window]) - exponent * np.log(left)))
    if s_delta:
        assert constant == pytest.approx(regime.constants[l], rel=1e-3)
    else:  # token 1 is in front of it, so no constant is promised
        assert regime.constants[l] == np.inf


def test_only_the_diagonal_of_the_hidden_attention_diverges() -> None:
    regime = classify(mu=1.0, s_delta=0.7, a=1.0, x0=[0.3, -1.0, 1.2])
    law, limits = regime.attention_limit()
    assert "token 3" in law
    np.testing.assert_array_equal(limits[2], [0, 0, np.inf])
    trajectory = simulate(mu=1.0, s_delta=0.7, a=1.0, x0=[0.3, -1.0, 1.2], t_end=1.0)
    last = np.flatnonzero(trajectory.alive.all(axis=1))[-1]
    P = trajectory.attention(last)
    assert P[2, 2] > 1e8
    assert abs(P[2, :2]).max() < 1e-100


# ----------------------------------------------------------------------------------------------------- convergence


def test_convergence_constants_of_the_math() -> None:
    regime = classify(mu=-1.3, s_delta=0.7, a=0.8, x0=[1.2, -0.8, 0.3, 2.0])
    assert regime.constants == pytest.approx([0.744904, 0.485990, 0.485990, 0.485990], abs=5e-7)
    end = simulate(mu=-1.3, s_delta=0.7, a=0.8, x0=[1.2, -0.8, 0.3, 2.0], t_end=1e10, times=[1e10], rtol=1e-11)
    assert np.abs(end.tokens[0]) * 1e5 == pytest.approx([0.74490, 0.48602, 0.48587, 0.48627], abs=5e-6)


def test_convergence_constants_with_bias_and_zeros() -> None:
    arguments = {"mu": -0.9, "s_delta": 0.5, "a": 1.4, "bias": 0.6, "x0": [0.0, 1.1, 0.0, 0.0, -0.7, 2.0]}
    regime = classify(**arguments)
    end = np.abs(simulate(**arguments, t_end=1e14, times=[1e14], rtol=1e-11).tokens[0]) * 1e7
    assert end == pytest.approx(regime.constants, rel=1e-4)
    assert regime.constants[4] > regime.constants[5]  # three places back to a token that is not 0, then one


def test_decay_bounds_hold() -> None:
    rng = generator("decay")
    b, times = 100, np.logspace(-3, 6, 10)
    x0, mu, s_delta = rng.normal(size=(b, 4)), -rng.uniform(0.3, 2, b), rng.normal(size=b)
    regime = classify(mu=mu, s_delta=s_delta, a=1.0, bias=-0.5, x0=x0)
    tokens = simulate(mu=mu, s_delta=s_delta, a=1.0, bias=-0.5, x0=x0, t_end=1e6, times=times).tokens
    c = (2 * regime.decay_bounds * -mu[:, None])[:, None]
    bound = (c * times[:, None] + x0[:, None] ** -2.0) ** -0.5
    assert (np.abs(tokens) <= bound * (1 + 1e-7)).all()


def test_attention_limit_under_convergence() -> None:
    regime = classify(mu=-1.3, s_delta=0.7, a=2.0, x0=[1.2, -0.8, 0.3])
    trajectory = simulate(mu=-1.3, s_delta=0.7, a=2.0, x0=[1.2, -0.8, 0.3], t_end=1e14, times=[1e14])
    np.testing.assert_allclose(1e14 * trajectory.attention(0), regime.attention_limit()[1], rtol=1e-4, atol=1e-12)


def test_time_scales_warn_of_trained_layers() -> None:
    fresh = classify(mu=-1.0, s_delta=0.5, a=1.0, x0=[1.0, 1.0])
    trained = classify(mu=-1.0, s_delta=0.5, a=1.0, bias=-4.6, x0=[1.0, 1.0])
    assert fresh.time_scales[1] < 1e2
    assert trained.time_scales[1] > 1e40


# -------------------------------------------------------------------------------------------------- slow divergence


def test_first_token_follows_the_law_of_slow_divergence() -> None:
    arguments = {"mu": 0.7, "s_delta": -1.4, "a": 1.0, "bias": 0.3, "x0": [1.0, 2.0]}
    times = np.array([1e100, 1e200, 1e290])
    tokens = simulate(**arguments, t_end=1e290, times=times, rtol=1e-11).tokens
    u, ln = 1.4 * tokens[:, 0], np.log(times)
    law = ln + 3 * np.log(ln) + np.log(0.7 * np.exp(0.3) / 1.4**2)
    gap = np.abs(u - law)
    assert (np.diff(gap) < 0).all()
    np.testing.assert_allclose(gap, 9 * np.log(ln) / ln, rtol=0.3)  # the next term of the expansion


def test_ratios_need_slow_divergence() -> None:
    with pytest.raises(OptionError, match="expected one problem of slow divergence"):
        classify(mu=-1.0, s_delta=1.0, a=1.0, x0=[1.0]).ratios()
    with pytest.raises(OptionError, match="on the line only"):
        _ = classify(M=np.eye(2), s_delta=[1.0, 0.0], a=1.0, x0=[[1.0, 1.0]]).constants


# ----------------------------------------------------------------------------------------------------------- in R^D


def test_negative_definite_and_shared_step_size_converge() -> None:
    rng = generator("negative")
    B = rng.normal(size=(3, 3))
    M = -B @ B.T - 0.1 * np.eye(3)
    x0 = rng.normal(size=(5, 3))
    regime = classify(M=M, s_delta=rng.normal(size=3), a=0.7, x0=x0)
    assert (regime.kind, regime.certainty) == ("convergence", "derived")
    assert regime.margin == pytest.approx(-np.linalg.eigvalsh(M).max())
    low_rank = classify(S_B=-B[:2], S_C=B[:2], s_delta=rng.normal(size=3), a=0.7, x0=x0)
    assert low_rank.kind != "convergence" or low_rank.certainty == "simulated"  # semidefinite proves nothing


def test_first_token_with_shared_step_size_is_the_lines() -> None:
    rng = generator("shared")
    for _ in range(20):
        M, s_delta, x = rng.normal(size=(4, 4)), rng.normal(size=4), rng.normal(size=4)
        regime = classify(M=M, s_delta=s_delta, a=1.0, x0=[x])
        size = np.linalg.norm(x)
        u = x / size
        line = classify(mu=u @ M @ u, s_delta=s_delta @ u, a=1.0, x0=[size])
        assert (regime.kind, regime.fates, regime.certainty) == (line.kind, line.fates, "derived")
        if line.kind == "fast divergence":
            ended = simulate(M=M, s_delta=s_delta, a=1.0, x0=[x], t_end=2 * line.blow_up_time).ended_at[0]
            assert ended == pytest.approx(line.blow_up_time, rel=1e-7)


def test_first_counter_example_of_the_conjecture() -> None:
    """Both eigenvalues negative, yet token 2 grows; the exponent is known."""
    M, s_delta = -np.array([[1, 0.9], [0.9, 1]]), np.array([[-5.0, 0], [5, 0]])
    x0 = np.array([[0.05, -0.1], [8.0, 1.0]])
    regime = classify(M=M, s_delta=s_delta, a=1.0, x0=x0)
    assert regime.fates == ("convergence", "slow divergence")
    assert regime.certainty == "simulated"
    assert "simulation" in regime.explain()
    tokens = simulate(M=M, s_delta=s_delta, a=1.0, x0=x0, t_end=1e14, times=[1e12, 1e14]).tokens
    x = tokens[-1, 0]  # the direction in which token 1 goes to 0
    power = -x[0] * (M @ x)[0] / (2 * x @ M @ x)
    assert power == pytest.approx(0.27185, abs=1e-4)
    assert np.log(tokens[1, 1, 0] / tokens[0, 1, 0]) / np.log(100) == pytest.approx(power, abs=1e-4)


def test_second_counter_example_of_the_conjecture() -> None:
    """A positive eigenvalue, yet token 1 goes to 0 like t^(-1/2)."""
    arguments = {"M": np.diag([1.0, -1.0]), "s_delta": np.zeros((2, 2)), "a": 1.0, "x0": [[0.1, 1.0], [1.0, 0.2]]}
    regime = classify(**arguments)
    assert regime.fates == ("convergence", "blow-up")
    assert regime.kind == "mixed"
    tokens = simulate(**arguments, t_end=1e8, times=[1e6, 1e8]).tokens[:, 0]
    sizes = np.linalg.norm(tokens, axis=1)
    assert np.log(sizes[1] / sizes[0]) / np.log(100) == pytest.approx(-0.5, abs=1e-4)


def test_sign_on_the_orthant_decides_the_first_token() -> None:
    M = np.array([[-1.0, 3.0], [0.0, -1.0]])  # indefinite, but negative where coordinates differ in sign
    s_delta = np.array([[1.0, 0.0], [0.0, -1.0]])
    regime = classify(M=M, s_delta=s_delta, a=1.0, x0=[[1.0, -1.0]])
    assert (regime.fates, regime.certainty) == (("convergence",), "derived")
    assert classify(M=M, s_delta=s_delta, a=1.0, x0=[[1.0, 1.0]]).certainty == "simulated"


def test_stationary_tokens_in_space() -> None:
    regime = classify(M=np.diag([1.0, -1.0]), s_delta=[0.3, 0.2], a=1.0, x0=[[1.0, 1.0]])
    assert (regime.kind, regime.margin) == ("stationary", 0.0)
    assert regime.boundaries
    flat = classify(M=np.eye(2), s_delta=[0.3, -0.3], a=1.0, x0=[[1.0, 1.0]])
    assert (flat.kind, flat.margin) == ("fast divergence", 0.0)
    assert flat.boundaries == ("|S_Δ x_1| = 0 is within 1e-09 of 0",)
    zero = classify(M=-np.eye(2), s_delta=[0.3, 0.2], a=1.0, x0=[[0.0, 0.0], [1.0, 1.0]])
    assert zero.fates == ("stationary", "convergence")
    assert zero.boundaries == ("x_1 = 0",)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_arrays_of_the_frameworks_are_read(backend: str) -> None:
    def make(values: object, name: str) -> Any:
        return load_backend(backend).from_numpy(np.asarray(values, np.float32), name)

    names = ("float32", "bfloat16")  # both hold these numbers exactly
    line = {"mu": 1.0, "s_delta": 0.75, "a": 1.0}
    wanted = classify(**line, x0=[0.25, -1.0, 1.25])
    for name in names:
        got = classify(**line, x0=make([0.25, -1.0, 1.25], name))
        assert got.explain() == wanted.explain()
        np.testing.assert_array_equal(got.blow_up_bounds, wanted.blow_up_bounds)
    sphere = {"M": np.diag([1.0, -0.5]), "s_delta": [0.5, 0.25], "x0": [[1.0, 0.0], [0.0, -1.0]]}
    for name in names:
        got = classify_sphere(a=1.0, **{key: make(value, name) for key, value in sphere.items()})
        assert got.explain() == classify_sphere(a=1.0, **sphere).explain()


def test_a_tensor_that_needs_a_gradient_is_read_and_a_traced_one_refused() -> None:
    import jax
    import torch

    x0 = torch.tensor([0.25, -1.0], requires_grad=True)
    assert classify(mu=-1.0, s_delta=0.5, a=1.0, x0=x0).kind == "convergence"
    with pytest.raises(DTypeError, match="classify: x0 has no values while it is traced; call classify outside jit"):
        jax.jit(lambda x: classify(mu=-1.0, s_delta=0.5, a=1.0, x0=x).margin)(np.ones(2))
