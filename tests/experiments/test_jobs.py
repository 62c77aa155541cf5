"""Runs side by side: which GPU each process takes, what a failed run does to the others, half-finished studies."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.experiments.tiny import COMPUTE, TRAIN, Recorder, TinyTask
from tokendyn.errors import NonFiniteError
from tokendyn.experiments._cli import Stopped
from tokendyn.experiments._config import RunConfig
from tokendyn.experiments._devices import RUNS_ON_A_GPU, jobs_for, take_gpu
from tokendyn.experiments._jobs import run_jobs
from tokendyn.experiments._report import of_planned, seeds_of
from tokendyn.experiments._run_folder import RunRecord
from tokendyn.experiments._signals import TIME_IS_UP, StopSignals
from tokendyn.experiments._study import Study

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As if there were three: the list of those that were taken."""
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    return taken


def test_processes_take_the_gpus_in_turn(three_gpus: list[int]) -> None:
    for place in range(7):
        take_gpu(CUDA, place)
    assert three_gpus == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_a_device_that_was_named_is_kept(three_gpus: list[int], device: str) -> None:
    take_gpu(torch.device(device), 2)
    assert three_gpus == []


def test_how_many_run_at_a_time(three_gpus: list[int]) -> None:
    assert jobs_for(None, CPU) == 1
    assert jobs_for(None, CUDA) == 3 * RUNS_ON_A_GPU
    assert jobs_for(None, torch.device("cuda:1")) == RUNS_ON_A_GPU
    assert [jobs_for(5, device) for device in (CPU, CUDA)] == [5, 5]


@dataclass(frozen=True)
class Tasks:
    """The arm "broken" meets a NaN at step 3 of seed 1."""

    def __call__(self, arm: str, seed: int) -> TinyTask:
        return TinyTask(seed, nan_at=3 if (arm, seed) == ("broken", 1) else None)


def study(folder: Path, seeds: tuple[int, ...]) -> Study:
    return Study(folder, ("sound", "broken"), seeds, Tasks(), TRAIN, COMPUTE, RunConfig())


def finished(folder: Path) -> list[str]:
    return sorted(f"{place.parent.parent.name} {place.parent.name}" for place in folder.glob("*/*/result.json"))


def mark(folder: Path, place: int) -> None:
    (folder / f"process {place}").mkdir(parents=True)


def test_a_loss_that_is_not_finite_stops_its_own_run_alone(tmp_path: Path) -> None:
    reported: list[RunRecord] = []
    whole = study(tmp_path / "runs", (0, 1, 2))
    pairs = [(arm, seed) for seed in whole.seeds for arm in whole.arms]
    begin = functools.partial(mark, tmp_path)
    with (
        pytest.raises(NonFiniteError, match=r"broken, seed 1, step 4 of 12: .* is nan"),
        whole.reporting(reported.extend),
        StopSignals() as signals,
    ):
        run_jobs(whole.run_one, pairs, 2, Recorder(), signals, begin)
    assert sorted(place.name for place in tmp_path.iterdir()) == ["process 0", "process 1", "runs"]
    done = ["broken seed-0", "broken seed-2", "sound seed-0", "sound seed-1", "sound seed-2"]
    assert finished(tmp_path / "runs") == done
    assert [(run.arm, run.seed) for run in reported] == [("sound", 0), ("sound", 2), ("broken", 0), ("broken", 2)]
    result = seeds_of(reported, whole.seeds)
    assert result == {"seeds": [0, 2], "seeds_planned": [0, 1, 2]}
    assert of_planned(result) == " (of 3 planned)"


def test_time_that_is_up_leaves_a_report_on_whole_seeds(tmp_path: Path) -> None:
    assert study(tmp_path, (0,)).run(jobs=1) is not None
    reported: list[RunRecord] = []
    longer = study(tmp_path, (0, 2))
    with pytest.raises(Stopped) as stopped, longer.reporting(reported.extend):
        longer.run(jobs=None, minutes=0)
    assert stopped.value.number == TIME_IS_UP
    assert "sound, seed 2 was not begun" in str(stopped.value)
    assert [(run.arm, run.seed) for run in reported] == [("sound", 0), ("broken", 0)]
    assert seeds_of(reported, (0,)) == {"seeds": [0]}
    assert of_planned({"seeds": [0]}) == ""


def test_a_study_without_a_whole_seed_reports_nothing(tmp_path: Path) -> None:
    with pytest.raises(Stopped), study(tmp_path, (0,)).reporting(lambda runs: pytest.fail(f"{runs}")):
        study(tmp_path, (0,)).run(jobs=1, minutes=0)
