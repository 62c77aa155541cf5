"""The table itself: what a row holds, and the decorator that enters an operation into it."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from tokendyn._dispatch import backend_of, implementation

P = ParamSpec("P")
R = TypeVar("R")

ALL_BACKENDS = ("numpy", "torch", "jax")


@dataclass(frozen=True)
class Operation:
    """One row of the table.

    Attributes:
        name: the public name.
        arrays: the array arguments, in order; dispatch looks at these.
        differentiable: those of ``arrays`` with respect to which there is a gradient.
        backends: the backends that implement it.
        numbers: those of ``arrays`` that may also be Python numbers, on which dispatch then does not look.
        source: where its formula stands.
        function: the public function.
    """

    name: str
    arrays: tuple[str, ...]
    differentiable: tuple[str, ...]
    backends: tuple[str, ...]
    numbers: tuple[str, ...]
    source: str
    function: Callable[..., Any]


OPERATIONS: dict[str, Operation] = {}


def operation(
    *,
    arrays: str,
    differentiable: str,
    source: str,
    backends: tuple[str, ...] = ALL_BACKENDS,
    numbers: str = "",
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Enter the decorated function into :data:`OPERATIONS`; its body becomes the check before the call."""
    array_names = tuple(arrays.split())
    differentiable_names = tuple(differentiable.split())
    number_names = tuple(numbers.split())
    assert set(differentiable_names) <= set(array_names)
    assert set(number_names) <= set(array_names)

    def decorate(checks: Callable[P, R]) -> Callable[P, R]:
        name = checks.__name__
        signature = inspect.signature(checks)
        parameters = signature.parameters.values()
        positional = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
        every = frozenset(signature.parameters)
        required = frozenset(p.name for p in parameters if p.default is p.empty)

        def refuse(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            """Raise the TypeError that Python would, with the operation's name; of a mistyped name before all else."""
            for key in kwargs:
                if key not in every:
                    close = difflib.get_close_matches(key, sorted(every), 1)
                    hint = f"; did you mean {close[0]!r}?" if close else ""
                    raise TypeError(f"{name}: got an unexpected keyword argument {key!r}{hint}")
            try:
                signature.bind(*args, **kwargs)
            except TypeError as cause:
                raise TypeError(f"{name}: {cause}") from None

        def call(fixed: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if len(args) > len(positional):
                refuse(args, kwargs)
            named = dict(zip(positional, args, strict=False))
            if any(key in named for key in kwargs) or not every.issuperset(kwargs):
                refuse(args, kwargs)
            named.update(kwargs)
            if not required.issubset(named):
                refuse(args, kwargs)
            given = {key: named.get(key) for key in array_names}
            for key in number_names:
                if isinstance(given[key], (int, float)):
                    del given[key]
            chosen = backend_of(name, given, fixed)
            checks(**named)  # type: ignore[call-arg]
            return implementation(name, backends, chosen)(**named)

        @functools.wraps(checks)
        def public(*args: P.args, **kwargs: P.kwargs) -> R:
            return call(None, args, kwargs)

        def on_backend(fixed: str) -> Callable[P, R]:
            def bound(*args: P.args, **kwargs: P.kwargs) -> R:
                return call(fixed, args, kwargs)

            return bound

        public.on_backend = on_backend  # type: ignore[attr-defined]
        OPERATIONS[name] = Operation(name, array_names, differentiable_names, backends, number_names, source, public)
        return public

    return decorate
