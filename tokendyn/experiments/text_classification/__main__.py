"""The command line of the text classification experiment."""

from __future__ import annotations

import sys

from tokendyn.experiments import _cli

PROG = "python -m tokendyn.experiments.text_classification"
DESCRIPTION = f"""
Train Mamba to classify texts, with and without reordering its tokens, several seeds each, and see
what the order did: a table, a figure and result.json in the run's folder. With no argument the
preset demo runs on 4,000 news of four kinds, in minutes on two CPU cores.

  {PROG}
  {PROG} --resume auto
  {PROG} imdb --data FOLDER/imdb_train.jsonl.xz
  {PROG} ag_news --data hf:fancyzhx/ag_news
  {PROG} demo --arms baseline sorted:tau=0.3 published

{_cli.EXIT_CODES}
"""


def command(arguments: list[str]) -> None:
    """Parse ``arguments`` and run the study."""
    from tokendyn.experiments.text_classification._config import PRESETS

    preset, config = _cli.parse(arguments, PRESETS, default="demo", prog=PROG, description=DESCRIPTION)
    if config.run.print_config:
        _cli.print_config(preset, config, orders=config.orders())
        return
    from tokendyn.experiments.text_classification._run import run_text_classification

    run_text_classification(preset, config, [*PROG.split(), *arguments])


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    return _cli.run(command, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
