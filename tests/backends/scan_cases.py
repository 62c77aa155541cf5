"""Calls of the selective scan, and what the spec says to them: shared by the tests of its GPU engines."""

from __future__ import annotations

import zlib

import numpy as np
import torch

from tokendyn import core
from tokendyn._tolerances import HALF_EPS, HALF_FACTOR, tolerance
from tokendyn.backends.torch.ops import _scan_chunked

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIFFERENTIABLE = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")

CASES = {
    "one token": {"b": 1, "d": 1, "L": 1, "N": 1},
    "plain": {"b": 1, "d": 3, "L": 20, "N": 2, "without": ("D", "z", "delta_bias", "initial_state")},
    "all options, two blocks of channels": {"b": 1, "d": 33, "L": 18, "N": 2},
    "blocks of states": {"b": 1, "d": 2, "L": 3, "N": 18},
    "groups": {"b": 2, "d": 4, "L": 16, "N": 2, "G": 2},
    "channels last": {"b": 1, "d": 5, "L": 33, "N": 2, "last": True},
    "packed and padded": {"b": 2, "d": 2, "L": 32, "N": 2, "packed": True, "padded": True},
    "scalar A": {"b": 1, "d": 3, "L": 35, "N": 2, "scalar": True},
    "scalar A, packed and padded": {"b": 2, "d": 3, "L": 40, "N": 2, "scalar": True, "packed": True, "padded": True},
    "scalar A, groups, channels last": {"b": 1, "d": 4, "L": 35, "N": 2, "scalar": True, "G": 2, "last": True},
    "large steps": {"b": 1, "d": 2, "L": 20, "N": 2, "scale": 1e3},
    "small steps": {"b": 1, "d": 2, "L": 20, "N": 2, "scale": 1e-6},
    "scalar A, large steps": {"b": 1, "d": 2, "L": 40, "N": 2, "scalar": True, "scale": 100.0},
}


