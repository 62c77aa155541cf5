"""The folder of a study: opened once, never overwritten, locked run by run.

::

    runs/imagenet-demo/
        config.json        the resolved configuration, and which data were found
        environment.json   what each sitting ran on
        ARM/seed-N/        metrics.jsonl, timings.jsonl, checkpoints/, result.json
        result.json        and figures/: the experiment's report
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokendyn.errors import CheckpointError, OptionError
from tokendyn.experiments._config import RunConfig, differences
from tokendyn.experiments._environment import describe_environment
from tokendyn.experiments._files import write_json
from tokendyn.experiments._records import read_records

FORMAT = 1
DECIDES_BITS = ("tokendyn", "revision", "packages", "cpu", "gpus")  # of the environment
LOCK_PATIENCE = 3.0  # seconds for a process that was killed to let go of its run


@dataclass(frozen=True)
class RunRecord:
    """A finished run: its arm, seed and folder, ``result.json``, and its records."""

    arm: str
    seed: int
    folder: Path
    result: dict[str, Any]
    metrics: list[dict[str, Any]]
    timings: list[dict[str, Any]]


def open_folder(
    run: RunConfig, *, stem: str, experiment: str, identity: dict[str, Any], shown: dict[str, Any], command: list[str]
) -> Path:
    """The folder to run in, made or checked, with its ``config.json`` and ``environment.json``.

    Args:
        run: where, and whether to continue.
        stem: name of the default folder under ``runs/``.
        experiment: name of the experiment.
        identity: what must be the same to continue the run there.
        shown: what ``config.json`` holds beside it.
        command: what the user typed.

    Raises:
        OptionError: the folder holds a run and ``--resume auto`` was not given, holds something else, or
            holds a run of another configuration.
        CheckpointError: its ``config.json`` is damaged.
    """
    folder = Path(run.out) if run.out is not None else _default_folder(Path("runs"), stem, run.resume)
    config = folder / "config.json"
    try:
        if folder.exists() and any(folder.iterdir()):
            if not config.is_file():
                raise OptionError(f"{folder} holds files but no run (no config.json); choose an empty or new --out")
            if run.resume == "never":
                raise OptionError(
                    f"{folder} already holds a run, which is not overwritten; continue it with --resume auto, or "
                    f"choose another --out"
                )
            _expect_same(folder, config, {"experiment": experiment, **identity})
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(config, {"format": FORMAT, "experiment": experiment, **identity, **shown})
        sittings_file = folder / "environment.json"
        sittings = json.loads(sittings_file.read_bytes()) if sittings_file.is_file() else []
        environment = describe_environment(command)
        changed = [key for key in DECIDES_BITS if sittings and sittings[-1][key] != environment[key]]
        if changed:
            print(f"note: not as in the last sitting: {', '.join(changed)}; the last bits may differ", file=sys.stderr)
        write_json(sittings_file, [*sittings, environment])
    except OSError as cause:
        raise OptionError(f"the run folder {folder} cannot be used ({cause}); choose another --out") from cause
    return folder


def run_folder(folder: Path, arm: str, seed: int) -> Path:
    """The folder of one run below that of its study; what file systems dislike in an arm's name is replaced."""
    return folder / re.sub(r"[^\w.=-]+", "_", arm) / f"seed-{seed}"


def read_run(folder: Path, arm: str, seed: int) -> RunRecord:
    """A finished run below the study's ``folder``.

    Raises:
        CheckpointError: its files cannot be read.
    """
    place = run_folder(folder, arm, seed)
    try:
        return RunRecord(
            arm,
            seed,
            place,
            json.loads((place / "result.json").read_bytes()),
            read_records(place / "metrics.jsonl"),
            read_records(place / "timings.jsonl"),
        )
    except (OSError, ValueError) as cause:
        raise CheckpointError(
            f"the finished run in {place} cannot be read ({cause}); delete it to train it anew"
        ) from cause


def _default_folder(parent: Path, stem: str, resume: str) -> Path:
    number = 1
    names = [stem]
    while (parent / names[-1]).exists():
        number += 1
        names.append(f"{stem}-{number}")
    return parent / (names[-2] if resume == "auto" and len(names) > 1 else names[-1])


def _expect_same(folder: Path, file: Path, identity: dict[str, Any]) -> None:
    try:
        before = json.loads(file.read_bytes())
        written, known = before["format"], {key: before[key] for key in identity}
    except (ValueError, KeyError, TypeError) as cause:
        raise CheckpointError(
            f"{file} is damaged ({cause!r}); put the original back, or choose another --out"
        ) from cause
    if written != FORMAT:
        raise CheckpointError(f"{folder} has format {written}, this version of tokendyn continues format {FORMAT}")
    found = differences(known, json.loads(json.dumps(identity)))
    if found:
        raise OptionError(
            f"{folder} was started with another configuration ({'; '.join(found)}); give the same, or choose another "
            f"--out"
        )


@contextlib.contextmanager
def hold(place: Path) -> Iterator[bool]:
    """Hold the run at ``place`` against other processes; False if another one keeps it."""
    try:
        import fcntl
    except ImportError:  # Windows: one process a folder
        yield True
        return
    place.mkdir(parents=True, exist_ok=True)
    handle = os.open(place / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    patience = time.monotonic() + LOCK_PATIENCE
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                ours = True
                break
            except BlockingIOError:
                ours = False
            if time.monotonic() > patience:
                break
            time.sleep(0.05)
        yield ours
    finally:
        os.close(handle)
