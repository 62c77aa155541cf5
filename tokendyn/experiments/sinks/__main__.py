"""``python -m tokendyn.experiments.sinks``."""

from __future__ import annotations

import sys

from tokendyn.experiments import _cli


def main(arguments: list[str]) -> int:
    """Run the command; its exit code."""
    if code := _cli.not_installed({"torch": "torch", "safetensors": "safetensors"}):
        return code
    from tokendyn.experiments.sinks import _command

    return _command.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
