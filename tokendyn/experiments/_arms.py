"""Arms as a command line names them: a name, or a name with changes as in ``free:n_layer=6,norm=none``."""

from __future__ import annotations

import contextlib
import difflib
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from tokendyn.errors import OptionError

A = TypeVar("A")

#: Types of fields in words.
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", type(None): "none"}


def find_arm(text: str, arms: Mapping[str, A]) -> tuple[str, A, str]:
    """The name in ``text``, the arm of that name, and the changes as they stand.

    Raises:
        OptionError: no arm has this name.
    """
    name, _, changes = text.partition(":")
    if name not in arms:
        close = difflib.get_close_matches(name, arms, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise OptionError(f"--arms: unknown arm {name!r}{hint}; the arms are {', '.join(arms)}")
    return name, arms[name], changes


def read_changes(changes: str, fields: Mapping[str, Any], text: str) -> dict[str, Any]:
    """``"tau=0.3,restore=true"`` as values by field; ``text`` is the whole arm, for the message.

    ``fields`` gives the type of each, whose first alternative that the value can be it becomes.

    Raises:
        OptionError: an unknown field, no ``=``, or a value that the field does not take.
    """
    found = {}
    for change in filter(None, changes.split(",")):
        key, equals, value = change.partition("=")
        if key not in fields or not equals:
            raise OptionError(
                f"--arms: {change!r} in {text!r} is no change; expected FIELD=VALUE of {', '.join(fields)}"
            )
        found[key] = _as_type(fields[key], value, text)
    return found


def _as_type(hint: Any, value: str, text: str) -> Any:
    kinds = (hint,) if typing.get_origin(hint) is typing.Literal else typing.get_args(hint) or (hint,)
    for kind in kinds:
        if kind is bool and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if kind is type(None) and value.lower() == "none":
            return None
        if kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(value)
        if kind is str or value in typing.get_args(kind):
            return value
    expected = [_WORDS.get(kind) or ", ".join(typing.get_args(kind)) for kind in kinds]
    raise OptionError(f"--arms: {value!r} in {text!r}, expected {' or '.join(filter(None, expected))}")
