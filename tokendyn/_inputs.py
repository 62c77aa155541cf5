"""Random, well-scaled arguments for every operation: to try one out, to test it, to time it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from tokendyn import _checks as check
from tokendyn._dispatch import BACKENDS, current_backend, load_backend
from tokendyn.errors import OptionError

#: Operation -> what makes its arguments from a generator and the options given.
_MAKERS: dict[str, Callable[..., dict[str, Any]]] = {}


def _makes(*operations: str) -> Callable[[Callable[..., dict[str, Any]]], Callable[..., dict[str, Any]]]:
    def register(maker: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        _MAKERS.update(dict.fromkeys(operations, maker))
        return maker

    return register


def random_inputs(operation: str, *, seed: int = 0, dtype: str = "float32", **options: Any) -> dict[str, Any]:
    """Random arguments for ``operation``, as arrays of the current backend.

    ::

        y = tokendyn.selective_scan(**tokendyn.random_inputs("selective_scan", length=64))

    The backend is the one chosen with :func:`tokendyn.backend`, :func:`tokendyn.use` or ``TOKENDYN_BACKEND``. The
    values are drawn with NumPy, so a seed means the same numbers on every backend. They have the scale of a freshly
    made Mamba: step sizes from 0.001 to 0.1 after softplus, A_{dn} = -n, everything else of unit variance.

    Args:
        operation: name of an operation, or ``"token_order"``.
        seed: of NumPy's generator.
        dtype: of the floating arrays.
        options: sizes and choices, by operation:

            - selective_scan: ``batch=2, channels=8, length=32, state=4, groups=None, scalar_a=False, with_d=True,
              with_z=True, with_state=False, packed=False, padded=False``. ``groups`` gives B and C their group axis;
              ``packed`` gives seq_idx, ``padded`` gives lengths, 0 and L among them.
            - hidden_attention: the same sizes, ``groups``, ``scalar_a``, ``packed`` and ``padded``.
            - selective_state_update: ``batch=2, channels=8, state=4, groups=None, scalar_a=False, with_d=True,
              with_z=True``.
            - importance_score: ``batch=2, channels=8, length=32, rank=None``. With ``rank``, x has that many
              channels and s_delta is the second factor of a low-rank S_Δ.
            - softsort, softsort_restore: ``batch=2, channels=8, length=32``; the other operations on scores:
              ``batch=2, length=32``.
            - take_tokens, put_tokens: ``batch=2, channels=8, length=32``.
            - flow_rhs: ``batch=2, channels=8, length=32, state=None, shared_delta=False``. ``channels=None`` is the
              line; with ``state`` the arguments hold S_B and S_C instead of M. sphere_flow: the same, ``value=False``
              for W; attention_flow: ``batch=2, channels=8, length=32, state=4``; autoregressive_flow: ``batch=2,
              channels=8, length=32, lags=3``. Tokens of the last three have unit norm.
            - io_projections: ``channels=8, state=4, regime="free", form="paper"``.
            - io_spectrum: ``channels=8, state=4``.

    Returns:
        Arguments by name.

    Raises:
        OptionError: an unknown operation or option, or a dtype that the backend has not.
        BackendUnknown, BackendMissing, BackendBroken: see :mod:`tokendyn.errors`.
    """
    check.expect_choice("random_inputs", "operation", operation, _MAKERS)
    check.expect_choice("random_inputs", "dtype", dtype, check.FLOATS)
    maker = _MAKERS[operation]
    known = tuple(inspect.signature(maker).parameters)[1:]
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise OptionError(
            f"random_inputs: {operation} has no option {', '.join(map(repr, unknown))}, expected some of "
            f"{', '.join(known)}"
        )
    backend = current_backend()
    from_numpy = load_backend(backend).from_numpy
    if dtype not in BACKENDS[backend].dtypes:
        others = " or ".join(f"tokendyn.use({name!r})" for name, other in BACKENDS.items() if dtype in other.dtypes)
        raise OptionError(
            f"random_inputs: dtype is {dtype!r}, but {backend} computes in {' and '.join(BACKENDS[backend].dtypes)}; "
            f"choose one of these, or {others} first"
        )
    made = maker(np.random.default_rng(seed), **options)
    return {
        name: from_numpy(value, dtype if value.dtype.kind == "f" else None) if isinstance(value, np.ndarray) else value
        for name, value in made.items()
    }


def _integers(values: Any) -> np.ndarray:
    """32 bits: every backend has them, JAX without x64 too."""
    return np.asarray(values, np.int32)


def _steps(rng: np.random.Generator, batch: int, channels: int, length: int) -> dict[str, np.ndarray]:
    """delta and delta_bias whose softplus lies about log-uniformly in [0.001, 0.1], as Mamba sets it up."""
    step = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), channels))
    return {
        "delta": 0.5 * rng.standard_normal((batch, channels, length)),
        "delta_bias": np.log(np.expm1(step)),
    }


@_makes("hidden_attention")
def _attention(
    rng: np.random.Generator,
    *,
    batch: int = 2,
    channels: int = 8,
    length: int = 32,
    state: int = 4,
    groups: int | None = None,
    scalar_a: bool = False,
    packed: bool = False,
    padded: bool = False,
) -> dict[str, Any]:
    maps = (batch, state, length) if groups is None else (batch, groups, state, length)
    made: dict[str, Any] = {
        **_steps(rng, batch, channels, length),
        "A": -rng.uniform(1.0, 16.0, channels) if scalar_a else -np.tile(np.arange(1.0, state + 1), (channels, 1)),
        "B": rng.standard_normal(maps),
        "C": rng.standard_normal(maps),
        "delta_softplus": True,
    }
    if packed:
        starts = rng.random((batch, length)) < 4 / length
        made["seq_idx"] = _integers(np.cumsum(starts, axis=1))
    if padded:
        lengths = rng.integers(0, length + 1, batch)
        lengths[:2] = (length, 0)[:batch]
        made["lengths"] = _integers(lengths)
    return made


@_makes("selective_scan")
def _scan(
    rng: np.random.Generator,
    *,
    batch: int = 2,
    channels: int = 8,
    length: int = 32,
    state: int = 4,
    groups: int | None = None,
    scalar_a: bool = False,
    with_d: bool = True,
    with_z: bool = True,
    with_state: bool = False,
    packed: bool = False,
    padded: bool = False,
) -> dict[str, Any]:
    sizes = {"batch": batch, "channels": channels, "length": length, "state": state, "groups": groups}
    made = {
        "u": rng.standard_normal((batch, channels, length)),
        **_attention(rng, **sizes, scalar_a=scalar_a, packed=packed, padded=padded),
    }
    if with_d:
        made["D"] = rng.standard_normal(channels)
    if with_z:
        made["z"] = rng.standard_normal((batch, channels, length))
    if with_state:
        made["initial_state"] = rng.standard_normal((batch, channels, state))
    return made


@_makes("selective_state_update")
def _step(
    rng: np.random.Generator,
    *,
    batch: int = 2,
    channels: int = 8,
    state: int = 4,
    groups: int | None = None,
    scalar_a: bool = False,
    with_d: bool = True,
    with_z: bool = True,
) -> dict[str, Any]:
    sizes = {"batch": batch, "channels": channels, "state": state, "groups": groups}
    scan = _scan(rng, **sizes, length=1, scalar_a=scalar_a, with_d=with_d, with_z=with_z, with_state=True)
    names = {
        "initial_state": "state",
        "u": "x",
        "delta": "dt",
        "delta_bias": "dt_bias",
        "delta_softplus": "dt_softplus",
    }
    one_token = ("u", "delta", "B", "C", "z")
    return {names.get(key, key): value[..., 0] if key in one_token else value for key, value in scan.items()}


@_makes("importance_score")
def _score(
    rng: np.random.Generator, *, batch: int = 2, channels: int = 8, length: int = 32, rank: int | None = None
) -> dict[str, Any]:
    inner = channels if rank is None else rank
    return {
        "x": rng.standard_normal((batch, length, inner)),
        "s_delta": rng.standard_normal((channels, inner)) * inner**-0.5,
        "k": rng.standard_normal(channels) * channels**-0.5,
    }


@_makes("softsort_matrix", "effective_tokens", "hard_order", "token_order")
def _scores(rng: np.random.Generator, *, batch: int = 2, length: int = 32) -> dict[str, Any]:
    return {"scores": rng.standard_normal((batch, length))}


@_makes("softsort")
def _scores_and_tokens(
    rng: np.random.Generator, *, batch: int = 2, channels: int = 8, length: int = 32
) -> dict[str, Any]:
    return {**_scores(rng, batch=batch, length=length), "x": rng.standard_normal((batch, length, channels))}


@_makes("softsort_restore")
def _scores_and_sorted(
    rng: np.random.Generator, *, batch: int = 2, channels: int = 8, length: int = 32
) -> dict[str, Any]:
    made = _scores_and_tokens(rng, batch=batch, channels=channels, length=length)
    return {"scores": made["scores"], "y": made["x"]}


@_makes("take_tokens")
def _tokens(rng: np.random.Generator, *, batch: int = 2, channels: int = 8, length: int = 32) -> dict[str, Any]:
    return {
        "x": rng.standard_normal((batch, length, channels)),
        "indices": _integers([rng.permutation(length) for _ in range(batch)]),
    }


@_makes("put_tokens")
def _sorted(rng: np.random.Generator, *, batch: int = 2, channels: int = 8, length: int = 32) -> dict[str, Any]:
    made = _tokens(rng, batch=batch, channels=channels, length=length)
    return {"y": made["x"], "indices": made["indices"]}


@_makes("io_projections")
def _projections(
    rng: np.random.Generator, *, channels: int = 8, state: int = 4, regime: str = "free", form: str = "paper"
) -> dict[str, Any]:
    scale = channels**-0.5
    made: dict[str, Any] = {"weight_B": rng.standard_normal((state, channels)) * scale}
    if regime == "free":
        made["weight_C"] = rng.standard_normal((state, channels)) * scale
    else:
        made["diagonal"] = rng.standard_normal(state)
    return {**made, "regime": regime, "form": form}


@_makes("io_spectrum")
def _spectrum(rng: np.random.Generator, *, channels: int = 8, state: int = 4) -> dict[str, Any]:
    return {name: rng.standard_normal((state, channels)) * channels**-0.5 for name in ("S_B", "S_C")}


@_makes("flow_rhs")
def _flow(
    rng: np.random.Generator,
    *,
    batch: int = 2,
    channels: int | None = 8,
    length: int = 32,
    state: int | None = None,
    shared_delta: bool = False,
) -> dict[str, Any]:
    if channels is None:
        return {
            "x": rng.standard_normal((batch, length)),
            "mu": rng.standard_normal(batch),
            "s_delta": rng.standard_normal(batch),
            "a": rng.uniform(0.5, 2.0, batch),
            "bias": rng.standard_normal(batch),
        }
    made = {
        "x": rng.standard_normal((batch, length, channels)),
        "s_delta": rng.standard_normal((channels,) if shared_delta else (channels, channels)) * channels**-0.5,
        "a": rng.uniform(0.5, 2.0, channels),
    }
    if state is None:
        made["M"] = rng.standard_normal((channels, channels)) / channels
    else:
        made.update({name: rng.standard_normal((state, channels)) * channels**-0.5 for name in ("S_B", "S_C")})
    return made


@_makes("sphere_flow")
def _sphere_flow(
    rng: np.random.Generator,
    *,
    batch: int = 2,
    channels: int = 8,
    length: int = 32,
    state: int | None = None,
    shared_delta: bool = False,
    value: bool = False,
) -> dict[str, Any]:
    made = _flow(rng, batch=batch, channels=channels, length=length, state=state, shared_delta=shared_delta)
    made["x"] /= np.linalg.norm(made["x"], axis=-1, keepdims=True)
    if value:
        made["W"] = rng.standard_normal((channels, channels)) * channels**-0.5
    return made


@_makes("attention_flow")
def _attention_flow(
    rng: np.random.Generator, *, batch: int = 2, channels: int = 8, length: int = 32, state: int = 4
) -> dict[str, Any]:
    x = rng.standard_normal((batch, length, channels))
    return {
        "x": x / np.linalg.norm(x, axis=-1, keepdims=True),
        "Q": rng.standard_normal((state, channels)),
        "K": rng.standard_normal((state, channels)),
    }


@_makes("autoregressive_flow")
def _autoregressive_flow(
    rng: np.random.Generator, *, batch: int = 2, channels: int = 8, length: int = 32, lags: int = 3
) -> dict[str, Any]:
    x = _attention_flow(rng, batch=batch, channels=channels, length=length)["x"]
    return {"x": x, "phi": rng.standard_normal(lags)}
