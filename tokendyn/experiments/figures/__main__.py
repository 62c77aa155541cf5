"""``python -m tokendyn.experiments.figures [name ...] [--out FOLDER]``."""

from __future__ import annotations

import sys

from tokendyn.experiments import _cli


def main(arguments: list[str]) -> int:
    """Run the command; its exit code."""
    if code := _cli.not_installed({"matplotlib": "matplotlib"}):
        return code
    from tokendyn.experiments.figures import _command

    return _command.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
