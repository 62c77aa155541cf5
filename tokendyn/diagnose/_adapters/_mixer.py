"""Mixers built like Mamba's: ``in_proj``, ``x_proj``, ``dt_proj``, ``A_log``, ``out_proj`` as modules and parameters.

Hugging Face's Mamba, Falcon-Mamba and Jamba, mamba-ssm's Mamba, MambaVision's mixer. Hooks on their modules show the
tokens, Δ's low-rank part, B, C and the output; Δ is that part times ``dt_proj``, which some of them apply as a module
and some as a matrix.
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
        first = args[0] if args else kwargs.get("hidden_states")
        if isinstance(first, Tensor):
            seen["hidden"] = first.detach()

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        if {"u", "projected", "y"} <= seen.keys():
            record(lambda: _captured(module, seen))
        seen.clear()

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
    # mamba-ssm's fused path goes past its own modules; its other path is the same function.
    fused = getattr(module, "use_fast_path", None)
    if fused:
        module.use_fast_path = False  # type: ignore[assignment]

    def remove() -> None:
        for handle in handles:
            handle.remove()
        if fused:
            module.use_fast_path = fused

    return remove


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
        "pre": pre.to(exact),
        "A": A.to(exact),
        "B": (B.float() if rounded else B).mT.to(exact),
        "C": C.mT.to(exact),
        "D": None if skip is None else (skip.float() if rounded else skip).to(exact),
        "z": None if z is None else z.to(exact),
        "y": y.to(exact),
        "projections": _projections(module, normalised),
    }


def _projections(module: Any, normalised: bool) -> Projections:
    rank, state = module.dt_proj.in_features, module.A_log.shape[1]
    weight = module.x_proj.weight.detach()
    return Projections(
        weight[rank : rank + state],
        weight[rank + state : rank + 2 * state],
        (module.dt_proj.weight.detach(), weight[:rank]),
        normalised=normalised,
        biased=module.x_proj.bias is not None,
    )
