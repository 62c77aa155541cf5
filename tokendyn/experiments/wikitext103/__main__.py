"""The command line of the language experiment."""

from __future__ import annotations

import sys

from tokendyn.experiments import _cli

PROG = "python -m tokendyn.experiments.wikitext103"
DESCRIPTION = f"""
Train language models whose input-output matrices have positive, negative, mixed or free spectra,
several seeds each, and see what the spectrum does: a table, a figure and result.json in the run's
folder. With no argument the preset demo runs on 43 articles of Wikipedia, in minutes on two CPU cores.

  {PROG}
  {PROG} --resume auto
  {PROG} spectrum --text FOLDER --tokenizer-dir FOLDER --zero-shot wiki.test.raw
  {PROG} table2_positive --text hf:Salesforce/wikitext:wikitext-103-raw-v1 --tokenizer-dir FOLDER
  {PROG} demo --arms free no_norm h3 transformer:n_layer=2

{_cli.EXIT_CODES}
"""


def command(arguments: list[str]) -> None:
    """Parse ``arguments`` and run the study."""
    from tokendyn.experiments.wikitext103._config import PRESETS

    preset, config = _cli.parse(arguments, PRESETS, default="demo", prog=PROG, description=DESCRIPTION)
    if config.run.print_config:
        _cli.print_config(preset, config, models=config.models())
        return
    from tokendyn.experiments.wikitext103._run import run_wikitext103

    run_wikitext103(preset, config, [*PROG.split(), *arguments])


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    return _cli.run(command, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
