"""Derivatives of what kernels compute: values and gradients from the kernels, all others from plain JAX.

A change of the outputs is linear in that of the inputs, q = T p. JAX is given it as the solution of a linear system,
(p, q - T p) = (given, 0): forward mode, and with it every further derivative, applies T as plain JAX code; the system's
transpose, which reverse mode asks for, is solved by the kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def change_of(
    outputs: list[jax.Array], tangents: Any, apply: Callable[[Any], list[jax.Array]], transpose: Callable[..., Any]
) -> list[jax.Array]:
    """The change of ``outputs`` that ``tangents`` (a tree) make.

    Args:
        outputs: arrays of the shapes of the result.
        tangents: of the inputs.
        apply: T, in plain JAX.
        transpose: of one cotangent for each output the gradients of the inputs, by the kernels.
    """

    def system(pair: Any) -> Any:
        p, q = pair
        return p, jax.tree.map(jnp.subtract, q, apply(p))

    def solve(_: Any, right: Any) -> Any:
        p, rest = right
        return p, jax.tree.map(jnp.add, rest, apply(p))

    def solve_transposed(_: Any, right: Any) -> Any:
        rest, cotangents = right
        return jax.tree.map(jnp.add, rest, transpose(*cotangents)), cotangents

    given = _all_depend((tangents, [jnp.zeros_like(v) for v in outputs]))
    return jax.lax.custom_linear_solve(system, given, solve, solve_transposed)[1]


def _all_depend(arrays: Any) -> Any:
    """``arrays``, each of which JAX takes to depend on whatever one of them depends on.

    It transposes a system only if all of its right-hand side is unknown, zeros too. The sum is never chosen, and
    nothing is left of it when compiled.
    """
    leaves, tree = jax.tree.flatten(arrays)
    never = jnp.zeros((), bool)
    link = functools.reduce(jnp.add, (leaf[(0,) * leaf.ndim].astype(jnp.float32) for leaf in leaves))
    return tree.unflatten([leaf + jnp.where(never, link, 0).astype(leaf.dtype) for leaf in leaves])
