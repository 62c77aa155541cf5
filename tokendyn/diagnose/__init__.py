"""Diagnose a trained model: ``tokendyn.diagnose(model, inputs)``.

The module can be called, as the function :func:`diagnose` in it; ``tokendyn.diagnose.capture`` and the rest are its
other names. Needs PyTorch.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tokendyn._dispatch import load_backend

load_backend("torch")  # its message says how to install it

from tokendyn.diagnose._capture import Capture, Projections, watching  # noqa: E402
from tokendyn.diagnose._diagnosis import Diagnosis, diagnose  # noqa: E402
from tokendyn.diagnose._findings import Finding  # noqa: E402
from tokendyn.diagnose._load import load, load_projections, save_projections  # noqa: E402
from tokendyn.diagnose._monitor import HuggingFaceMonitor, LightningMonitor, Monitor, MonitorWarning  # noqa: E402
from tokendyn.diagnose._refine import Refinement, refine  # noqa: E402

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "Capture",
    "Diagnosis",
    "Finding",
    "HuggingFaceMonitor",
    "LightningMonitor",
    "Monitor",
    "MonitorWarning",
    "Projections",
    "Refinement",
    "capture",
    "diagnose",
    "load",
    "load_projections",
    "refine",
    "save_projections",
]


@contextlib.contextmanager
def capture(model: nn.Module) -> Iterator[list[Capture]]:
    """Watch every selective scan of ``model`` while it runs as it is.

    ::

        with tokendyn.diagnose.capture(model) as scans:
            model(input_ids)
        scans[0].attention(channel=3)         # (L, L) hidden attention
        scans[0].reconstruct()                # the layer's output by an independent path

    Unlike :func:`diagnose` this keeps all that it saw. Where there is no selective layer that can be read the list
    stays empty.

    Args:
        model: as of :func:`diagnose`.

    Yields:
        One :class:`Capture` a scan, in the order in which they ran.
    """
    from tokendyn.diagnose._adapters import find_sites

    captures: list[Capture] = []

    def keep(capture: Capture) -> None:
        _ = capture.pre  # now, while the weights are those of this pass
        captures.append(capture)

    with watching(find_sites(model), keep):
        yield captures


class _Callable(ModuleType):
    """A module that can be called: ``tokendyn.diagnose(...)`` is ``tokendyn.diagnose.diagnose(...)``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Diagnosis:
        return diagnose(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
