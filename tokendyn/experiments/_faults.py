"""Where a NaN or an infinity came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def first_faulty_output(model: nn.Module, run: Callable[[], Any]) -> str | None:
    """The first module, in the order of computation, that makes non-finite output of finite input while ``run`` calls
    the model, and which; None if there is none."""
    found: list[str] = []

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if found or not any(_faulty(x) for x in _tensors(output)):
            return
        if any(_faulty(x) for x in _tensors(inputs)):
            found.append(f"the input of {name or 'the model'} ({type(module).__name__})")
        else:
            found.append(f"the output of {name or 'the model'} ({type(module).__name__})")

    handles = [
        module.register_forward_hook(lambda m, i, o, name=name: look(name, m, i, o))
        for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def faulty_parameters(model: nn.Module, *, gradients: bool) -> list[str]:
    """Names of parameters that hold a non-finite value, or whose gradient does, the nearest to the output first."""
    named = reversed(list(model.named_parameters()))
    if gradients:
        return [f"{name}.grad" for name, p in named if p.grad is not None and _faulty(p.grad)]
    return [name for name, p in named if _faulty(p)]


def _faulty(x: Tensor) -> bool:
    return x.is_floating_point() and not bool(torch.isfinite(x).all())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for item in value for x in _tensors(item)] if isinstance(value, (tuple, list)) else []
