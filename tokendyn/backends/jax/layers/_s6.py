"""The bare selective layer: x -> Δ, B, C -> scan."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tokendyn import _operations as ops
from tokendyn._layers import OrderConfig, expect_selective
from tokendyn._order import Order
from tokendyn.backends.jax.layers._affine import Linear, compute_dtype
from tokendyn.backends.jax.layers._ordering import expect_tokens, make_ordering
from tokendyn.errors import OptionError


class S6(nnx.Module):
    """Selective state space layer (S6): the scan whose Δ, B, C are made from its own input.

    ::

        Δ(x_l) = softplus(S_Δ x_l + bias),  B_l = S_B x_l,  C_l = S_C x_l,  y = selective_scan(x, Δ, A, B, C, D)

    with ``A = -exp(A_log)``. Names, shapes and starting distributions of the parameters are those of
    :class:`tokendyn.torch.S6`, so that weights are shared; see :func:`tokendyn.jax.save_weights`.

    Args:
        d_model: channels d.
        d_state: state size N.
        dt_rank, dt_min, dt_max, dt_init, dt_scale, dt_init_floor, dt_bias, skip, scalar_A, io_regime, io_form, order:
            see :class:`tokendyn.torch.S6`.
        dtype: in which to compute; None: that of the input and the parameters together. In half precision the step
            size's bias, A, D and the state stay in float32.
        param_dtype: of the parameters; A_log and D are in float32 at least.
        rngs: the stream ``params``; ``order`` for random orders.

    Shapes:
        x (b, L, d) → y (b, L, d).

    Raises:
        OptionError, RegimeError: an option is out of range or contradicts another.

    Cost:
        O(b L d (R + N)) with R the rank of S_Δ.

    Source:
        Paper 1, Eqs. (1)-(3); Gu and Dao (2023).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        *,
        dt_rank: int | str | None = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        dt_bias: bool = True,
        skip: bool = True,
        scalar_A: bool = False,
        io_regime: str = "free",
        io_form: str = "paper",
        order: OrderConfig | str | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.dt_rank = expect_selective(type(self).__name__, d_model, d_state, dt_rank, dt_init, io_regime, io_form)
        self.d_inner = d_model
        self.d_state = d_state
        self.io_regime = io_regime
        self.io_form = io_form
        self.dtype = dtype
        options: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        exact = jnp.promote_types(param_dtype, jnp.float32)

        free = io_regime == "free"
        rows = (self.dt_rank or 0) + (2 * d_state if free else d_state)
        self.x_proj = Linear(d_model, rows, bias=False, dtype=dtype, **options)
        self.io_diagonal = None if free else nnx.Param(jnp.zeros(d_state, param_dtype))
        self.dt_proj = Linear(self.dt_rank or d_model, d_model, bias=dt_bias, dtype=dtype, **options)
        _init_step_size(self.dt_proj, dt_init, dt_scale, dt_min, dt_max, dt_init_floor, rngs)
        if scalar_A:
            A_log = jnp.zeros(d_model, exact)
        else:
            A_log = jnp.tile(jnp.log(jnp.arange(1, d_state + 1, dtype=exact)), (d_model, 1))
        self.A_log = nnx.Param(A_log)
        self.D = nnx.Param(jnp.ones(d_model, exact)) if skip else None
        self.order = make_ordering(order, d_model, **options)

    def io_matrices(self) -> tuple[jax.Array, jax.Array]:
        """S_B and S_C, each (N, d); their spectrum: ``tokendyn.io_spectrum(*layer.io_matrices())``."""
        rows = self.x_proj.weight[self.dt_rank or 0 :]
        if self.io_diagonal is None:
            return rows[: self.d_state], rows[self.d_state :]
        return ops.io_projections(rows, diagonal=self.io_diagonal[...], regime=self.io_regime, form=self.io_form)

    def s_delta(self) -> tuple[jax.Array, ...]:
        """The factors of S_Δ, left to right: (W_dt, W_r), or (S_Δ,) if it is dense."""
        if self.dt_rank is None:
            return (self.dt_proj.weight[...],)
        return self.dt_proj.weight[...], self.x_proj.weight[: self.dt_rank]

    def step_bias(self) -> jax.Array | None:
        """(d,) the bias inside the softplus of Δ."""
        return None if self.dt_proj.bias is None else self.dt_proj.bias[...]

    def token_order(self, x: jax.Array) -> Order | None:
        """The order of the tokens x (b, L, d) that this layer's ``order=`` asks for, or None."""
        return None if self.order is None else self.order(x, *self.s_delta())

    def scan(self, x: jax.Array, z: jax.Array | None = None, **options: Any) -> Any:
        """Scan x (b, L, d), gated by z (b, L, d) if given, in the order in which it comes.

        Args:
            x, z: tokens, channels last.
            options: those of :func:`tokendyn.selective_scan`, such as ``initial_state``.

        Returns:
            (b, L, d), and the last state (b, d, N) with ``return_last_state``.
        """
        u, delta, A, B, C, D, z, bias = self._select(x, z)
        gate = None if z is None else z.mT
        out = ops.selective_scan(u.mT, delta.mT, A, B.mT, C.mT, D, gate, bias, True, **options)
        if options.get("return_last_state"):
            return out[0].mT, out[1]
        return out.mT

    def update(self, state: jax.Array, x: jax.Array, z: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """One token of :meth:`scan`: x, z (b, d) and the state (b, d, N) before it give y (b, d) and the next state."""
        u, delta, A, B, C, D, z, bias = self._select(x, z)
        return ops.selective_state_update(state, u, delta, A, B, C, D, z, bias, True)

    def _select(self, x: jax.Array, z: jax.Array | None) -> tuple[Any, ...]:
        """u, delta, A, B, C, D, z, delta_bias of the scan of x (..., d), tokens before channels."""
        weight = self.x_proj.weight[...]
        if self.io_diagonal is not None:
            weight = jnp.concatenate([weight[: self.dt_rank or 0], *self.io_matrices()])
        dtype = compute_dtype(self.dtype, x, weight)
        exact = jnp.promote_types(dtype, jnp.float32)
        x, rank = x.astype(dtype), self.dt_rank or 0
        r, B, C = jnp.split(x @ weight.astype(dtype).T, (rank, rank + self.d_state), axis=-1)
        bias = self.step_bias()
        return (
            x,
            (x if self.dt_rank is None else r) @ self.dt_proj.weight[...].astype(dtype).T,
            -jnp.exp(self.A_log[...].astype(exact)),
            B,
            C,
            None if self.D is None else self.D[...].astype(exact),
            None if z is None else z.astype(dtype),
            None if bias is None else bias.astype(exact),
        )

    def __call__(
        self,
        x: jax.Array,
        *,
        initial_state: jax.Array | None = None,
        return_last_state: bool = False,
        seq_idx: jax.Array | None = None,
        lengths: jax.Array | None = None,
    ) -> Any:
        """Scan the tokens in the layer's order.

        Args:
            x: (b, L, d) tokens, channels last.
            initial_state, return_last_state, seq_idx, lengths: as of :func:`tokendyn.selective_scan`.

        Returns:
            y (b, L, d), or (y, last_state) with ``return_last_state``.

        Raises:
            ShapeError: x has another number of axes or channels.
            OptionError: ``seq_idx`` or ``lengths`` on a layer that orders its tokens across them.
        """
        expect_tokens("S6", x, self.d_inner)
        if self.order is not None and (seq_idx is not None or lengths is not None):
            raise OptionError(
                "S6: seq_idx or lengths was given to a layer with order=, which would sort tokens across sequences and "
                "into padding; order each sequence by itself"
            )
        options = {
            "initial_state": initial_state,
            "return_last_state": return_last_state,
            "seq_idx": seq_idx,
            "lengths": lengths,
        }
        order = self.token_order(x)
        if order is None:
            return self.scan(x, **options)
        out = self.scan(order.apply(x), **options)
        if self.order is None or not self.order.config.restore:
            return out
        return (order.restore(out[0]), out[1]) if return_last_state else order.restore(out)


def _init_step_size(
    dt_proj: Linear, init: str, scale: float, dt_min: float, dt_max: float, floor: float, rngs: nnx.Rngs
) -> None:
    """Mamba's start: W_dt keeps the variance of its input, softplus(bias) is log-uniform in [dt_min, dt_max]."""
    outputs, inputs = dt_proj.weight.shape
    dtype, bound = dt_proj.weight.dtype, scale * inputs**-0.5
    if init == "constant":
        dt_proj.weight = nnx.Param(jnp.full((outputs, inputs), bound, dtype))
    else:
        dt_proj.weight = nnx.Param(jax.random.uniform(rngs.params(), (outputs, inputs), dtype, -bound, bound))
    if dt_proj.bias is None:
        return
    exact = jnp.promote_types(dtype, jnp.float32)
    share = jax.random.uniform(rngs.params(), (outputs,), exact)
    dt = jnp.maximum(jnp.exp(math.log(dt_min) + share * (math.log(dt_max) - math.log(dt_min))), floor)
    dt_proj.bias = nnx.Param((dt + jnp.log(-jnp.expm1(-dt))).astype(dtype))  # inverse of softplus
