"""Who runs a call: for each operation a list of engines, each of which says what it declines and why.

``engine="auto"`` takes the first in the list that does not decline, and logs once who took a call on an
accelerator and why the others did not; naming one that declines is an error with its reason. To add an
engine: write its ``declines`` and ``run`` and enter it into :data:`ENGINES` before ``plain``, which takes
every call.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tokendyn.backends.cuda import _scan_cuda_layout
from tokendyn.backends.torch.ops import _mamba_ssm, _permute, _scan_chunked, _scan_plain, _softsort_plain, _step_plain
from tokendyn.errors import EngineError, OptionError

_log = logging.getLogger(__name__)
_said: set[str] = set()
_taken: dict[str, set[str]] = {}
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_HAS_NVRTC = importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None


@dataclass(frozen=True)
class Call:
    """What an engine may look at to decide: everything about a call except values.

    Attributes:
        dtype: of the activations.
        device: ``"cpu"``, ``"cuda"``, ...
        needs_grad: some array requires a gradient and gradients are enabled.
        transformed: a torch.func transform (grad, vmap, jvp) or forward-mode differentiation is active.
    """

    dtype: torch.dtype
    device: str
    needs_grad: bool
    transformed: bool


@dataclass(frozen=True)
class StepCall(Call):
    """A call of ``selective_state_update``: ``state`` is the size N."""

    state: int


@dataclass(frozen=True)
class ScanCall(StepCall):
    """A call of ``selective_scan``.

    Attributes:
        batch, channels, length, groups: the sizes b, d, L, G.
        scalar_A: A is (d,) or (d, 1).
        given: names of the optional arrays that were given.
        delta_softplus, return_last_state: the options.
    """

    batch: int
    channels: int
    length: int
    groups: int
    scalar_A: bool
    given: frozenset[str]
    delta_softplus: bool
    return_last_state: bool


@dataclass(frozen=True)
class OrderCall(Call):
    """A call of ``softsort`` or ``softsort_restore``.

    Attributes:
        length: L.
        power: of the distance.
    """

    length: int
    power: float


@dataclass(frozen=True)
class Engine:
    """One way to run an operation.

    Attributes:
        name: what users write.
        declines: the reason for not taking a call, or None.
        run: takes the arguments of the operation, except ``engine``, optional ones by keyword.
    """

    name: str
    declines: Callable[[Any], str | None]
    run: Callable[..., Any]


def _triton_declines(call: Call) -> str | None:
    if call.device != "cuda":
        return f"the arrays are on {call.device}, it needs an NVIDIA GPU"
    if not _HAS_TRITON:
        return "the package 'triton' is not installed"
    if call.dtype == torch.float64:
        return "it computes in float32, the arrays are float64"
    if call.transformed:
        return "its operator has no rule for torch.func transforms"
    return None


def _cuda_declines(call: Call) -> str | None:
    if call.device != "cuda":
        return f"the arrays are on {call.device}, it needs an NVIDIA GPU"
    if call.dtype == torch.float64:
        return "it computes in float32, the arrays are float64"
    if not _HAS_NVRTC:
        return "the package 'cuda-bindings', which PyTorch's CUDA builds bring, is not installed"
    if torch.cuda.get_device_capability() < (8, 0):
        return "it needs a GPU of compute capability 8.0 or later"
    if call.transformed:
        return "its operator has no rule for torch.func transforms"
    return None


def _cuda_scan_declines(call: StepCall) -> str | None:
    if call.state > _scan_cuda_layout.STATE:
        return f"the state has N = {call.state} entries, it takes at most {_scan_cuda_layout.STATE}"
    return _cuda_declines(call)


def _cuda_scan(*args: Any, **options: Any) -> Any:
    from tokendyn.backends.torch.ops import _scan_cuda

    return _scan_cuda.run(*args, **options)


def _triton_scan_declines(call: StepCall) -> str | None:
    if call.state > 256:
        return f"the state has N = {call.state} entries, it takes at most 256"
    return _triton_declines(call)


def _triton_scan(*args: Any, **options: Any) -> Any:
    from tokendyn.backends.torch.ops import _scan_triton

    return _scan_triton.run(*args, **options)


def _triton_step_declines(call: StepCall) -> str | None:
    if call.needs_grad:
        return "it is for decoding and has no gradient"
    return _triton_scan_declines(call)


def _triton_step(*args: Any, **options: Any) -> Any:
    from tokendyn.backends.torch.ops import _step_triton

    return _step_triton.run(*args, **options)


def _cuda_order_declines(call: OrderCall) -> str | None:
    if call.power != 1:
        return f"the power is {call.power}, it takes 1"
    return _cuda_declines(call)


def _cuda_softsort(*args: Any) -> Any:
    from tokendyn.backends.torch.ops import _softsort_cuda

    return _softsort_cuda.softsort(*args)


def _cuda_softsort_restore(*args: Any) -> Any:
    from tokendyn.backends.torch.ops import _softsort_cuda

    return _softsort_cuda.softsort_restore(*args)


#: Up to this length the kernel takes less memory than the plain engine, and about as much time or less, with power 1;
#: measured on an H100 at (128, 196, 160) and (128, 49, 320).
_ALL_PAIRS_UP_TO = 256


def _triton_order_declines(call: OrderCall) -> str | None:
    if call.power not in (1, 2):
        return f"the power is {call.power}, it takes 1 and 2"
    if call.power == 1 and call.length > _ALL_PAIRS_UP_TO:
        return f"L = {call.length} exceeds {_ALL_PAIRS_UP_TO}, where power 1 takes less time in linear form"
    return _triton_declines(call)


def _triton_softsort(*args: Any) -> Any:
    from tokendyn.backends.torch.ops import _softsort_triton

    return _softsort_triton.softsort(*args)


def _triton_softsort_restore(*args: Any) -> Any:
    from tokendyn.backends.torch.ops import _softsort_triton

    return _softsort_triton.softsort_restore(*args)


def _triton_move_declines(call: Call) -> str | None:
    if not call.dtype.is_floating_point:
        return f"it marks what has no order by NaN, the tokens are {call.dtype}"
    return _triton_declines(call)


def _triton_take(*args: Any) -> Any:
    from tokendyn.backends.torch.ops import _permute_triton

    return _permute_triton.take_tokens(*args)


def _triton_put(*args: Any) -> Any:
    from tokendyn.backends.torch.ops import _permute_triton

    return _permute_triton.put_tokens(*args)


def _takes_all(call: Call) -> None:
    return None


ENGINES: dict[str, tuple[Engine, ...]] = {
    "selective_scan": (
        Engine("cuda", _cuda_scan_declines, _cuda_scan),
        Engine("triton", _triton_scan_declines, _triton_scan),
        Engine("mamba_ssm", _mamba_ssm.declines, _mamba_ssm.run),
        Engine("chunked", _scan_chunked.declines, _scan_chunked.run),
        Engine("plain", _takes_all, _scan_plain.run),
    ),
    "selective_state_update": (
        Engine("triton", _triton_step_declines, _triton_step),
        Engine("plain", _takes_all, _step_plain.run),
    ),
    "softsort": (
        Engine("cuda", _cuda_order_declines, _cuda_softsort),
        Engine("triton", _triton_order_declines, _triton_softsort),
        Engine("plain", _takes_all, _softsort_plain.softsort),
    ),
    "softsort_restore": (
        Engine("cuda", _cuda_order_declines, _cuda_softsort_restore),
        Engine("triton", _triton_order_declines, _triton_softsort_restore),
        Engine("plain", _takes_all, _softsort_plain.softsort_restore),
    ),
    "take_tokens": (
        Engine("triton", _triton_move_declines, _triton_take),
        Engine("plain", _takes_all, _permute.take_tokens),
    ),
    "put_tokens": (
        Engine("triton", _triton_move_declines, _triton_put),
        Engine("plain", _takes_all, _permute.put_tokens),
    ),
}


def _say_once(line: str) -> None:
    if line not in _said:
        _said.add(line)
        _log.info(line)


def engines_taken() -> dict[str, list[str]]:
    """By operation, the engines that have run calls in this process since this was last asked; compiled graphs, which
    choose once, are not counted."""
    found = {operation: sorted(engines) for operation, engines in sorted(_taken.items())}
    _taken.clear()
    return found


def choose(operation: str, name: str, call: Call) -> Engine:
    """The engine of ``operation`` called ``name``, or with ``"auto"`` the first that takes ``call``.

    Raises:
        OptionError: no engine has this name.
        EngineError: it declines; the message has its reason.
    """
    declined: list[str] = []
    for engine in ENGINES[operation]:
        if name not in ("auto", engine.name):
            continue
        reason = engine.declines(call)
        if reason is None:
            if not torch.compiler.is_compiling():
                _taken.setdefault(operation, set()).add(engine.name)
            if declined and call.device != "cpu" and not torch.compiler.is_compiling():
                _say_once(f"{operation}: engine {engine.name!r} takes the call; {'; '.join(declined)}")
            return engine
        declined.append(f"{engine.name!r} declined: {reason}")
        if name == engine.name:
            raise EngineError(
                f"{operation}: engine {name!r} cannot take this call: {reason}; choose engine='auto' or another"
            )
    choices = ", ".join(repr(known) for known in ("auto", *(engine.name for engine in ENGINES[operation])))
    raise OptionError(f"{operation}: engine is {name!r}, expected one of {choices}")
