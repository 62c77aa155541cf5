"""Running a model on the inputs given, with one clear sentence where they do not fit it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokendyn.diagnose._words import printable
from tokendyn.errors import DataError, TokendynError

#: What a model raises when it is called on something that it does not take.
_REFUSALS = (RuntimeError, IndexError, KeyError, TypeError, ValueError, AttributeError, AssertionError)


def model_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the call.

    Raises:
        DataError: there is no tensor, or an empty one.
    """
    if isinstance(inputs, Mapping):
        args, kwargs = (), dict(inputs)
    elif isinstance(inputs, tuple):
        args, kwargs = inputs, {}
    else:
        args, kwargs = (inputs,), {}
    found = list(tensors((args, kwargs)))
    if not found:
        raise DataError(
            f"diagnose: inputs ({type(inputs).__name__}) hold no tensor, expected token ids or features as a "
            f"torch.Tensor"
        )
    if any(0 in tensor.shape for tensor in found):
        shape = next(tuple(tensor.shape) for tensor in found if 0 in tensor.shape)
        raise DataError(f"diagnose: an input has shape {shape}, expected at least one token")
    return args, kwargs


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested mappings, tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from tensors(entry)


@torch.no_grad()
def run_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The model's output in evaluation mode; every module's own mode is restored.

    Raises:
        DataError: token ids outside an embedding, or whatever else the model refuses the inputs for.
    """
    with _evaluating(model), _ids_in_range(model):
        try:
            return model(*args, **kwargs)
        except (TokendynError, torch.OutOfMemoryError, NotOfTheModel):
            raise
        except _REFUSALS as cause:
            shapes = ", ".join(
                f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors((args, kwargs))
            )
            said = (str(cause).strip().splitlines() or [""])[0]
            raise DataError(
                f"diagnose: {type(model).__name__} cannot be called on these inputs ({shapes}): "
                f"{type(cause).__name__}: {printable(said, 300)}; give what its forward takes, such as ids (b, L)"
            ) from cause


class NotOfTheModel(Exception):
    """Carries an error of the measurements through the model that they hook into."""


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _ids_in_range(model: nn.Module) -> Iterator[None]:
    """Ids outside an embedding are said before a GPU would abort on them."""

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        ids = args[0] if args else None
        if not isinstance(ids, Tensor) or ids.is_floating_point() or not ids.numel():
            return
        least, most = int(ids.min()), int(ids.max())
        rows = int(module.num_embeddings)  # type: ignore[arg-type]
        if least < 0 or most >= rows:
            raise DataError(f"diagnose: ids go from {least} to {most}, expected 0 to {rows - 1} for this embedding")

    handles = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
