"""The JAX operations under JAX's transformations: what a comparison with the spec, call by call, cannot see."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import tokendyn
from tokendyn.backends.jax.ops import _engines, from_numpy, to_numpy
from tokendyn.errors import DTypeError, EngineError, OptionError

BATCH, CHANNELS, LENGTH, STATE = 2, 4, 35, 3  # more than one chunk of the scan, the last one not full


def normal(*shape: int, seed: int) -> Any:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape))


def scan_arguments(length: int = LENGTH, groups: int = 2, scalar: bool = False) -> dict[str, Any]:
    projections = (BATCH, groups, STATE, length)
    return {
        "u": normal(BATCH, CHANNELS, length, seed=1),
        "delta": normal(BATCH, CHANNELS, length, seed=2),
        "A": -jnp.exp(normal(CHANNELS, 1 if scalar else STATE, seed=3)),
        "B": normal(*projections, seed=4),
        "C": normal(*projections, seed=5),
        "D": normal(CHANNELS, seed=6),
        "z": normal(BATCH, CHANNELS, length, seed=7),
        "delta_bias": normal(CHANNELS, seed=8),
        "initial_state": normal(BATCH, CHANNELS, STATE, seed=9),
    }


def only(arguments: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: arguments[name] for name in names}


@dataclass(frozen=True, eq=False)
class Case:
    """``function(**varied)``, differentiable in every argument."""

    function: Callable[..., Any]
    varied: dict[str, Any]

    def __call__(self, varied: dict[str, Any]) -> Any:
        return self.function(**varied)


def cases() -> Iterator[tuple[str, Case]]:
    packed = jnp.asarray([[0] * 20 + [1] * 15, [3] * 35])
    lengths = jnp.asarray([35, 21])
    scan = {"delta_softplus": True, "return_last_state": True, "seq_idx": packed, "lengths": lengths}
    yield "scan", Case(lambda **v: tokendyn.selective_scan(**v, **scan), scan_arguments())
    yield "scan, scalar A", Case(lambda **v: tokendyn.selective_scan(**v, **scan), scan_arguments(scalar=True))
    attended = only(scan_arguments(length=9), "delta", "A", "B", "C", "delta_bias")
    yield "attention", Case(lambda **v: tokendyn.hidden_attention(**v, delta_softplus=True, rows=(2, 7)), attended)
    yield (
        "attention, mean_abs",
        Case(lambda **v: tokendyn.hidden_attention(**v, delta_softplus=True, aggregate="mean_abs"), attended),
    )
    tokens = {"x": normal(BATCH, 70, 3, seed=10)}  # more than one block of the Laplace kernel
    scores = {"scores": normal(BATCH, 70, seed=11)}
    yield (
        "importance_score",
        Case(tokendyn.importance_score, {**tokens, "s_delta": normal(4, 3, seed=12), "k": normal(4, seed=13)}),
    )
    yield "softsort", Case(lambda **v: tokendyn.softsort(**v, tau=0.5), scores | tokens)
    yield (
        "softsort, power 3",
        Case(lambda **v: tokendyn.softsort(**v, power=3, ascending=False), scores | tokens),
    )
    yield "softsort_restore", Case(lambda **v: tokendyn.softsort_restore(**v, tau=0.5), scores | {"y": tokens["x"]})
    yield "softsort_matrix", Case(tokendyn.softsort_matrix, {"scores": scores["scores"][:, :9]})
    order = jnp.argsort(scores["scores"], axis=1)
    yield "take_tokens", Case(lambda x: tokendyn.take_tokens(x, order), tokens)
    yield "put_tokens", Case(lambda y: tokendyn.put_tokens(y, order), {"y": tokens["x"]})
    yield (
        "straight_through",
        Case(lambda scores, x: tokendyn.token_order(scores, "straight_through").apply(x), scores | tokens),
    )
    yield (
        "io_projections",
        Case(
            lambda **v: tokendyn.io_projections(**v, regime="mixed", form="scale_matched"),
            {"weight_B": normal(3, 8, seed=14), "diagonal": normal(3, seed=15)},
        ),
    )

    with tokendyn.backend("jax"):
        one_token = tokendyn.random_inputs("selective_state_update", dtype="float64", channels=4, state=3, groups=2)
    del one_token["dt_softplus"]
    yield (
        "selective_state_update",
        Case(lambda **v: tokendyn.selective_state_update(**v, dt_softplus=True), one_token),
    )

    def spectrum(S_B: Any, S_C: Any) -> Any:
        values, symmetric = tokendyn.io_spectrum(S_B, S_C)
        return values.real, values.imag, symmetric

    yield "io_spectrum", Case(spectrum, {"S_B": normal(3, 8, seed=16), "S_C": normal(3, 8, seed=17)})


CASES = dict(cases())


def assert_close(got: Any, want: Any, tolerance: float = 1e-12) -> None:
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        scale = np.linalg.norm(b)
        assert np.linalg.norm(np.asarray(a) - np.asarray(b)) <= tolerance * max(scale, 1e-3), (a, b)


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """The names of what XLA compiles meanwhile."""
    compiled: list[str] = []

    def listen(event: str, duration: float, **kwargs: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(str(kwargs.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield compiled
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("name", CASES)
def test_transformations_agree(name: str) -> None:
    """Differences of jit, jvp of jit, and vjp of remat of vmap within scan, all on tracers."""
    case = CASES[name]
    tangents = {k: normal(*v.shape, seed=21 + i) for i, (k, v) in enumerate(case.varied.items())}
    shifted = jax.jit(lambda h: case({k: v + h * tangents[k] for k, v in case.varied.items()}))
    value, tangent = jax.jit(lambda: jax.jvp(case, (case.varied,), (tangents,)))()
    assert_close(value, shifted(0.0))
    h = 1e-6
    quotient = jax.tree.map(lambda a, b: (a - b) / (2 * h), shifted(h), shifted(-h))
    if name != "straight_through":  # whose derivatives are not those of its value, on purpose
        assert_close(tangent, quotient, 1e-7)

    cotangents = jax.tree.map(lambda v: normal(*v.shape, seed=31), value)

    def pulled(varied: dict[str, Any]) -> dict[str, Any]:
        return jax.vjp(jax.checkpoint(case), varied)[1](cotangents)[0]

    @jax.jit
    def scanned(varied: dict[str, Any]) -> dict[str, Any]:
        return jax.lax.scan(lambda carry, v: (carry, jax.vmap(pulled)(v)), None, varied)[1]

    # Two steps of a batch of two; the second of the first step is the first of the second.
    factors = jnp.asarray([[1.0, 1.01], [1.01, 1.02]])
    gradients = scanned(jax.tree.map(lambda v: jnp.tensordot(factors, v, 0), case.varied))
    first, other, same = (jax.tree.map(lambda g, at=at: g[at], gradients) for at in ((0, 0), (0, 1), (1, 0)))
    assert_close(other, same)
    assert all(np.abs(gradient).max() > 0 for gradient in first.values())
    inner = sum(jnp.vdot(c, t) for c, t in zip(jax.tree.leaves(cotangents), jax.tree.leaves(tangent), strict=True))
    assert_close(sum(jnp.vdot(first[k], tangents[k]) for k in tangents), inner)


def test_second_calls_compile_nothing(compilations: list[str]) -> None:
    """Eager calls too; and a temperature is no compile-time constant."""
    arguments = scan_arguments()
    scores, x = normal(BATCH, 70, seed=11), normal(BATCH, 70, 3, seed=10)

    def every(tau: float, factor: float) -> None:
        tokendyn.selective_scan(**jax.tree.map(lambda v: v * factor, arguments), delta_softplus=True)
        tokendyn.hidden_attention(**only(arguments, "delta", "A", "B", "C"), channel=1)
        tokendyn.softsort(scores * factor, x, tau=tau)
        tokendyn.softsort_restore(scores, x * factor, tau=tau)
        tokendyn.softsort_matrix(scores, tau=tau)
        tokendyn.effective_tokens(scores, tau=tau)
        tokendyn.put_tokens(x, tokendyn.hard_order(scores))
        tokendyn.io_spectrum(x[0], x[1] * factor)

    every(0.5, 1.1)
    assert compilations  # the listener listens
    compilations.clear()
    every(0.25, 1.2)
    assert not compilations


def largest_intermediate(function: Callable[..., Any], *arguments: Any) -> int:
    """Elements of the largest array that ``function`` makes anywhere, inside loops too."""
    return largest_in(jax.make_jaxpr(function)(*arguments).jaxpr)


def largest_in(jaxpr: Any) -> int:
    sizes = [variable.aval.size for equation in jaxpr.eqns for variable in equation.outvars]
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    sizes.append(largest_in(inner))
    return max(sizes, default=0)


def test_no_array_of_all_states_is_made() -> None:
    """Neither forward nor in reverse; nor (b, d, L, L) by an aggregate, nor L x L by SoftSort."""
    b, d, length, state = 1, 8, 512, 16
    u, delta = (jnp.ones((b, d, length), jnp.float32) for _ in range(2))
    A = -jnp.ones((d, state), jnp.float32)
    B = jnp.ones((b, state, length), jnp.float32)

    def scan(u: Any, delta: Any, A: Any, B: Any, C: Any) -> Any:
        return tokendyn.selective_scan(u, delta, A, B, C, delta_softplus=True).sum()

    assert largest_intermediate(jax.grad(scan, (0, 1, 2, 3, 4)), u, delta, A, B, B) <= b * d * length * state / 4

    def attention(delta: Any, A: Any, B: Any, C: Any) -> Any:
        return tokendyn.hidden_attention(delta, A, B, C, aggregate="mean_abs").sum()

    assert largest_intermediate(jax.grad(attention, (0, 1, 2, 3)), delta, A, B, B) <= b * length**2

    def sort(scores: Any, x: Any) -> Any:
        return tokendyn.softsort_restore(scores, tokendyn.softsort(scores, x)).sum()

    x = jnp.ones((1, 4096, 4), jnp.float32)
    assert largest_intermediate(jax.grad(sort, (0, 1)), x[..., 0], x) <= 4096 * 64


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_dtypes_are_kept(dtype: str) -> None:
    """Outputs and gradients; parameters in float32 beside half precision stay so, and so does the state."""
    state = "float64" if dtype == "float64" else "float32"
    parameters = ("A", "D", "delta_bias", "initial_state")
    arguments = {k: v.astype(state if k in parameters else dtype) for k, v in scan_arguments().items()}

    def scanned(arguments: dict[str, Any]) -> Any:
        return tokendyn.selective_scan(**arguments, delta_softplus=True, return_last_state=True)

    def dtypes(function: Callable[..., Any], *arguments: Any) -> Any:
        return jax.tree.map(lambda v: str(v.dtype), jax.eval_shape(function, *arguments))

    assert dtypes(scanned, arguments) == (dtype, state)
    gradients = dtypes(jax.grad(lambda a: sum(v.astype(state).sum() for v in scanned(a))), arguments)
    assert gradients == {name: v.dtype for name, v in arguments.items()}

    scores, x = normal(BATCH, 70, seed=11).astype("float32"), normal(BATCH, 70, 3, seed=10).astype(dtype)
    for method in ("softsort", "hard", "straight_through"):

        def there_and_back(scores: Any, x: Any, method: str = method) -> Any:
            order = tokendyn.token_order(scores, method)
            return order.restore(order.apply(x))

        assert dtypes(there_and_back, scores, x) == dtype
        gradients = dtypes(jax.grad(lambda *a: there_and_back(*a).astype(state).sum(), (0, 1)), scores, x)
        assert gradients == ("float32", dtype)
    for function in (tokendyn.softsort_matrix, tokendyn.effective_tokens):
        assert dtypes(function, x[..., 0]) == dtype
        assert dtypes(lambda scores: tokendyn.softsort_matrix(scores, power=3), x[..., 0]) == dtype
    assert dtypes(lambda x: tokendyn.importance_score(x, None, x[0, 0]), x) == dtype
    assert dtypes(lambda W, d: tokendyn.io_projections(W, None, d, regime="negative"), x[0].T, x[0, 0]) == (dtype,) * 2
    for options in ({}, {"channel": 0}, {"aggregate": "mean"}, {"aggregate": "mean_abs"}):
        attended = only(arguments, "delta", "A", "B", "C")
        assert dtypes(lambda a, o=options: tokendyn.hidden_attention(**a, **o), attended) == dtype
    if dtype in ("float32", "float64"):
        complex_dtype = {"float32": "complex64", "float64": "complex128"}[dtype]
        assert tuple(dtypes(tokendyn.io_spectrum, x[0], x[1])) == (complex_dtype, dtype)


def test_padding_may_hold_anything() -> None:
    """NaN in the padding: y is 0 there, the rest is as without it, and its gradient is exactly 0."""
    arguments = scan_arguments()
    lengths = jnp.asarray([LENGTH, 21])
    tokens = ("u", "delta", "B", "C", "z")
    padded = {k: v.at[1, ..., 21:].set(jnp.nan) if k in tokens else v for k, v in arguments.items()}

    @jax.jit
    def run(arguments: dict[str, Any]) -> Any:
        def loss(arguments: dict[str, Any]) -> Any:
            y, state = tokendyn.selective_scan(
                **arguments, delta_softplus=True, return_last_state=True, lengths=lengths
            )
            return (y**2).sum() + (state**2).sum(), y

        return jax.grad(loss, has_aux=True)(arguments)

    gradients, y = run(padded)
    expected, y_expected = run(arguments)
    assert_close((gradients, y), (expected, y_expected), 0.0)
    assert not np.asarray(y)[1, :, 21:].any()
    for name in tokens:
        assert not np.asarray(gradients[name])[1, ..., 21:].any(), name


def test_the_step_size_is_exact_at_its_extremes() -> None:
    """softplus where its exponential over- and underflows; its derivative is the logistic function."""
    delta = jnp.asarray([[[-1e3, -700.0, -40.0, 0.0, 40.0, 700.0, 1e3]]])
    one = jnp.ones((1, 1, delta.shape[-1]))

    def run(delta: Any) -> Any:  # with A = 0 the outputs are the partial sums of Δ
        return tokendyn.selective_scan(one, delta, jnp.zeros((1, 1)), one, one, delta_softplus=True)

    exact = np.logaddexp(0, np.asarray(delta))
    np.testing.assert_allclose(np.asarray(run(delta)), np.cumsum(exact, -1), rtol=1e-14)
    last = jax.grad(lambda delta: run(delta)[0, 0, -1])(delta)
    np.testing.assert_allclose(np.asarray(last), np.exp(np.asarray(delta) - exact), rtol=1e-12)


def test_rows_of_attention_may_be_a_list() -> None:
    with tokendyn.backend("jax"):
        given = tokendyn.random_inputs("hidden_attention", batch=1, channels=1, length=5)
    np.testing.assert_array_equal(
        tokendyn.hidden_attention(**given, rows=[1, 3]),  # type: ignore[arg-type]
        tokendyn.hidden_attention(**given, rows=(1, 3)),
    )


def test_engines() -> None:
    """An unknown name lists the choices; one that declines says why, and "auto" goes on to the next."""
    arguments = scan_arguments()
    y = tokendyn.selective_scan(**arguments, delta_softplus=True, engine="xla")
    assert_close(tokendyn.selective_scan(**arguments, delta_softplus=True), y, 0.0)
    with pytest.raises(OptionError, match=r"'triton', expected one of 'auto', .*'xla'"):
        tokendyn.selective_scan(**arguments, engine="triton")


def test_an_engine_may_decline(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(**arguments: Any) -> Any:
        raise AssertionError("it declined")

    picky = _engines.Engine("picky", lambda arguments: f"L is {arguments['u'].shape[-1]}", run)
    monkeypatch.setattr(_engines, "ENGINES", (picky, *_engines.ENGINES))
    arguments = scan_arguments()
    with pytest.raises(EngineError, match="'picky' cannot take this call: L is 35"):
        tokendyn.selective_scan(**arguments, engine="picky")
    assert tokendyn.selective_scan(**arguments).shape == arguments["u"].shape


def test_spectrum_of_deficient_rank() -> None:
    """Eigenvalues that coincide at 0 leave values and derivatives of the others alone."""
    L, R = normal(6, 2, seed=51), normal(2, 20, seed=52)
    S_B, S_C = L @ R, L @ normal(2, 20, seed=53)  # rank 2, N = 6
    values, symmetric = tokendyn.io_spectrum(S_B, S_C)
    M = np.asarray(S_C).T @ np.asarray(S_B)
    exact = np.linalg.eigvals(M)
    exact = exact[np.argsort(-np.abs(exact))][:2]
    largest = np.sort_complex(np.asarray(values)[np.argsort(-np.abs(values))][:2])
    np.testing.assert_allclose(largest, np.sort_complex(exact), atol=1e-10 * np.abs(exact).max())
    wanted = np.sort(np.linalg.eigvalsh((M + M.T) / 2))[::-1]
    wanted = np.concatenate([wanted[:6], wanted[-6:]])
    np.testing.assert_allclose(np.asarray(symmetric), wanted, atol=1e-10 * np.abs(wanted).max())
    top = int(np.argmax(np.abs(values)))

    def of_rank_two(L: Any) -> Any:
        spectrum = tokendyn.io_spectrum(L @ R, S_C)
        return spectrum.eigenvalues[top].real, spectrum.symmetric[0]

    direction = normal(6, 2, seed=54)
    tangents = jax.jvp(of_rank_two, (L,), (direction,))[1]
    above, below = of_rank_two(L + 1e-6 * direction), of_rank_two(L - 1e-6 * direction)
    np.testing.assert_allclose(tangents, (np.asarray(above) - np.asarray(below)) / 2e-6, rtol=1e-7)


def test_the_scan_has_second_derivatives_in_both_modes() -> None:
    rest = scan_arguments(9, groups=1)
    x = rest.pop("u"), rest.pop("delta")

    def scan(u: Any, delta: Any) -> Any:
        return tokendyn.selective_scan(jnp.asarray(u), jnp.asarray(delta), delta_softplus=True, **rest)

    check_grads(scan, x, order=2, modes=["fwd", "rev"], atol=1e-5, rtol=1e-5)


def test_conversions() -> None:
    values = np.asarray([[1.5, -2.25]])
    for dtype in ("float64", "float32", "bfloat16", "float16"):
        array = from_numpy(values, dtype)
        assert array.dtype == dtype
        np.testing.assert_array_equal(to_numpy(array).astype(np.float64), values)
    assert from_numpy(np.asarray([1, 2])).dtype == jnp.asarray([1]).dtype


LEAVES_X64_ALONE = """
import warnings
warnings.simplefilter("error")
import jax, jax.numpy as jnp, numpy as np
import tokendyn, tokendyn.jax
from tokendyn.errors import DTypeError
x = jnp.ones((1, 5, 3))
assert x.dtype == "float32"
order = tokendyn.token_order(x[..., 0])
assert order.restore(order.apply(x)).dtype == "float32" and order.indices.dtype == "int32"
u = x.mT
assert tokendyn.jax.selective_scan(u, u, -jnp.ones((3, 2)), u[:, :2], u[:, :2], lengths=jnp.array([4])).dtype == x.dtype
assert tokendyn.io_spectrum(x[0].T, x[0].T).eigenvalues.dtype == "complex64"
from tokendyn.backends.jax.ops import from_numpy
try:
    from_numpy(np.ones(2))
except DTypeError as error:
    assert "jax_enable_x64" in str(error)
else:
    raise AssertionError("float64 was quietly rounded")
assert from_numpy(np.ones(2), "float32").dtype == "float32"
assert not jax.config.jax_enable_x64
"""


def test_the_library_leaves_x64_alone() -> None:
    """In a process where the user has not switched it on."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_ENABLE_X64"}
    done = subprocess.run(
        [sys.executable, "-c", LEAVES_X64_ALONE], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_foreign_arrays_are_named() -> None:
    arguments = scan_arguments()
    with pytest.raises(DTypeError, match="B is a numpy array"):
        tokendyn.jax.selective_scan(**{**arguments, "B": np.asarray(arguments["B"])})
