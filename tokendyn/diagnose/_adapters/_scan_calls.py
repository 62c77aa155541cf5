"""tokendyn's own layers, and any module that calls :func:`tokendyn.selective_scan`: the call itself is seen.

While a model is watched, the PyTorch backend's ``selective_scan`` is one that also shows its arguments to the
watchers of the same thread; it runs the engine that would have run, on the arguments that it was given.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tokendyn.backends.torch import ops as backend
from tokendyn.backends.torch.layers import S6
from tokendyn.diagnose._capture import Projections, Site

#: Of this thread and context: the layers whose forward is running, innermost last.
_running: ContextVar[tuple[tuple[nn.Module, Callable[..., None]], ...]] = ContextVar("tokendyn_watched", default=())
_lock = threading.Lock()
_watchers = 0
_plain = backend.selective_scan


def find(model: nn.Module) -> list[Site]:
    """Own layers, and modules that say of themselves that they scan, by a method ``io_matrices``."""
    return [
        Site(name or type(module).__name__, module, "tokendyn", lambda record, module=module: _watch(module, record))
        for name, module in model.named_modules()
        if isinstance(module, S6) or callable(getattr(module, "io_matrices", None))
    ]


def _watch(module: nn.Module, record: Callable[..., None]) -> Callable[[], None]:
    tokens = []

    def enter(_module: nn.Module, _args: Any) -> None:
        tokens.append(_running.set((*_running.get(), (module, record))))

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        _running.reset(tokens.pop())

    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    _install(1)

    def remove() -> None:
        _install(-1)
        for handle in handles:
            handle.remove()

    return remove


def _install(change: int) -> None:
    global _watchers
    with _lock:
        _watchers += change
        backend.selective_scan = _shown if _watchers else _plain  # type: ignore[assignment]


def _shown(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    **options: Any,
) -> Any:
    out = _plain(u, delta, A, B, C, D, z, delta_bias, delta_softplus, **options)
    running = _running.get()
    if running and B.ndim == 3:
        module, record = running[-1]
        last = out[0] if options.get("return_last_state") else out
        record(lambda: _captured(module, u, delta, A, B, C, D, z, last, delta_bias, delta_softplus, options))
    return out


def _captured(
    module: nn.Module,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    y: Tensor,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    options: dict[str, Any],
) -> dict[str, Any]:
    """The fields of :class:`Capture` from the arguments of one scan and its output."""
    step = delta.detach()
    if delta_bias is not None:
        step = step + delta_bias.detach()[:, None].to(step.dtype)
    notes = tuple(
        f"the scan was given {name}, which is not part of the hidden attention"
        for name in ("initial_state", "seq_idx", "lengths")
        if options.get(name) is not None
    )
    reorders = getattr(module, "order", None) is not None
    if reorders:
        notes = (*notes, "the layer orders its tokens: places are those of the sorted sequence")
    return {
        "u": u.detach(),
        "delta": F.softplus(step) if delta_softplus else step,
        "linear_part": lambda: _linear_part(module, delta.detach(), delta_softplus),
        "A": _rates(A.detach(), B.shape[1]),
        "B": B.detach(),
        "C": C.detach(),
        "D": None if D is None else D.detach(),
        "z": None if z is None else z.detach(),
        "y": y.detach(),
        "projections": _projections(module),
        "reorders": reorders,
        "notes": notes,
    }


def _linear_part(module: Any, delta: Tensor, delta_softplus: bool) -> Tensor | None:
    """S_Δ x: what the scan was given if it adds the bias itself, else what the layer's own words make of it."""
    if delta_softplus:
        return delta
    return module.undo_step(delta) if hasattr(module, "undo_step") else None


def _rates(A: Tensor, state: int) -> Tensor:
    """(d, N), also of the scalar form."""
    return A.reshape(A.shape[0], -1).expand(-1, state)


def _projections(module: Any) -> Projections | None:
    if not hasattr(module, "io_matrices") or not hasattr(module, "s_delta"):
        return None
    S_B, S_C = module.io_matrices()
    biased = getattr(module, "biased", getattr(getattr(module, "x_proj", None), "bias", None) is not None)
    return Projections(S_B.detach(), S_C.detach(), tuple(f.detach() for f in module.s_delta()), biased=biased)
