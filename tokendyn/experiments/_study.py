"""A study: several arms times several seeds, one run each, resumable at any point.

Several processes may work on one folder with ``--resume auto``: each takes the runs that no other holds.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tokendyn.errors import NonFiniteError, OptionError
from tokendyn.experiments._cli import Stopped
from tokendyn.experiments._config import ComputeConfig, RunConfig, TrainConfig
from tokendyn.experiments._devices import jobs_for, numerics, take_gpu
from tokendyn.experiments._distributed import current_group
from tokendyn.experiments._graphs import expect_recordable
from tokendyn.experiments._jobs import run_jobs
from tokendyn.experiments._progress import Listener, Progress, Quiet
from tokendyn.experiments._run_folder import RunRecord, hold, read_run, run_folder
from tokendyn.experiments._signals import TIME_IS_UP, StopRequest, StopSignals, name_of
from tokendyn.experiments._task import Task
from tokendyn.experiments._trainer import Trainer, total_steps


def expect_trainable(
    make_task: Callable[[str, int], Task], arms: tuple[str, ...], seed: int, compute: ComputeConfig
) -> None:
    """Every arm can be trained so; asked before a folder is made.

    Raises:
        OptionError: one cannot; the reason.
    """
    for arm in arms:
        task = make_task(arm, seed)
        if compute.cuda_graphs:
            expect_recordable(task, torch.device(compute.device), current_group(), compute)


@dataclass(frozen=True)
class Study:
    """What is trained and where.

    Attributes:
        folder: from :func:`._run_folder.open_folder`.
        arms: names, the first being the one that the others are compared with.
        seeds: the same for all arms: runs of one seed have one data order, and start equal in all
            parameters that an arm shares with the first.
        make_task: the task of (arm, seed); can be pickled, for runs in other processes.
        train, compute: see :class:`~._trainer.Trainer`.
        options: how many runs at a time, for how long, and whom the metrics are told.
    """

    folder: Path
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    make_task: Callable[[str, int], Task]
    train: TrainConfig
    compute: ComputeConfig
    options: RunConfig

    def run(self, jobs: int | None, minutes: float | None = None) -> list[RunRecord] | None:
        """Train all runs, ``jobs`` at a time, each from where it stands; stop after ``minutes`` if given.

        Seeds come one after another, so that time that is up leaves whole seeds behind. On several GPUs each process
        takes one of them in turn, unless ``compute.device`` names one.

        Args:
            jobs: None for :func:`._devices.jobs_for`'s number.

        Returns:
            The finished runs, arm by arm; or None if other processes still work on some of them.

        Raises:
            Stopped: a signal came; everything is saved.
            NonFiniteError, CheckpointError: see :meth:`~._trainer.Trainer.run`; the runs beside are saved.
        """
        group = current_group()
        device = torch.device(self.compute.device)
        jobs = 1 if jobs is None and group.size > 1 else jobs_for(jobs, device)
        if group.size > 1 and jobs > 1:
            raise OptionError(f"--jobs is {jobs}; with torchrun all processes train one run, say --jobs 1")
        pairs = [(arm, seed) for seed in self.seeds for arm in self.arms]
        unfinished = group.told([pair for pair in pairs if not self._finished(*pair)])
        if group.leads:
            progress: Progress | Quiet = Progress(
                sum(total_steps(self.make_task(*pair), self.train) for pair in unfinished)
            )
        else:
            progress = Quiet()
        try:
            with StopSignals(minutes) as signals:
                if min(jobs, len(unfinished)) > 1:
                    begin = functools.partial(take_gpu, device)
                    ours = run_jobs(self.run_one, unfinished, min(jobs, len(unfinished)), progress, signals, begin)
                else:
                    ours = [self.run_one(*pair, progress, signals) for pair in unfinished]
                if signals.received not in (None, TIME_IS_UP):  # with all runs finished the report takes seconds
                    raise Stopped(signals.received, "all runs are finished")
        except Stopped as stopped:
            reason = name_of(stopped.number)
            raise Stopped(stopped.number, f"stopped by {reason}: {stopped}; continue with --resume auto") from None
        finally:
            if isinstance(progress, Progress):
                progress.close()
        if not all(ours):
            return None
        return self._records(self.seeds)

    def run_and_report(self, report: Callable[[list[RunRecord]], None]) -> list[RunRecord] | None:
        """:meth:`run` as the options say and ``report`` all; if time is up, the seeds that all arms have finished.

        Returns:
            The runs, arm by arm; or None where another process works on some of them or makes the report.

        Raises:
            Stopped, NonFiniteError, CheckpointError: see :meth:`run`.
        """
        with self.reporting(report):
            runs = self.run(self.options.jobs, self.options.max_minutes)
        if not current_group().leads:
            return None
        if runs is None:
            print("other processes still train some of these runs; give the same command again for the report")
            return None
        report(runs)
        return runs

    @contextlib.contextmanager
    def reporting(self, report: Callable[[list[RunRecord]], None]) -> Iterator[None]:
        """If time is up in the block, or a loss was not finite, ``report`` the seeds that all arms have finished."""
        try:
            yield
        except (Stopped, NonFiniteError) as error:
            time_is_up = not isinstance(error, Stopped) or error.number == TIME_IS_UP
            seeds = tuple(seed for seed in self.seeds if all(self._finished(arm, seed) for arm in self.arms))
            if time_is_up and seeds and current_group().leads:
                print(f"{len(seeds)} of {len(self.seeds)} seeds are finished in all arms:", file=sys.stderr)
                report(self._records(seeds))
            raise

    def _finished(self, arm: str, seed: int) -> bool:
        return (run_folder(self.folder, arm, seed) / "result.json").is_file()

    def _records(self, seeds: tuple[int, ...]) -> list[RunRecord]:
        return [read_run(self.folder, arm, seed) for arm in self.arms for seed in seeds]

    def run_one(self, arm: str, seed: int, progress: Listener, signals: StopRequest) -> bool:
        """Train one run, or what is left of it; False if another process works on it."""
        place, name, task = run_folder(self.folder, arm, seed), f"{arm}, seed {seed}", self.make_task(arm, seed)
        if signals.received is not None:
            raise Stopped(signals.received, f"{name} was not begun")
        group = current_group()
        with hold(place) if group.leads else contextlib.nullcontext(True) as held, numerics(self.compute):
            ours = group.told(held)
            # Another process may have finished it just now.
            if ours and group.told(not self._finished(arm, seed)):
                Trainer(
                    task,
                    name=name,
                    seed=seed,
                    folder=place,
                    train=self.train,
                    compute=self.compute,
                    workers=self.options.workers,
                    log_to=self.options.log_to,
                    progress=progress,
                    signals=signals,
                    initialise_like=None if arm == self.arms[0] else self.make_task(self.arms[0], seed),
                ).run()
            return ours
