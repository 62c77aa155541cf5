"""Small models of every family that the adapters read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokendyn import selective_scan
from tokendyn.torch import Mamba

VOCABULARY = 48


def hugging_face(family: str, case: int) -> tuple[Any, Tensor]:
    """A transformers model of a random configuration in float64, and token ids."""
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(100 * case + len(family))
    torch.manual_seed(case)
    width = int(rng.choice([16, 24, 32]))
    state = int(rng.integers(3, 9))
    layers = int(rng.integers(1, 4))
    common = {"vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": layers}
    own = {
        "state_size": state,
        "conv_kernel": int(rng.integers(2, 5)),
        "expand": int(rng.integers(1, 3)),
        "time_step_rank": int(rng.integers(1, 5)),
        "use_conv_bias": bool(rng.integers(2)),
        "use_bias": bool(rng.integers(2)),
    }
    if family == "mamba":
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**common, **own))
    elif family == "mamba_headless":
        model = transformers.MambaModel(transformers.MambaConfig(**common, **own))
    elif family == "falcon_mamba":
        model = transformers.FalconMambaForCausalLM(transformers.FalconMambaConfig(**common, **own))
    else:
        config = transformers.JambaConfig(
            **{**common, "num_hidden_layers": 3},
            intermediate_size=32,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_experts=1,
            num_experts_per_tok=1,
            attn_layer_period=3,
            attn_layer_offset=1,
            mamba_d_state=state,
            mamba_dt_rank=own["time_step_rank"],
            mamba_d_conv=own["conv_kernel"],
            mamba_expand=own["expand"],
        )
        model = transformers.JambaForCausalLM(config)
    with torch.no_grad():  # away from the constants of a fresh model
        for name, value in model.named_parameters():
            if name.endswith(("A_log", ".D", "dt_proj.bias", "conv1d.bias")):
                value.add_(0.3 * torch.randn_like(value))
    length = int(rng.integers(60, 150))
    return model.double().eval(), torch.randint(VOCABULARY, (2, length))


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, mixer: nn.Module, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x))


class Tiny(nn.Module):
    """Embedding, blocks, head."""

    def __init__(self, *mixers: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Block(mixer, width) for mixer in mixers)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class SlowPathMamba(nn.Module):
    """Built like mamba-ssm's Mamba: which parts are called as modules there and which as matrices, and a fused path
    that goes past all of them."""

    def __init__(self, width: int, state: int = 4) -> None:
        super().__init__()
        inner, rank = 2 * width, 3
        self.use_fast_path = True
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, 4, groups=inner, padding=3)
        self.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.rand(inner, state))
        self.D = nn.Parameter(torch.rand(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        b, length, _ = hidden_states.shape
        x, z = (hidden_states @ self.in_proj.weight.mT).mT.chunk(2, dim=1)
        x = F.silu(self.conv1d(x)[..., :length])
        rank, state = self.dt_proj.in_features, self.A_log.shape[1]
        flat = x.mT.reshape(b * length, -1)
        projected = F.linear(flat, self.x_proj.weight) if self.use_fast_path else self.x_proj(flat)
        low_rank, B, C = projected.split([rank, state, state], dim=-1)
        delta = (low_rank @ self.dt_proj.weight.mT).reshape(b, length, -1).mT
        B, C = (t.reshape(b, length, -1).mT for t in (B, C))
        A = -torch.exp(self.A_log.float())
        y = selective_scan(x, delta, A.to(x), B, C, self.D, z, self.dt_proj.bias, True)
        if not self.use_fast_path:
            return self.out_proj(y.mT)
        weight, y = self.out_proj.weight, y.mT  # another order of the same sums, as in a kernel
        return F.linear(y[..., ::2], weight[:, ::2]) + F.linear(y[..., 1::2], weight[:, 1::2])


class PublicVisionMixer(nn.Module):
    """Built like the public MambaVision mixer: two convolutions, half of the channels scanned, Δ's bias added twice."""

    def __init__(self, width: int, state: int = 4) -> None:
        super().__init__()
        half, rank = width // 2, 2
        self.in_proj = nn.Linear(width, width)
        self.conv1d_x = nn.Conv1d(half, half, 3, groups=half, padding="same", bias=False)
        self.conv1d_z = nn.Conv1d(half, half, 3, groups=half, padding="same", bias=False)
        self.x_proj = nn.Linear(half, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, half)
        self.A_log = nn.Parameter(torch.rand(half, state))
        self.D = nn.Parameter(torch.rand(half))
        self.out_proj = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        b, length, _ = hidden_states.shape
        x, z = self.in_proj(hidden_states).mT.chunk(2, dim=1)
        x, z = F.silu(self.conv1d_x(x)), F.silu(self.conv1d_z(z))
        rank, state = self.dt_proj.in_features, self.A_log.shape[1]
        low_rank, B, C = self.x_proj(x.mT.reshape(b * length, -1)).split([rank, state, state], dim=-1)
        delta = self.dt_proj(low_rank).reshape(b, length, -1).mT
        B, C = (t.reshape(b, length, -1).mT for t in (B, C))
        A = -torch.exp(self.A_log.float()).to(x)
        y = selective_scan(x, delta, A, B, C, self.D, None, self.dt_proj.bias, True)
        return self.out_proj(torch.cat([y, z], dim=1).mT)


def small(seed: int, layers: int = 3, **options: Any) -> tuple[Tiny, Tensor]:
    """Our own Mamba blocks, in float32, and token ids."""
    torch.manual_seed(seed)
    model = Tiny(*(Mamba(16, 4, **options) for _ in range(layers))).eval()
    return model, torch.randint(VOCABULARY, (2, 70))
