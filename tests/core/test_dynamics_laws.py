"""The laws of one channel, measured over many random problems and long times."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from tokendyn import classify, simulate


def generator(*key: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def contradictions(size: int, length: int, t_end: float) -> int:
    """How many of ``size`` random problems go another way, simulated, than the classifier says."""
    rng = generator("contradictions", size)
    x0 = rng.normal(size=(size, length)) * 10 ** rng.uniform(-1, 0.5, (size, 1))
    sorted_out = rng.random(size) < 0.4  # else slow divergence would hardly occur
    s_delta = rng.normal(size=size)
    x0[sorted_out] = -np.sign(s_delta[sorted_out])[:, None] * np.abs(x0[sorted_out])
    parameters = {
        "mu": rng.normal(size=size),
        "s_delta": s_delta,
        "a": rng.uniform(0.2, 3.0, size),
        "bias": np.where(rng.random(size) < 0.5, 0.0, rng.normal(size=size)),
    }
    regime = classify(x0=x0, **parameters)
    assert {0, 1, 2, 3} - set(regime.kind_code) == {0}
    trajectory = simulate(x0=x0, t_end=t_end, times=[0.0, t_end / 10, t_end], rtol=1e-8, **parameters)
    decided = regime.margin > 1e-4
    assert decided.mean() > 0.99
    assert set(trajectory.reason) <= {"reached t_end", "all tokens ended"}
    ended = np.isfinite(trajectory.ended_at)
    with np.errstate(invalid="ignore"):
        sizes = np.abs(trajectory.tokens)
        shrinks = (sizes[:, 2] < sizes[:, 1]) & (sizes[:, 2] < 1e-2) & ~ended
        grows = (sizes[:, 2] > sizes[:, 1]) & (sizes[:, 1] > sizes[:, 0]) & ~ended
    agrees = np.select(
        [regime.fate_codes == 1, regime.fate_codes == 2, regime.fate_codes == 3],
        [shrinks, grows, ended & (trajectory.ended_at <= regime.blow_up_bounds * (1 + 1e-7))],
    )
    return int((~agrees.astype(bool).all(axis=1) & decided).sum())


def test_classifier_agrees_with_simulation() -> None:
    assert contradictions(500, 5, 1e14) == 0


@pytest.mark.slow
def test_classifier_agrees_with_simulation_on_ten_thousand_problems() -> None:
    assert contradictions(10_000, 8, 1e14) == 0


def test_blow_up_times_of_one_token() -> None:
    rng = generator("blow-up")
    b = 200
    s_delta, mu = rng.choice([-1, 1], b) * 10 ** rng.uniform(-1, 1, b), 10 ** rng.uniform(-1, 1, b)
    x0 = np.sign(s_delta)[:, None] * 10 ** rng.uniform(-1, 1, (b, 1))
    parameters = {"mu": mu, "s_delta": s_delta, "a": rng.uniform(0.2, 3, b), "x0": x0}
    exact = classify(**parameters).blow_up_time
    found = simulate(**parameters, t_end=2 * exact.max(), rtol=1e-11).ended_at[:, 0]
    np.testing.assert_allclose(found, exact, rtol=1e-8)


def test_constants_of_convergence() -> None:
    """200 random problems with a ≥ 1 at t = 1e10: constants to 1e-3."""
    rng = generator("constants")
    b = 200
    parameters = {
        "mu": -rng.uniform(0.3, 3, b),
        "s_delta": rng.normal(size=b),
        "a": rng.uniform(1, 3, b),
        "x0": rng.choice([-1, 1], (b, 4)) * rng.uniform(0.3, 2, (b, 4)),
    }
    tokens = simulate(**parameters, t_end=1e10, times=[1e10], rtol=1e-9).tokens[:, 0]
    np.testing.assert_allclose(np.abs(tokens) * 1e5, classify(**parameters).constants, rtol=1e-3)


@pytest.mark.parametrize("a", [0.2, 0.4, 0.7])
def test_second_token_approaches_its_law_by_a_power(a: float) -> None:
    """For smaller a the constants are far off; the deviation of token 2 dies like t^{-(1 - 2^{-a})}."""
    parameters = {"mu": -1.1, "s_delta": 0.6, "a": a, "x0": [1.2, -0.8]}
    times = np.logspace(14, 30, 9)
    tokens = simulate(**parameters, t_end=1e30, times=times, rtol=1e-12).tokens
    deviation = np.abs(tokens[:, 1]) * np.sqrt(times) / classify(**parameters).constants[1] - 1
    window = np.abs(deviation) > 1e-9
    assert window.sum() >= 4
    slope = np.polyfit(np.log(times[window]), np.log(np.abs(deviation[window])), 1)[0]
    assert slope == pytest.approx(-(1 - 2.0**-a), abs=5e-3)


RATIOS = {
    (2.2, 2.5, 3.0, 3.5): (1, 1.695825, 2.430918, 3.119249),
    (3.0, 2.0, 1.0, 0.5): (1, 1.368038, 1.450764, 1.407805),
    (0.5, 0.5, 0.5, 0.5): (1, 3.554139, 8.208694, 15.136042),
}


@pytest.mark.parametrize("x0", RATIOS)
def test_ratios_of_slow_divergence(x0: tuple[float, ...]) -> None:
    regime = classify(mu=1.0, s_delta=-1.0, a=1.0, x0=x0)
    np.testing.assert_allclose(regime.ratios(), RATIOS[x0], rtol=0, atol=6e-7)
    np.testing.assert_allclose(regime.ratios(1e8), RATIOS[x0], rtol=1e-5)  # the nearer to 1, the slower


def test_order_of_sorted_tokens_and_the_first_as_the_least() -> None:
    rng = generator("order")
    b = 100
    x0 = np.sort(rng.uniform(0.2, 3, (b, 5)), axis=1)
    parameters = {"mu": rng.uniform(0.3, 2, b), "s_delta": -rng.uniform(0.3, 2, b), "a": rng.uniform(0.3, 3, b)}
    tokens = simulate(x0=x0, t_end=1e20, times=np.logspace(-2, 20, 23), rtol=1e-9, **parameters).tokens
    assert (tokens[:, :, 1:] >= tokens[:, :, :1] * (1 - 1e-9)).all()


def test_hidden_attention_of_slow_divergence_is_on_the_first_token() -> None:
    parameters = {"mu": 1.0, "s_delta": -1.0, "a": 1.0, "x0": [2.2, 2.5, 3.0]}
    regime = classify(**parameters)
    trajectory = simulate(**parameters, t_end=1e200, times=[1e200], rtol=1e-10)
    P = trajectory.attention(0) * 1e200 * trajectory.tokens[0, 0]
    limits = regime.attention_limit()[1]
    np.testing.assert_allclose(P[:, 0], limits[:, 0], rtol=0.05)
    assert np.abs(P[:, 1:]).max() < 1e-6 * P[0, 0]
