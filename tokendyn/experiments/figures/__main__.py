"""``python -m tokendyn.experiments.figures [name ...] [--out FOLDER] [--list]``."""

from __future__ import annotations

import sys

from tokendyn.experiments.figures._command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
