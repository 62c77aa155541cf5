"""Mixers built like Mamba's: ``in_proj``, ``x_proj``, ``dt_proj``, ``A_log``, ``out_proj`` as modules and parameters.

Hugging Face's Mamba, Falcon-Mamba and Jamba, mamba-ssm's Mamba, MambaVision's mixer. Hooks on their modules show the
tokens, Δ's low-rank part, B, C and the output; Δ is that part times ``dt_proj``, which some of them apply as a module
and some as a matrix.

A fused path (mamba-ssm's, and transformers' in training with kernels) goes past these modules. It is left as it is, so
that the model computes what it would compute; what hooks cannot see there is seen by running the mixer's other path on
the same tokens beside it, whose output is compared with the fused one's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokendyn.diagnose._capture import Projections, Site

_NORMS = ("dt_layernorm", "b_layernorm", "c_layernorm")


def find(model: nn.Module) -> list[Site]:
    """Mixers by their parts."""
    return [
        Site(name or type(module).__name__, module, _family(module), lambda record, m=module: _watch(m, record))
        for name, module in model.named_modules()
        if _is_mixer(module)
    ]


def _is_mixer(module: nn.Module) -> bool:
    rates = getattr(module, "A_log", None)
    linear = all(isinstance(getattr(module, part, None), nn.Linear) for part in ("x_proj", "dt_proj", "out_proj"))
    return isinstance(rates, Tensor) and rates.ndim == 2 and linear


def _family(module: nn.Module) -> str:
    root = type(module).__module__.split(".")
    return root[2] if root[:2] == ["transformers", "models"] and len(root) > 2 else root[0]


def _watch(module: nn.Module, record: Callable[..., None]) -> Callable[[], None]:
    seen: dict[str, Tensor] = {}
    call: list[Any] = []

    def of_output(key: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            seen[key] = output.detach()

        return hook

    def of_input(key: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[key] = args[0].detach()

        return hook

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.clear()
        call[:] = [args, kwargs]
        first = args[0] if args else kwargs.get("hidden_states")
        if isinstance(first, Tensor):
            seen["hidden"] = first.detach()

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        if {"u", "projected", "y"} <= seen.keys():
            record(lambda: _captured(module, seen))
        elif "hidden" in seen and isinstance(output, Tensor):
            record(lambda: _beside(module, seen, call, output.detach()))
        seen.clear()
        call.clear()

    handles = [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.get_submodule("x_proj").register_forward_pre_hook(of_input("u")),
        module.get_submodule("x_proj").register_forward_hook(of_output("projected")),
        module.get_submodule("out_proj").register_forward_pre_hook(of_input("y")),
        module.register_forward_hook(leave),
    ]
    for part in (*_NORMS, "in_proj", "dt_proj", "conv1d_z"):
        if isinstance(inner := getattr(module, part, None), nn.Module):
            handles.append(inner.register_forward_hook(of_output(part)))

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


@torch.no_grad()
def _beside(module: Any, seen: dict[str, Tensor], call: list[Any], output: Tensor) -> dict[str, Any] | None:
    """The fields of :class:`Capture` by the mixer's unfused path on the same tokens; None if that shows nothing either.

    mamba-ssm's path is chosen by ``use_fast_path``, transformers' by the mode of training.
    """
    args, kwargs = call
    fast, training = getattr(module, "use_fast_path", None), module.training
    try:
        module.training = False
        if fast is not None:
            module.use_fast_path = False
        again = module.forward(*args, **kwargs)
    finally:
        module.training = training
        if fast is not None:
            module.use_fast_path = fast
    if not {"u", "projected", "y"} <= seen.keys():
        return None
    scale = output.abs().amax().clamp_min(torch.finfo(output.dtype).tiny)
    return {**_captured(module, seen), "fused": float((again - output).abs().amax() / scale)}


def _captured(module: Any, seen: dict[str, Tensor]) -> dict[str, Any]:
    state = module.A_log.shape[1]
    shape = seen["y"].shape[:2] if seen["y"].ndim == 3 else seen["hidden"].shape[:2]  # (b, L)
    rank = module.dt_proj.in_features
    low_rank, B, C = seen["projected"].reshape(*shape, -1).split([rank, state, state], dim=-1)
    normalised = "b_layernorm" in seen
    if normalised:
        low_rank, B, C = (seen[key].reshape(*shape, -1) for key in _NORMS)
    u = seen["u"].reshape(*shape, -1)
    exact = torch.promote_types(u.dtype, torch.float32)
    maps = _projections(module, normalised)
    halves = "conv1d_z" in seen  # MambaVision: the scan's half beside the other, no gate
    pre = (module.dt_proj.weight @ low_rank.mT).detach()  # as these mixers multiply
    bias = module.dt_proj.bias
    shift = 0.0 if bias is None else bias.detach().float()[:, None]
    if halves and "dt_proj" in seen and bias is not None:
        shift = 2 * shift  # the projection adds it and the scan adds it again
    # Hugging Face's scan takes these in float32 whatever the model's dtype.
    rounded = type(module).__module__.startswith("transformers.")
    A = -torch.exp(module.A_log.detach().float())
    skip = module.D.detach() if isinstance(getattr(module, "D", None), Tensor) else None
    y = seen["y"].mT
    z = None
    if halves:
        y = y[:, : u.shape[-1]]
    elif "in_proj" in seen:
        z = seen["in_proj"].chunk(2, dim=-1)[1].mT
    else:
        z = F.linear(seen["hidden"], module.in_proj.weight, module.in_proj.bias).detach().chunk(2, dim=-1)[1].mT
    return {
        "u": u.mT.to(exact),
        "driven": u.mT.float().to(exact) if rounded else None,
        "delta": F.softplus(pre + shift).to(exact),
        "linear_part": lambda: pre.to(exact),
        "A": A.to(exact),
        "B": (B.float() if rounded else B).mT.to(exact),
        "C": C.mT.to(exact),
        "D": None if skip is None else (skip.float() if rounded else skip).to(exact),
        "z": None if z is None else z.to(exact),
        "y": y.to(exact),
        "projections": maps if maps.linear else None,
        "notes": () if maps.linear else ("a norm that is no RMS norm follows B and C: their spectrum says nothing",),
    }


def _projections(module: Any, normalised: bool) -> Projections:
    rank, state = module.dt_proj.in_features, module.A_log.shape[1]
    weight = module.x_proj.weight.detach()
    S_B, S_C = weight[rank : rank + state], weight[rank + state : rank + 2 * state]
    gains = norm_gains(module) if normalised else None
    step_gain = None
    if gains is not None:
        step_gain, gain_B, gain_C = gains
        S_B, S_C = gain_B[:, None] * S_B, gain_C[:, None] * S_C
    return Projections(
        S_B,
        S_C,
        (module.dt_proj.weight.detach(), weight[:rank]),
        normalised=normalised,
        biased=module.x_proj.bias is not None,
        step_gain=step_gain,
        linear=not normalised or gains is not None,
    )


def norm_gains(module: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    """Gains of the norms of Δ's low-rank part, B and C, if these are RMS norms, x ↦ g ∘ x / √(mean x² + ε); else None.

    Told by what they do to two vectors, whatever their class.
    """
    sizes = (module.dt_proj.in_features, module.A_log.shape[1], module.A_log.shape[1])
    found = []
    like = module.x_proj.weight
    for part, size in zip(_NORMS, sizes, strict=True):
        norm = getattr(module, part)
        probe = torch.linspace(1.0, 2.0, size, device=like.device).to(like.dtype)
        with torch.no_grad():  # not by calling the module: hooks are not to see it
            gain = norm.forward(probe) * probe.square().mean().sqrt() / probe
            other = probe.flip(0) * torch.where(torch.arange(size, device=like.device) % 2 == 0, 3.0, -3.0).to(probe)
            wanted = gain * other / other.square().mean().sqrt()
            if not torch.allclose(norm.forward(other), wanted, rtol=0.02, atol=1e-3):
                return None
        weight = getattr(norm, "weight", None)
        named = isinstance(weight, Tensor) and weight.shape == gain.shape and torch.allclose(weight, gain, rtol=0.02)
        found.append(weight.detach() if isinstance(weight, Tensor) and named else gain)
    return found[0], found[1], found[2]
