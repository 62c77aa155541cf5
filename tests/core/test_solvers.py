"""The right-hand sides as they are in SciPy, torchdiffeq and diffrax: same tokens, same derivatives, linear memory."""

from __future__ import annotations

import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tokendyn
from tokendyn._dispatch import load_backend

ROOT = Path(__file__).parents[2]
L, D, N, T_END = 6, 3, 2, 0.5
#: Model -> operation, options, the shapes of its parameters, and the parameter that is differentiated.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]], str]] = {
    "line": ("flow_rhs", {}, {"mu": (), "s_delta": (), "a": (), "bias": ()}, "mu"),
    "channels": ("flow_rhs", {}, {"M": (D, D), "s_delta": (D, D), "a": (D,), "bias": (D,)}, "s_delta"),
    "shared Δ": ("flow_rhs", {}, {"M": (D, D), "s_delta": (D,), "a": (D,), "bias": ()}, "bias"),
    "general A": ("flow_rhs", {}, {"S_B": (N, D), "S_C": (N, D), "s_delta": (D, D), "a": (D, N)}, "a"),
    "Euclidean attention": ("attention_flow", {"sphere": False}, {"Q": (N, D), "K": (N, D)}, "Q"),
    "sphere": ("sphere_flow", {}, {"M": (D, D), "s_delta": (D, D), "a": (D,), "W": (D, D)}, "W"),
    "attention": ("attention_flow", {"sphere": True}, {"Q": (N, D), "K": (N, D), "V": (D, D)}, "V"),
    "linear attention": ("attention_flow", {"sphere": True, "kind": "linear"}, {"Q": (N, D), "K": (N, D)}, "K"),
    "AR": ("autoregressive_flow", {}, {"phi": (2,)}, "phi"),
}


