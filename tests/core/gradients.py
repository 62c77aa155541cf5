"""Two independent checks of a hand-written reverse pass: directional differences, and the transpose of a linear map."""

from __future__ import annotations

from typing import Any

import numpy as np

from tokendyn import core

#: Fourth-order central differences: the offsets and weights of f in ``h f'``.
STENCIL = ((-2, 1 / 12), (-1, -8 / 12), (1, 8 / 12), (2, -1 / 12))


def inner(cotangent: Any, output: Any) -> float:
    """``Re ⟨cotangent, output⟩``, summed over a tuple's members; None counts as 0."""
    if isinstance(output, tuple):
        return sum(inner(c, o) for c, o in zip(cotangent, output, strict=True))
    return 0.0 if cotangent is None else float(np.real(np.vdot(cotangent, output)))


def cotangent_of(output: Any, rng: np.random.Generator) -> Any:
    """Random numbers in the structure of ``output``."""
    if isinstance(output, tuple):
        return tuple(cotangent_of(member, rng) for member in output)
    numbers = rng.standard_normal(output.shape)
    return numbers + 1j * rng.standard_normal(output.shape) if np.iscomplexobj(output) else numbers


def check_vjp(
    name: str,
    arguments: dict[str, Any],
    wrt: str,
    rng: np.random.Generator,
    *,
    step: float = 1e-3,
    tolerance: float = 1e-8,
    **options: Any,
) -> None:
    """``core.<name>_vjp`` gives gradients of exactly ``wrt``, in their shapes, that agree with differences.

    Every argument is moved by itself along a random direction, so that no error can hide behind another's size.
    """
    operation, vjp = getattr(core, name), getattr(core, f"{name}_vjp")
    dout = cotangent_of(operation(**arguments, **options), rng)
    gradients = vjp(dout, **arguments, **options)
    assert set(gradients) == set(wrt.split())
    for key, gradient in gradients.items():
        value = np.asarray(arguments[key], np.float64)
        assert gradient.shape == value.shape
        assert gradient.dtype == np.float64
        direction = rng.standard_normal(value.shape)
        direction /= np.linalg.norm(direction)
        difference = sum(
            weight * inner(dout, operation(**{**arguments, key: value + offset * step * direction}, **options))
            for offset, weight in STENCIL
        )
        expected = difference / step
        found = inner(gradient, direction)
        scale = max(abs(expected), float(np.linalg.norm(gradient)) / np.sqrt(gradient.size))
        assert abs(found - expected) <= tolerance * scale, (key, found, expected)


def check_transpose(
    name: str, arguments: dict[str, Any], linear: str, rng: np.random.Generator, **options: Any
) -> None:
    """``⟨v, J w⟩ = ⟨Jᵀ v, w⟩`` to rounding, for an argument in which the operation is linear."""
    operation, vjp = getattr(core, name), getattr(core, f"{name}_vjp")
    w = rng.standard_normal(np.shape(arguments[linear]))
    forward = operation(**{**arguments, linear: w}, **options)
    v = cotangent_of(forward, rng)
    left, right = inner(v, forward), inner(vjp(v, **arguments, **options)[linear], w)
    assert abs(left - right) <= 1e-13 * np.sqrt(inner(v, v) * inner(forward, forward))
