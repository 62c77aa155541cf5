"""What a language model's blocks do: spectra, signs of x_lᵀ M x_j on data, token norms, and the ODE's word on them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tokendyn import _operations as ops
from tokendyn.backends.torch.layers import Mamba
from tokendyn.backends.torch.models import LanguageModel


def measure_blocks(model: LanguageModel[Any], tokens: Tensor) -> dict[str, Any]:
    """Measures of the blocks of ``model`` on ``tokens`` (b, L).

    Returns:
        ``norms``: mean over tokens of log2 ‖x_l‖ before the first block and after every one, of the residual stream;
        ``norms_first``: of each sequence's first token alone. For Mamba also

        ``norms_ode``: the same as the token dynamics (7) have it. A block is one unit of time; its own tokens x (of the
        scan, D_inner channels), its S_B, S_C, S_Δ, bias and A give dx/dt, and the mean of d ln‖x_l‖/dt =
        ⟨x_l, dx_l/dt⟩/‖x_l‖² is added to the logarithm of the norm. Projections, gate, skip and norm are not in (7).

        ``layers``: by number, ``eigenvalues``, the magnitudes of the N eigenvalues of M = S_Cᵀ S_B that are not 0 by
        rank, falling; ``symmetric``, the largest and smallest eigenvalue of (M + Mᵀ)/2; ``positive_pairs``, the part of
        all pairs j < l with x_lᵀ M x_j > 0, and ``positive_self``, of all l with x_lᵀ M x_l > 0; ``ode_rate``, the mean
        above.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        backbone = model.backbone
        x = backbone.embed(tokens)
        norms, first = [_log_norm(x).mean().item()], [_log_norm(x[:, 0]).mean().item()]
        ode = [norms[0]]
        layers: dict[str, Any] = {}
        for index, block in enumerate(backbone.blocks()):
            if isinstance(block.mixer, Mamba):
                layers[str(index)] = _measure_mixer(block.mixer, block.norm(x))
                ode.append(ode[-1] + layers[str(index)]["ode_rate"] / math.log(2))
            x = block(x)
            norms.append(_log_norm(x).mean().item())
            first.append(_log_norm(x[:, 0]).mean().item())
    found: dict[str, Any] = {"norms": norms, "norms_first": first}
    return found | {"norms_ode": ode, "layers": layers} if layers else found


def _measure_mixer(mixer: Mamba, hidden: Tensor) -> dict[str, Any]:
    x = mixer.convolve(mixer.in_proj(hidden)[..., : mixer.d_inner]).float()
    S_B, S_C = (S.float() for S in mixer.io_matrices())
    spectrum = ops.io_spectrum(S_B.cpu(), S_C.cpu())  # N x N: not worth a GPU's launches
    scores = (x @ S_C.mT) @ (x @ S_B.mT).mT  # (b, L, L): x_lᵀ M x_j
    pairs = torch.ones(scores.shape[1:], dtype=torch.bool, device=x.device).tril(-1)
    s_delta = mixer.s_delta()[0].float()
    for factor in mixer.s_delta()[1:]:
        s_delta = s_delta @ factor.float()
    bias = mixer.step_bias()
    rate = ops.flow_rhs(
        x, S_B=S_B, S_C=S_C, s_delta=s_delta, a=mixer.A_log.float().exp(), bias=None if bias is None else bias.float()
    )
    squares = x.square().sum(-1)
    return {
        "eigenvalues": spectrum.eigenvalues.abs().sort(descending=True).values.tolist(),
        "symmetric": [spectrum.symmetric[0].item(), spectrum.symmetric[-1].item()],
        "positive_pairs": (scores[:, pairs] > 0).float().mean().item(),
        "positive_self": (scores.diagonal(dim1=1, dim2=2) > 0).float().mean().item(),
        "ode_rate": ((x * rate).sum(-1) / squares.clamp(min=torch.finfo(squares.dtype).tiny)).mean().item(),
    }


def _log_norm(x: Tensor) -> Tensor:
    """log2 of the norms of the tokens; of a token that is 0, that of the smallest number."""
    return x.float().norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny).log2()
