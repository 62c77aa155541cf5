"""The image study trained in JAX: ``python -m tokendyn.experiments.imagenet.jax``."""

from __future__ import annotations

import sys

from tokendyn.experiments import _cli

REQUIRED = _cli.REQUIRED | {"jax": "jax", "flax": "flax", "optax": "optax"}


def command(arguments: list[str]) -> None:
    """Parse ``arguments``, train, and print a table."""
    from tokendyn.experiments.imagenet._jax import command as train

    train(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    return _cli.run(command, sys.argv[1:] if arguments is None else arguments, REQUIRED, "experiments,jax")


if __name__ == "__main__":
    sys.exit(main())
