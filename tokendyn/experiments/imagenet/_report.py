"""The report of an image study: the table on stdout, ``result.json`` and the figure in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokendyn.experiments._files import write_json
from tokendyn.experiments._order_report import conclusions, format_table, summarise_arms
from tokendyn.experiments._report import pictures, seeds_of, write_page
from tokendyn.experiments._run_folder import RunRecord
from tokendyn.experiments.imagenet._config import ImageNetConfig
from tokendyn.experiments.imagenet._images import Images
from tokendyn.experiments.imagenet._task import stage_of

FORMAT = 1


def write_report(
    folder: Path,
    preset: str,
    config: ImageNetConfig,
    images: Images,
    runs: Sequence[RunRecord],
) -> None:
    """Write ``result.json`` and the figure, and print the table."""
    from tokendyn.experiments.imagenet._figure import draw_figure  # only now: matplotlib takes a while to load

    result = {
        "format": FORMAT,
        "experiment": "imagenet",
        "preset": preset,
        "data": images.fingerprint,
        **seeds_of(runs, config.seeds),
        "arms": summarise_arms(config.orders(), runs),
        "skipped": {name: reason for run in runs for name, reason in run.result["skipped"].items()},
    }
    write_json(folder / "result.json", result)
    figures = draw_figure(folder / "figures", config, images, runs)
    if config.data.mechanism:
        from tokendyn.experiments.imagenet._mechanism import draw_mechanism
        from tokendyn.experiments.imagenet._page import page

        figures += draw_mechanism(folder / "figures", result, images, runs)
        figures.append(write_page(folder, [*page(result), *pictures(figures, folder)]))
    print("\n" + format_table(result, stage_of))
    print()
    for sentence in conclusions(result):
        print(sentence)
    if result["skipped"]:
        print(f"{len(result['skipped'])} images could not be read and were skipped; result.json names them")
    print("\n" + "\n".join(f"  {path}" for path in (folder / "result.json", *figures)))
