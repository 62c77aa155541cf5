"""How each backend is run and differentiated, in one form for all: NumPy arrays in, :class:`Outcome` out."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tokendyn._checks import HALVES, dtype_name
from tokendyn._dispatch import load_backend

from .compare import Outcome


@dataclass(frozen=True)
class Implementation:
    """What is under test: a call and, for the NumPy backend, which cannot differentiate it, its VJP."""

    call: Callable[..., Any]
    vjp: Callable[..., dict[str, Any]] | None = None


class Framework(Protocol):
    """One backend's arrays and derivatives."""

    name: str

    def array(self, values: np.ndarray, dtype: str | None, *, strided: bool) -> Any:
        """``values`` as this framework's array; ``strided``: a view that is not contiguous."""
        ...

    def run(
        self,
        implementation: Implementation,
        arguments: dict[str, Any],
        wrt: Sequence[str],
        cotangents: Sequence[np.ndarray] | None,
    ) -> tuple[tuple[Outcome, ...], dict[str, Outcome | None]]:
        """Outputs, and the gradients of ``Σ ⟨cotangent, output⟩`` with respect to ``wrt``.

        A complex output takes a real cotangent with a last axis of two: for its real and its imaginary part.
        A gradient that the framework says does not exist is None. Without cotangents, or with another number of
        them than there are outputs, there are no gradients.
        """
        ...


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """``values`` rounded to ``dtype`` and back to float64."""
    if dtype == "bfloat16":
        import ml_dtypes

        return values.astype(ml_dtypes.bfloat16).astype(np.float64)
    return values.astype(dtype).astype(np.float64)


def poisoned(values: np.ndarray) -> np.ndarray:
    """A view on ``values`` with NaN (or the lowest integer) between its elements: who ignores strides reads poison."""
    poison = np.nan if np.issubdtype(values.dtype, np.floating) else np.iinfo(values.dtype).min
    store = np.full((*values.shape[:-1], 2 * values.shape[-1]), poison, values.dtype)
    view = store[..., ::2]
    view[...] = values
    return view


def as_tuple(outputs: Any) -> tuple[Any, ...]:
    """A single output or a (named) tuple of them, as a tuple."""
    return tuple(outputs) if isinstance(outputs, tuple) else (outputs,)


class NumPy:
    """NumPy arrays; gradients only where the backend offers a VJP."""

    name = "numpy"

    def array(self, values: np.ndarray, dtype: str | None, *, strided: bool) -> Any:
        array = load_backend("numpy").from_numpy(values, dtype)
        return poisoned(array) if strided else array

    def run(
        self,
        implementation: Implementation,
        arguments: dict[str, Any],
        wrt: Sequence[str],
        cotangents: Sequence[np.ndarray] | None,
    ) -> tuple[tuple[Outcome, ...], dict[str, Outcome | None]]:
        outputs = as_tuple(implementation.call(**arguments))
        outcomes = tuple(_outcome(output, output) for output in outputs)
        if cotangents is None or implementation.vjp is None or len(cotangents) != len(outputs):
            return outcomes, {}
        dout = tuple(
            g[..., 0] + 1j * g[..., 1] if np.iscomplexobj(output) else g.astype(output.dtype)
            for g, output in zip(cotangents, outputs, strict=True)
        )
        found = implementation.vjp(dout if len(dout) > 1 else dout[0], **arguments)
        return outcomes, {name: _outcome(found[name], found[name]) if name in found else None for name in wrt}


class Torch:
    """Tensors on the CPU; reverse-mode autograd."""

    name = "torch"

    def array(self, values: np.ndarray, dtype: str | None, *, strided: bool) -> Any:
        ops = load_backend("torch")
        if not strided:
            return ops.from_numpy(values, dtype)
        return ops.from_numpy(np.ascontiguousarray(poisoned(values).base), dtype)[..., ::2]

    def run(
        self,
        implementation: Implementation,
        arguments: dict[str, Any],
        wrt: Sequence[str],
        cotangents: Sequence[np.ndarray] | None,
    ) -> tuple[tuple[Outcome, ...], dict[str, Outcome | None]]:
        import torch

        if cotangents is not None:
            arguments = {k: v.requires_grad_() if k in wrt else v for k, v in arguments.items()}
        outputs = as_tuple(implementation.call(**arguments))
        outcomes = tuple(_outcome(output, _torch_values(output)) for output in outputs)
        if cotangents is None or len(cotangents) != len(outputs):
            return outcomes, {}
        real = tuple(torch.view_as_real(o.resolve_conj()) if o.is_complex() else o for o in outputs)
        seeds = tuple(torch.tensor(g).to(o.dtype) for g, o in zip(cotangents, real, strict=True))
        found = torch.autograd.grad(real, [arguments[name] for name in wrt], seeds, allow_unused=True)
        return outcomes, {
            name: None if gradient is None else _outcome(gradient, _torch_values(gradient))
            for name, gradient in zip(wrt, found, strict=True)
        }