def problem(model: str, length: int = L) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Tokens of unit norm, and parameters of moderate size."""
    rng = np.random.default_rng(zlib.crc32(model.encode()))
    x0 = rng.normal(size=(length, 1 if model == "line" else D))
    x0 /= np.linalg.norm(x0, axis=-1, keepdims=True)
    parameters = {name: np.asarray(0.4 * rng.normal(size=shape)) for name, shape in MODELS[model][2].items()}
    if "a" in parameters:
        parameters["a"] = 0.3 + np.abs(parameters["a"])
    return (x0[:, 0] * rng.uniform(0.5, 1.5, length) if model == "line" else x0), parameters


def flow_of(model: str, parameters: dict[str, Any]) -> Callable[[Any, Any], Any]:
    """``(x, scale) -> dx/dt`` with the parameter that is differentiated multiplied by ``scale``."""
    name, options, _, key = MODELS[model]
    operation = getattr(tokendyn, name)
    return lambda x, scale: operation(x, **{**parameters, key: scale * parameters[key]}, **options)


def expected(model: str, scale: float) -> np.ndarray:
    """The tokens at the end, by our own integrator."""
    name, options, _, key = MODELS[model]
    x0, parameters = problem(model)
    on_sphere = options.get("sphere", name != "flow_rhs")
    simulate = tokendyn.simulate_sphere if on_sphere else tokendyn.simulate
    more = {key: value for key, value in options.items() if key != "sphere"}
    changed = {**parameters, key: scale * parameters[key]}
    return simulate(x0=x0, t_end=T_END, times=[T_END], rtol=1e-12, **changed, **more).tokens[0]


def expected_derivative(model: str) -> float:
    """Of the sum of all coordinates at the end, by the scale at 1."""
    h = 1e-4
    return float((expected(model, 1 + h) - expected(model, 1 - h)).sum() / (2 * h))


@pytest.mark.parametrize("model", MODELS)
def test_scipy_takes_it_as_it_is(model: str) -> None:
    from scipy.integrate import solve_ivp

    x0, parameters = problem(model)
    flow = flow_of(model, parameters)
    solution = solve_ivp(
        lambda t, y: flow(y.reshape(x0.shape), 1.0).ravel(), (0, T_END), x0.ravel(), "DOP853", rtol=1e-10, atol=1e-12
    )
    np.testing.assert_allclose(solution.y[:, -1].reshape(x0.shape), expected(model, 1.0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("model", MODELS)
def test_torchdiffeq_differentiates_through_it(model: str) -> None:
    torch = pytest.importorskip("torch")
    odeint = pytest.importorskip("torchdiffeq").odeint
    x0, parameters = problem(model)
    flow = flow_of(model, {name: torch.tensor(value) for name, value in parameters.items()})
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    times = torch.tensor([0.0, T_END], dtype=torch.float64)
    options = {"step_t": times[1:]}  # else it interpolates at the end, to order 4 only
    accuracy: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12, "method": "dopri8", "options": options}
    end = odeint(lambda t, x: flow(x, scale), torch.tensor(x0), times, **accuracy)[1]
    (derivative,) = torch.autograd.grad(end.sum(), scale)
    np.testing.assert_allclose(end.detach().numpy(), expected(model, 1.0), rtol=0, atol=1e-9)
    assert float(derivative) == pytest.approx(expected_derivative(model), rel=1e-6)


@pytest.mark.usefixtures("quick_compilation")
def test_diffrax_differentiates_through_them() -> None:
    """As one state, which is compiled once, each with a scale of its own; one model of every kind of scan."""
    jax = pytest.importorskip("jax")
    diffrax = pytest.importorskip("diffrax")
    jnp = jax.numpy
    models = ("line", "general A", "sphere", "attention", "linear attention", "AR")
    x0, flows = {}, {}
    for model in models:
        x0[model], parameters = problem(model)
        flows[model] = flow_of(model, {name: jnp.asarray(value) for name, value in parameters.items()})

    def total(scales: dict[str, Any]) -> Any:
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, x, args: {model: flows[model](x[model], args[model]) for model in models}),
            diffrax.Dopri8(),
            0.0,
            T_END,
            None,
            jax.tree.map(jnp.asarray, x0),
            scales,
            stepsize_controller=diffrax.PIDController(rtol=1e-10, atol=1e-12),
            max_steps=64,
        )
        end = {model: tokens[0] for model, tokens in solution.ys.items()}
        return sum(tokens.sum() for tokens in end.values()), end

    derivatives, end = jax.jit(jax.grad(total, has_aux=True))(dict.fromkeys(models, 1.0))
    for model in models:
        np.testing.assert_allclose(end[model], expected(model, 1.0), rtol=0, atol=1e-9, err_msg=model)
        assert float(derivatives[model]) == pytest.approx(expected_derivative(model), rel=1e-6), model


@pytest.mark.parametrize(("backend", "package"), [("torch", "torchdiffeq"), ("jax", "diffrax")])
def test_a_solver_that_is_not_installed_is_named(backend: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(backend)
    monkeypatch.setitem(sys.modules, package, None)
    x0 = load_backend(backend).from_numpy(np.ones(2))
    with pytest.raises(tokendyn.errors.EngineError, match=rf"needs {package}; run: pip install 'tokendyn\[solvers\]'"):
        tokendyn.simulate(x0=x0, mu=-1.0, s_delta=1.0, a=1.0, t_end=1.0)


# --------------------------------------------------------------------------------------------- never an L x L matrix


@pytest.mark.parametrize("model", MODELS)
def test_largest_tensor_is_linear_in_length(model: str) -> None:
    torch = pytest.importorskip("torch")
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
            return out

    def largest(length: int) -> int:
        x0, parameters = problem(model, length)
        x = torch.tensor(x0, requires_grad=True)
        flow = flow_of(model, {name: torch.tensor(value, requires_grad=True) for name, value in parameters.items()})
        with Largest() as mode:
            flow(x, 1.0).sum().backward()
        return mode.elements

    assert largest(2048) <= 2.1 * largest(1024)


@pytest.mark.parametrize("model", MODELS)
def test_largest_array_of_the_program_is_linear_in_length(model: str) -> None:
    jax = pytest.importorskip("jax")
    from jax.extend.core import jaxprs_in_params

    def sizes(jaxpr: Any) -> int:
        inner = [sizes(sub) for equation in jaxpr.eqns for sub in jaxprs_in_params(equation.params)]
        return max([*inner, *(var.aval.size for equation in jaxpr.eqns for var in equation.outvars)], default=0)

    def largest(length: int) -> int:
        x0, parameters = problem(model, length)
        flow = flow_of(model, {name: jax.numpy.asarray(value) for name, value in parameters.items()})
        gradient = jax.grad(lambda x, scale: flow(x, scale).sum(), argnums=(0, 1))
        return sizes(jax.make_jaxpr(gradient)(x0, 1.0).jaxpr)

    assert largest(2048) <= 2.1 * largest(1024)


MEMORY = """
import resource
from tests.core.test_solvers import MODELS, flow_of, problem

def run(length):
    for model in MODELS:
        x0, parameters = problem(model, length)
        flow_of(model, parameters)(x0, 1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

compiled = run(8)
print(run(20_000) - compiled)
"""


def test_kernels_need_little_memory() -> None:
    """One 20,000 x 20,000 matrix would be 3.2 GB; all right-hand sides together stay below 64 MB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(done.stdout) < 64 * 1024  # KB
