"""Kill a run at many random moments, one kill a run, continue it, and compare every bit with an uninterrupted one.

    python -m tests.reliability.kill_many [--kills 20] [--seed 0]

A run is one arm and one seed, on one thread. Of every four kills one waits for a checkpoint that is just being written;
the others come at a moment drawn evenly over the time that the uninterrupted run took. Minutes long: the tests hold
a short form (``test_kill_resume.py``).
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.experiments.trees import write_tree
from tests.reliability.test_kill_resume import contents, finish, kill, start
from tokendyn.experiments._files import TEMPORARY

STEPS = 60  # as many as take as long as starting
ONE_RUN = ("--arms", "sorted", "--jobs", "1", "--checkpoint-every", "1", "--steps", f"{STEPS}")


def main(kills: int, seed: int) -> int:
    """Print a line a kill; the number of runs that ended otherwise."""
    moments, wrong, writing = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as place:
        tree = write_tree(Path(place) / "tree")
        began = time.monotonic()
        finish(start(Path(place) / "whole", tree, *ONE_RUN))
        length = time.monotonic() - began
        expected = contents(Path(place) / "whole", STEPS)
        print(f"uninterrupted: {length:.1f} s, {len(expected)} files to compare", flush=True)
        for number in range(kills):
            out = Path(place) / f"run-{number}"
            process = start(out, tree, *ONE_RUN)
            began, moment = time.monotonic(), moments.random() * length
            aimed = number % 4 == 3
            skip = moments.randint(0, STEPS - 2)  # checkpoints to let pass
            while process.poll() is None:
                if not aimed and time.monotonic() - began >= moment:
                    break
                if aimed and any(out.glob(f"*/seed-*/checkpoints/{TEMPORARY}*")) and _newest(out) >= skip:
                    break
                time.sleep(0.0005 if aimed else 0.005)
            ended = process.poll() is not None
            kill(process)
            half = sorted(file.name for file in out.glob(f"*/seed-*/checkpoints/{TEMPORARY}*/*"))
            written, steps = bool(list(out.glob(f"*/seed-*/checkpoints/{TEMPORARY}*"))), _newest(out)
            finish(start(out, tree, *ONE_RUN))
            same = contents(out, STEPS) == expected
            wrong += not same
            writing += written
            when = f"{time.monotonic() - began:.1f}"
            state = "after its end" if ended else f"after step {steps}"
            print(
                f"kill {number + 1:2d}: {state}{f', writing a checkpoint ({len(half)} files)' if written else ''}; "
                f"continued, {when} s in all: {'the same bits' if same else 'OTHER BITS'}",
                flush=True,
            )
    print(f"{kills} kills, {writing} of them while a checkpoint was written: {wrong} ended otherwise")
    return wrong


def _newest(out: Path) -> int:
    """Step of the newest checkpoint."""
    return max((int(place.name[5:]) for place in out.glob("*/seed-*/checkpoints/step-*")), default=0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sys.exit(min(1, main(given.kills, given.seed)))
