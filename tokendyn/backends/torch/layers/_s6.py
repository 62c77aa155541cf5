"""The bare selective layer: x -> Δ, B, C -> scan."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokendyn import _operations as ops
from tokendyn._layers import OrderConfig, expect_selective
from tokendyn._order import Order
from tokendyn.backends.torch.layers._ordering import expect_tokens, make_ordering
from tokendyn.errors import OptionError


class S6(nn.Module):
    """Selective state space layer (S6): the scan whose Δ, B, C are made from its own input.

    ::

        Δ(x_l) = softplus(S_Δ x_l + bias),  B_l = S_B x_l,  C_l = S_C x_l,  y = selective_scan(x, Δ, A, B, C, D)

    with ``A = -exp(A_log)``. ``x_proj.weight`` holds the rows of S_Δ's inner factor W_r, S_B, S_C, in this order;
    ``dt_proj`` the outer factor W_dt and the bias: S_Δ = W_dt W_r. The names are mamba-ssm's.

    Args:
        d_model: channels d.
        d_state: state size N.
        dt_rank: rank of S_Δ; ``"auto"`` for ⌈d/16⌉, None for the paper's dense S_Δ (then ``dt_proj`` is S_Δ itself).
        dt_bias: give Δ a bias.
        dt_min, dt_max, dt_init_floor: softplus(bias) starts log-uniform in [dt_min, dt_max], not under the floor.
        dt_init, dt_scale: ``"random"``: W_dt uniform in ± dt_scale / √dt_rank; ``"constant"``: that value.
        skip: add D ∘ x to the output.
        scalar_A: one decay rate a channel, ``A_d I_N`` (starts at -1), instead of N (start at -1 ... -N).
        io_regime: signs of the eigenvalues of the input-output matrix S_Cᵀ S_B: ``"free"``, ``"positive"``,
            ``"negative"``, ``"mixed"``; needs N ≤ d unless free. Then ``x_proj`` holds W_r and the raw rows of S_B,
            and ``io_diagonal`` (N,) the raw diagonal; see :func:`tokendyn.io_projections`.
        io_form: ``"paper"``, ``"published_code"`` or ``"scale_matched"``.
        order: reorder the tokens before the scan: an :class:`~tokendyn.OrderConfig`, ``"published"``, a method's name,
            or None. A layer that orders its tokens is not causal: earlier outputs depend on later tokens.
        device, dtype: of the parameters; A_log, D stay in float32 where dtype is a half precision.

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dt_rank = expect_selective(type(self).__name__, d_model, d_state, dt_rank, dt_init, io_regime, io_form)
        self.d_inner = d_model
        self.d_state = d_state
        self.io_regime = io_regime
        self.io_form = io_form
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        exact = {"device": device, "dtype": torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)}

        free = io_regime == "free"
        rows = (self.dt_rank or 0) + (2 * d_state if free else d_state)
        self.x_proj = nn.Linear(d_model, rows, bias=False, **options)
        self.io_diagonal = None if free else nn.Parameter(torch.zeros(d_state, **options))
        self.dt_proj = nn.Linear(self.dt_rank or d_model, d_model, bias=dt_bias, **options)
        _init_step_size(self.dt_proj, dt_init, dt_scale, dt_min, dt_max, dt_init_floor)
        if scalar_A:
            A_log = torch.zeros(d_model, **exact)
        else:
            A_log = torch.arange(1, d_state + 1, **exact).log().repeat(d_model, 1)
        self.A_log = nn.Parameter(A_log)
        self.D = nn.Parameter(torch.ones(d_model, **exact)) if skip else None
        for kept in (self.A_log, self.D):
            if kept is not None:
                setattr(kept, "_no_weight_decay", True)  # noqa: B010
        self.order = make_ordering(order, d_model, **options)

    def io_matrices(self) -> tuple[Tensor, Tensor]:
        """S_B and S_C, each (N, d); their spectrum: ``tokendyn.io_spectrum(*layer.io_matrices())``."""
        rows = self.x_proj.weight[self.dt_rank or 0 :]
        if self.io_diagonal is None:
            return rows[: self.d_state], rows[self.d_state :]
        return ops.io_projections(rows, diagonal=self.io_diagonal, regime=self.io_regime, form=self.io_form)

    def s_delta(self) -> tuple[Tensor, ...]:
        """The factors of S_Δ, left to right: (W_dt, W_r), or (S_Δ,) if it is dense."""
        if self.dt_rank is None:
            return (self.dt_proj.weight,)
        return self.dt_proj.weight, self.x_proj.weight[: self.dt_rank]

    def step_bias(self) -> Tensor | None:
        """(d,) the bias inside the softplus of Δ."""
        return self.dt_proj.bias

    def token_order(self, x: Tensor, lengths: Tensor | None = None) -> Order | None:
        """The order of the tokens x (b, L, d), of ``lengths`` (b,), that this layer's ``order=`` asks for, or None."""
        return None if self.order is None else self.order(x, *self.s_delta(), lengths=lengths)

    def expect_unpacked(self, seq_idx: Tensor | None) -> None:
        """Refuse packed sequences (``seq_idx``) on behalf of an order that would mix them."""
        if seq_idx is not None:
            raise OptionError(
                f"{type(self).__name__}: seq_idx was given to a layer with order=, which would sort tokens across "
                f"sequences; order each sequence by itself"
            )

    def scan(self, x: Tensor, z: Tensor | None = None, **options: Any) -> Any:
        """Scan x (b, L, d), gated by z (b, L, d) if given, in the order in which it comes.

        Args:
            x, z: tokens, channels last.
            options: those of :func:`tokendyn.selective_scan`, such as ``initial_state``.

        Returns:
            (b, L, d), and the last state (b, d, N) with ``return_last_state``.
        """
        u, delta, A, B, C, D, z, bias = self._select(x, z)
        out = ops.selective_scan(
            u.mT, delta.mT, A, B.mT, C.mT, D, None if z is None else z.mT, bias, True, **options
        )  # fmt: skip
        if options.get("return_last_state"):
            return out[0].mT, out[1]
        return out.mT

    def update(self, state: Tensor, x: Tensor, z: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One token of :meth:`scan`: x, z (b, d) and the state (b, d, N) before it give y (b, d) and the next state."""
        u, delta, A, B, C, D, z, bias = self._select(x, z)
        return ops.selective_state_update(state, u, delta, A, B, C, D, z, bias, True)

    def _select(self, x: Tensor, z: Tensor | None) -> tuple[Any, ...]:
        """u, delta, A, B, C, D, z, delta_bias of the scan of x (..., d), tokens before channels."""
        if self.io_diagonal is None:
            weight = self.x_proj.weight
        else:
            weight = torch.cat([self.x_proj.weight[: self.dt_rank or 0], *self.io_matrices()])
        sizes = [self.dt_rank or 0, self.d_state, self.d_state]
        r, B, C = F.linear(x, weight).split(sizes, dim=-1)
        delta = F.linear(x if self.dt_rank is None else r, self.dt_proj.weight)
        # Under autocast the projections are in half precision: u and z follow, the parameters stay in float32.
        exact = torch.promote_types(delta.dtype, torch.float32)
        bias = self.step_bias()
        return (
            x.to(delta.dtype),
            delta,
            -torch.exp(self.A_log.to(exact)),
            B,
            C,
            None if self.D is None else self.D.to(exact),
            None if z is None else z.to(delta.dtype),
            None if bias is None else bias.to(exact),
        )

    def forward(
        self,
        x: Tensor,
        *,
        initial_state: Tensor | None = None,
        return_last_state: bool = False,
        seq_idx: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Any:
        """Scan the tokens in the layer's order.

        Args:
            x: (b, L, d) tokens, channels last.
            initial_state, return_last_state, seq_idx, lengths: as of :func:`tokendyn.selective_scan`.

        Returns:
            y (b, L, d), or (y, last_state) with ``return_last_state``.

        Raises:
            ShapeError: x has another number of axes or channels.
            OptionError: ``seq_idx`` on a layer that orders its tokens across sequences.
        """
        expect_tokens("S6", x, self.d_inner, self.dt_proj.weight)
        if self.order is not None:
            self.expect_unpacked(seq_idx)
        options = {
            "initial_state": initial_state,
            "return_last_state": return_last_state,
            "seq_idx": seq_idx,
            "lengths": lengths,
        }
        order = self.token_order(x, lengths)
        if order is None:
            return self.scan(x, **options)
        out = self.scan(order.apply(x), **options)
        if self.order is None or not self.order.config.restore:
            return out
        return (order.restore(out[0]), out[1]) if return_last_state else order.restore(out)


def _init_step_size(dt_proj: nn.Linear, init: str, scale: float, dt_min: float, dt_max: float, floor: float) -> None:
    """Mamba's start: W_dt keeps the variance of its input, softplus(bias) is log-uniform in [dt_min, dt_max]."""
    bound = scale * dt_proj.in_features**-0.5
    if init == "constant":
        nn.init.constant_(dt_proj.weight, bound)
    else:
        nn.init.uniform_(dt_proj.weight, -bound, bound)
    if dt_proj.bias is None:
        return
    exact = torch.promote_types(dt_proj.bias.dtype, torch.float32)
    share = torch.rand(dt_proj.out_features, device=dt_proj.bias.device, dtype=exact)
    dt = torch.exp(math.log(dt_min) + share * (math.log(dt_max) - math.log(dt_min))).clamp(min=floor)
    with torch.no_grad():
        dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
    setattr(dt_proj.bias, "_no_reinit", True)  # noqa: B010
