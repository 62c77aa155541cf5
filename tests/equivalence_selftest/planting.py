"""How faults are planted, and the array language they are written in.

A fault takes the backend's own implementation and returns a faulty one. Most change what goes in or what comes out,
in what NumPy, PyTorch and JAX share, so one description serves every backend, gradients included.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from tokendyn._checks import dtype_name
from tokendyn._dispatch import kind_of, load_backend

from ..equivalence.frameworks import Implementation

Arguments = dict[str, Any]
Plant = Callable[[Implementation], Implementation]


@dataclass(frozen=True)
class Fault:
    """A fault in one subject.

    Attributes:
        name: what is wrong.
        subject: where.
        plant: makes the faulty implementation from the right one.
        backends: where it is planted.
        caught_by: the check that must catch it, if only one will do.
        where: the case that is tried first, since it is known to catch it. The others follow.
    """

    name: str
    subject: str
    plant: Plant
    backends: tuple[str, ...] = ("torch",)
    caught_by: str | None = None
    where: str | None = None


MAIN = ("numpy", "torch", "jax")
#: Without JAX, which compiles every fault.
BOTH = ("numpy", "torch")
DIFFERENTIATED = ("torch", "jax")


# ------------------------------------------------------------------------------------------ the shared array language


def xp(array: Any) -> ModuleType:
    """numpy, torch or jax.numpy: ``exp``, ``log1p``, ``expm1`` and ``where`` are called the same in all three."""
    return importlib.import_module({"numpy": "numpy", "torch": "torch", "jax": "jax.numpy"}[str(kind_of(array))])


def ops(array: Any) -> Any:
    return load_backend(str(kind_of(array)))


def cut(array: Any) -> Any:
    """The same array, through which no gradient passes."""
    return ops(array).stop_gradient(array) if kind_of(array) else array


def cast(array: Any, dtype: str) -> Any:
    return array.to(getattr(xp(array), dtype)) if kind_of(array) == "torch" else array.astype(dtype)


def constant(values: Any, like: Any) -> Any:
    return ops(like).from_numpy(np.asarray(values, np.float64), dtype_name(like))


def single(shape: tuple[int, ...], value: float) -> np.ndarray:
    """Zeros with ``value`` in the middle."""
    array = np.zeros(shape)
    array[tuple(size // 2 for size in shape)] = value
    return array


def earlier(array: Any, axis: int = -1) -> Any:
    """Every token in the place of the next one; the first stays."""
    length = array.shape[axis]
    index = np.maximum(np.arange(length) - 1, 0)
    return array[..., index] if axis == -1 else array[:, index]


def step(a: Arguments) -> Any:
    """Δ (b, d, L) of a scan's arguments."""
    delta = a["delta"]
    if a.get("delta_bias") is not None:
        delta = delta + a["delta_bias"][:, None]
    # max(x, 0) + log(1 + e^-|x|)
    return xp(delta).log1p(xp(delta).exp(-abs(delta))) + delta * (delta > 0) if a.get("delta_softplus") else delta


def decay(a: Arguments) -> Any:
    """A (d, N) or (d, 1)."""
    return a["A"] if len(a["A"].shape) == 2 else a["A"][:, None]


def by_channel(a: Arguments, name: str, group: Callable[[int, int], np.ndarray] | None = None) -> Any:
    """B or C as (b, d, N, L), a group of its own for every channel."""
    maps, d = a[name], a["delta"].shape[1]
    if len(maps.shape) == 3:
        maps = maps[:, None]
    groups = maps.shape[1]
    return maps[:, np.arange(d) // (d // groups) if group is None else group(d, groups)]


def scaled_gradient(array: Any, factor: float) -> Any:
    """The same value; its gradient times ``factor``."""
    stop = ops(array).stop_gradient
    return array * factor + stop(array) * (1.0 - factor)


# --------------------------------------------------------------------------------------------------- ways of planting


def given(change: Callable[[Arguments], Arguments]) -> Plant:
    """Change what goes in. On NumPy only the values are compared then."""
    return lambda right: Implementation(lambda **a: right.call(**{**a, **change(a)}))


def made(change: Callable[[Any], Any]) -> Plant:
    """Change the first output."""

    def plant(right: Implementation) -> Implementation:
        def call(**a: Any) -> Any:
            out = right.call(**a)
            return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

        return Implementation(call)

    return plant


def instead(call: Callable[..., Any]) -> Plant:
    """Something else in its place; ``call(right, arguments)``."""
    return lambda right: Implementation(lambda **a: call(right.call, a))


def gradient(name: str, change: Callable[[np.ndarray], np.ndarray] | None, through: Callable[[Any], Any]) -> Plant:
    """A wrong gradient of argument ``name`` beside right values.

    Args:
        name: the argument.
        change: of the gradient that NumPy's VJP returns; None drops it.
        through: of the argument itself, for frameworks that differentiate.
    """

    def plant(right: Implementation) -> Implementation:
        if right.vjp is None:
            return Implementation(lambda **a: right.call(**({**a, name: through(a[name])} if name in a else a)))
        vjp = right.vjp

        def wrong(dout: Any, **a: Any) -> dict[str, Any]:
            found = vjp(dout, **a)
            if name in found:
                g = found.pop(name)
                if change is not None:
                    found[name] = change(g)
            return found

        return Implementation(right.call, wrong)

    return plant


def without(*names: str) -> Plant:
    return given(lambda a: dict.fromkeys((n for n in names if n in a), None))
