"""Simulation of token dynamics on tensors, through torchdiffeq: differentiable, without an account of blow-ups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tokendyn.errors import EngineError


def integrate(
    flow: Callable[[Any], Any], x0: torch.Tensor, times: list[float], rtol: float, max_steps: int
) -> torch.Tensor:
    """Tokens at ``times`` (rising, the first is 0), with an axis for them in front."""
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise EngineError("simulating tensors needs torchdiffeq; run: pip install 'tokendyn[solvers]'") from error
    rtol = max(rtol, 32 * torch.finfo(x0.dtype).eps)
    grid = torch.tensor(times, dtype=torch.float64, device=x0.device)
    atol = 1e-6 * rtol * float(x0.detach().abs().max())
    try:
        # Steps end at the times asked for: between steps its interpolation is of order 4 only.
        options = {"max_num_steps": max_steps, "step_t": grid[1:]}
        return odeint(lambda _, x: flow(x), x0, grid, rtol=rtol, atol=atol, method="dopri8", options=options)  # type: ignore[return-value]
    except AssertionError as error:  # torchdiffeq's way to say that the step has collapsed
        raise EngineError(
            f"simulate: torchdiffeq stopped ({error}): a token blows up, or the problem is stiff; tokens that blow up "
            f"are followed for NumPy arrays"
        ) from error
