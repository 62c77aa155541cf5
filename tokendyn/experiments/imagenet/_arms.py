"""The arms that an image study can compare: each a way to order the tokens, by name.

On a command line an arm is a name, or a name with changes: ``sorted``, ``sorted:tau=0.3``,
``published:restore=true,tau=0.1``.
"""

from __future__ import annotations

import dataclasses
import difflib

from tokendyn._layers import OrderConfig
from tokendyn.errors import OptionError

ARMS: dict[str, OrderConfig | None] = {
    # Tokens as they come, row by row.
    "baseline": None,
    # Scores of unit deviation, a temperature that sorts, the order undone after the scan.
    "sorted": OrderConfig("softsort", tau=0.02, normalize=True),
    # Paper 1's public code: temperature 1 on raw scores, the order not undone.
    "published": OrderConfig.published(),
    # The same, undone.
    "published_restored": OrderConfig("softsort", tau=1.0),
    # A permutation, its gradient that of SoftSort.
    "straight_through": OrderConfig("straight_through", tau=0.1, normalize=True),
    # Paper 2: a fresh permutation in every training step.
    "random": OrderConfig("random"),
    # Control: last token first.
    "reversed": OrderConfig("reversed"),
}


def resolve_arm(text: str) -> OrderConfig | None:
    """The order that an arm stands for.

    Raises:
        OptionError: an unknown name or field, or a value that the field does not take.
    """
    name, _, changes = text.partition(":")
    if name not in ARMS:
        close = difflib.get_close_matches(name, ARMS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise OptionError(f"--arms: unknown arm {name!r}{hint}; the arms are {', '.join(ARMS)}")
    order = ARMS[name]
    if not changes:
        return order
    if order is None:
        raise OptionError(f"--arms: {text!r} changes {name}, which orders nothing; change another arm")
    given = {}
    for change in changes.split(","):
        key, equals, value = change.partition("=")
        known = {field.name: getattr(order, field.name) for field in dataclasses.fields(order)}
        if key not in known or not equals:
            raise OptionError(
                f"--arms: {change!r} in {text!r} is no change; expected FIELD=VALUE of {', '.join(known)}"
            )
        given[key] = _as_type_of(known[key], value, text)
    return dataclasses.replace(order, **given)


def describe_order(order: OrderConfig | None) -> str:
    """An order in a few words, for a table."""
    if order is None:
        return "no order"
    words = {"softsort": "SoftSort", "straight_through": "straight-through"}.get(order.method, order.method)
    if order.method in ("softsort", "straight_through"):
        words += f", τ = {order.tau:g}"
    if order.normalize:
        words += ", unit scores"
    return words + (", restored" if order.restore else ", not restored")


def _as_type_of(example: object, value: str, text: str) -> object:
    if isinstance(example, bool):
        if value.lower() in ("true", "false"):
            return value.lower() == "true"
    elif isinstance(example, float):
        try:
            return float(value)
        except ValueError:
            pass
    else:
        return value
    raise OptionError(
        f"--arms: {value!r} in {text!r} is no {'true or false' if isinstance(example, bool) else 'number'}"
    )
