"""The integrator: its method, its accuracy, and what it says about trajectories that end."""

from __future__ import annotations

import signal
import threading
import zlib

import numpy as np
import pytest
from scipy.integrate import quad, solve_ivp

import tokendyn
from tokendyn import core, simulate, simulate_sphere
from tokendyn.core import _simulate
from tokendyn.core._dop853 import DENSE, ERRORS, STAGES
from tokendyn.errors import DTypeError, EngineError, NonFiniteError, OptionError, ShapeError


def generator(*key: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def reference(flow: object, x0: np.ndarray, times: np.ndarray, **parameters: object) -> np.ndarray:
    """SciPy on the spec's right-hand side."""
    x0 = np.asarray(x0, float)
    solution = solve_ivp(
        lambda t, y: flow(y.reshape(x0.shape), **parameters).ravel(),  # type: ignore[operator]
        (0.0, times[-1]),
        x0.ravel(),
        method="DOP853",
        t_eval=times,
        rtol=1e-12,
        atol=1e-14,
    )
    assert solution.success
    return solution.y.T.reshape(len(times), *x0.shape)


# ------------------------------------------------------------------------------------------------------ the method


def test_quadrature_conditions_of_the_pair() -> None:
    nodes = STAGES.sum(axis=1)
    for power in range(8):
        assert STAGES[12] @ nodes**power == pytest.approx(1 / (power + 1), abs=1e-14)
    assert STAGES[12] @ nodes**8 != pytest.approx(1 / 9, abs=1e-8)
    for row in ERRORS:  # differences of two methods: they vanish on what both integrate exactly
        assert row.sum() == pytest.approx(0, abs=1e-14)
        assert row @ nodes == pytest.approx(0, abs=1e-14)
    assert DENSE.sum(axis=1) == pytest.approx(np.zeros(4), abs=1e-12)


def test_tree_conditions_of_the_pair() -> None:
    """Σ b_i a_ij c_j^q = 1/((q+1)(q+2)) and the like: conditions that quadrature does not see."""
    b, A, c = STAGES[12], STAGES, STAGES.sum(axis=1)
    for q in range(1, 6):
        assert b @ A @ c**q == pytest.approx(1 / ((q + 1) * (q + 2)), abs=1e-14)
        assert (b * c) @ A @ c**q == pytest.approx(1 / ((q + 1) * (q + 3)), abs=1e-14)
    assert b @ A @ A @ c**5 == pytest.approx(1 / (6 * 7 * 8), abs=1e-14)
    assert b @ A @ A @ A @ A @ A @ A @ c == pytest.approx(1 / 40320, abs=1e-14)


@pytest.mark.parametrize("rtol", [1e-5, 1e-8, 1e-11])
def test_errors_follow_the_tolerance(rtol: float) -> None:
    rng = generator("tolerance")
    x0, times = rng.normal(size=20), np.array([0.1, 1.0, 10.0])
    parameters = {"mu": -0.8, "s_delta": 0.9, "a": 1.1, "bias": 0.3}
    exact = reference(core.flow_rhs, x0, times, **parameters)
    error = np.abs(simulate(x0=x0, t_end=10.0, times=times, rtol=rtol, **parameters).tokens / exact - 1).max()
    assert error < 30 * rtol
    if rtol == 1e-5:
        assert error > 1e-9  # the tolerance means something


# ------------------------------------------------------------------------------------- every model against SciPy


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def space_problem(rng: np.random.Generator, **more: object) -> dict:
    M = rng.normal(size=(3, 3))
    return {"M": -M @ M.T / 3, "s_delta": rng.normal(size=(3, 3)) / 2, "a": rng.uniform(0.5, 2, 3), **more}


MODELS = {
    "line, slow divergence": (simulate, core.flow_rhs, lambda rng: {"mu": 1.0, "s_delta": -1.2, "a": 0.7}),
    "channels": (simulate, core.flow_rhs, space_problem),
    "channels, shared Δ, bias": (
        simulate,
        core.flow_rhs,
        lambda rng: space_problem(rng, s_delta=rng.normal(size=3), bias=-0.4, a=1.3),
    ),
    "channels, general A": (
        simulate,
        core.flow_rhs,
        lambda rng: {
            "S_B": rng.normal(size=(2, 3)) / 3,
            "S_C": rng.normal(size=(2, 3)) / 3,
            "s_delta": rng.normal(size=(3, 3)) / 2,
            "a": rng.uniform(0.5, 2, (3, 2)),
        },
    ),
    "sphere": (simulate_sphere, core.sphere_flow, space_problem),
    "sphere with values": (
        simulate_sphere,
        core.sphere_flow,
        lambda rng: space_problem(rng, s_delta=rng.normal(size=3), a=1.0, W=np.diag([1.0, 0.5, -0.3])),
    ),
    "softmax on the sphere": (
        simulate_sphere,
        core.attention_flow,
        lambda rng: {"Q": rng.normal(size=(2, 3)), "K": rng.normal(size=(2, 3)), "V": rng.normal(size=(3, 3))},
    ),
    "linear attention on the sphere": (
        simulate_sphere,
        core.attention_flow,
        lambda rng: {"Q": rng.normal(size=(2, 3)), "K": rng.normal(size=(2, 3)), "kind": "linear"},
    ),
    "AR on the sphere": (simulate_sphere, core.autoregressive_flow, lambda rng: {"phi": np.array([0.5, 0.3])}),
    "full attention in space": (
        simulate,
        core.attention_flow,
        lambda rng: {"Q": rng.normal(size=(2, 3)) / 2, "K": rng.normal(size=(2, 3)) / 2, "causal": False},
    ),
}


@pytest.mark.parametrize("model", MODELS)
def test_every_model_agrees_with_scipy(model: str) -> None:
    run, flow, make = MODELS[model]
    rng = generator("model", model)
    parameters = make(rng)
    x0 = -1.0 - rng.random(6) if "mu" in parameters else unit(rng.normal(size=(6, 3)))
    if "mu" in parameters:
        x0 = -x0
    times = np.array([0.0, 0.3, 1.0, 2.0])
    trajectory = run(x0=x0, t_end=2.0, times=times, rtol=1e-11, **parameters)
    assert trajectory.reason == "reached t_end"
    options = {"sphere": run is simulate_sphere} if flow is core.attention_flow else {}
    exact = reference(flow, x0, times, **parameters, **options)
    np.testing.assert_allclose(trajectory.tokens, exact, rtol=1e-8, atol=1e-9)
    if run is simulate_sphere:
        np.testing.assert_allclose(np.linalg.norm(trajectory.tokens, axis=-1), 1, rtol=1e-9)


# ------------------------------------------------------------------------------------------------ where tokens end


def test_blow_up_of_one_token_is_the_integral() -> None:
    mu, s_delta, x = 1.3, 0.8, 0.6
    exact = quad(lambda v: v / (mu * np.logaddexp(0, s_delta / v)), 0, 1 / x, epsabs=0, epsrel=1e-12)[0]
    trajectory = simulate(mu=mu, s_delta=s_delta, a=1.0, x0=[x], t_end=100.0)
    assert trajectory.reason == "all tokens ended"
    assert trajectory.ended_at[0] == pytest.approx(exact, rel=1e-9)
    assert trajectory.stopped_at == trajectory.ended_at[0]
    assert (np.diff(trajectory.times) > 0).all()


def test_tokens_before_a_blow_up_live_on() -> None:
    times = np.array([0.0, 0.2, 0.2127, 0.2128, 6.2, 6.3])
    trajectory = simulate(mu=1.0, s_delta=0.7, a=1.0, x0=[0.3, -1.0, 1.2], t_end=10.0, times=times)
    assert trajectory.ended_at == pytest.approx([6.2013, 6.2013, 0.21271], abs=6e-5)
    assert trajectory.ended_by.tolist() == [0, 0, 2]
    assert [(event.kind, event.index) for event in trajectory.events] == [("blow-up", 2), ("blow-up", 0), ("ended", 1)]
    np.testing.assert_array_equal(trajectory.alive.sum(axis=0), [5, 5, 3])
    np.testing.assert_array_equal(np.isfinite(trajectory.tokens), trajectory.alive)
    np.testing.assert_array_equal(trajectory.tokens[-1], [np.inf, -np.inf, np.inf])
    at_blow_up = simulate(mu=1.0, s_delta=0.7, a=1.0, x0=[0.3, -1.0], t_end=0.2128, times=[0.2128]).tokens[0]
    np.testing.assert_allclose(trajectory.tokens[3, :2], at_blow_up, rtol=1e-8)
    assert at_blow_up == pytest.approx([0.305, -1.108], abs=6e-4)


def test_a_token_at_zero_stays_there_and_moves_nothing() -> None:
    times = np.array([0.05, 0.5])
    trajectory = simulate(mu=1.0, s_delta=0.7, a=1.0, x0=[0.0, 1.2, 0.0], t_end=0.5, times=times)
    alone = simulate(mu=1.0, s_delta=0.7, a=1.0, x0=[1.2], t_end=0.5, times=times)
    np.testing.assert_array_equal(trajectory.tokens[:, [0, 2]], 0)
    assert trajectory.ended_at[1] == pytest.approx(alone.ended_at[0], rel=1e-9)


def test_blow_up_in_space_ends_only_later_tokens() -> None:
    trajectory = simulate(
        M=np.diag([1.0, -1.0]), s_delta=np.zeros((2, 2)), a=1.0, x0=[[0.1, 1.0], [1.0, 0.2]], t_end=1e4
    )
    assert trajectory.ended_by.tolist() == [-1, 1]
    assert trajectory.reason == "reached t_end"
    assert np.linalg.norm(trajectory.tokens[-1, 0]) < 0.01
    assert np.isinf(trajectory.tokens[-1, 1]).all()


def test_stiff_trajectory_is_carried_on() -> None:
    M, s_delta = -np.array([[1, 0.9], [0.9, 1]]), np.array([[-5.0, 0], [5, 0]])
    x0 = [[0.05, -0.1], [8.0, 1.0]]
    times = [1e2, 1e6, 1e8]
    trajectory = simulate(M=M, s_delta=s_delta, a=1.0, x0=x0, t_end=1e8, times=times, rtol=1e-8)
    # math: token 2's first coordinate grows like t^p although M is negative definite
    assert trajectory.tokens[1:, 1, 0] == pytest.approx([71.27, 249.24], abs=6e-3)
    assert trajectory.steps < 3000
    many = simulate(M=M, s_delta=s_delta, a=1.0, x0=[x0, x0], t_end=1e8, times=times, rtol=1e-8)
    np.testing.assert_array_equal(many.tokens[1], trajectory.tokens)
    stiff = solve_ivp(
        lambda s, y: np.exp(s) * core.flow_rhs(y.reshape(2, 2), M=M, s_delta=s_delta, a=1.0).ravel(),
        (np.log(1e2), np.log(1e6)),
        trajectory.tokens[0].ravel(),
        method="Radau",
        rtol=1e-9,
        atol=1e-13,
    )
    np.testing.assert_allclose(trajectory.tokens[1], stiff.y[:, -1].reshape(2, 2), rtol=1e-5, atol=1e-9)


def test_overflow_is_said() -> None:
    x0 = unit(generator("overflow").normal(size=(4, 3)))
    trajectory = simulate(Q=np.eye(3), K=np.eye(3), x0=x0, t_end=1e4)
    assert trajectory.reason == "overflow"
    assert trajectory.stopped_at < 1e4
    assert np.isfinite(trajectory.tokens).all()
    assert simulate(mu=1.0, s_delta=1.0, a=1.0, x0=[1e200], t_end=1.0).reason == "overflow"


def test_it_says_that_steps_or_accuracy_did_not_suffice() -> None:
    line = simulate(mu=-1.0, s_delta=0.7, a=1.0, x0=[1.0, 2.0], t_end=1e30, max_steps=5)
    assert (line.reason, line.steps) == ("max_steps reached", 5)
    assert line.times[-1] <= line.stopped_at < 1e30
    assert np.isfinite(line.tokens).all()
    M, s_delta = -np.array([[1, 0.9], [0.9, 1]]), np.array([[-5.0, 0], [5, 0]])
    parameters = {"mu": None, "M": M, "S_B": None, "S_C": None, "s_delta": s_delta, "a": np.array(1.0), "bias": 0.0}
    options = {"times": None, "rtol": 1e-8, "points_per_step": 1, "max_steps": 10_000, "implicit": False}
    x0 = np.array([[0.05, -0.1], [8.0, 1.0]])
    stiff = _simulate.simulate(x0, parameters, sphere=False, t_end=1e8, **options)
    assert stiff.reason == "tolerance unreachable"
    assert 0 < stiff.stopped_at < 1e8
    assert np.isfinite(stiff.tokens).all()


def test_nothing_moves_without_mu() -> None:
    trajectory = simulate(mu=0.0, s_delta=1.0, a=1.0, x0=[1.0, -2.0], t_end=1e30)
    np.testing.assert_array_equal(trajectory.tokens, np.broadcast_to([1.0, -2.0], trajectory.tokens.shape))


# ------------------------------------------------------------------------------------------------------- ensembles


def test_an_ensemble_is_its_trajectories_bit_for_bit() -> None:
    rng = generator("ensemble")
    x0, mu, s_delta = rng.normal(size=(9, 4)), rng.normal(size=9), rng.normal(size=9)
    times = np.array([0.0, 0.5, 20.0])
    many = simulate(mu=mu, s_delta=s_delta, a=1.0, bias=-0.5, x0=x0, t_end=20.0, times=times)
    assert many.ensemble
    assert set(many.reason) == {"reached t_end", "all tokens ended"}
    for i in range(9):
        one = simulate(mu=mu[i], s_delta=s_delta[i], a=1.0, bias=-0.5, x0=x0[i], t_end=20.0, times=times)
        np.testing.assert_array_equal(many[i].tokens, one.tokens)
        np.testing.assert_array_equal(many[i].ended_at, one.ended_at)
        assert many[i].reason == one.reason
        assert many[i].problem["mu"] == mu[i]


def test_parameters_of_their_own_in_space() -> None:
    rng = generator("own")
    M, s_delta = rng.normal(size=(3, 2, 2)), rng.normal(size=(3, 1, 2))
    x0 = rng.normal(size=(4, 2))
    many = simulate(M=M, s_delta=s_delta, a=1.0, x0=x0, t_end=0.05)
    for i in range(3):
        one = simulate(M=M[i], s_delta=s_delta[i, 0], a=1.0, x0=x0, t_end=0.05, times=[0.0, 0.05])
        np.testing.assert_array_equal(many[i].tokens, one.tokens)
    with pytest.raises(OptionError, match="take one trajectory"):
        _ = many.events


def test_ctrl_c_keeps_the_times_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    integrate, calls = _simulate.engine.integrate, []

    def interrupted(*arguments: object) -> int:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return integrate(*arguments)

    monkeypatch.setattr(_simulate.engine, "integrate", interrupted)
    x0 = np.abs(generator("interrupt").normal(size=20_000)) + 0.1
    trajectory = simulate(mu=-1.0, s_delta=-0.7, a=1.0, x0=x0, t_end=1e30)
    assert trajectory.reason == "interrupted"
    assert trajectory.steps == 20
    assert 0 < trajectory.times[-1] <= trajectory.stopped_at < 1e30
    assert np.isfinite(trajectory.tokens).all()


def test_ctrl_c_keeps_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    x0 = generator("interrupt").normal(size=(40_000, 64))
    simulate(mu=-1.0, s_delta=0.7, a=1.0, x0=x0[:8], t_end=1.0)  # compiled before the clock matters
    main = threading.main_thread().ident
    assert main is not None
    run_tiles = _simulate.run_tiles

    def interrupted(*args: object, **kwargs: object) -> None:
        threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT)).start()
        run_tiles(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(_simulate, "run_tiles", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores Ctrl-C
    try:
        with pytest.warns(RuntimeWarning, match="interrupted"):
            trajectory = simulate(mu=-1.0, s_delta=0.7, a=1.0, x0=x0, t_end=1e30, rtol=1e-12)
    finally:
        signal.signal(signal.SIGINT, before)
    done = trajectory.reason == "reached t_end"
    assert 0 < done.sum() < len(x0)
    assert set(trajectory.reason[~done]) == {"interrupted"}
    assert np.isfinite(trajectory.tokens[done]).all()


# ------------------------------------------------------------------------------------------------------ what is asked


def test_times_of_its_own_begin_at_zero_and_end_at_the_end() -> None:
    trajectory = simulate(mu=-1.0, s_delta=0.7, a=1.0, x0=[1.0, 2.0], t_end=1e3, points_per_step=2)
    assert trajectory.times[0] == 0
    assert trajectory.times[-1] == 1e3
    np.testing.assert_allclose(trajectory.tokens[0], [1.0, 2.0], rtol=1e-15)
    assert len(trajectory) == 1 + 2 * trajectory.steps


WRONG = {
    "NaN": ({"x0": [1.0, np.nan]}, NonFiniteError, r"x0\[1\] is nan"),
    "a = 0": ({"a": 0.0}, OptionError, "a is 0.0, expected a > 0"),
    "no a": ({"a": None}, OptionError, "a is missing"),
    "two sizes": ({"mu": [1.0, 2.0], "s_delta": np.ones(3)}, ShapeError, "s_delta has shape"),
    "text": ({"x0": "tokens"}, DTypeError, "x0 is builtins.str"),
    "ragged": ({"x0": [[1.0], [1.0, 2.0]]}, ShapeError, "ragged"),
    "two models": ({"Q": np.eye(2), "K": np.eye(2)}, OptionError, "s_delta, a, mu given with Q and K"),
    "past times": ({"times": [0.5, 2.0]}, OptionError, "rising numbers in"),
    "falling times": ({"times": [0.5, 0.1]}, OptionError, "rising numbers in"),
    "no time": ({"t_end": 0.0}, OptionError, "t_end is 0.0"),
    "tolerance": ({"rtol": 1e-17}, OptionError, "rtol is 1e-17"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case: str) -> None:
    arguments, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        simulate(**{"mu": 1.0, "s_delta": -1.0, "a": 1.0, "x0": [1.0, 2.0], "t_end": 1.0, **arguments})


def test_tokens_off_the_sphere_are_named() -> None:
    with pytest.raises(OptionError, match=r"x0\[1\] has norm 2.23606798"):
        simulate_sphere(x0=[[1.0, 0.0], [1.0, 2.0]], phi=[1.0], t_end=1.0)


def test_it_prints_what_happened() -> None:
    text = str(simulate(mu=1.0, s_delta=0.7, a=1.0, x0=[0.3, -1.0, 1.2], t_end=10.0))
    assert "all tokens ended" in text
    assert "token 3 blows up" in text
    assert "token 2 ends with token 1" in text
    assert tokendyn.Trajectory.__name__ == "Trajectory"


# ----------------------------------------------------------------------------------------- on tensors and JAX arrays


def test_parameters_of_a_framework_beside_plain_tokens() -> None:
    import torch

    with pytest.raises(DTypeError, match=r"simulate: mu is a torch array .* but x0 is builtins.list; give x0 as such"):
        tokendyn.simulate(mu=torch.tensor(1.0), s_delta=0.7, a=1.0, x0=[0.3, 1.2], t_end=1.0)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_frameworks_agree_and_differentiate(backend: str) -> None:
    framework = pytest.importorskip(backend)
    pytest.importorskip({"torch": "torchdiffeq", "jax": "diffrax"}[backend])
    x0, times = np.array([[1.2, -0.8, 0.3], [0.5, 1.0, -2.0]]), [0.5, 2.0]
    parameters = {"s_delta": 0.7, "a": 0.8, "t_end": 2.0, "times": times, "rtol": 1e-10}
    expected = simulate(x0=x0, mu=-1.3, **parameters).tokens
    h = 1e-5
    difference = (
        simulate(x0=x0, mu=-1.3 + h, **parameters).tokens - simulate(x0=x0, mu=-1.3 - h, **parameters).tokens
    ) / (2 * h)
    if backend == "torch":
        mu = framework.tensor(-1.3, dtype=framework.float64, requires_grad=True)
        tokens = simulate(x0=framework.tensor(x0), mu=mu, **parameters).tokens
        (gradient,) = framework.autograd.grad(tokens.sum(), mu)
        tokens = tokens.detach().numpy()
    else:
        jnp = framework.numpy

        def total(mu: object) -> object:
            return simulate(x0=jnp.asarray(x0), mu=mu, **parameters).tokens.sum()

        gradient = framework.jit(framework.grad(total))(jnp.asarray(-1.3))
        tokens = np.asarray(simulate(x0=jnp.asarray(x0), mu=-1.3, **parameters).tokens)
    np.testing.assert_allclose(tokens, expected, rtol=1e-8)
    assert float(gradient) == pytest.approx(difference.sum(), rel=1e-6)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_frameworks_on_the_sphere(backend: str) -> None:
    pytest.importorskip({"torch": "torchdiffeq", "jax": "diffrax"}[backend])
    rng = generator("frameworks")
    x0, M, s_delta = unit(rng.normal(size=(4, 3))), rng.normal(size=(3, 3)), rng.normal(size=3)
    expected = simulate_sphere(x0=x0, M=M, s_delta=s_delta, a=1.0, t_end=1.0, times=[1.0]).tokens
    with tokendyn.backend(backend):
        from tokendyn._dispatch import load_backend

        made = [load_backend(backend).from_numpy(array) for array in (x0, M, s_delta)]
    tokens = simulate_sphere(x0=made[0], M=made[1], s_delta=made[2], a=1.0, t_end=1.0, times=[1.0]).tokens
    np.testing.assert_allclose(np.asarray(tokens), expected, atol=1e-8)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_frameworks_say_that_a_token_blows_up(backend: str) -> None:
    framework = pytest.importorskip(backend)
    pytest.importorskip({"torch": "torchdiffeq", "jax": "diffrax"}[backend])
    x0 = framework.tensor([1.0]) if backend == "torch" else framework.numpy.asarray([1.0])
    with pytest.raises(EngineError, match="blows up"):
        simulate(x0=x0, mu=1.0, s_delta=1.0, a=1.0, t_end=10.0, max_steps=2000)
