"""What the reports of all studies are made of: seeds, costs, numbers with their deviations, tables, pages."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokendyn.experiments._files import write_bytes
from tokendyn.experiments._run_folder import RunRecord


def seeds_of(runs: Sequence[RunRecord], planned: Sequence[int]) -> dict[str, Any]:
    """For a report: ``seeds`` of the runs, and those ``planned`` where some are not finished yet."""
    seeds = list(dict.fromkeys(run.seed for run in runs))
    return {"seeds": seeds} if len(seeds) == len(planned) else {"seeds": seeds, "seeds_planned": list(planned)}


def of_planned(result: dict[str, Any]) -> str:
    """`` (of 3 planned)`` for a report on some of the seeds, nothing for one on all."""
    return f" (of {len(result['seeds_planned'])} planned)" if "seeds_planned" in result else ""


def over_seeds(result: dict[str, Any]) -> str:
    """What the numbers of a report are, in words."""
    count = len(result["seeds"])
    return ("one seed" if count == 1 else f"mean ± standard deviation over {count} seeds") + of_planned(result)


def cost(runs: Sequence[RunRecord], **measures: Callable[[dict[str, Any]], float]) -> dict[str, Any]:
    """Medians of ``measures`` over all windows of steps but each run's first, and peak memory of the GPU."""
    windows = [entry for run in runs for entry in (run.timings[1:] or run.timings)]
    memory = [entry["gpu_memory_bytes"] for entry in windows if "gpu_memory_bytes" in entry]
    found = {name: statistics.median(map(measure, windows)) for name, measure in measures.items()}
    return {**found, "gpu_memory_bytes": max(memory) if memory else None}


def plus_minus(values: dict[str, Any], digits: int, scale: float = 1.0) -> str:
    """Mean and deviation of a :func:`._statistics.summary`."""
    mean = f"{scale * values['mean']:.{digits}f}"
    return mean if values["deviation"] is None else f"{mean} ± {scale * values['deviation']:.{digits}f}"


def text_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in columns below its title."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join([title, lines[0], "-" * max(map(len, lines)), *lines[1:]])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table as Markdown has it."""
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in [header, ["---"] * len(header), *rows])


def pictures(figures: Sequence[Path], folder: Path) -> list[str]:
    """The PNGs among ``figures``, below ``folder``, as paragraphs of a page in it."""
    return [f"![{figure.stem}]({figure.relative_to(folder)})" for figure in figures if figure.suffix == ".png"]


def write_page(folder: Path, paragraphs: Sequence[str]) -> Path:
    """Write ``report.md`` into ``folder``; its path."""
    page = folder / "report.md"
    write_bytes(page, ("\n\n".join(paragraphs) + "\n").encode())
    return page
