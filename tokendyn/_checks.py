"""Argument checks shared by all backends: shapes, dtypes, options, and values where they can be seen.

They look at ``.shape`` and ``.dtype`` only, so they cost microseconds and can be traced by
``torch.compile`` and ``jax.jit``. :func:`concrete` is the one function that looks at values.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable
from typing import Any

from tokendyn._dispatch import kind_of
from tokendyn.errors import DataError, DTypeError, NonFiniteError, OptionError, ShapeError

FLOATS = ("float16", "bfloat16", "float32", "float64")
WIDE_FLOATS = ("float32", "float64")
HALVES = ("float16", "bfloat16")


def dtype_name(array: Any) -> str:
    """``"float32"`` and so on, the same word for every framework."""
    return str(array.dtype).removeprefix("torch.")


def state_dtype(activation: str) -> str:
    """The dtype in which states are kept and sums are made: float32 for half precision, else the same."""
    return "float32" if activation in HALVES else activation


class Shapes:
    """Binds the letters of shape patterns to sizes across the arguments of one call.

    >>> shapes = Shapes("selective_scan")
    >>> shapes.expect("u", u, "b d L")
    >>> shapes.expect("B", B, "b N L", "b G N L")
    """

    def __init__(self, operation: str) -> None:
        self.operation = operation
        self.sizes: dict[str, int] = {}
        self.givers: dict[str, str] = {}  # letter -> the argument that bound it

    def expect(self, name: str, array: Any, *patterns: str) -> None:
        """Match ``array``'s shape with one of ``patterns``; the first of the same rank decides."""
        shape = tuple(array.shape)
        for pattern in patterns:
            letters = pattern.split()
            if len(letters) != len(shape):
                continue
            sizes = dict(self.sizes)  # bound as a whole: a message speaks of the arrays before this one
            for letter, size in zip(letters, shape, strict=True):
                known = int(letter) if letter.isdigit() else sizes.get(letter)
                if known is not None and known != size:
                    self._fail(name, shape, patterns)
                if known is None:
                    if isinstance(size, int) and size < 1:
                        self._fail(name, shape, patterns)
                    sizes[letter] = size
            self.givers.update(dict.fromkeys(sizes.keys() - self.sizes.keys(), name))
            self.sizes = sizes
            return
        self._fail(name, shape, patterns)

    def _fail(self, name: str, shape: tuple[int, ...], patterns: Iterable[str]) -> None:
        wanted = " or ".join(
            "(" + ", ".join(pattern.split()) + ("," if len(pattern.split()) == 1 else "") + ")" for pattern in patterns
        )
        broken = {
            letter
            for letters in map(str.split, patterns)
            if len(letters) == len(shape)
            for letter, size in zip(letters, shape, strict=True)
            if self.sizes.get(letter, size) != size and letter in self.givers
        }
        known = ", ".join(
            f"{letter} = {size}" + (f" from {self.givers[letter]}" if letter in broken else "")
            for letter, size in self.sizes.items()
        )
        raise ShapeError(
            f"{self.operation}: {name} has shape {shape}, expected {wanted}"
            + (f" with {known}" if known else "")
            + ", every size at least 1"
            + self._hint(name, shape, patterns)
        )

    def _hint(self, name: str, shape: tuple[int, ...], patterns: Iterable[str]) -> str:
        """What to do where tokens and channels were exchanged: in this array, or in those before it."""

        def fits(shape: tuple[int, ...], sizes: dict[str, int]) -> bool:
            return any(
                len(letters) == len(shape)
                and all(sizes.get(letter, size) == size for letter, size in zip(letters, shape, strict=True))
                for letters in map(str.split, patterns)
            )

        shapes = [shape, (*shape[:-2], *shape[:-3:-1])] if len(shape) > 2 else [shape]
        sizes = [self.sizes]
        if {"d", "L"} <= set(self.sizes):
            sizes.append({**self.sizes, "d": self.sizes["L"], "L": self.sizes["d"]})
        _, *others = itertools.product(shapes, sizes)  # the first pair is the one that failed
        if 0 not in shape and any(fits(*pair) for pair in others):
            return f"; are the last two axes of {name}, or of the arrays before it, exchanged?"
        return ""


def expect_floats(operation: str, arrays: dict[str, Any], dtypes: tuple[str, ...] = FLOATS) -> str:
    """All ``arrays`` (None skipped) share one of the floating ``dtypes``; its name is returned."""
    first: tuple[str, str] | None = None
    for name, array in arrays.items():
        if array is None:
            continue
        dtype = dtype_name(array)
        if dtype not in dtypes:
            raise DTypeError(
                f"{operation}: {name} has dtype {dtype}, expected a real floating dtype "
                f"({', '.join(dtypes)}); convert it first"
            )
        if first is None:
            first = (name, dtype)
        elif dtype != first[1]:
            raise DTypeError(
                f"{operation}: {name} has dtype {dtype} but {first[0]} has {first[1]}; give both in one dtype"
            )
    assert first is not None
    return first[1]


