"""Who runs a selective scan: a list of engines, each of which says what it declines and why.

``engine="auto"`` takes the first in the list that does not decline; naming one that declines is an error
with its reason. To add an engine: write its ``declines`` and ``run`` and enter it into :data:`ENGINES`
before ``plain``, which takes every call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tokendyn.backends.torch.ops import _scan_plain
from tokendyn.errors import EngineError, OptionError


@dataclass(frozen=True)
class ScanCall:
    """What an engine may look at to decide: everything about a call except values.

    Attributes:
        batch, channels, length, groups, state: the sizes b, d, L, G, N.
        dtype: of u, delta, z, B, C.
        device: ``"cpu"``, ``"cuda"``, ...
        scalar_A: A is (d,) or (d, 1).
        given: names of the optional arrays that were given.
        delta_softplus, return_last_state: the options.
        needs_grad: some array requires a gradient and gradients are enabled.
        transformed: a torch.func transform (grad, vmap, jvp) is active.
    """

    batch: int
    channels: int
    length: int
    groups: int
    state: int
    dtype: torch.dtype
    device: str
    scalar_A: bool
    given: frozenset[str]
    delta_softplus: bool
    return_last_state: bool
    needs_grad: bool
    transformed: bool


@dataclass(frozen=True)
class Engine:
    """One way to run a scan.

    Attributes:
        name: what users write.
        declines: the reason for not taking a call, or None.
        run: takes the arguments of :func:`tokendyn.selective_scan` by keyword, except ``engine``.
    """

    name: str
    declines: Callable[[ScanCall], str | None]
    run: Callable[..., Any]


ENGINES: tuple[Engine, ...] = (Engine("plain", lambda call: None, _scan_plain.run),)


def choose(name: str, call: ScanCall) -> Engine:
    """The engine called ``name``, or with ``"auto"`` the first that takes ``call``.

    Raises:
        OptionError: no engine has this name.
        EngineError: it declines; the message has its reason.
    """
    for engine in ENGINES:
        if name not in ("auto", engine.name):
            continue
        reason = engine.declines(call)
        if reason is None:
            return engine
        if name == engine.name:
            raise EngineError(
                f"selective_scan: engine {name!r} cannot take this call: {reason}; choose engine='auto' or another"
            )
    choices = ", ".join(repr(known) for known in ("auto", *(engine.name for engine in ENGINES)))
    raise OptionError(f"selective_scan: engine is {name!r}, expected one of {choices}")
