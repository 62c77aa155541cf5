"""Reading the golden files of ``tests/data/golden``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from .check import Reference
from .subjects import SUBJECTS

FOLDER = Path(__file__).parents[1] / "data" / "golden"


def load(source: str) -> dict[str, tuple[str, str, Reference]]:
    """The entries of one file: case -> (subject, dtype, what it says)."""
    with safe_open(FOLDER / f"{source}.safetensors", "numpy") as file:
        # The handle is no mapping: it has keys() and cannot be iterated.
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        about = {case: json.loads(text) for case, text in file.metadata().items()}
    return {case: (row["subject"], row["dtype"], _reference(case, row, arrays)) for case, row in sorted(about.items())}


def _reference(case: str, row: dict[str, Any], arrays: dict[str, np.ndarray]) -> Reference:
    def group(kind: str) -> dict[str, np.ndarray]:
        prefix = f"{case}/{kind}/"
        found = {key.removeprefix(prefix): v for key, v in arrays.items() if key.startswith(prefix)}
        return {name: v.astype(np.float64) if v.dtype == np.float32 else v for name, v in found.items()}

    subject = SUBJECTS[row["subject"]]
    arguments = group("argument")
    dtypes = {name: row["dtype"] for name, value in arguments.items() if value.dtype == np.float64}
    outputs, cotangents = group("output"), group("cotangent")
    outputs = {name: outputs[name] for name in row["outputs"]}
    output_dtypes = {name: subject.output_dtype(name, dtypes) for name in outputs}
    for name, dtype in output_dtypes.items():
        if dtype.startswith("complex"):
            outputs[name] = outputs[name][..., 0] + 1j * outputs[name][..., 1]
    return Reference(
        # JSON has lists only.
        arguments={**arguments, **{k: tuple(v) if isinstance(v, list) else v for k, v in row["options"].items()}},
        dtypes=dtypes,
        outputs=outputs,
        output_dtypes=output_dtypes,
        cotangents=[cotangents[name] for name in outputs] if cotangents else None,
        gradients=group("gradient"),
    )
