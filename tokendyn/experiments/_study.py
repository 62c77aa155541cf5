"""A study: several arms times several seeds, each run in a subfolder of its own, resumable at any point.

::

    runs/imagenet-demo/
        config.json        the resolved configuration, and which data were found
        environment.json   what each sitting ran on
        ARM/seed-N/        metrics.jsonl, timings.jsonl, checkpoints/, result.json
        result.json        (and figures: the experiment's report)

Several processes may work on one folder with ``--resume auto``: each takes the runs that no other holds.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokendyn.errors import CheckpointError, OptionError
from tokendyn.experiments._cli import Stopped
from tokendyn.experiments._config import ComputeConfig, RunConfig, TrainConfig, differences
from tokendyn.experiments._environment import describe_environment
from tokendyn.experiments._files import write_json
from tokendyn.experiments._progress import Progress
from tokendyn.experiments._records import read_records
from tokendyn.experiments._signals import StopSignals
from tokendyn.experiments._trainer import Task, Trainer, numerics, total_steps

FORMAT = 1


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
        write_json(sittings_file, [*sittings, describe_environment(command)])
    except OSError as cause:
        raise OptionError(f"the run folder {folder} cannot be used ({cause}); choose another --out") from cause
    return folder


def run_study(
    folder: Path,
    arms: Sequence[str],
    seeds: Sequence[int],
    make_task: Callable[[str, int], Task],
    *,
    train: TrainConfig,
    compute: ComputeConfig,
    workers: int,
) -> list[RunRecord] | None:
    """Train every arm with every seed; arms of one seed start equal in all parameters they share.

    Args:
        folder: from :func:`open_folder`.
        arms: names, the first being the one that the others are compared with.
        seeds: the same for all arms: one seed has one data order.
        make_task: the task of (arm, seed).
        train, compute, workers: see :class:`~._trainer.Trainer`.

    Returns:
        The finished runs, arm by arm; or None if other processes still work on some of them.

    Raises:
        Stopped, NonFiniteError, CheckpointError: see :meth:`~._trainer.Trainer.run`.
    """
    pairs = [(arm, seed) for seed in seeds for arm in arms]
    total = sum(total_steps(make_task(arm, seed), train) for arm, seed in pairs)
    progress = Progress(total)
    held_elsewhere = []
    try:
        with numerics(compute), StopSignals() as signals:
            for arm, seed in pairs:
                place = folder / arm_folder(arm) / f"seed-{seed}"
                name, task = f"{arm}, seed {seed}", make_task(arm, seed)
                if signals.received is not None:
                    raise Stopped(
                        signals.received,
                        f"stopped by signal {signals.received} before {name}; continue with --resume auto",
                    )
                with _lock(place) as ours:
                    if (place / "result.json").is_file():
                        progress.start(name, *[total_steps(task, train)] * 2)
                    elif ours:
                        Trainer(
                            task,
                            name=name,
                            seed=seed,
                            folder=place,
                            train=train,
                            compute=compute,
                            workers=workers,
                            progress=progress,
                            signals=signals,
                            initialise_like=None if arm == arms[0] else make_task(arms[0], seed),
                        ).run()
                    else:
                        held_elsewhere.append(name)
    finally:
        progress.close()
    if held_elsewhere:
        return None
    return [_read_run(folder, arm, seed) for arm in arms for seed in seeds]


def arm_folder(arm: str) -> str:
    """The name of an arm's folder: the arm with what file systems dislike replaced."""
    return re.sub(r"[^\w.=-]+", "_", arm)


def _read_run(folder: Path, arm: str, seed: int) -> RunRecord:
    place = folder / arm_folder(arm) / f"seed-{seed}"
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
            f"{folder} was started with another configuration ({'; '.join(found)}); give the same, or choose another --out"
        )


@contextlib.contextmanager
def _lock(place: Path) -> Iterator[bool]:
    """Hold the run at ``place`` against other processes; False if another one holds it."""
    try:
        import fcntl
    except ImportError:  # Windows: one process a folder
        yield True
        return
    place.mkdir(parents=True, exist_ok=True)
    handle = os.open(place / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = True
        except BlockingIOError:
            ours = False
        yield ours
    finally:
        os.close(handle)
