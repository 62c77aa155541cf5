"""Which backend a call goes to.

First match wins:

1. the arrays in the call (arrays of two kinds in one call: :class:`~tokendyn.errors.DTypeError`);
2. an explicit module: ``tokendyn.torch.f(...)``, ``tokendyn.jax.f(...)``;
3. ``with tokendyn.backend("jax"):`` (a context variable: safe under threads and asyncio);
4. ``tokendyn.use("jax")`` (the process's default);
5. the environment variable ``TOKENDYN_BACKEND``;
6. ``"numpy"``.

The last four serve only what makes things from nothing: layer constructors, random inputs, command
lines. They never decide which code touches an array that the caller already holds.

Nothing here imports a framework: a framework is considered only if it is already loaded, because an
array of a framework that was never imported cannot exist.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

from tokendyn.errors import (
    BackendBroken,
    BackendMissing,
    BackendUnknown,
    DTypeError,
    NotImplementedForBackend,
)

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Backend:
    """A backend: its name, the package its arrays come from, the extra that installs it, its dtypes."""

    name: str
    package: str
    extra: str | None
    dtypes: tuple[str, ...]

    def owns(self, value: object) -> bool:
        """Whether ``value`` is an array of this backend. Imports nothing."""
        package = sys.modules.get(self.package)
        if package is None:
            return False
        if self.name == "torch":
            return isinstance(value, package.Tensor)
        if self.name == "jax":
            return isinstance(value, package.Array)
        return isinstance(value, (package.ndarray, package.generic))


BACKENDS: dict[str, Backend] = {
    "numpy": Backend("numpy", "numpy", None, ("float64", "float32")),
    "torch": Backend("torch", "torch", "torch", ("float64", "float32", "bfloat16", "float16")),
    "jax": Backend("jax", "jax", "jax", ("float64", "float32", "bfloat16", "float16")),
}

_scoped: ContextVar[str | None] = ContextVar("tokendyn_backend", default=None)
_process_default: str | None = None


def _known(name: object) -> str:
    if not isinstance(name, str) or name not in BACKENDS:
        choices = ", ".join(map(repr, BACKENDS))
        raise BackendUnknown(f"unknown backend {name!r}; choose one of {choices}")
    return name


def load_backend(name: str) -> ModuleType:
    """Import the framework of backend ``name`` and return that backend's ``ops`` module.

    Raises:
        BackendUnknown: no backend has this name.
        BackendMissing: its package is not installed; the message gives the command that installs it.
        BackendBroken: its package is installed but fails to import; the original error is chained.
    """
    backend = BACKENDS[_known(name)]
    if backend.package not in sys.modules:
        if importlib.util.find_spec(backend.package) is None:
            raise BackendMissing(
                f"backend {name!r} needs the package {backend.package!r}, which is not installed; "
                f"run: pip install 'tokendyn[{backend.extra}]'"
            )
        try:
            importlib.import_module(backend.package)
        except Exception as cause:
            raise BackendBroken(
                f"backend {name!r}: the package {backend.package!r} is installed but fails to import "
                f"({type(cause).__name__}: {cause}); reinstall it, or choose another backend"
            ) from cause
    # Import statements, because torch.compile traces through these and not through importlib.
    if name == "torch":
        from tokendyn.backends.torch import ops
    elif name == "jax":
        from tokendyn.backends.jax import ops
    else:
        from tokendyn.backends.numpy import ops
    return ops


def use(name: str) -> None:
    """Make ``name`` the process's default backend for constructors, random inputs and command lines.

    It never changes which code handles an array you hold: that follows from the array's own type.
    The backend is loaded at once, so that a missing package is reported here and not later.

    Args:
        name: ``"numpy"``, ``"torch"`` or ``"jax"``.

    Raises:
        BackendUnknown, BackendMissing, BackendBroken: see :mod:`tokendyn.errors`.
    """
    global _process_default
    load_backend(name)
    _process_default = name


@contextlib.contextmanager
def backend(name: str) -> Iterator[str]:
    """Choose the backend of constructors, random inputs and command lines inside a ``with`` block.

    The choice is held in a context variable, so other threads and tasks do not see it.

    Args:
        name: ``"numpy"``, ``"torch"`` or ``"jax"``.

    Raises:
        BackendUnknown, BackendMissing, BackendBroken: see :mod:`tokendyn.errors`.
    """
    load_backend(name)
    token = _scoped.set(name)
    try:
        yield name
    finally:
        _scoped.reset(token)


def current_backend() -> str:
    """The backend that constructors and random inputs use here and now: rules 3 to 6 of this module."""
    scoped = _scoped.get()
    if scoped is not None:
        return scoped
    if _process_default is not None:
        return _process_default
    from_environment = os.environ.get("TOKENDYN_BACKEND")
    if from_environment:
        if from_environment not in BACKENDS:
            choices = ", ".join(map(repr, BACKENDS))
            raise BackendUnknown(
                f"the environment variable TOKENDYN_BACKEND is {from_environment!r}; choose one of {choices}"
            )
        return from_environment
    return "numpy"


def kind_of(value: object) -> str | None:
    """The backend whose array ``value`` is, or None if it is no array."""
    for name, candidate in BACKENDS.items():
        if candidate.owns(value):
            return name
    return None


def describe(value: object) -> str:
    """``value`` in a few words for an error message."""
    kind = kind_of(value)
    if kind is not None:
        dtype = str(value.dtype).removeprefix("torch.")  # type: ignore[attr-defined]
        return f"a {kind} array of shape {tuple(value.shape)} and dtype {dtype}"  # type: ignore[attr-defined]
    return f"{type(value).__module__}.{type(value).__qualname__}"


def backend_of(operation: str, arrays: Mapping[str, object], expected: str | None = None) -> str:
    """The one backend of all ``arrays`` (None entries are skipped).

    Args:
        operation: name of the operation, for messages.
        arrays: array arguments by name.
        expected: the backend they must belong to (explicit modules), or None.

    Raises:
        DTypeError: an argument is no array, kinds are mixed, or they are not ``expected``.
    """
    first_name: str | None = None
    first_kind: str | None = expected
    for name, value in arrays.items():
        if value is None:
            continue
        kind = kind_of(value)
        if kind is None:
            raise DTypeError(
                f"{operation}: {name} is {describe(value)}, expected an array of "
                f"{expected or 'NumPy, PyTorch or JAX'}; convert it first, for example "
                f"{'torch.as_tensor' if expected == 'torch' else 'jnp.asarray' if expected == 'jax' else 'np.asarray'}"
                f"({name})"
            )
        if first_kind is None:
            first_name, first_kind = name, kind
        elif kind != first_kind:
            if expected is not None:
                raise DTypeError(
                    f"tokendyn.{expected}.{operation}: {name} is {describe(value)}, expected a {expected} array; "
                    f"convert it, or call tokendyn.{operation}, which follows its arguments"
                )
            raise DTypeError(
                f"{operation}: {first_name} is a {first_kind} array but {name} is {describe(value)}; "
                f"all arrays of one call must be of one kind, convert one of the two"
            )
    if first_kind is None:
        raise DTypeError(f"{operation}: no array was given among {', '.join(arrays)}")
    return first_kind


def implementation(operation: str, backends: tuple[str, ...], name: str) -> Callable[..., Any]:
    """The function that implements ``operation`` on backend ``name``.

    Nothing is kept between calls: a cache filled while torch.compile traces would make it trace again.
    """
    if name not in backends:
        raise NotImplementedForBackend(f"{operation} is not implemented for {name}; it is for {', '.join(backends)}")
    return getattr(load_backend(name), operation)


def bind(function: Callable[P, R], name: str) -> Callable[P, R]:
    """``function`` (an operation of the table) fixed to backend ``name``: what explicit modules export."""
    fixed = function.on_backend(name)  # type: ignore[attr-defined]
    return functools.wraps(function)(fixed)