def expect_parameters(operation: str, activation: str, arrays: dict[str, Any]) -> None:
    """Parameters and states have the activations' dtype, or float32 beside half-precision activations."""
    allowed = {activation, state_dtype(activation)}
    for name, array in arrays.items():
        if array is not None and (dtype := dtype_name(array)) not in allowed:
            todo = "complex parameters are not taken" if dtype.startswith("complex") else "convert it first"
            raise DTypeError(
                f"{operation}: {name} has dtype {dtype}, expected "
                f"{' or '.join(sorted(allowed))} beside {activation} activations; {todo}"
            )


def expect_integers(operation: str, name: str, array: Any) -> None:
    """``array`` has an integer dtype."""
    dtype = dtype_name(array)
    if not dtype.startswith(("int", "uint")):
        raise DTypeError(f"{operation}: {name} has dtype {dtype}, expected an integer dtype such as int64")


def expect_choice(operation: str, name: str, value: object, choices: Iterable[object]) -> None:
    """``value`` is one of ``choices``."""
    choices = tuple(choices)
    if value not in choices:
        raise OptionError(f"{operation}: {name} is {value!r}, expected one of {', '.join(map(repr, choices))}")


def expect_positive(operation: str, name: str, value: object) -> None:
    """``value`` is a finite Python number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise OptionError(f"{operation}: {name} is {value!r}, expected a finite Python number above 0")


def expect_number(operation: str, name: str, value: object) -> None:
    """``value`` is a finite Python number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < float("inf"):
        raise OptionError(f"{operation}: {name} is {value!r}, expected a finite Python number")


def expect_size(operation: str, name: str, value: object) -> int:
    """``value`` is a Python int of at least 1; it is returned."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{operation}: {name} is {value!r}, expected an integer of at least 1")
    return value


def concrete(array: Any, *, synchronize: bool) -> Any:
    """``array``'s values as a NumPy array, or None where they cannot be seen.

    They cannot be seen while ``torch.compile``, ``torch.func`` or JAX traces, nor, unless
    ``synchronize`` is given, on an accelerator, where a look would stall the stream.
    """
    kind = kind_of(array)
    if kind == "numpy":
        return array
    if kind == "torch":
        torch = sys.modules["torch"]
        if torch.compiler.is_compiling() or (array.device.type != "cpu" and not synchronize):
            return None
        try:
            values = array.detach()
            if values.dtype in (torch.bfloat16, torch.float16):
                values = values.float()
            return values.cpu().numpy()
        except RuntimeError:  # a torch.func wrapper has no values
            return None
    jax = sys.modules["jax"]
    if isinstance(array, jax.core.Tracer):
        return None
    if not synchronize and any(device.platform != "cpu" for device in array.devices()):
        return None
    import numpy as np

    return np.asarray(array, dtype=np.float32) if dtype_name(array) in HALVES else np.asarray(array)


def expect_lengths(operation: str, lengths: Any, longest: int) -> None:
    """Every length lies in [0, L], where that can be seen."""
    values = concrete(lengths, synchronize=True)
    if values is not None and values.size and (values.min() < 0 or values.max() > longest):
        worst = int(values.min()) if values.min() < 0 else int(values.max())
        raise ShapeError(f"{operation}: lengths holds {worst}, expected values from 0 to L = {longest}")


def expect_ids(operation: str, name: str, ids: Any, rows: int) -> None:
    """Every id names one of the ``rows`` of an embedding, where that can be seen without stalling an accelerator."""
    values = concrete(ids, synchronize=False)
    if values is not None and values.size and (values.min() < 0 or values.max() >= rows):
        worst = int(values.min()) if values.min() < 0 else int(values.max())
        raise DataError(
            f"{operation}: {name} hold the id {worst}, expected ids from 0 to {rows - 1}; does the tokenizer belong to "
            f"the model?"
        )


def expect_permutations(operation: str, name: str, indices: Any) -> None:
    """Every row of ``indices`` (b, L) is a permutation, where that can be seen without stalling an accelerator."""
    values = concrete(indices, synchronize=False)
    if values is None:
        return
    import numpy as np

    length = values.shape[1]
    wrong = (np.sort(values, axis=1) != np.arange(length)).any(axis=1)
    if not wrong.any():
        return
    row = int(wrong.argmax())
    outside = values[row][(values[row] < 0) | (values[row] >= length)]
    if len(outside):
        holds = f"holds {int(outside[0])}"
    else:
        counts = np.bincount(values[row], minlength=length)
        holds = f"holds {int(counts.argmax())} {int(counts.max())} times"
    raise ShapeError(
        f"{operation}: {name}[{row}] {holds}, expected a permutation of 0 to L - 1 = {length - 1}; take them from "
        f"hard_order or token_order of finite scores"
    )


def expect_finite(operation: str, name: str, array: Any) -> None:
    """No NaN and no infinity, where that can be seen without stalling an accelerator."""
    values = concrete(array, synchronize=False)
    if values is None:
        return
    import numpy as np

    finite = np.isfinite(values)
    if not finite.all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise NonFiniteError(
            f"{operation}: {name}[{', '.join(map(str, where))}] is {values[where]}, expected finite values "
            f"({int((~finite).sum())} of {values.size} are not); look for the layer that made it"
        )
