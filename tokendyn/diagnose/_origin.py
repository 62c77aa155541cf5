"""Where what is not finite begins: in a weight, or in the first module whose inputs were finite still."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def bad_weights(model: nn.Module) -> list[dict[str, Any]]:
    """Parameters and buffers with NaN or infinity: name, how many, the first index and its value."""
    found = []
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if not value.is_floating_point():
            continue
        wrong = ~torch.isfinite(value.detach())
        if wrong.any():
            where = torch.argwhere(wrong)[0].tolist()
            first = float(value.detach()[tuple(where)])
            found.append({"name": name, "count": int(wrong.sum()), "first": where, "value": str(first)})
    return found


@contextlib.contextmanager
def origin_of_non_finite(model: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """The first module whose output was not finite though its inputs were, as the only entry; none where there is none.

    A module is through after its parts, so that it is the innermost one.
    """
    found: list[dict[str, Any]] = []

    def look(name: str, args: Any, output: Any) -> None:
        if found or not _wrong(output) or _wrong(args):
            return
        found.append({"module": name})

    handles = [
        module.register_forward_hook(lambda m, args, output, name=name: look(name, args, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _wrong(value: Any) -> bool:
    if isinstance(value, Tensor):
        # The sum of finite numbers may overflow, so it only spares the exact look where it is finite.
        return (
            value.is_floating_point()
            and not bool(torch.isfinite(value.detach().sum()))
            and bool((~torch.isfinite(value.detach())).any())
        )
    if isinstance(value, (tuple, list)):
        return any(_wrong(entry) for entry in value)
    return False
