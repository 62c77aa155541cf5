"""Weights of NNX modules by PyTorch's names, and safetensors files that both frameworks read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tokendyn.backends.jax.ops import from_numpy
from tokendyn.errors import CheckpointError


def _variables(module: nnx.Module) -> Any:
    """Pairs of path and variable: parameters and running statistics."""
    return nnx.to_flat_state(nnx.state(module, nnx.Any(nnx.Param, nnx.BatchStat)))


def _name(path: tuple[Any, ...]) -> str:
    """The name in ``state_dict`` of the torch module."""
    return ".".join(map(str, path))


def _aliases(module: nnx.Module) -> tuple[tuple[str, str], ...]:
    """Further names under which torch lists a parameter, and its own name: a head tied to the embedding."""
    return getattr(module, "aliases", ())


def state_dict(module: nnx.Module) -> dict[str, np.ndarray]:
    """Parameters and running statistics of an NNX module by the names that its torch twin has.

    Args:
        module: a layer or model of this package.

    Returns:
        NumPy arrays by name. bfloat16 stays bfloat16; counters become int64, as torch keeps them.
    """
    arrays = {_name(path): np.asarray(variable[...]) for path, variable in _variables(module)}
    arrays |= {alias: arrays[name] for alias, name in _aliases(module)}
    return {
        name: array.astype(np.int64) if np.issubdtype(array.dtype, np.integer) else array
        for name, array in arrays.items()
    }


def load_state_dict(module: nnx.Module, tensors: dict[str, Any]) -> None:
    """Set all parameters and running statistics of ``module`` in place to ``tensors``, values and dtypes.

    Args:
        module: whose names and shapes must be exactly those of ``tensors``.
        tensors: array-likes by name, as of :func:`state_dict`.

    Raises:
        CheckpointError: a name is missing or unknown, or a shape differs. Nothing has been changed then.
        DTypeError: float64 while JAX's x64 mode is off.
    """
    flat = _variables(module)
    variables = {_name(path): variable for path, variable in flat}
    tensors = dict(tensors)
    for alias, name in _aliases(module):
        if alias in tensors and name in tensors and not np.array_equal(tensors.pop(alias), tensors[name]):
            raise CheckpointError(f"{alias} and {name} differ, but are one parameter in this {type(module).__name__}")
    missing, unknown = sorted(variables.keys() - tensors.keys()), sorted(tensors.keys() - variables.keys())
    if missing or unknown:
        raise CheckpointError(
            f"the weights do not fit {type(module).__name__}: missing {missing or 'nothing'}, unknown "
            f"{unknown or 'nothing'}; make the module with the options of the one that was saved"
        )
    arrays = {}
    for name, variable in variables.items():
        array = np.asarray(tensors[name]).copy()  # JAX may keep what it is given, and torch changes its own in place
        if array.shape != variable.shape:
            raise CheckpointError(
                f"the weights do not fit {type(module).__name__}: {name} has shape {array.shape}, expected "
                f"{variable.shape}"
            )
        if np.issubdtype(array.dtype, np.integer):
            array = array.astype(variable.dtype)
        arrays[name] = from_numpy(array, str(array.dtype))
    nnx.update(module, nnx.from_flat_state([(path, v.replace(arrays[_name(path)])) for path, v in flat]))


def save_weights(module: nnx.Module, path: str | Path) -> None:
    """Write :func:`state_dict` to a safetensors file; ``safetensors.torch.load_file`` gives the torch twin's state.

    Args:
        module: a layer or model of this package.
        path: of the file, which is replaced.
    """
    save_file({name: np.asarray(array, order="C") for name, array in state_dict(module).items()}, path)


def load_weights(module: nnx.Module, path: str | Path) -> None:
    """Set ``module`` in place to a safetensors file of :func:`save_weights` or of torch's ``state_dict``.

    Args:
        module: whose names and shapes must be those of the file.
        path: of the file.

    Raises:
        CheckpointError: the file cannot be read, or does not fit the module; see :func:`load_state_dict`.
        DTypeError: it holds float64 while JAX's x64 mode is off.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as cause:
        raise CheckpointError(f"{path} cannot be read as safetensors: {cause}") from cause
    load_state_dict(module, tensors)
