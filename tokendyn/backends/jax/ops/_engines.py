"""Who runs a selective scan: a list of engines, each of which says what it declines and why.

``engine="auto"`` takes the first in the list that does not decline; naming one that declines is an error
with its reason. To add an engine: write its ``declines`` and ``run`` and enter it into :data:`ENGINES`
before ``xla``, which takes every call.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.core import Tracer

from tokendyn._checks import dtype_name
from tokendyn.backends.cuda import _scan_cuda_layout
from tokendyn.backends.jax.ops import _scan_xla
from tokendyn.errors import EngineError, OptionError

#: Largest N whose state the kernels hold in registers.
PALLAS_STATE = 256
_HAS_NVRTC = importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None


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


def platform_of(array: jax.Array) -> str:
    """Where a computation on ``array`` runs: its device, or for a tracer the device that JAX takes by default."""
    if not isinstance(array, Tracer):
        return next(iter(array.devices())).platform
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    if default is None:
        return jax.default_backend()
    return default if isinstance(default, str) else default.platform


def split_by_the_compiler(array: jax.Array) -> bool:
    """Whether XLA may have to cut ``array`` over devices: traced where there are several, outside ``jax.shard_map``."""
    if not isinstance(array, Tracer):
        return len(array.devices()) > 1
    return jax.device_count() > 1 and not jax.sharding.get_abstract_mesh().manual_axes


def kernels_decline(array: jax.Array) -> str | None:
    """Why a GPU kernel cannot be run on ``array``, or None."""
    platform = platform_of(array)
    if platform not in ("gpu", "cuda"):
        return f"the arrays are on {platform}, it needs an NVIDIA GPU"
    if dtype_name(array) == "float64":
        return "it computes in float32, the arrays are float64"
    if split_by_the_compiler(array):
        return "XLA cannot divide a kernel among devices; call it inside jax.shard_map, or show the process one device"
    return None


def capability() -> float:
    """Compute capability of the device that JAX takes by default; 0 where it is none of NVIDIA's."""
    text = jax.local_devices()[0].compute_capability
    return float(text) if text.replace(".", "").isdigit() else 0.0


def _cuda_declines(arguments: Mapping[str, Any]) -> str | None:
    state = arguments["B"].shape[-2]
    if state > _scan_cuda_layout.STATE:
        return f"the state has N = {state} entries, it takes at most {_scan_cuda_layout.STATE}"
    reason = kernels_decline(arguments["u"])
    if reason is None and not _HAS_NVRTC:
        return "the packages 'cuda-bindings' and 'nvidia-cuda-nvrtc' are not installed"
    if reason is None and capability() < 8:
        return "it needs a GPU of compute capability 8.0 or later"
    return reason


def _cuda_run(**arguments: Any) -> tuple[jax.Array, jax.Array]:
    from tokendyn.backends.jax.ops import _scan_cuda  # registers a target with XLA, which no other device needs

    return _scan_cuda.run(**arguments)


def _pallas_declines(arguments: Mapping[str, Any]) -> str | None:
    state = arguments["B"].shape[-2]
    if state > PALLAS_STATE:
        return f"the state has N = {state} entries, it takes at most {PALLAS_STATE}"
    return kernels_decline(arguments["u"])


def _pallas_run(**arguments: Any) -> tuple[jax.Array, jax.Array]:
    from tokendyn.backends.jax.ops import _scan_pallas  # loads Pallas, which no other device needs

    return _scan_pallas.run(**arguments)


ENGINES: tuple[Engine, ...] = (
    Engine("cuda", _cuda_declines, _cuda_run),
    Engine("pallas", _pallas_declines, _pallas_run),
    Engine("xla", lambda arguments: None, _scan_xla.run),
)


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
