"""The sphere: eigenvalues against the full Jacobian, rates against simulation, where tokens go."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from tokendyn import classify_sphere, core, simulate_sphere
from tokendyn.core import _sphere
from tokendyn.core._activations import softplus
from tokendyn.errors import OptionError, ShapeError

L, D = 6, 4


def generator(*key: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def signs(rng: np.random.Generator) -> np.ndarray:
    return np.append(1.0, rng.choice([-1.0, 1.0], L - 1))


def case_a(rng: np.random.Generator) -> tuple[np.ndarray, dict, np.ndarray]:
    x1, s, M, s_delta, a, bias = (
        unit(rng.normal(size=D)),
        signs(rng),
        rng.normal(size=(D, D)),
        rng.normal(size=D),
        0.7,
        0.2,
    )
    rates = _sphere.shared_rates(x1 @ M @ x1, softplus(s * (s_delta @ x1) + bias), a)
    return s[:, None] * x1, {"M": M, "s_delta": s_delta, "a": a, "bias": bias}, np.tile(-rates[:, None], D - 1)


def case_b(rng: np.random.Generator) -> tuple[np.ndarray, dict, np.ndarray]:
    s, M, s_delta, nu = signs(rng), rng.normal(size=(D, D)), rng.normal(size=(D, D)), 2
    a, bias = rng.uniform(0.5, 2, D), rng.normal(size=D)
    x = np.zeros((L, D))
    x[:, nu] = s
    values = _sphere.pole_eigenvalues(M[nu, nu], softplus(x @ s_delta.T + bias), a[nu], nu)
    return x, {"M": M, "s_delta": s_delta, "a": a, "bias": bias}, values


def case_c(rng: np.random.Generator) -> tuple[np.ndarray, dict, np.ndarray]:
    W = rng.normal(size=(D, D))
    W = W + W.T
    values, vectors = np.linalg.eigh(W)
    s, M, s_delta, v = signs(rng), rng.normal(size=(D, D)), rng.normal(size=D), vectors[:, 3]
    step = softplus(s * (s_delta @ v))
    eigenvalues = _sphere.value_eigenvalues(v @ M @ v, values, 3, step, 1.3)
    return s[:, None] * v, {"M": M, "s_delta": s_delta, "a": 1.3, "W": W}, eigenvalues


def softmax(rng: np.random.Generator) -> tuple[np.ndarray, dict, np.ndarray]:
    x = np.tile(unit(rng.normal(size=D)), (L, 1))
    rates = _sphere.softmax_rates(L)
    assert rates[1] == 0.5
    return x, {"Q": rng.normal(size=(3, D)), "K": rng.normal(size=(3, D))}, np.tile(-rates[:, None], D - 1)


def linear(rng: np.random.Generator) -> tuple[np.ndarray, dict, np.ndarray]:
    x1, Q, K = unit(rng.normal(size=D)), rng.normal(size=(3, D)), rng.normal(size=(3, D))
    rates = (Q @ x1) @ (K @ x1) * np.arange(L)
    return signs(rng)[:, None] * x1, {"Q": Q, "K": K, "kind": "linear"}, np.tile(-rates[:, None], D - 1)


def autoregressive(rng: np.random.Generator) -> tuple[np.ndarray, dict, np.ndarray]:
    phi = np.array([0.5, 0.3, -0.1])
    rates = _sphere.autoregressive_rates(phi, L)
    assert rates == pytest.approx([0, 0.5, 0.8, 0.7, 0.7, 0.7])
    return np.tile(unit(rng.normal(size=D)), (L, 1)), {"phi": phi}, np.tile(-rates[:, None], D - 1)


CASES = {
    "A": case_a,
    "B": case_b,
    "C": case_c,
    "softmax": softmax,
    "linear": linear,
    "AR": autoregressive,
}


def right_hand_side(x: np.ndarray, parameters: dict) -> np.ndarray:
    if "phi" in parameters:
        return core.autoregressive_flow(x, **parameters)
    if "Q" in parameters:
        return core.attention_flow(x, sphere=True, **parameters)
    return core.sphere_flow(x, **parameters)


@pytest.mark.parametrize("case", CASES)
def test_eigenvalues_of_every_token(case: str) -> None:
    x, parameters, expected = CASES[case](generator("eigenvalues", case))
    found = _sphere.spectrum(x, parameters)
    np.testing.assert_allclose(found.imag, 0, atol=1e-8)
    np.testing.assert_allclose(found.real, np.sort(expected, axis=1), rtol=0, atol=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_limit_points_rest_and_the_jacobian_is_block_triangular(case: str) -> None:
    """So the eigenvalues of the whole linearisation are those of the blocks; measured by differences."""
    x, parameters, expected = CASES[case](generator("eigenvalues", case))
    assert np.abs(right_hand_side(x, parameters)).max() < 1e-12
    bases = [np.linalg.svd(token[None])[2][1:] for token in x]
    whole = np.zeros((L, D - 1, L, D - 1))
    h = 1e-5
    for l in range(L):
        for i, direction in enumerate(bases[l]):
            ends = []
            for sign in (1, -1):
                moved = x.copy()
                moved[l] = unit(x[l] + sign * h * direction)
                ends.append(right_hand_side(moved, parameters))
            for k in range(L):
                whole[k, :, l, i] = bases[k] @ (ends[0][k] - ends[1][k]) / (2 * h)
    for k in range(L):
        assert np.abs(whole[k, :, k + 1 :]).max(initial=0) < 1e-9
        block = np.sort(np.linalg.eigvals(whole[k, :, k]).real)
        np.testing.assert_allclose(block, np.sort(expected[k]), atol=1e-7)


def fitted_rate(times: np.ndarray, distances: np.ndarray, gap: float) -> float:
    """The slope of ln(distance) between 1e-7 and 1e-11, freed from the next exponential, which falls ``gap`` faster."""
    window = slice(np.flatnonzero(distances > 1e-7)[-1] + 1, np.flatnonzero(distances < 1e-11)[0])
    t = times[window] - times[window.start]
    assert len(t) > 100
    columns = np.stack([-t, np.ones_like(t), *([np.exp(-gap * t)] if np.isfinite(gap) else [])], axis=1)
    return float(np.linalg.lstsq(columns, np.log(distances[window]), rcond=None)[0][0])


RATES = {
    "A": lambda rng, root: {"M": root @ root.T, "s_delta": rng.normal(size=D), "a": 2.0},
    "B": lambda rng, root: {
        "M": np.diag([1.0, 0.8, 1.2, 0.9]) + 0.1 * root,
        "s_delta": np.zeros((D, D)),
        "a": 0.05,
        "bias": np.array([-1.0, -2.0, 2.0, 0.5]),  # the third channel has the largest Δ, so ±e_3 are stable
    },
    "C": lambda rng, root: {"M": np.eye(D), "s_delta": rng.normal(size=D), "a": 1.0, "W": np.diag([2.0, 1.4, 0.3, -1])},
    "softmax": lambda rng, root: {"Q": rng.normal(size=(3, D)), "K": rng.normal(size=(3, D))},
    "linear": lambda rng, root: {"Q": root, "K": root, "kind": "linear"},
    "AR": lambda rng, root: {"phi": np.array([0.4, 0.3, 0.5])},
}


@pytest.mark.parametrize("case", RATES)
def test_fitted_rates_are_those_predicted(case: str) -> None:
    """Token 2 of four random sets a case, and later tokens where the next rate is 1.5 times larger or more."""
    for number in range(4):
        rng = generator("rates", case, number)
        parameters = RATES[case](rng, rng.normal(size=(D, D)))
        near = {"B": np.eye(D)[2]}.get(case, unit(rng.normal(size=D)))
        x0 = unit(near + 0.15 * rng.normal(size=(L, D)))
        regime = classify_sphere(x0=x0, **parameters)
        assert regime.kind == "consensus"
        moving = np.flatnonzero(regime.rates > 0)
        times = np.linspace(0, 34 / regime.rates[moving].min(), 3000)
        trajectory = simulate_sphere(x0=x0, t_end=times[-1], times=times, rtol=1e-13, **parameters)
        distances = np.linalg.norm(trajectory.tokens - regime.signs[:, None] * regime.limit, axis=-1)
        for l in moving:
            so_far = np.sort(regime.rates[moving[moving <= l]])
            if l <= 1 or so_far[1] >= 1.5 * so_far[0]:  # else powers of t beside the exponential
                gap = so_far[1] - so_far[0] if len(so_far) > 1 else np.inf
                found = fitted_rate(times, distances[:, l], gap)
                assert found == pytest.approx(regime.decay[l], rel=1e-3), (number, l)


def test_tokens_gather_at_a_stable_pole_and_its_antipode() -> None:
    rng = generator("pole")
    parameters = RATES["B"](rng, rng.normal(size=(D, D)))
    x0 = unit(np.eye(D)[2] + 0.2 * rng.normal(size=(L, D)))
    x0[1] *= -1
    regime = classify_sphere(x0=x0, **parameters)
    assert regime.kind == "consensus"
    np.testing.assert_array_equal(regime.limit, np.eye(D)[2])
    np.testing.assert_array_equal(regime.signs, [1, -1, 1, 1, 1, 1])
    assert {point.name for point in regime.limit_points if point.stable} == {"pole +e_2", "pole -e_2"}


def test_first_token_rests_in_case_a_and_the_second_takes_the_sign() -> None:
    rng = generator("sign")
    for _ in range(10):
        root = rng.normal(size=(D, D))
        M = root @ root.T + 0.3 * rng.normal(size=(D, D))
        x0 = unit(rng.normal(size=(2, D)))
        if x0[0] @ M @ x0[0] < 0.2 or abs(x0[1] @ M @ x0[0]) < 0.05:
            continue
        regime = classify_sphere(x0=x0, M=M, s_delta=rng.normal(size=D), a=1.0)
        assert (regime.kind, regime.certainty) == ("consensus", "derived")
        assert regime.signs[1] == np.sign(x0[1] @ M @ x0[0])
        end = simulate_sphere(x0=x0, t_end=60.0 / regime.rates[1], **regime.problem).tokens[-1]
        np.testing.assert_allclose(end[0], x0[0], atol=1e-12)
        np.testing.assert_allclose(end[1], regime.signs[1] * x0[0], atol=1e-6)


def test_second_token_goes_to_the_hyperplane_where_the_first_repels() -> None:
    rng = generator("repel")
    root = rng.normal(size=(D, D))
    M, x0 = -root @ root.T, unit(rng.normal(size=(2, D)))
    parameters = {"M": M, "s_delta": rng.normal(size=D), "a": 1.0}
    assert classify_sphere(x0=x0, **parameters).kind == "repulsion"
    end = simulate_sphere(x0=x0, t_end=200.0, **parameters).tokens[-1]
    assert abs(end[1] @ M @ x0[0]) < 1e-3


def test_replicator_equation_of_case_b() -> None:
    rng = generator("replicator")
    x = unit(rng.normal(size=(1, D)))
    M, s_delta, bias = rng.normal(size=(D, D)), rng.normal(size=(D, D)), rng.normal(size=D)
    p, step = x[0] ** 2, softplus(s_delta @ x[0] + bias)
    expected = 2 * (x[0] @ M @ x[0]) * p * (step - p @ step)
    found = 2 * x[0] * core.sphere_flow(x, M=M, s_delta=s_delta, a=1.0, bias=bias)[0]
    np.testing.assert_allclose(found, expected, atol=1e-14)


def test_clustering_alone_makes_no_attention_sink() -> None:
    """At consensus with one Δ the hidden attention falls away from the diagonal."""
    x1 = np.array([1.0, 0.0])
    x = np.tile(x1, (5, 1))
    step = np.full(5, 0.8)
    weights = [[step[j] * np.exp(-step[j + 1 : l + 1].sum()) for j in range(l + 1)] for l in range(5)]
    P = simulate_sphere(x0=x, M=np.eye(2), s_delta=[np.log(np.expm1(0.8)), 0.0], a=1.0, t_end=1e-3).attention(0)
    for l in range(5):
        np.testing.assert_allclose(P[0, l, : l + 1], weights[l], rtol=1e-12)
        assert (np.diff(weights[l]) > 0).all()


def test_limits_in_words() -> None:
    rng = generator("words")
    x0 = unit(rng.normal(size=(3, D)))
    text = classify_sphere(x0=x0, Q=np.eye(D), K=np.eye(D)).explain()
    assert "arXiv 2411.04990" in text
    assert "0.5" in text
    assert "undecided" in str(classify_sphere(x0=x0, Q=np.eye(D), K=np.eye(D), V=np.diag([1.0, -1, 2, 0])))


def test_clusters_are_counted() -> None:
    x = np.array([[1.0, 0], [0, 1], [1, 1e-5], [-1, 0], [0, 1]])
    np.testing.assert_array_equal(_sphere.clusters(x), [0, 1, 0, 2, 1])


def test_what_has_no_closed_form_says_so() -> None:
    x0 = unit(generator("closed").normal(size=(3, D)))
    with pytest.raises(OptionError, match="symmetric W"):
        classify_sphere(x0=x0, M=np.eye(D), s_delta=np.ones(D), a=1.0, W=np.triu(np.ones((D, D))))
    with pytest.raises(ShapeError, match="expected one sequence"):
        classify_sphere(x0=np.stack([x0, x0]), phi=[0.5])
