"""How many comparisons ran and how large the errors were; the table printed at the end of a session."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from tokendyn._dispatch import BACKENDS

from .check import Measured
from .subjects import SUBJECTS


@dataclass
class Row:
    """The worst errors of one operation on one backend in one dtype."""

    values: float = 0.0
    worst_token: float = 0.0
    gradients: float = 0.0
    comparisons: int = 0
    gradient_comparisons: int = 0


@dataclass
class Record:
    """All comparisons of a session."""

    rows: dict[tuple[str, str, str], Row] = field(default_factory=dict)

    def add(self, subject: str, backend: str, dtype: str, measured: list[Measured]) -> None:
        row = self.rows.setdefault((subject, backend, dtype), Row())
        for one in measured:
            row.comparisons += 1
            if one.gradient:
                row.gradient_comparisons += 1
                row.gradients = max(row.gradients, one.errors.normwise)
            else:
                row.values = max(row.values, one.errors.normwise)
                row.worst_token = max(row.worst_token, one.errors.worst_token)

    def plain(self) -> list[tuple[tuple[str, str, str], dict[str, float]]]:
        """The rows as plain data, to be sent from one process to another."""
        return [(key, asdict(row)) for key, row in self.rows.items()]

    def merge(self, plain: list[tuple[tuple[str, str, str], dict[str, float]]]) -> None:
        """Add the rows of another process."""
        for key, values in plain:
            row = self.rows.setdefault(tuple(key), Row())
            for name, value in values.items():
                mine = getattr(row, name)
                setattr(row, name, mine + value if name.endswith("comparisons") else max(mine, value))

    @property
    def comparisons(self) -> int:
        return sum(row.comparisons for row in self.rows.values())

    def missing(self, backends: tuple[str, ...]) -> list[str]:
        """Operations and backends of which nothing was compared, or no gradient where there is one."""
        found = [] if self.comparisons else ["anything at all"]
        for name, subject in SUBJECTS.items():
            for backend in subject.backends:
                if backend not in backends:
                    continue
                rows = [row for key, row in self.rows.items() if key[:2] == (name, backend)]
                if not sum(row.comparisons for row in rows):
                    found.append(f"{name} on {backend}")
                elif subject.differentiable and backend != "numpy" and not sum(r.gradient_comparisons for r in rows):
                    found.append(f"gradients of {name} on {backend}")
        return found

    def table(self) -> list[str]:
        lines = [
            f"{'operation':<24}{'backend':<9}{'dtype':<10}{'normwise':>10}{'worst token':>13}{'gradients':>11}"
            f"{'comparisons':>13}"
        ]
        order = [*SUBJECTS, *BACKENDS, "float64", "float32", "bfloat16", "float16"]
        by_place = sorted(self.rows.items(), key=lambda item: [order.index(word) for word in item[0]])
        for (name, backend, dtype), row in by_place:
            gradients = f"{row.gradients:.1e}" if row.gradient_comparisons else "-"
            lines.append(
                f"{name:<24}{backend:<9}{dtype:<10}{row.values:>10.1e}{row.worst_token:>13.1e}{gradients:>11}"
                f"{row.comparisons:>13}"
            )
        return lines
