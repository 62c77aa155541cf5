"""Two processes that share every batch train as one process with the whole batch does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.experiments.tiny import COMPUTE, TRAIN, TinyTask, trainer
from tests.experiments.trees import write_tree
from tests.reliability.parallel_run import make
from tokendyn.errors import OptionError
from tokendyn.experiments._checkpoint import load_newest
from tokendyn.experiments._distributed import Group, current_group, part_of
from tokendyn.experiments._records import read_records

ROOT = Path(__file__).parent.parent.parent


PROCESSES = 2


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of runs by two processes, and what these printed."""
    folder = tmp_path_factory.mktemp("parallel")
    write_tree(folder / "tree")
    # torchrun finds a free port by itself, and keeps it.
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    run = subprocess.run(
        [sys.executable, *torchrun, f"--nproc-per-node={PROCESSES}", "-m", "tests.reliability.parallel_run", folder],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stdout
    return folder, run.stdout


@pytest.mark.parametrize("how", ["ddp", "fsdp", "graphs"])
def test_two_processes_do_what_one_does(tmp_path: Path, parallel: tuple[Path, str], how: str) -> None:
    folder, printed = parallel
    for rank in range(PROCESSES):
        assert printed.count(f"process {rank}: tiny, seed 3 stopped after step 7 of 12; it is saved") == 3
    make(tmp_path, "ddp" if how == "graphs" else how).run()
    places = tmp_path, folder / how
    one, two = (read_records(place / "metrics.jsonl") for place in places)
    assert len(one) == len(two) == 4 + 4
    for expected, found in zip(one, two, strict=True):
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            if key == "split":
                assert found[key] == value
            else:
                np.testing.assert_allclose(found[key], value, rtol=1e-5, err_msg=key)  # float32 sums in another order
    weights = [load_newest(place / "checkpoints", print) for place in places]
    assert weights[0] is not None
    assert weights[1] is not None
    for group in ("model", "optimizer", *([] if how == "fsdp" else ["average"])):
        expected, found = weights[0].tensors[group], weights[1].tensors[group]
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name].numpy(), value.numpy(), rtol=2e-5, atol=1e-8, err_msg=name)
    assert {"random", "random-1"} <= weights[1].tensors.keys()


def test_a_study_by_two_processes(parallel: tuple[Path, str]) -> None:
    """One of them speaks and writes; every image of a batch and of the held-out ones counts once."""
    folder, printed = parallel
    result = json.loads((folder / "study" / "result.json").read_bytes())
    for arm in ("baseline", "published"):
        accuracy = result["arms"][arm]["held_out"]["accuracy"]["mean"]
        assert accuracy * 6 == pytest.approx(round(accuracy * 6))
        assert printed.count(f"{arm}, seed 0  step 2/2") == (2 if arm == "baseline" else 1)  # and once spread
        lines = read_records(folder / "study" / arm / "seed-0" / "metrics.jsonl")
        assert [line["step"] for line in lines] == [0, 1, 2, 2]
        assert lines[1]["accuracy"] * 8 == pytest.approx(round(lines[1]["accuracy"] * 8))
    assert printed.count("held-out results, one seed") == 2
    assert (folder / "study" / "figures" / "study.png").is_file()
    whole, spread = (
        read_records(folder / name / "baseline" / "seed-0" / "metrics.jsonl") for name in ("study", "study-fsdp")
    )
    np.testing.assert_allclose([line["loss"] for line in spread], [line["loss"] for line in whole], rtol=1e-4)


def test_parts_of_a_batch() -> None:
    assert [part_of(6, Group(rank, 3)) for rank in range(3)] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    with pytest.raises(OptionError, match="--batch-size is 7, which 2 processes do not divide"):
        part_of(7, Group(0, 2))
    assert current_group() == Group()


def test_what_parallel_training_cannot_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="--ema-decay cannot be had with --parallel fsdp"):
        trainer(tmp_path, compute=replace(COMPUTE, parallel="fsdp"))
    monkeypatch.setattr("tokendyn.experiments._trainer.current_group", lambda: Group(0, 2))
    monkeypatch.delattr(TinyTask, "batch_part")
    with pytest.raises(OptionError, match="TinyTask trains in one process; start it without torchrun"):
        trainer(tmp_path, train=replace(TRAIN, ema_decay=0.0))
