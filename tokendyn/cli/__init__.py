"""The command line: ``tokendyn classify``, ``tokendyn simulate``, ``tokendyn diagnose``, ``tokendyn figures``.

Whatever a user can get wrong ends in one sentence on stderr and exit code 2, never in a traceback.
"""

from __future__ import annotations

import os
import sys

from tokendyn.errors import TokendynError

MISTAKE, INTERRUPTED = 2, 130


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit code: 0, 2 for a mistake in the call, 130 for Ctrl-C."""
    from tokendyn.cli._commands import run

    try:
        try:
            return run(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # who reads, `head` say, has seen enough; Python would complain of it at its end again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except TokendynError as error:
        print(f"tokendyn: {error}", file=sys.stderr)
        return MISTAKE
    except OSError as error:
        what = error if error.filename is None else f"{error.filename}: {error.strerror}"
        print(f"tokendyn: {what}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("tokendyn: interrupted", file=sys.stderr)
        return INTERRUPTED
