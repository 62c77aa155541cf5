"""Does a model read the future? Measured, not assumed; the twin of torch's check."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokendyn import _checks as check
from tokendyn._causality import (
    Causality,
    Leak,
    declares_causal,
    expect_declared_causal,
    expect_no_leak,
    perturbed_places,
)
from tokendyn._dispatch import describe
from tokendyn.backends.jax.models._mamba_lm import Embedding
from tokendyn.errors import DTypeError, NonFiniteError, OptionError, ShapeError


class _Shifted(nnx.Module):
    """An embedding whose rows are moved, so that there is something to differentiate by."""

    def __init__(self, embedding: Embedding, shift: jax.Array) -> None:
        self.embedding = embedding
        self.shift = nnx.data(shift)

    @property
    def weight(self) -> Any:
        return self.embedding.weight

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.embedding(ids) + self.shift


def causality(
    model: nnx.Module,
    length: int,
    *,
    tokens: jax.Array | None = None,
    perturbed: Iterable[int] | None = None,
    modes: Sequence[Literal["train", "eval"]] = ("train", "eval"),
    seed: int = 0,
) -> Causality:
    """Perturb one token after another, and see which outputs change::

        token t changes        =>  y_l the same to the last bit   for every l < t
        d y_l / d x_t          =   0 exactly                      for every l < t

    in the dtype of the model. Every call begins with the same random state, so dropout draws the same masks.

    Args:
        model: token ids (b, L) → (b, L, ...), or features (b, L, D) → (b, L, ...).
        length: L, tokens in the sequence; take more than one chunk of what the model computes in chunks.
        tokens: (b, L) integers or (b, L, D) floats to start from. By default ids drawn for the model's embedding.
        perturbed: places to perturb. By default all up to 160 tokens; in longer sequences the first, the last, and
            those at, before and after every multiple of 16.
        modes: of the model, ``model.train()`` and ``model.eval()``.
        seed: of the ids and the perturbations.

    Returns:
        The leaks found.

    Raises:
        DTypeError: the model is no ``nnx.Module``.
        OptionError: no output changed with any token, so there is nothing to check; or no embedding was found.
        NonFiniteError: the model's output is NaN or infinite.
        ShapeError: the output has not one entry for each token.

    Cost:
        One forward and one backward pass for each token perturbed and mode, compiled once a mode.
    """
    if not isinstance(model, nnx.Module):
        raise DTypeError(f"causality: model is {describe(model)}, expected a flax.nnx.Module")
    check.expect_size("causality", "length", length)
    for mode in modes:
        check.expect_choice("causality", "modes", mode, ("train", "eval"))
    places = perturbed_places(length, perturbed)
    declared, model = declares_causal(model), nnx.clone(model)
    draw = np.random.default_rng(seed)
    start = _start(model, length, tokens, draw)
    changes = {t: _changed(model, start, t, draw) for t in places}

    leaks: list[Leak] = []
    comparisons, responds, dtype = 0, False, ""
    for mode in modes:
        getattr(model, mode)()
        run = _Run(model, start)
        before = run.outputs(start)
        dtype = str(before.dtype)
        for t in places:
            difference = np.abs(run.outputs(changes[t]).astype(np.float64) - before.astype(np.float64))
            difference = difference.swapaxes(0, 1).reshape(length, -1).max(1)
            responds = responds or bool(difference.any())
            if difference[:t].any():
                seen = int(np.flatnonzero(difference[:t])[0])
                leaks.append(Leak(mode, "value", t, seen, float(difference[:t].max())))
        if not responds:
            raise OptionError("causality: no output changed with any token; give a model that responds to its tokens")
        weights = draw.standard_normal(before.shape)
        for t in filter(None, places):  # nothing is before the first token
            earlier = (np.arange(length) < t).reshape(1, -1, *(1,) * (before.ndim - 2))
            size = run.derivative(jnp.asarray(weights * earlier, before.dtype), t)
            if size:
                leaks.append(Leak(mode, "gradient", t, None, size))
        comparisons += len(places) + len(places) - (0 in places)
    return Causality(tuple(leaks), length, tuple(places), comparisons, declared, dtype)


def expect_causal(model: nnx.Module, length: int, **options: Any) -> Causality:
    """:func:`causality`, which must find no leak.

    Args:
        model, length, options: see :func:`causality`.

    Returns:
        What :func:`causality` found.

    Raises:
        CausalityError: the model declares ``causal = False``, or a leak was found.
        DTypeError, OptionError, NonFiniteError, ShapeError: see :func:`causality`.

    Cost:
        As :func:`causality`.
    """
    expect_declared_causal(model)
    found = causality(model, length, **options)
    expect_no_leak(model, found)
    return found


class _Run:
    """Calls of one model from one random state, compiled once."""

    def __init__(self, model: nnx.Module, start: jax.Array) -> None:
        graph, self._state = nnx.split(model)
        self._start = start
        integers = not jnp.issubdtype(start.dtype, jnp.floating)
        width, dtype = start.shape[-1], start.dtype
        path: tuple[Any, ...] = ()
        if integers:
            path, embedding = _embedding(model)
            width, dtype = embedding.weight.shape[1], embedding.weight.dtype
        self._still = jnp.zeros((*start.shape[:2], width), dtype)

        def output(state: Any, tokens: jax.Array, shift: jax.Array) -> jax.Array:
            live = nnx.merge(graph, state, copy=True)
            if not integers:
                return live(tokens + shift)  # type: ignore[operator]
            parent: Any = live
            for name in path[:-1]:
                parent = parent[name] if isinstance(name, int) else getattr(parent, name)
            setattr(parent, path[-1], _Shifted(getattr(parent, path[-1]), shift))
            return live(tokens)  # type: ignore[operator]

        def derivative(state: Any, tokens: jax.Array, shift: jax.Array, cotangent: jax.Array) -> jax.Array:
            return jax.vjp(lambda shift: output(state, tokens, shift), shift)[1](cotangent)[0]

        self._output: Callable[..., jax.Array] = jax.jit(output)
        self._derivative: Callable[..., jax.Array] = jax.jit(derivative)

    def outputs(self, tokens: jax.Array) -> np.ndarray:
        y = np.asarray(self._output(self._state, tokens, self._still))
        if y.ndim < 2 or y.shape[:2] != tokens.shape[:2]:
            raise ShapeError(
                f"causality: the model's output has shape {tuple(y.shape)} for tokens {tuple(tokens.shape)}, expected "
                f"(b, L, ...) with the same b and L"
            )
        if not np.isfinite(y.astype(np.float64)).all():
            raise NonFiniteError("causality: the model's output is NaN or infinite; there is nothing to compare")
        return y

    def derivative(self, cotangent: jax.Array, t: int) -> float:
        """The largest derivative by token t of the outputs weighted by ``cotangent``."""
        found = self._derivative(self._state, self._start, self._still, cotangent)
        return float(jnp.abs(found[:, t]).max())


def _start(model: nnx.Module, length: int, tokens: jax.Array | None, draw: np.random.Generator) -> jax.Array:
    if tokens is None:
        return jnp.asarray(draw.integers(_ids(model), size=(2, length)), jnp.int32)
    floating = jnp.issubdtype(tokens.dtype, jnp.floating)
    if tokens.ndim not in (2, 3) or tokens.shape[1] != length or floating != (tokens.ndim == 3):
        raise ShapeError(
            f"causality: tokens have shape {tuple(tokens.shape)} and dtype {tokens.dtype}, expected integers (b, L) or "
            f"floats (b, L, D) with L = {length}"
        )
    return tokens


def _changed(model: nnx.Module, tokens: jax.Array, t: int, draw: np.random.Generator) -> jax.Array:
    """``tokens`` with another token at place t in every row."""
    if jnp.issubdtype(tokens.dtype, jnp.floating):
        return tokens.at[:, t].add(jnp.asarray(draw.standard_normal(tokens[:, t].shape), tokens.dtype))
    ids = _ids(model)
    shift = jnp.asarray(draw.integers(1, ids, tokens[:, t].shape), tokens.dtype)
    return tokens.at[:, t].set((tokens[:, t] + shift) % ids)


def _ids(model: nnx.Module) -> int:
    ids = getattr(model, "vocab_size", None)
    ids = ids if isinstance(ids, int) else _embedding(model)[1].weight.shape[0]
    if ids < 2:
        raise OptionError(f"causality: the model knows {ids} token, expected at least 2")
    return ids


def _embedding(model: nnx.Module) -> tuple[tuple[Any, ...], Embedding]:
    """The model's embedding and the path to it."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Embedding):
            return path, module
    raise OptionError("causality: the model has no embedding of MambaLM's kind; give tokens, floats (b, L, D)")
