"""What a check for causality finds, and whose it is: that of the backend whose model is given."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from tokendyn.errors import CausalityError, OptionError

#: Up to this length every token is perturbed.
_EVERY = 160


@dataclass(frozen=True)
class Leak:
    """Token ``token`` is seen by an output that should not see it.

    Attributes:
        mode: ``"train"`` or ``"eval"``.
        kind: ``"value"``, the output changed with the token; ``"gradient"``, its derivative is not 0.
        token: the place perturbed, from 0.
        output: the first place that saw it: before ``token``, or in another packed sequence. None for a gradient, which
            is taken of all such places together.
        size: the largest change, or derivative.
    """

    mode: str
    kind: Literal["value", "gradient"]
    token: int
    output: int | None
    size: float


@dataclass(frozen=True)
class Causality:
    """What :func:`causality` found.

    Attributes:
        leaks: every token that was seen too early, one entry a mode and kind; none for a causal model.
        length: tokens of the sequence.
        tokens: the places perturbed.
        comparisons: how many pairs of outputs, and gradients, were compared.
        declared: False if the model says of itself ``causal = False``, else True.
        dtype: in which the outputs were compared, to the last bit.
    """

    leaks: tuple[Leak, ...]
    length: int
    tokens: tuple[int, ...]
    comparisons: int
    declared: bool
    dtype: str = "float64"

    @property
    def causal(self) -> bool:
        """No leak was found."""
        return not self.leaks

    def explain(self) -> str:
        """One or two sentences in words."""
        done = f"{self.comparisons} comparisons over {self.length} tokens, {len(self.tokens)} of them perturbed"
        if self.causal:
            return f"No output saw a later token ({done}, {self.dtype}, equal to the last bit)."
        first = max(self.leaks, key=lambda leak: leak.size)
        token = f"the token at index {first.token}"
        if first.kind == "value":
            what = f"the output at index {first.output} changes by {first.size:.3g} with {token}"
        else:
            what = f"outputs that must not see {token} have a derivative of {first.size:.3g} by it"
        return (
            f"The model reads the future: in {first.mode} mode {what}, and {len(self.leaks) - 1} more leaks ({done})."
        )


def causality(model: Any, length: int, **options: Any) -> Causality:
    """Perturb one token after another, and see which outputs change: is there a model that reads the future?

    Args:
        model: a ``torch.nn.Module`` or a ``flax.nnx.Module``.
        length, options: see :func:`tokendyn.torch.causality`, :func:`tokendyn.jax.causality`.

    Returns:
        The leaks found.

    Raises:
        DTypeError, OptionError, NonFiniteError, ShapeError: see there.

    Cost:
        One forward and one backward pass for each token perturbed and mode.
    """
    return _backend_of(model).causality(model, length, **options)


def expect_causal(model: Any, length: int, **options: Any) -> Causality:
    """:func:`causality`, which must find no leak.

    Args:
        model, length, options: see :func:`causality`.

    Returns:
        What :func:`causality` found.

    Raises:
        CausalityError: the model declares ``causal = False``, or a leak was found.
        DTypeError, OptionError, NonFiniteError, ShapeError: see :func:`causality`.

    Cost:
        As :func:`causality`.
    """
    return _backend_of(model).expect_causal(model, length, **options)


def _backend_of(model: Any) -> Any:
    flax = sys.modules.get("flax.nnx")
    is_flax = flax is not None and isinstance(model, flax.Module)
    return importlib.import_module(f"tokendyn.{'jax' if is_flax else 'torch'}")


def perturbed_places(length: int, wanted: Iterable[int] | None) -> list[int]:
    """The places to perturb: those ``wanted``, or the ones named in ``causality``'s docstring.

    Raises:
        OptionError: a place outside the sequence, or none.
    """
    places = sorted(set(_usual(length) if wanted is None else wanted))
    if not places or places[0] < 0 or places[-1] >= length:
        raise OptionError(f"causality: perturbed is {places}, expected places from 0 to {length - 1}")
    return places


def _usual(length: int) -> Iterable[int]:
    if length <= _EVERY:
        return range(length)
    near = (k + shift for k in range(16, length, 16) for shift in (-1, 0, 1))
    return [0, length - 1, *(t for t in near if t < length)]


def declares_causal(model: Any) -> bool:
    """False if the model says of itself ``causal = False``."""
    return getattr(model, "causal", True) is not False


def expect_declared_causal(model: Any) -> None:
    """Raises:
    CausalityError: the model says of itself ``causal = False``.
    """
    if not declares_causal(model):
        raise CausalityError(
            f"{type(model).__name__} declares causal = False: its outputs see later tokens; do not train it to predict "
            f"the next token"
        )


def expect_no_leak(model: Any, found: Causality) -> None:
    """Raises:
    CausalityError: a leak was found.
    """
    if not found.causal:
        raise CausalityError(f"{type(model).__name__}: {found.explain()}")
