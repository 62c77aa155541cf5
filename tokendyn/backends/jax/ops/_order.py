"""Orders of tokens: importance score, SoftSort and its restoration, hard order."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from tokendyn._checks import expect_choice
from tokendyn.backends.jax.ops._arguments import EXACT, absolute, widen
from tokendyn.backends.jax.ops._engines import kernels_decline
from tokendyn.backends.jax.ops._laplace import laplace_kernel
from tokendyn.errors import EngineError

_einsum = functools.partial(jnp.einsum, precision=EXACT)
ENGINES = ("auto", "pallas", "xla")
#: tau is no compile-time constant, so that a schedule of temperatures compiles once.
_jit = functools.partial(jax.jit, static_argnames=("power", "ascending"))
_jit_by_engine = functools.partial(jax.jit, static_argnames=("power", "ascending", "engine"))


@jax.jit
def importance_score(x: jax.Array, s_delta: jax.Array | None, k: jax.Array) -> jax.Array:
    """See :func:`tokendyn.importance_score`."""
    direction = widen(k) if s_delta is None else _einsum("dq,d->q", widen(s_delta), widen(k))
    return _einsum("blq,q->bl", widen(x), direction).astype(x.dtype)


def hard_order(scores: jax.Array, *, ascending: bool = True) -> jax.Array:
    """See :func:`tokendyn.hard_order`."""
    return _sorting(_key(scores, ascending))


def take_tokens(x: jax.Array, indices: jax.Array) -> jax.Array:
    """See :func:`tokendyn.take_tokens`. Places outside the sequence give NaN."""
    return jnp.take_along_axis(x, _places(indices)[..., None], axis=1, mode="fill")


def put_tokens(y: jax.Array, indices: jax.Array) -> jax.Array:
    """See :func:`tokendyn.put_tokens`. Places that no index names give NaN."""
    batch, length = indices.shape
    nowhere = jnp.full_like(indices, length)
    rows, places = jnp.arange(batch)[:, None], _places(indices)
    inverse = nowhere.at[rows, places].set(jnp.arange(length, dtype=indices.dtype), mode="drop")
    return take_tokens(y, inverse)


def _places(indices: jax.Array) -> jax.Array:
    """``indices`` with L, which names no token, for negative ones, which JAX would count from the end."""
    return jnp.where(indices < 0, indices.shape[1], indices)


def softsort(
    scores: jax.Array,
    x: jax.Array,
    *,
    tau: float = 1.0,
    power: float = 1,
    ascending: bool = True,
    engine: str = "auto",
) -> jax.Array:
    """See :func:`tokendyn.softsort`."""
    engine = _engine("softsort", engine, x, power)
    return _softsort(scores, x, float(tau), power=power, ascending=ascending, engine=engine)


def softsort_restore(
    scores: jax.Array,
    y: jax.Array,
    *,
    tau: float = 1.0,
    power: float = 1,
    ascending: bool = True,
    engine: str = "auto",
) -> jax.Array:
    """See :func:`tokendyn.softsort_restore`."""
    engine = _engine("softsort_restore", engine, y, power)
    return _softsort_restore(scores, y, float(tau), power=power, ascending=ascending, engine=engine)


def softsort_matrix(scores: jax.Array, *, tau: float = 1.0, power: float = 1, ascending: bool = True) -> jax.Array:
    """See :func:`tokendyn.softsort_matrix`."""
    return _softsort_matrix(scores, float(tau), power=power, ascending=ascending)


def effective_tokens(scores: jax.Array, *, tau: float = 1.0, power: float = 1, ascending: bool = True) -> jax.Array:
    """See :func:`tokendyn.effective_tokens`."""
    engine = _engine("effective_tokens", "auto", scores, power)
    scores = jax.lax.stop_gradient(scores)
    return _effective_tokens(scores, float(tau), power=power, ascending=ascending, engine=engine)


def _engine(operation: str, name: str, x: jax.Array, power: float) -> str:
    """Who carries sums over blocks: a kernel on a GPU, or XLA, which there starts several for every block."""
    expect_choice(f"{operation} on JAX", "engine", name, ENGINES)
    reason = kernels_decline(x) if power == 1 else f"power is {power}, it takes 1"
    if name == "pallas" and reason is not None:
        raise EngineError(
            f"{operation}: engine 'pallas' cannot take this call: {reason}; choose engine='auto' or 'xla'"
        )
    return "xla" if name == "xla" or reason is not None else "pallas"


@_jit_by_engine
def _softsort(
    scores: jax.Array, x: jax.Array, tau: jax.Array, *, power: float, ascending: bool, engine: str
) -> jax.Array:
    s, tokens, order = _widened(scores, x, ascending)
    if power != 1:
        # Sorted keys against keys in place: the gather of tokens is left to the product.
        K = _kernel(_take(s, order), s, tau, power)
        return (_einsum("bkl,bld->bkd", K, tokens) / K.sum(-1, keepdims=True)).astype(x.dtype)
    product = laplace_kernel(_take(s, order), _with_column(take_tokens(tokens, order), 1), tau, engine=engine)
    return (product[..., :-1] / product[..., -1:]).astype(x.dtype)


@_jit_by_engine
def _softsort_restore(
    scores: jax.Array, y: jax.Array, tau: jax.Array, *, power: float, ascending: bool, engine: str
) -> jax.Array:
    s, tokens, order = _widened(scores, y, ascending)
    if power != 1:
        K = _kernel(_take(s, order), s, tau, power)
        P = K / K.sum(-1, keepdims=True)
        return (_einsum("bkl,bkd->bld", P, tokens) / P.sum(1)[..., None]).astype(y.dtype)
    s = _take(s, order)
    total = laplace_kernel(s, jnp.ones_like(tokens[..., :1]), tau, engine=engine)
    product = laplace_kernel(s, _with_column(tokens, 1) / total, tau, engine=engine)
    return put_tokens(product[..., :-1] / product[..., -1:], order).astype(y.dtype)


@_jit
def _softsort_matrix(scores: jax.Array, tau: jax.Array, *, power: float, ascending: bool) -> jax.Array:
    s = _key(widen(scores), ascending)
    K = _kernel(_take(s, _sorting(s)), s, tau, power)
    return (K / K.sum(-1, keepdims=True)).astype(scores.dtype)


@_jit_by_engine
def _effective_tokens(scores: jax.Array, tau: jax.Array, *, power: float, ascending: bool, engine: str) -> jax.Array:
    # K² is the same kernel at τ/2, so with row sums Z: 1/Σ P² = Z_τ² / Z_{τ/2}.
    s = _key(widen(scores), ascending)
    s = _take(s, _sorting(s))

    def total(tau: jax.Array) -> jax.Array:
        if power != 1:
            return _kernel(s, s, tau, power).sum(-1)
        return laplace_kernel(s, jnp.ones_like(s)[..., None], tau, engine=engine)[..., 0]

    return (total(tau) ** 2 / total(tau / 2)).astype(scores.dtype)


def _key(scores: jax.Array, ascending: bool) -> jax.Array:
    """What to sort by, ascending. Distances of keys are those of scores, and a stable sort stays stable."""
    return scores if ascending else -scores


def _sorting(key: jax.Array) -> jax.Array:
    """(b, L) indices of a stable sort; L, which names no token, in rows with a key that is not finite."""
    order = jnp.argsort(key, axis=-1, stable=True)
    return jnp.where(jnp.isfinite(key).all(-1, keepdims=True), order, key.shape[-1])


def _take(s: jax.Array, order: jax.Array) -> jax.Array:
    """Keys in their order; a row with a key that is not finite becomes NaN.

    The NaN is made from the data. One that the compiler can see, as ``mode="fill"`` writes it, is undefined behaviour
    to XLA's float32 exponential on the CPU, which then returns whatever was in memory.
    """
    return jnp.take_along_axis(s, order, axis=1, mode="clip") + (0 * s).sum(-1, keepdims=True)


def _widened(scores: jax.Array, x: jax.Array, ascending: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys and tokens in the one dtype that holds both, and the order of the keys."""
    scores, x = widen(scores), widen(x)
    dtype = jnp.promote_types(scores.dtype, x.dtype)
    key = _key(scores.astype(dtype), ascending)
    return key, x.astype(dtype), _sorting(key)


def _with_column(x: jax.Array, value: float) -> jax.Array:
    """``x`` (b, L, D) with one more channel that holds ``value``."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, 1)), constant_values=value)


def _kernel(rows: jax.Array, columns: jax.Array, tau: jax.Array, power: float) -> jax.Array:
    """(b, L, L) ``exp(-|rows_k - columns_l|^power / tau)``; the derivative of |·| at 0 is 0."""
    r = columns[:, None, :] - rows[:, :, None]
    if power == 1:
        distance = absolute(r)
    elif power == 2:
        distance = r * r
    else:
        apart = r != 0
        distance = jnp.where(apart, jnp.abs(jnp.where(apart, r, 1)) ** power, 0)
    return jnp.exp(-distance / tau)
