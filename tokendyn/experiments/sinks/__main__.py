"""``python -m tokendyn.experiments.sinks``."""

from __future__ import annotations

import sys

from tokendyn.experiments.sinks._command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
