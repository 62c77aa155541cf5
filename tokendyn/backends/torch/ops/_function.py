"""How our autograd functions are called: with a forward-mode rule where PyTorch can take one."""

from __future__ import annotations

from typing import Any

import torch
from torch._functorch import eager_transforms
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp) or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class Function(torch.autograd.Function):
    """An autograd function whose forward-mode rule is called ``tangent``; to be called by :meth:`call`.

    The rule is not named ``jvp`` because torch.compile refuses every function that has one.
    """

    _with_jvp: type[torch.autograd.Function]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "jvp" not in vars(cls):
            cls._with_jvp = type(f"{cls.__name__}WithJvp", (cls,), {"jvp": staticmethod(cls.tangent)})

    @staticmethod
    def tangent(ctx: Any, *tangents: Any) -> Any:
        """The tangent of the output, as ``torch.autograd.Function.jvp`` would give it."""
        raise NotImplementedError

    @classmethod
    def call(cls, *inputs: Any) -> Any:
        """``apply``, differentiable in forward mode too, except inside forward mode.

        Raises:
            NotImplementedError: forward mode inside forward mode, for which PyTorch silently gives a zero
                derivative of every autograd function.
        """
        if torch.compiler.is_compiling():
            return cls.apply(*inputs)
        if eager_transforms.JVP_NESTING > 1:
            raise NotImplementedError(
                "forward-mode differentiation of forward-mode derivatives: PyTorch has none for an autograd "
                "function; differentiate in reverse inside, as in torch.func.jacfwd(torch.func.jacrev(f))"
            )
        return cls._with_jvp.apply(*inputs)
