"""The Pallas kernels of the scan, in interpret mode, against the engine in plain JAX; and their lowering for a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokendyn
from tokendyn.backends.jax.ops import _engines, _laplace, _laplace_pallas, _order, _scan_pallas, _scan_xla
from tokendyn.backends.jax.ops._scan_pallas import Tiling
from tokendyn.errors import EngineError

#: Several chunks, tiles and blocks of channels, none of them full.
SMALL = Tiling(chunk=8, tile=4, elements=8, interpret=True)


pytestmark = pytest.mark.usefixtures("quick_compilation")


def arguments(
    *, d: int = 6, L: int = 21, N: int = 3, groups: int = 2, scalar: bool = False, given: bool = True, dtype: Any
) -> dict[str, Any]:
    rng = np.random.default_rng([d, L, N, groups, scalar])

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    exact = jnp.promote_types(dtype, jnp.float32)
    made = {
        "u": normal(2, d, L),
        "delta": normal(2, d, L),
        "A": -jnp.exp(normal(d, 1 if scalar else N)).astype(exact),
        "B": normal(2, groups, N, L),
        "C": normal(2, groups, N, L),
    }
    if given:
        made |= {"z": normal(2, d, L)} | {name: normal(d).astype(exact) for name in ("D", "delta_bias")}
        made["initial_state"] = normal(2, d, N).astype(exact)
    return made


def results(run: Callable[..., Any], arguments: dict[str, Any], **options: Any) -> Any:
    """Output and last state, and the gradients of a generic functional of both."""

    @jax.jit
    def call(arguments: dict[str, Any]) -> Any:
        out, pull = jax.vjp(lambda a: run(**a, delta_softplus=True, **options), arguments)
        cotangents = jax.tree.map(lambda v: jnp.cos(jnp.arange(v.size)).reshape(v.shape).astype(v.dtype), out)
        return out, pull(cotangents)[0]

    return call(arguments)


def error(got: jax.Array, want: jax.Array) -> float:
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.isfinite(got).all()
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "everything": (
        {},
        {"seq_idx": jnp.asarray([[0] * 8 + [1] * 13, [3] * 9 + [0] * 12]), "lengths": jnp.asarray([21, 17])},
    ),
    "scalar A, one group, no option": ({"scalar": True, "groups": 1, "d": 5, "given": False}, {}),
}


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("engine", ["xla", "pallas"])
def test_packed_sequences_are_apart_even_in_what_is_not_a_number(engine: str, scalar: bool) -> None:
    run = _scan_xla.run if engine == "xla" else functools.partial(_scan_pallas.run, tiling=SMALL)
    length, cut = 21, 12
    options = {"seq_idx": jnp.tile(jnp.arange(length) >= cut, (2, 1)).astype(int)}
    made = arguments(L=length, scalar=scalar, dtype=jnp.float32)
    (y, last), gradients = results(run, made, **options)
    first, second = slice(0, cut), slice(cut, length)
    for at, spoiled, other in ((cut - 1, first, second), (1, first, second), (cut, second, first), (-1, second, first)):
        dirty = {**made, **{key: made[key].at[..., at].set(jnp.nan) for key in ("u", "delta", "B", "C", "z")}}
        (got, end), derivatives = results(run, dirty, **options)
        assert jnp.isnan(got[..., spoiled]).any()
        assert jnp.array_equal(got[..., other], y[..., other])
        for key in ("u", "delta", "B", "C", "z"):
            assert jnp.array_equal(derivatives[key][..., other], gradients[key][..., other]), (key, at)
        if spoiled == first:
            assert jnp.array_equal(end, last)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_plain_engine(name: str) -> None:
    sizes, options = CASES[name]
    made = arguments(**sizes, dtype=jnp.float64)
    got = results(lambda **a: _scan_pallas.run(tiling=SMALL, **a), made, **options)
    want = results(_scan_xla.run, made, **options)
    errors = jax.tree.leaves(jax.tree.map(error, got, want))
    assert len(errors) == 2 + len(made)
    assert max(errors) < 1e-13


def test_all_derivatives() -> None:
    """Forward mode, second derivatives, vmap and remat of the kernels: those of the engine in plain JAX."""
    sizes = {"d": 3, "L": 9, "N": 2, "groups": 1}
    made = arguments(**sizes, dtype=jnp.float64)
    starts = {"seq_idx": jnp.asarray([[0] * 5 + [1] * 4, [3] * 9])}

    def everything(run: Callable[..., Any]) -> Any:
        def loss(made: dict[str, Any]) -> Any:
            y, last = run(**made, **starts, delta_softplus=True)
            return jnp.sin(y).sum() + jnp.sin(last).sum()

        direction = jax.tree.map(jnp.cos, made)
        some = jax.grad(jax.checkpoint(lambda C, u: loss(made | {"C": C, "u": u})))
        return {
            "jvp": jax.jvp(lambda made: run(**made, **starts, delta_softplus=True), (made,), (direction,)),
            "jvp of grad": jax.jvp(jax.grad(loss), (made,), (direction,))[1],
            "vmap of grad": jax.vmap(some, (None, 0))(made["C"], jnp.stack([made["u"], 1.1 * made["u"]])),
        }

    got = jax.jit(functools.partial(everything, functools.partial(_scan_pallas.run, tiling=SMALL)))()
    want = jax.jit(functools.partial(everything, _scan_xla.run))()
    assert max(jax.tree.leaves(jax.tree.map(error, got, want))) < 1e-12


def test_in_bfloat16_sums_are_made_in_float32() -> None:
    """One token, one state, one channel too: blocks of a single element."""
    made = arguments(d=1, L=1, N=1, groups=1, dtype=jnp.bfloat16)
    got = results(lambda **a: _scan_pallas.run(tiling=SMALL, **a), made)
    want = results(_scan_xla.run, made)
    assert max(jax.tree.leaves(jax.tree.map(error, got, want))) < 2**-8


def test_what_a_kernel_leaves_unwritten_is_nan() -> None:
    """So that the comparisons above would see an output that no program wrote."""
    from jax.experimental import pallas as pl

    def first_half(x: Any, out: Any) -> None:
        out[:2] = x[:2]

    shape = jax.ShapeDtypeStruct((4,), jnp.float32)
    out = pl.pallas_call(first_half, out_shape=shape, interpret=True)(jnp.ones(4, jnp.float32))
    assert np.isnan(np.asarray(out)).tolist() == [False, False, True, True]


@pytest.mark.parametrize(("dtype", "width"), [(jnp.bfloat16, 16), (jnp.float32, 1)])
def test_lowers_for_cuda(dtype: Any, width: int) -> None:
    """Forward and backward kernels become Triton programs; no GPU is needed for that."""
    if jax.__version_info__ >= (0, 11) and jax.default_backend() != "gpu":
        pytest.skip("JAX 0.11 asks the GPU for its capability when it lowers")
    b, d, L, N = 2, 96, 300, 16

    def loss(u: Any, delta: Any, A: Any, B: Any, C: Any, h: Any) -> Any:
        starts = jnp.zeros((b, L), jnp.int32)
        y, last = _scan_pallas.run(u=u, delta=delta, A=A, B=B, C=C, initial_state=h, seq_idx=starts)
        return y.astype(jnp.float32).sum() + last.sum()

    def struct(*shape: int, dtype: Any = dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    shapes = [struct(b, d, L), struct(b, d, L), struct(d, width, dtype=jnp.float32), struct(b, N, L), struct(b, N, L)]
    traced = jax.jit(jax.grad(loss, range(6))).trace(*shapes, struct(b, d, N, dtype=jnp.float32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("ends", "carry", "outputs", "reverse_ends", "tile_states", "gradients"):
        assert f'name = "tokendyn_scan_{kernel}"' in text, kernel


def test_who_takes_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    made = arguments(dtype=jnp.float32)
    monkeypatch.setattr(_engines, "platform_of", lambda array: "cpu")
    with pytest.raises(EngineError, match="'pallas' cannot take this call: the arrays are on cpu"):
        _engines.choose("pallas", made)
    assert _engines.choose("auto", made).name == "xla"
    monkeypatch.setattr(_engines, "platform_of", lambda array: "gpu")
    monkeypatch.setattr(_engines, "_HAS_NVRTC", True)
    monkeypatch.setattr(_engines, "capability", lambda: 7.5)
    with pytest.raises(EngineError, match=r"'cuda' cannot take this call: it needs a GPU of compute capability 8\.0"):
        _engines.choose("cuda", made)
    assert _engines.choose("auto", made).name == "pallas"
    monkeypatch.setattr(_engines, "capability", lambda: 8.0)
    assert _engines.choose("auto", made).name == "cuda"
    monkeypatch.setattr(_engines, "_HAS_NVRTC", False)
    with pytest.raises(EngineError, match="'cuda-bindings' and 'nvidia-cuda-nvrtc' are not installed"):
        _engines.choose("cuda", made)
    assert _engines.choose("auto", made).name == "pallas"
    assert _engines.choose("auto", arguments(dtype=jnp.float64)).name == "xla"
    wide = made | {"B": jnp.ones((2, 1, 40, 21), jnp.float32)}
    with pytest.raises(EngineError, match="N = 40 entries, it takes at most 32"):
        _engines.choose("cuda", wide)
    wide = made | {"B": jnp.ones((2, 1, 300, 21), jnp.float32)}
    with pytest.raises(EngineError, match="N = 300 entries, it takes at most 256"):
        _engines.choose("pallas", wide)
    monkeypatch.setattr(_engines, "split_by_the_compiler", lambda array: True)
    with pytest.raises(EngineError, match=r"inside jax\.shard_map"):
        _engines.choose("pallas", made)


def test_sums_carried_by_a_kernel_are_those_of_the_loop() -> None:
    """Values, both modes of differentiation, and the second derivative, under vmap."""
    rng = np.random.default_rng(3)
    own = jnp.asarray(rng.normal(size=(2, 2, 5, 3, 3)))
    decay = jnp.asarray(rng.uniform(0.1, 0.9, (2, 2, 5)))
    same = jnp.asarray(rng.integers(0, 2, (2, 2, 5)) == 1)

    def everything(carry: Callable[..., Any]) -> Any:
        def loss(own: Any, decay: Any) -> Any:
            return jnp.sum(jnp.sin(jax.vmap(carry)(own, decay, same)))

        gradient = jax.grad(loss, (0, 1))
        _, tangent = jax.jvp(gradient, (own, decay), (jnp.cos(own), jnp.cos(decay)))
        return jax.vmap(carry)(own, decay, same), gradient(own, decay), tangent

    want = jax.jit(functools.partial(everything, _laplace.carry))()
    got = jax.jit(functools.partial(everything, functools.partial(_laplace_pallas.carry, interpret=True)))()
    assert max(jax.tree.leaves(jax.tree.map(error, got, want))) < 1e-13


def test_softsort_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """There and back over several blocks, with ties within blocks and across them."""
    rng = np.random.default_rng(4)
    scores = jnp.asarray(rng.integers(0, 40, (1, 150)) / 10.0)
    x = jnp.asarray(rng.normal(size=(1, 150, 3)))

    def there_and_back(engine: str) -> Any:
        def call(scores: Any, x: Any) -> Any:
            sorted_tokens = tokendyn.softsort(scores, x, tau=0.3, engine=engine)
            return jnp.sum(jnp.sin(tokendyn.softsort_restore(scores, sorted_tokens * x, tau=0.3, engine=engine)))

        return jax.jit(jax.value_and_grad(call, (0, 1)))(scores, x)

    monkeypatch.setattr(_engines, "platform_of", lambda array: "cpu")
    with pytest.raises(EngineError, match="the arrays are on cpu"):
        there_and_back("pallas")
    with pytest.raises(EngineError, match="power is 2, it takes 1"):
        tokendyn.softsort(scores, x, power=2, engine="pallas")
    monkeypatch.setattr(_order, "kernels_decline", lambda x: None)
    monkeypatch.setattr(_laplace_pallas, "carry", functools.partial(_laplace_pallas.carry, interpret=True))
    errors = jax.tree.leaves(jax.tree.map(error, there_and_back("pallas"), there_and_back("xla")))
    assert max(errors) < 1e-12


def test_softsort_lowers_for_cuda() -> None:
    if jax.__version_info__ >= (0, 11) and jax.default_backend() != "gpu":
        pytest.skip("JAX 0.11 asks the GPU for its capability when it lowers")
    own = jax.ShapeDtypeStruct((2, 5, 3, 200), jnp.float32)
    decay, same = jax.ShapeDtypeStruct((2, 5), jnp.float32), jax.ShapeDtypeStruct((2, 5), bool)
    gradient = jax.jit(jax.grad(lambda *a: _laplace_pallas.carry(*a).sum()))
    text = gradient.trace(own, decay, same).lower(lowering_platforms=("cuda",)).as_text()
    assert 'name = "tokendyn_laplace_solve_transposed"' in text


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("engine", ["cuda", "pallas"])
def test_on_a_gpu(dtype: Any, scalar: bool, engine: str) -> None:
    """Compiled kernels at real sizes, odd ones, with everything given."""
    made = arguments(d=330, L=1021, N=13, groups=3, scalar=scalar, dtype=dtype)
    options = {"seq_idx": jnp.asarray([[0] * 500 + [1] * 521, [3] * 1021]), "lengths": jnp.asarray([1021, 700])}
    got = results(_engines.choose(engine, made).run, made, **options)
    want = results(_scan_xla.run, made, **options)
    # A decay rate's gradient is a sum over all tokens of what cancels.
    bound = 2e-5 if dtype == jnp.float32 else 2e-2
    assert max(jax.tree.leaves(jax.tree.map(error, got, want))) < bound


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", ["cuda", "pallas"])
def test_derivatives_on_a_gpu(name: str) -> None:
    made = arguments(d=48, L=300, N=16, groups=1, dtype=jnp.float32)

    def loss(engine: str, made: dict[str, Any]) -> Any:
        return jnp.sin(tokendyn.selective_scan(**made, delta_softplus=True, engine=engine)).sum()

    def both(engine: str) -> Any:
        gradient = jax.grad(functools.partial(loss, engine))
        return jax.jit(lambda made: jax.jvp(gradient, (made,), (jax.tree.map(jnp.cos, made),)))(made)

    assert max(jax.tree.leaves(jax.tree.map(error, both(name), both("xla")))) < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
def test_softsort_on_a_gpu() -> None:
    rng = np.random.default_rng(4)
    scores = jnp.asarray(rng.integers(0, 400, (3, 1500)) / 100.0, jnp.float32)
    x = jnp.asarray(rng.normal(size=(3, 1500, 70)), jnp.float32)

    def there_and_back(engine: str) -> Any:
        def call(scores: Any, x: Any) -> Any:
            sorted_tokens = tokendyn.softsort(scores, x, tau=0.3, engine=engine)
            return jnp.sum(jnp.sin(tokendyn.softsort_restore(scores, sorted_tokens * x, tau=0.3, engine=engine)))

        return jax.jit(jax.value_and_grad(call, (0, 1)))(scores, x)

    errors = jax.tree.leaves(jax.tree.map(error, there_and_back("pallas"), there_and_back("xla")))
    assert max(errors) < 2e-5