def _torch_values(tensor: Any) -> np.ndarray:
    tensor = tensor.detach().resolve_conj()
    return (tensor.double() if tensor.is_floating_point() else tensor).cpu().numpy()


class Jax:
    """JAX arrays; ``jax.vjp``. Values and gradients are compiled as one, once for all arguments of the same shapes.

    ``compiler_options`` go to XLA.
    """

    name = "jax"

    def __init__(self, **compiler_options: Any) -> None:
        self._compiler_options = tuple(compiler_options.items())

    def array(self, values: np.ndarray, dtype: str | None, *, strided: bool) -> Any:
        del strided  # JAX arrays have no strides
        return load_backend("jax").from_numpy(values, dtype)

    def run(
        self,
        implementation: Implementation,
        arguments: dict[str, Any],
        wrt: Sequence[str],
        cotangents: Sequence[np.ndarray] | None,
    ) -> tuple[tuple[Outcome, ...], dict[str, Outcome | None]]:
        import jax

        varied = {name: arguments[name] for name in wrt}
        fixed = {name: v for name, v in arguments.items() if isinstance(v, jax.Array) and name not in varied}
        options = tuple((name, v) for name, v in arguments.items() if not isinstance(v, jax.Array))
        call = _compiled(implementation.call, options, self._compiler_options)
        outputs, found = call(varied, fixed, None if cotangents is None else tuple(cotangents))
        return tuple(_outcome(output, np.asarray(output)) for output in outputs), {
            name: _outcome(gradient, np.asarray(gradient)) for name, gradient in found.items()
        }


@functools.cache
def _compiled(
    call: Callable[..., Any], options: tuple[tuple[str, Any], ...], compiler_options: tuple[tuple[str, Any], ...]
) -> Callable[..., Any]:
    """``(varied, fixed, cotangents)`` -> the outputs of ``call``, its gradients with respect to ``varied``."""
    import jax
    import jax.numpy as jnp

    def run(
        varied: dict[str, Any], fixed: dict[str, Any], cotangents: tuple[Any, ...] | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def real_and_all(varied: dict[str, Any]) -> tuple[Any, Any]:
            outputs = as_tuple(call(**fixed, **varied, **dict(options)))
            return tuple(jnp.stack([o.real, o.imag], -1) if jnp.iscomplexobj(o) else o for o in outputs), outputs

        if cotangents is None:
            return real_and_all(varied)[1], {}
        real, pull, outputs = jax.vjp(real_and_all, varied, has_aux=True)
        if len(cotangents) != len(outputs):
            return outputs, {}
        return outputs, pull(tuple(g.astype(o.dtype) for g, o in zip(cotangents, real, strict=True)))[0]

    return jax.jit(run, compiler_options=dict(compiler_options) or None)


def _outcome(array: Any, values: np.ndarray) -> Outcome:
    """``values`` in 64 bits beside the dtype that ``array`` has."""
    dtype = dtype_name(array)
    if np.iscomplexobj(values):
        return Outcome(values.astype(np.complex128), dtype)
    if dtype in (*HALVES, "float32", "float64"):
        return Outcome(values.astype(np.float64), dtype)
    return Outcome(values.astype(np.int64), dtype)


FRAMEWORKS: dict[str, Framework] = {"numpy": NumPy(), "torch": Torch(), "jax": Jax()}


def implementation_of(name: str, call: Callable[..., Any], backend: str) -> Implementation:
    """The backend's own implementation of subject ``name``: ``call``, and its VJP where there is one."""
    if backend != "numpy":
        return Implementation(call)
    return Implementation(call, getattr(importlib.import_module("tokendyn.backends.numpy.ops"), f"{name}_vjp", None))
