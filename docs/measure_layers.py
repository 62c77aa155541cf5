"""Writes ``_measured/layers.md``: how far the JAX layers are from their torch twins with the same weights.

python docs/measure_layers.py
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ["JAX_ENABLE_X64"] = "1"  # read when JAX is imported
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # as in the tests: they take longer than the computations
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))


def main() -> None:
    """Run every case of the layers' tests in both dtypes."""
    from tests.backends.test_jax_layers import CASES, errors

    lines = ["| layer | float64: values | gradients | float32: values | gradients |", "|---|---|---|---|---|"]
    for name, case in CASES.items():
        worst: dict[tuple[str, str], float] = {}
        with tempfile.TemporaryDirectory() as folder:
            for dtype, kind, _, error, _ in errors(case, Path(folder), ("float64", "float32")):
                worst[dtype, kind] = max(worst.get((dtype, kind), 0.0), error)
        cells = [f"{worst[dtype, kind]:.1e}" for dtype in ("float64", "float32") for kind in ("values", "gradients")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    (HERE / "_measured").mkdir(exist_ok=True)
    (HERE / "_measured" / "layers.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