def arguments(name, b, d, L, N, G=None, last=False, packed=False, padded=False, scalar=False, scale=1.0, without=()):
    """Float64 arrays by argument name. With ``scale`` the step size is given itself, up to that size."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    shared = (b, N, L) if G is None else (b, G, N, L)
    found = {
        "u": rng.standard_normal((b, d, L)),
        "delta": rng.standard_normal((b, d, L)) if scale == 1.0 else scale * rng.random((b, d, L)),
        "A": -0.1 - rng.random((d,) if scalar else (d, N)),
        "B": rng.standard_normal(shared),
        "C": rng.standard_normal(shared),
        "D": rng.standard_normal(d),
        "z": rng.standard_normal((b, d, L)),
        "delta_bias": rng.standard_normal(d),
        "initial_state": rng.standard_normal((b, d, N)),
    }
    for absent in (*without, *(() if scale == 1.0 else ("delta_bias",))):
        del found[absent]
    found["delta_softplus"] = scale == 1.0
    if packed:
        found["seq_idx"] = np.cumsum(rng.random((b, L)) < 0.2, axis=1)
    if padded:
        found["lengths"] = np.array([L // 2, L, 0][:b])
    return found


def tensors(values, dtype, last, device=DEVICE):
    """The arguments on a device in ``dtype``, parameters in float32."""
    parameters = ("A", "D", "delta_bias", "initial_state")
    found = {}
    for key, value in values.items():
        if not isinstance(value, np.ndarray):
            found[key] = value
            continue
        t = torch.from_numpy(value).to(device)
        if key in DIFFERENTIABLE:
            t = t.to(torch.float32 if key in parameters and dtype != torch.float64 else dtype)
        if last and key in ("u", "delta", "z"):
            t = t.transpose(1, 2).contiguous().transpose(1, 2)
        found[key] = t.requires_grad_() if key in DIFFERENTIABLE else t
    return found


def seeds(y, last):
    """The same gradients of y and of the last state for every implementation."""
    rng = np.random.default_rng(y.numel())
    return [torch.from_numpy(rng.standard_normal(tuple(t.shape))).to(t) for t in (y, last)]


def evaluate(run, given):
    """y, the last state and all gradients of ``run``."""
    y, last = run(**given, return_last_state=True)
    wrt = [key for key in DIFFERENTIABLE if key in given]
    gradients = torch.autograd.grad((y, last), [given[key] for key in wrt], seeds(y, last))
    found = {"y": y, "last_state": last, **dict(zip(wrt, gradients, strict=True))}
    return {key: value.detach() for key, value in found.items()}


def by_spec(values, dtype):
    """The same from the spec in float64, on inputs and seeds rounded as ``dtype`` rounds them."""
    rounded = {
        key: value.detach().double().cpu().numpy() if isinstance(value, torch.Tensor) else value
        for key, value in tensors(values, dtype, False).items()
    }
    y, last = core.selective_scan(**rounded, return_last_state=True)
    to = torch.float32 if dtype != torch.float64 else dtype
    dout = [s.double().numpy() for s in seeds(torch.from_numpy(y).to(dtype), torch.from_numpy(last).to(to))]
    gradients = core.selective_scan_vjp(tuple(dout), **rounded, return_last_state=True)
    found = {"y": y, "last_state": last, **gradients}
    return {key: torch.from_numpy(np.asarray(value, np.float64)) for key, value in found.items()}


def error(got, want):
    return float((got.double().cpu() - want).norm() / want.norm().clamp_min(1e-30))


def worst_token(got, want):
    size = want.square().sum(1).sqrt()
    off = (got.double().cpu() - want).square().sum(1).sqrt()
    return float((off / size.clamp_min(float(size.max()) * 1e-3)).max())


def check(run, values, dtype, last=False, want=None):
    """``run`` agrees with ``want``, the spec's word, in y, the last state and all gradients, as ``dtype`` allows."""
    want = by_spec(values, dtype) if want is None else want
    got = evaluate(run, tensors(values, dtype, last))
    assert got.keys() == want.keys()
    bound = tolerance("selective_scan", "float32")
    plain = evaluate(_scan_chunked.run, tensors(values, dtype, last, "cpu")) if dtype != torch.float32 else {}
    for key, value in want.items():
        assert got[key].shape == value.shape
        assert torch.isfinite(got[key]).all(), f"{key} is not finite"
        off = error(got[key], value)
        if dtype == torch.float32:
            allowed = bound.values if key in ("y", "last_state") else bound.gradients
        else:
            allowed = HALF_FACTOR * error(plain[key], value) + HALF_EPS * torch.finfo(dtype).eps
        assert off <= allowed, f"{key}: {off:.1e} exceeds {allowed:.1e}"
    if dtype == torch.float32:
        assert worst_token(got["y"], want["y"]) <= bound.worst_token


def check_apart(run, values, cut):
    """Of two packed sequences, the second from token ``cut`` on, NaN in one changes no bit of the other's outputs, last
    state and activations' gradients."""
    values = {key: value for key, value in values.items() if key != "initial_state"}
    b, _, length = values["u"].shape
    values["seq_idx"] = np.tile(np.arange(length) >= cut, (b, 1)).astype(int)
    clean = evaluate(run, tensors(values, torch.float32, False))
    first, second = slice(0, cut), slice(cut, length)
    for at, spoiled, other in ((cut - 1, first, second), (1, first, second), (cut, second, first), (-1, second, first)):
        dirty = {key: value.copy() if isinstance(value, np.ndarray) else value for key, value in values.items()}
        for key in ("u", "delta", "B", "C", "z"):
            dirty[key][..., at] = np.nan
        got = evaluate(run, tensors(dirty, torch.float32, False))
        assert torch.isnan(got["y"][..., spoiled]).any()
        for key in ("y", "u", "delta", "z"):
            assert torch.equal(got[key][..., other], clean[key][..., other]), f"NaN at token {at} reaches {key}"
        if spoiled == first:
            assert torch.equal(got["last_state"], clean["last_state"]), f"NaN at token {at} reaches the last state"
