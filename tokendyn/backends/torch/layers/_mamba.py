"""The Mamba block, with mamba-ssm's arguments and parameter names."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokendyn import _checks as check
from tokendyn._layers import OrderConfig
from tokendyn.backends.torch.layers._ordering import expect_tokens
from tokendyn.backends.torch.layers._s6 import S6
from tokendyn.backends.torch.ops._convolution import convolve_silu
from tokendyn.backends.torch.ops._scan_plain import sequence_starts
from tokendyn.errors import OptionError, ShapeError


class Mamba(S6):
    """Mamba block: a gated selective layer behind a short causal convolution.

    ::

        x, z = in_proj(h);  x = silu(conv1d(x));  y = S6(x) ∘ silu(z);  out_proj(y)

    A call written for ``mamba_ssm.Mamba`` runs unchanged, and its ``state_dict`` has the same names and shapes.

    Args:
        d_model: channels of input and output.
        d_state, d_conv, expand: state size N, kernel of the convolution (None: no convolution, as in paper 1's
            Table 10), d_inner = expand · d_model.
        dt_rank: rank of S_Δ; ``"auto"`` for ⌈d_model/16⌉, None for a dense one.
        dt_min, dt_max, dt_init, dt_scale, dt_init_floor: see :class:`S6`.
        conv_bias, bias: biases of the convolution; of in_proj and out_proj.
        use_fast_path: accepted for mamba-ssm's sake, without effect: the engine is the scan's choice.
        layer_idx: key of this layer in ``inference_params.key_value_memory_dict``.
        scalar_A, io_regime, io_form: see :class:`S6`; all but their defaults change names or shapes of parameters.
        order: see :class:`S6`; adds the parameter ``order.K`` (d_inner,). The score (14) is taken from the convolved
            x, the order applied to x and so to Δ, B, C, and the gate treated as the configuration says. A block that
            orders its tokens is **not causal**: see :class:`~tokendyn.torch.models.MambaLM` for orders that are.
        device, dtype: of the parameters; A_log, D stay in float32 where dtype is a half precision.

    Shapes:
        (b, L, d_model) → (b, L, d_model).

    Raises:
        OptionError, RegimeError, ShapeError: an unknown option, a regime that the others exclude, an input that does
            not fit.

    Source:
        Gu and Dao (2023), Figure 3; paper 1, Section 5.2 for the order.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int | None = 4,
        expand: float = 2,
        dt_rank: int | str | None = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scalar_A: bool = False,
        io_regime: str = "free",
        io_form: str = "paper",
        order: OrderConfig | str | None = None,
    ) -> None:
        check.expect_size("Mamba", "d_model", d_model)
        if d_conv is not None:
            check.expect_size("Mamba", "d_conv", d_conv)
        d_inner = int(expand * d_model)
        super().__init__(
            d_inner,
            d_state,
            dt_rank=math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init=dt_init,
            dt_scale=dt_scale,
            dt_init_floor=dt_init_floor,
            scalar_A=scalar_A,
            io_regime=io_regime,
            io_form=io_form,
            order=order,
            device=device,
            dtype=dtype,
        )
        self.d_model = d_model
        self.d_conv = d_conv
        self.expand = expand
        self.use_fast_path = use_fast_path
        self.layer_idx = layer_idx
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=bias, **options)
        self.conv1d = None
        if d_conv is not None:
            self.conv1d = nn.Conv1d(
                d_inner, d_inner, d_conv, groups=d_inner, padding=d_conv - 1, bias=conv_bias, **options
            )
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias, **options)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        inference_params: Any = None,
        *,
        seq_idx: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """(b, L, d_model) → (b, L, d_model).

        Args:
            hidden_states: (b, L, d_model) tokens.
            inference_params: mamba-ssm's cache (``seqlen_offset``, ``key_value_memory_dict``), for decoding token by
                token after a prompt; refused by a block that orders its tokens.
            seq_idx: (b, L) integers, optional: sequences packed end to end, each by itself; another begins wherever the
                value differs from the one before it. Refused by a block that orders its tokens.
            lengths: (b,) integers, optional: sequences padded on the right. The padding, whatever it holds, changes
                nothing before it.
        """
        expect_tokens("Mamba", hidden_states, self.d_model, self.dt_proj.weight)
        if inference_params is not None:
            if seq_idx is not None or lengths is not None:
                raise OptionError("Mamba: inference_params came with seq_idx or lengths; decode whole sequences only")
            return self._decode(hidden_states, inference_params)
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        return self.out_proj(self.mix(self.convolve(x, seq_idx), z, seq_idx=seq_idx, lengths=lengths))

    def mix(self, x: Tensor, z: Tensor, *, seq_idx: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """S6(x) ∘ silu(z) of x and z (b, L, d_inner), in the order that ``order=`` asks for.

        ``seq_idx`` (b, L) and ``lengths`` (b,) as of :meth:`forward`.
        """
        if self.order is None:
            return self.scan(x, z, seq_idx=seq_idx, lengths=lengths)
        self.expect_unpacked(seq_idx)
        order = self.token_order(x, lengths)
        if order is None:
            return self.scan(x, z, lengths=lengths)
        x = order.apply(x)
        if self.order.config.restore:
            return order.restore(self.scan(x, lengths=lengths)) * F.silu(z)
        if self.order.config.reorder_gate:
            z = order.apply(z)
        return self.scan(x, z, lengths=lengths)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """Empty states for decoding: (b, d_inner, d_conv) of the convolution and (b, d_inner, N) of the scan.

        b is ``batch_size``; ``max_seqlen`` is accepted for mamba-ssm's sake, the states do not grow. The scan's state
        is kept in float32 where ``dtype`` is a half precision.
        """
        self._expect_decodable()
        weight = self.in_proj.weight
        dtype = dtype or weight.dtype
        return (
            weight.new_zeros(batch_size, self.d_inner, self.d_conv or 0, dtype=dtype),
            weight.new_zeros(batch_size, self.d_inner, self.d_state, dtype=torch.promote_types(dtype, torch.float32)),
        )

    def prefill(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A whole prompt, ``hidden_states`` (b, L, d_model) → (b, L, d_model), from the beginning of the sequences.

        ``conv_state`` and ``ssm_state`` are set in place to those after its last token, and returned.
        """
        x, z = self._convolved_prompt(hidden_states, conv_state)
        y, state = self.scan(x, z, return_last_state=True)
        ssm_state.copy_(state)
        return self.out_proj(y), conv_state, ssm_state

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token, ``hidden_states`` (b, 1, d_model) → (b, 1, d_model).

        ``conv_state`` and ``ssm_state`` are advanced in place and returned.
        """
        if hidden_states.shape[1] != 1:
            raise ShapeError(
                f"Mamba.step: hidden_states has shape {tuple(hidden_states.shape)}, expected one token (b, 1, D); "
                f"call forward for a whole prompt"
            )
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        x = self.convolve_next(x, conv_state)
        y, state = self.update(ssm_state, x[:, 0], z[:, 0])
        ssm_state.copy_(state)
        return self.out_proj(y.unsqueeze(1)), conv_state, ssm_state

    def convolve(self, x: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """x (b, L, d_inner) → the same, each token mixed with the d_conv - 1 before it in its sequence (seq_idx)."""
        if self.conv1d is None:
            return F.silu(x)
        if seq_idx is None:
            return convolve_silu(x, self.conv1d.weight, self.conv1d.bias)
        number = sequence_starts(seq_idx).cumsum(1)
        taps = self.conv1d.weight.squeeze(1).to(x.dtype)  # (d_inner, d_conv), the newest token's last
        out = x * taps[:, -1]
        for age in range(1, min(taps.shape[1], x.shape[1])):
            same = (number[:, age:] == number[:, :-age]).unsqueeze(-1)
            out = out + F.pad(torch.where(same, x[:, :-age], 0.0) * taps[:, -1 - age], (0, 0, age, 0))
        return F.silu(out if self.conv1d.bias is None else out + self.conv1d.bias.to(x.dtype))

    def _convolved_prompt(self, hidden_states: Tensor, conv_state: Tensor) -> tuple[Tensor, Tensor]:
        """Convolved tokens and gate of a prompt; ``conv_state`` is set to its last tokens before the convolution."""
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        if self.d_conv is not None:
            conv_state.copy_(F.pad(x.mT, (self.d_conv - x.shape[1], 0)))  # a negative pad cuts a long prompt
        return self.convolve(x), z

    def convolve_next(self, x: Tensor, conv_state: Tensor) -> Tensor:
        """One token ``x`` (b, 1, d_inner) of :meth:`convolve`; ``conv_state`` is advanced in place."""
        if self.conv1d is not None:
            conv_state.copy_(torch.cat([conv_state[..., 1:], x.mT.to(conv_state.dtype)], dim=-1))
            x = F.conv1d(conv_state.to(x.dtype), self.conv1d.weight, self.conv1d.bias, groups=self.d_inner).mT
        return F.silu(x)

    def _expect_decodable(self) -> None:
        if self.order is not None:
            raise OptionError(
                "Mamba: states for decoding were asked of a block with order=; an order needs the whole sequence and "
                "cannot be decoded token by token, call forward without inference_params"
            )

    def _decode(self, hidden_states: Tensor, inference_params: Any) -> Tensor:
        self._expect_decodable()
        if self.layer_idx is None:
            raise OptionError("Mamba: inference_params was given but layer_idx is None; construct with layer_idx=")
        cache = inference_params.key_value_memory_dict
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(hidden_states.shape[0], 0)
        advance = self.step if inference_params.seqlen_offset > 0 else self.prefill
        return advance(hidden_states, *cache[self.layer_idx])[0]
