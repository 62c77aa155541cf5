"""AdamW with its no-decay rule, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from tokendyn.errors import CheckpointError
from tokendyn.experiments._config import TrainConfig
from tokendyn.experiments._distributed import like


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """Rate of update number ``step`` (from 0) of ``total``: linear warm-up, then cosine decay."""
    warmup = round(config.warmup * total)
    if step < warmup:
        rise = config.learning_rate - config.initial_learning_rate
        return config.initial_learning_rate + rise * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    swing = config.learning_rate - config.final_learning_rate
    return config.final_learning_rate + swing * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def make_optimizer(model: nn.Module, config: TrainConfig, *, recordable: bool = False) -> torch.optim.AdamW:
    """AdamW on the parameters that are trained.

    Weight decay acts on matrices only: vectors, scalars and parameters that carry ``_no_weight_decay``
    (the decay rates and skip of a selective scan do) have none. ``recordable``: for CUDA graphs, so that the learning
    rate is a tensor beside the parameters; :func:`set_rate` sets either kind.
    """
    decayed, exempt = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim > 1 and not getattr(parameter, "_no_weight_decay", False)
            (decayed if matrix else exempt).append(parameter)
    rate: Any = config.learning_rate
    if recordable:
        rate = torch.tensor(rate, device=next(model.parameters()).device)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=rate,
        betas=(config.beta1, config.beta2),
        fused=True,
        capturable=recordable,
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next update."""
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's whole state by name: ``exp_avg/blocks.0.weight`` and so on."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = value if torch.is_tensor(value) else torch.tensor(value, dtype=torch.float64)
    return tensors


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Any]) -> None:
    """Set the optimiser's state to what :func:`optimizer_tensors` returned.

    Raises:
        CheckpointError: a tensor belongs to no parameter of the model.
    """
    parameters = dict(model.named_parameters())
    for key_and_name, value in tensors.items():
        key, _, name = key_and_name.partition("/")
        parameter = parameters.get(name)
        if parameter is None:
            raise CheckpointError(f"the checkpoint's optimiser holds {key_and_name}, but the model has no {name}")
        if value.shape != parameter.shape:  # AdamW's fused update keeps its step count beside the parameter
            optimizer.state[parameter][key] = value.to(parameter.device).clone()
            continue
        # Laid out in memory as the parameter is: the fused update walks over both in the order of memory.
        held = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
        optimizer.state[parameter][key] = held.copy_(like(parameter, value))
