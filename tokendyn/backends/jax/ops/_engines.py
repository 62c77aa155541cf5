"""Who runs a selective scan: a list of engines, each of which says what it declines and why.

``engine="auto"`` takes the first in the list that does not decline; naming one that declines is an error
with its reason. To add an engine: write its ``declines`` and ``run`` and enter it into :data:`ENGINES`
before ``xla``, which takes every call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from tokendyn.backends.jax.ops import _scan_xla
from tokendyn.errors import EngineError, OptionError


@dataclass(frozen=True)
class Engine:
    """One way to run a scan.

    Attributes:
        name: what users write.
        declines: given the call's arguments by name, of whose arrays only shapes and dtypes are known, the
            reason for not taking it, or None.
        run: takes the arguments of :func:`tokendyn.selective_scan` by keyword, except ``engine`` and
            ``return_last_state``; gives the output and the last state.
    """

    name: str
    declines: Callable[[Mapping[str, Any]], str | None]
    run: Callable[..., tuple[jax.Array, jax.Array]]


ENGINES: tuple[Engine, ...] = (Engine("xla", lambda arguments: None, _scan_xla.run),)


def choose(name: str, arguments: Mapping[str, Any]) -> Engine:
    """The engine called ``name``, or with ``"auto"`` the first that takes this call.

    Raises:
        OptionError: no engine has this name.
        EngineError: it declines; the message has its reason.
    """
    for engine in ENGINES:
        if name not in ("auto", engine.name):
            continue
        reason = engine.declines(arguments)
        if reason is None:
            return engine
        if name == engine.name:
            raise EngineError(
                f"selective_scan: engine {name!r} cannot take this call: {reason}; choose engine='auto' or another"
            )
    choices = ", ".join(repr(known) for known in ("auto", *(engine.name for engine in ENGINES)))
    raise OptionError(f"selective_scan: engine is {name!r}, expected one of {choices}")
