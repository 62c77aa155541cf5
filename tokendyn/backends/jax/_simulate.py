"""Simulation of token dynamics on JAX arrays, through diffrax: differentiable, without an account of blow-ups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tokendyn.errors import EngineError


def integrate(flow: Callable[[Any], Any], x0: jax.Array, times: list[float], rtol: float, max_steps: int) -> jax.Array:
    """Tokens at ``times`` (rising, the first is 0), with an axis for them in front."""
    try:
        import diffrax
    except ImportError as error:
        raise EngineError("simulating JAX arrays needs diffrax; run: pip install 'tokendyn[solvers]'") from error
    rtol = max(rtol, 32 * float(jnp.finfo(x0.dtype).eps))
    steps = diffrax.PIDController(rtol=rtol, atol=1e-6 * rtol * jnp.abs(jax.lax.stop_gradient(x0)).max())
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, x, args: flow(x)),
        diffrax.Dopri8(),
        0.0,
        times[-1],
        None,
        x0,
        saveat=diffrax.SaveAt(ts=jnp.asarray(times, x0.dtype)),
        stepsize_controller=steps,
        max_steps=max_steps,
        throw=False,
    )
    failed = solution.result != diffrax.RESULTS.successful
    if not isinstance(failed, jax.core.Tracer) and bool(failed):  # type: ignore[attr-defined]
        raise EngineError(
            f"simulate: diffrax stopped ({solution.result}): a token blows up, or the problem is stiff; tokens that "
            f"blow up are followed for NumPy arrays"
        )
    return jnp.where(failed, jnp.nan, jnp.asarray(solution.ys))  # under a trace nothing can be raised
