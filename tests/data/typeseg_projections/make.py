"""Makes ``layers.safetensors``: ``python tests/data/typeseg_projections/make.py mamba_al.npz`` (of typeseg 0.2.7)."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tokendyn.diagnose import capture, save_projections
from tokendyn.experiments.sinks._texts import to_ids
from tokendyn.experiments.sinks._typeseg import load_typeseg

TEXT = "def f(x):\n    return {'a': x}\n<p>hello</p>\n{\"k\": 1}\n"


def main(path: str) -> None:
    model = load_typeseg(Path(path))
    with capture(model) as scans, torch.no_grad():
        model(torch.from_numpy(to_ids(TEXT.encode()))[None])
    layers = {}
    for scan in scans:
        if scan.index:  # the second scan is of the same tokens, reversed
            continue
        mixer = model.get_submodule(scan.layer)
        rank, state = mixer.rank, mixer.state
        weight, bias = mixer.x_proj.weight.detach(), mixer.x_proj.bias.detach()
        layers[scan.layer] = {
            "S_B": weight[rank : rank + state],
            "S_C": weight[rank + state :],
            "W_dt": mixer.dt_proj.weight.detach(),
            "W_r": weight[:rank],
            "A": -torch.exp(mixer.A_log.detach()),
            "B_bias": bias[rank : rank + state],
            "C_bias": bias[rank + state :],
            "delta_bias": mixer.step_bias().detach(),
            "D": mixer.D.detach(),
            "x": scan.u.mT.contiguous(),
        }
    save_projections(Path(__file__).parent, layers)


if __name__ == "__main__":
    main(sys.argv[1])
