"""The support matrix of README and docs, made from the table of operations.

``python docs/_ext/support_matrix.py`` prints it; with ``--write`` it is put into README.md between its two
markers. A test compares the README with it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tokendyn._dispatch import BACKENDS
from tokendyn._operations import OPERATIONS

BEGIN, END = "<!-- support matrix: begin -->", "<!-- support matrix: end -->"
README = Path(__file__).parents[2] / "README.md"


def support_matrix() -> str:
    """A Markdown table: one row an operation, one column a backend."""
    titles = {"numpy": "NumPy", "torch": "PyTorch", "jax": "JAX"}
    lines = [
        "| operation | " + " | ".join(titles[name] for name in BACKENDS) + " | gradient to | source |",
        "|---" * (len(BACKENDS) + 3) + "|",
    ]
    for row in OPERATIONS.values():
        marks = ["✓" if name in row.backends else "" for name in BACKENDS]
        gradients = ", ".join(row.differentiable) or "none"
        lines.append(f"| `{row.name}` | " + " | ".join(marks) + f" | {gradients} | {row.source} |")
    dtypes = "; ".join(f"{titles[b.name]}: {', '.join(b.dtypes)}" for b in BACKENDS.values())
    exact = "`io_spectrum` and the right-hand sides (`*_flow`, `flow_rhs`): float64 and float32 only"
    return "\n".join([*lines, "", f"Dtypes. {dtypes}. {exact}. Gradients on NumPy: hand-written, in `tokendyn.core`."])


def replaced(text: str) -> str:
    """``text`` with the matrix between its markers."""
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{support_matrix()}\n{END}{tail}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        README.write_text(replaced(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(support_matrix())
