"""The arms of studies that compare orders of tokens: each a way to order them, by name.

On a command line an arm is a name, or a name with changes: ``sorted``, ``sorted:tau=0.3``,
``published:restore=true,tau=0.1``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from tokendyn._layers import OrderConfig
from tokendyn.errors import OptionError
from tokendyn.experiments._arms import find_arm, read_changes

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Arm:
    """An order, or None for the tokens as they come, and how its temperature moves in training.

    Attributes:
        order: the order at the start of the training.
        final_tau: temperature at the end, reached geometrically; None keeps ``order.tau``.
    """

    order: OrderConfig | None
    final_tau: float | None = None

    def __post_init__(self) -> None:
        if self.final_tau is None:
            return
        if self.order is None or self.order.method not in ("softsort", "straight_through"):
            raise OptionError(f"final_tau is {self.final_tau} for {describe_order(self)}, which has no temperature")
        if not 0 < self.final_tau < float("inf"):
            raise OptionError(f"final_tau is {self.final_tau}, expected a number above 0")

    def tau(self, progress: float) -> float:
        """Temperature when a part ``progress`` (0 to 1) of the training is over."""
        assert self.order is not None
        start = self.order.tau
        return start if self.final_tau is None else start * (self.final_tau / start) ** progress

    def set_progress(self, model: nn.Module, progress: float) -> None:
        """Set the temperature that the schedule asks for, in every order by score of ``model``."""
        from tokendyn.backends.torch.layers._ordering import ScoreOrdering

        if self.final_tau is not None:
            for module in model.modules():
                if isinstance(module, ScoreOrdering):
                    module.tau = self.tau(progress)

    def to_json(self) -> dict[str, Any] | None:
        """All settings, for ``config.json``."""
        if self.order is None:
            return None
        settings = dataclasses.asdict(self.order)
        return settings if self.final_tau is None else settings | {"final_tau": self.final_tau}


ARMS: dict[str, Arm] = {
    # Tokens as they come.
    "baseline": Arm(None),
    # Scores of unit deviation, a temperature that sorts, the order undone after the scan.
    "sorted": Arm(OrderConfig("softsort", tau=0.02, normalize=True)),
    # The same from a temperature that averages, so that gradients reach all scores, to one that sorts.
    "annealed": Arm(OrderConfig("softsort", tau=1.0, normalize=True), final_tau=0.02),
    # Paper 1's public code: temperature 1 on raw scores, the order not undone.
    "published": Arm(OrderConfig.published()),
    # The same, undone.
    "published_restored": Arm(OrderConfig("softsort", tau=1.0)),
    # A permutation, its gradient that of SoftSort.
    "straight_through": Arm(OrderConfig("straight_through", tau=0.1, normalize=True)),
    # Paper 2: a fresh permutation in every training step.
    "random": Arm(OrderConfig("random")),
    # Control: every token that enters the scan is the mean of its sequence, and nothing is undone. Where the
    # published order averages all tokens this is what is left of it.
    "mean": Arm(OrderConfig("mean", restore=False)),
    # Control: last token first.
    "reversed": Arm(OrderConfig("reversed")),
}


def resolve_arm(text: str) -> Arm:
    """The arm that a name, perhaps with changes, stands for.

    Raises:
        OptionError: an unknown name or field, or a value that the field does not take.
    """
    name, arm, changes = find_arm(text, ARMS)
    if not changes:
        return arm
    if arm.order is None:
        raise OptionError(f"--arms: {text!r} changes {name}, which orders nothing; change another arm")
    given = read_changes(changes, get_type_hints(OrderConfig) | {"final_tau": float}, text)
    final_tau = given.pop("final_tau", arm.final_tau)
    return Arm(dataclasses.replace(arm.order, **given), final_tau)


def describe_order(arm: Arm) -> str:
    """An arm in a few words, for a table."""
    order = arm.order
    if order is None:
        return "no order"
    words = {"softsort": "SoftSort", "straight_through": "straight-through", "mean": "mean token"}.get(
        order.method, order.method
    )
    if order.method in ("softsort", "straight_through"):
        words += f", τ = {order.tau:g}"
        words += "" if arm.final_tau is None else f" to {arm.final_tau:g}"
    if order.normalize:
        words += ", unit scores"
    return words + (", restored" if order.restore else ", not restored")
