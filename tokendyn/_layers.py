"""Layer and model constructors that follow the chosen backend (rules 3 to 6 of ``_dispatch``)."""

from __future__ import annotations

import importlib
from typing import Any

from tokendyn._dispatch import current_backend, load_backend
from tokendyn.errors import NotImplementedForBackend

#: Constructor -> the backends that have it.
CONSTRUCTORS: dict[str, tuple[str, ...]] = {
    "S6": ("torch",),
    "Mamba": ("torch",),
    "TokenReorder": ("torch",),
    "MambaVision": ("torch",),
    "mambavision_t": ("torch",),
}


def construct(name: str, *args: Any, **kwargs: Any) -> Any:
    """Make layer ``name`` on the current backend.

    Raises:
        NotImplementedForBackend: the current backend has no such layer.
        BackendMissing, BackendBroken: see :mod:`tokendyn.errors`.
    """
    chosen = current_backend()
    if chosen not in CONSTRUCTORS[name]:
        choices = " or ".join(f"tokendyn.use({b!r})" for b in CONSTRUCTORS[name])
        raise NotImplementedForBackend(
            f"{name} is not implemented for the current backend {chosen!r}; choose another with {choices}, "
            f"or name it: tokendyn.{CONSTRUCTORS[name][0]}.{name}"
        )
    load_backend(chosen)
    return getattr(importlib.import_module(f"tokendyn.{chosen}"), name)(*args, **kwargs)
