"""The byte-level segmentation model of the package typeseg 0.2.7 (Apache-2.0), from its published arrays.

Six residual blocks that scan both ways with one set of parameters, with biases on every projection::

    u, z = in_proj(norm(x));  u = silu(conv(u));  r, B, C = x_proj(u);  Δ = softplus(W_dt r + b) + 1e-4
    x ← x + out_proj((scan(u) + scan of u reversed) ∘ silu(z))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokendyn import selective_scan
from tokendyn.errors import DataError

_FLOOR = 1e-4


class TypesegMixer(nn.Module):
    """The mixer: an S6 both ways, with biases."""

    def __init__(self, width: int, state: int, rank: int, kernel: int) -> None:
        super().__init__()
        self.rank, self.state = rank, state
        self.in_proj = nn.Linear(width, 2 * width)
        self.conv = nn.Conv1d(width, width, kernel, groups=width)
        self.x_proj = nn.Linear(width, rank + 2 * state)
        self.dt_proj = nn.Linear(rank, width)
        self.out_proj = nn.Linear(width, width)
        self.A_log = nn.Parameter(torch.zeros(width, state))
        self.D = nn.Parameter(torch.zeros(width))

    def io_matrices(self) -> tuple[Tensor, Tensor]:
        """S_B and S_C."""
        return self.x_proj.weight[self.rank : self.rank + self.state], self.x_proj.weight[self.rank + self.state :]

    def s_delta(self) -> tuple[Tensor, ...]:
        """The factors of S_Δ."""
        return self.dt_proj.weight, self.x_proj.weight[: self.rank]

    def step_bias(self) -> Tensor:
        """(width,) what Δ's argument holds beside S_Δ u: the outer bias, and the inner one through W_dt."""
        return self.dt_proj.bias + self.dt_proj.weight @ self.x_proj.bias[: self.rank]

    def undo_step(self, delta: Tensor) -> Tensor:
        """S_Δ u from Δ."""
        step = delta.double() - _FLOOR
        return (step + torch.log(-torch.expm1(-step)) - self.step_bias().double()[:, None]).to(delta.dtype)

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_proj(x).mT.chunk(2, dim=1)
        kernel = self.conv.kernel_size[0]
        u = F.silu(self.conv(F.pad(u, ((kernel - 1) // 2, kernel // 2))))
        r, B, C = self.x_proj(u.mT).split([self.rank, self.state, self.state], dim=-1)
        delta = F.softplus(self.dt_proj(r)).mT + _FLOOR
        A = -torch.exp(self.A_log)

        def scan(*rows: Tensor) -> Tensor:
            return selective_scan(rows[0], rows[1], A, rows[2], rows[3], self.D)

        rows = (u, delta, B.mT, C.mT)
        y = scan(*rows) + scan(*(t.flip(-1) for t in rows)).flip(-1)
        return self.out_proj((y * F.silu(z)).mT)


class TypesegBlock(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, width: int, state: int, rank: int, kernel: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mixer = TypesegMixer(width, state, rank, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x))


class Typeseg(nn.Module):
    """Bytes (b, L) → logits (b, L, classes)."""

    def __init__(self, layers: int, width: int, state: int, rank: int, kernel: int, rows: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, width)
        self.layers = nn.ModuleList(TypesegBlock(width, state, rank, kernel) for _ in range(layers))
        self.norm_f = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm_f(x))


def load_typeseg(path: Path) -> Typeseg:
    """The model in typeseg's ``mamba_al.npz``; a pickle inside is refused by NumPy.

    Raises:
        DataError: no such file, or one of other arrays.
    """
    if not path.is_file():
        raise DataError(
            f"{path} is missing: it is data/mamba_al.npz of the package typeseg 0.2.7; "
            f"run pip download --no-deps typeseg==0.2.7 and unpack it"
        )
    try:
        with np.load(path, allow_pickle=False) as arrays:
            given = {key.replace("__", "/"): torch.from_numpy(arrays[key]) for key in arrays.files}
        return _fill(given)
    except (KeyError, ValueError) as cause:
        raise DataError(f"{path} does not hold typeseg's Mamba ({cause})") from cause


def _fill(given: dict[str, Any]) -> Typeseg:
    layers = len({key.split("/")[0] for key in given if key.startswith("CheckpointMambaBlock1D_")})
    block = "CheckpointMambaBlock1D_0/"
    width, state = given[f"{block}A_log"].shape
    rank = given[f"{block}Dense_2/kernel"].shape[0]
    kernel = given[f"{block}Conv_0/kernel"].shape[0]
    model = Typeseg(
        layers, width, state, rank, kernel, given["Embed_0/embedding"].shape[0], given["Dense_0/bias"].shape[0]
    )
    wanted: dict[str, Tensor] = {"embedding.weight": given["Embed_0/embedding"]}

    def linear(ours: str, theirs: str) -> None:
        wanted[f"{ours}.weight"], wanted[f"{ours}.bias"] = given[f"{theirs}/kernel"].mT, given[f"{theirs}/bias"]

    def norm(ours: str, theirs: str) -> None:
        wanted[f"{ours}.weight"], wanted[f"{ours}.bias"] = given[f"{theirs}/scale"], given[f"{theirs}/bias"]

    for i in range(layers):
        ours, theirs = f"layers.{i}.mixer", f"CheckpointMambaBlock1D_{i}"
        norm(f"layers.{i}.norm", f"{theirs}/LayerNorm_0")
        for part, number in (("in_proj", 0), ("x_proj", 1), ("dt_proj", 2), ("out_proj", 3)):
            linear(f"{ours}.{part}", f"{theirs}/Dense_{number}")
        wanted[f"{ours}.conv.weight"] = given[f"{theirs}/Conv_0/kernel"].permute(2, 1, 0)
        wanted[f"{ours}.conv.bias"] = given[f"{theirs}/Conv_0/bias"]
        wanted[f"{ours}.A_log"], wanted[f"{ours}.D"] = given[f"{theirs}/A_log"], given[f"{theirs}/D"]
    norm("norm_f", "LayerNorm_0")
    linear("head", "Dense_0")
    model.load_state_dict({key: value.contiguous() for key, value in wanted.items()})
    return model.eval()
