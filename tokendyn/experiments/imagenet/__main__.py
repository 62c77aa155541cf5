"""The command line of the image experiment."""

from __future__ import annotations

import sys

from tokendyn.experiments import _cli

PROG = "python -m tokendyn.experiments.imagenet"
DESCRIPTION = f"""
Train MambaVision on images, with and without reordering its tokens, several seeds each, and see
what the order did: a table, a figure and result.json in the run's folder. With no argument the
preset demo runs on scikit-learn's digits, in minutes on two CPU cores.

  {PROG}
  {PROG} --resume auto
  {PROG} cifar10 --data-dir TREE --seeds 0 --epochs 5
  {PROG} demo --arms baseline sorted:tau=0.3 published

{_cli.EXIT_CODES}
"""


def command(arguments: list[str]) -> None:
    """Parse ``arguments`` and run the study."""
    from tokendyn.experiments.imagenet._config import PRESETS

    preset, config = _cli.parse(arguments, PRESETS, default="demo", prog=PROG, description=DESCRIPTION)
    if config.run.print_config:
        _cli.print_config(preset, config, orders=config.orders())
        return
    from tokendyn.experiments.imagenet._run import run_imagenet

    run_imagenet(preset, config, [*PROG.split(), *arguments])


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    return _cli.run(command, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
