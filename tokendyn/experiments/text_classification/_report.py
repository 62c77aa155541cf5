"""The report of a text classification study: table, ``result.json``, page and figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokendyn.experiments._files import write_json
from tokendyn.experiments._order_report import conclusions, format_table, summarise_arms
from tokendyn.experiments._report import of_planned, pictures, seeds_of, write_page
from tokendyn.experiments._run_folder import RunRecord
from tokendyn.experiments.text_classification._config import TextConfig
from tokendyn.experiments.text_classification._reference import reference
from tokendyn.experiments.text_classification._task import block_of
from tokendyn.experiments.text_classification._texts import Texts

FORMAT = 1


def write_report(folder: Path, preset: str, config: TextConfig, texts: Texts, runs: Sequence[RunRecord]) -> None:
    """Write ``result.json``, ``report.md`` and the figure, and print the table."""
    from tokendyn.experiments.text_classification._figure import draw_figure  # only now: matplotlib takes a while

    result = {
        "format": FORMAT,
        "experiment": "text_classification",
        "preset": preset,
        "data": texts.fingerprint,
        **seeds_of(runs, config.seeds),
        "arms": summarise_arms(config.orders(), runs),
        "reference": reference(texts),
    }
    write_json(folder / "result.json", result)
    figures = draw_figure(folder / "figures", config, result["reference"], runs)
    table, sentences = format_table(result, block_of), [*conclusions(result), against_reference(result)]
    page = write_page(folder, [*_page(result, table, sentences), *pictures(figures, folder)])
    print("\n" + table + "\n")
    print("\n".join(sentences))
    print("\n" + "\n".join(f"  {path}" for path in (folder / "result.json", page, *figures)))


def against_reference(result: dict[str, Any]) -> str:
    """One sentence on what counting words reaches, and which arms are above it in the mean."""
    accuracy = result["reference"]["accuracy"]
    above = [arm for arm, values in result["arms"].items() if values["held_out"]["accuracy"]["mean"] > accuracy]
    return f"{result['reference']['name']}: {100 * accuracy:.2f} %; above it: {', '.join(above) or 'no arm'}"


def _page(result: dict[str, Any], table: str, sentences: Sequence[str]) -> list[str]:
    data, seeds = result["data"], len(result["seeds"])
    return [
        f"# Does order help to classify? {data['train']:,} training texts, {len(data['classes'])} classes",
        f"{data['test']:,} test texts, evaluated at steps that were fixed beforehand; {seeds} "
        f"seed{'s' if seeds > 1 else ''}{of_planned(result)}, each with the same data order and initial weights in all "
        f"arms. Differences are taken seed by seed; the interval is the 95 % one of their mean (Student's t). Each "
        f"misses the truth with a chance of 5 %; there are {len(result['arms']) - 1} here.",
        "\n".join(f"- {sentence}" for sentence in sentences),
        f"```text\n{table}\n```",
    ]
