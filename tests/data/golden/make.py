"""Make the golden files: answers written down once, so that spec and backends cannot change together unseen.

From the root of the repository::

    python -m tests.data.golden.make spec        # spec.safetensors, from tokendyn.core
    python -m tests.data.golden.make mamba_ssm   # mamba_ssm.safetensors; needs the package mamba-ssm

Make ``spec.safetensors`` anew only when an operation is added or a definition changed on purpose, and say so.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.equivalence.cases import CASES
from tests.equivalence.check import Reference, reference

HERE = Path(__file__).parent

#: The cases that are written down: of each operation the ordinary and the easily mistaken.
FROM_SPEC = (
    "selective_scan-scalar_A",
    "selective_scan-groups",
    "selective_scan-packed",
    "selective_scan-padded",
    "selective_scan-extreme_steps",
    "selective_state_update-groups",
    "selective_state_update-bare",
    "hidden_attention-groups",
    "hidden_attention-packed_rows",
    "hidden_attention-padded",
    "importance_score-low_rank",
    "importance_score-no_step_size",
    "softsort-ties_descending",
    "softsort-power_1.5_descending",
    "softsort_restore-ties_descending",
    "softsort_matrix-ties,_square",
    "effective_tokens-ties",
    "hard_order-ties_descending",
    "take_tokens-int32",
    "put_tokens-int32",
    "reordered_scan-soft_with_ties",
    "reordered_scan-straight_through_with_ties",
    "io_projections-free",
    "io_projections-mixed,_even_N",
    "io_projections-negative,_published_code",
    "io_spectrum-D_above_2N",
    "io_spectrum-N_above_D",
    "flow_rhs-line,_bias",
    "flow_rhs-bias",
    "flow_rhs-general_A,_shared_step_size",
    "sphere_flow-C:_value_matrix",
    "sphere_flow-general_A_and_value_matrix",
    "attention_flow-softmax,_causal,_sphere",
    "attention_flow-linear,_full,_space",
    "autoregressive_flow-p=1",
)

#: Those that mamba-ssm's reference can express: no initial state, no packing, no padding, A of two axes.
FROM_MAMBA = (
    "selective_scan-L=63",
    "selective_scan-bare",
    "selective_scan-softplus,_D,_last_state",
    "selective_scan-bias_and_gate",
    "selective_scan-extreme_steps",
    "selective_scan-groups",
    "selective_scan-growth",
)


def entry(case_id: str, dtype: str, want: Reference) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of one case by key, and what JSON can hold of it."""
    arrays, options = {}, {}
    for name, value in want.arguments.items():
        if isinstance(value, np.ndarray):
            arrays[f"{case_id}/argument/{name}"] = value
        else:
            options[name] = value
    for kind, group in (("output", want.outputs), ("gradient", want.gradients)):
        for name, value in group.items():
            value = np.asarray(value)
            pairs = np.stack([value.real, value.imag], -1) if np.iscomplexobj(value) else value
            arrays[f"{case_id}/{kind}/{name}"] = pairs
    for name, cotangent in zip(want.outputs, want.cotangents or (), strict=False):
        arrays[f"{case_id}/cotangent/{name}"] = cotangent
    if dtype == "float32":
        arrays = {key: v.astype(np.float32) if v.dtype == np.float64 else v for key, v in arrays.items()}
    about = {"subject": case_id.split("-")[0], "dtype": dtype, "options": options, "outputs": list(want.outputs)}
    return {key: np.ascontiguousarray(v) for key, v in arrays.items()}, about


def from_mamba(want: Reference) -> Reference:
    """``want`` with the answers of mamba-ssm's reference loop, which computes in float32, and its autograd's."""
    import torch
    from mamba_ssm.ops.selective_scan_interface import selective_scan_ref

    arguments = {
        name: torch.tensor(value, dtype=torch.float32) if isinstance(value, np.ndarray) else value
        for name, value in want.arguments.items()
        if name != "initial_state"
    }
    tensors = {name: value.requires_grad_() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    outputs = selective_scan_ref(**arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert want.cotangents is not None
    seeds = [torch.tensor(cotangent, dtype=torch.float32) for cotangent in want.cotangents]
    gradients = torch.autograd.grad(outputs, list(tensors.values()), seeds)
    return Reference(
        arguments={name: value for name, value in want.arguments.items() if name != "initial_state"},
        dtypes=want.dtypes,
        outputs={name: out.detach().numpy() for name, out in zip(want.outputs, outputs, strict=True)},
        output_dtypes=want.output_dtypes,
        cotangents=want.cotangents,
        gradients={name: g.numpy() for name, g in zip(tensors, gradients, strict=True)},
    )


def main(source: str) -> None:
    cases = {case.id: case for case in CASES}
    dtype = "float64" if source == "spec" else "float32"
    arrays: dict[str, np.ndarray] = {}
    about: dict[str, str] = {}
    for case_id in FROM_SPEC if source == "spec" else FROM_MAMBA:
        want = reference(cases[case_id], dtype)
        made, described = entry(case_id, dtype, want if source == "spec" else from_mamba(want))
        arrays |= made
        about[case_id] = json.dumps(described)
    save_file(arrays, HERE / f"{source}.safetensors", metadata=about)
    print(f"{source}.safetensors: {len(about)} cases, {sum(v.nbytes for v in arrays.values()) / 1024:.0f} KiB")


if __name__ == "__main__":
    if sys.argv[1:] not in (["spec"], ["mamba_ssm"]):
        sys.exit(__doc__)
    main(sys.argv[1])
