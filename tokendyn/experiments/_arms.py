"""Arms as a command line names them: a name, or a name with changes as in ``free:n_layer=6,norm=none``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from tokendyn.errors import OptionError

A = TypeVar("A")


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


def read_changes(changes: str, fields: Iterable[str], text: str) -> dict[str, str]:
    """``"tau=0.3,restore=true"`` as values by field; ``text`` is the whole arm, for the message.

    Raises:
        OptionError: an unknown field, or no ``=``.
    """
    fields, found = list(fields), {}
    for change in filter(None, changes.split(",")):
        key, equals, value = change.partition("=")
        if key not in fields or not equals:
            raise OptionError(
                f"--arms: {change!r} in {text!r} is no change; expected FIELD=VALUE of {', '.join(fields)}"
            )
        found[key] = value
    return found
