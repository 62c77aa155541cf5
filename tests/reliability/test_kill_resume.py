"""A study that is killed and started again ends bit for bit as if it had not been."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.experiments.trees import write_tree

STEPS = 14
OPTIONS = f"--seeds 0 --steps {STEPS} --batch-size 4 --log-every 2 --evaluate-every 6 --checkpoint-every 2 --threads 1"
OPTIONS += " --arms baseline published"
PATIENCE = 120  # seconds until a process that does nothing is a failure


def start(out: Path, tree: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tokendyn.experiments.imagenet", "--data-dir", str(tree), "--out", str(out)]
    return subprocess.Popen(
        [*command, "--resume", "auto", *OPTIONS.split(), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the process alone: those that it started must end by themselves."""
    process.kill()
    process.communicate(timeout=PATIENCE)


def contents(out: Path) -> dict[str, bytes]:
    """What must be equal: all metrics, results, and the weights of the last checkpoints."""
    found = [*out.glob("*/seed-*/metrics.jsonl"), *out.glob("*/seed-*/result.json")]
    found += out.glob(f"*/seed-*/checkpoints/step-{STEPS:08d}/*.safetensors")
    return {str(file.relative_to(out)): file.read_bytes() for file in found}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("images") / "tree")


@pytest.fixture(scope="module")
def uninterrupted(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    finish(start(out, tree, "--jobs", "1"))
    found = contents(out)
    assert len(found) == 2 * 5  # files an arm
    return found


def test_killed_at_random_moments(tree: Path, uninterrupted: dict[str, bytes], tmp_path: Path) -> None:
    """Twice, and within a fraction of a second after some checkpoint, so that some kills fall into writing one."""
    out = tmp_path / "run"
    moments = random.Random(11)
    for kills, jobs in enumerate(("2", "1")):
        process = start(out, tree, "--jobs", jobs)
        seen = {str(place) for place in out.glob("*/seed-*/checkpoints/step-*")}
        new = moments.randint(1, 3)

        def enough(seen: set[str] = seen, new: int = new) -> bool:
            return len({str(place) for place in out.glob("*/seed-*/checkpoints/step-*")} - seen) >= new

        wait_for(enough, process)
        time.sleep(moments.random() * 0.15)
        kill(process)
        assert len(list(out.glob("*/seed-*/result.json"))) < 2, f"kill {kills} came too late to test anything"
    finish(start(out, tree, "--jobs", "1"))
    assert contents(out) == uninterrupted


def stop(process: subprocess.Popen[str], number: int, out: Path) -> None:
    """Send a signal after the first logged steps; the process must save and exit with its code."""
    wait_for(lambda: any(file.read_bytes().count(b"train") for file in out.glob("*/seed-*/metrics.jsonl")), process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number, output
    assert f"stopped by {signal.Signals(number).name}: " in output
    assert "Traceback" not in output
    assert list(out.glob("*/seed-*/checkpoints/step-*"))


def test_sigterm_saves_all_jobs(tree: Path, uninterrupted: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "run"
    stop(start(out, tree, "--jobs", "2", "--checkpoint-every", "1000"), signal.SIGTERM, out)
    finish(start(out, tree, "--jobs", "1", "--checkpoint-every", "1000"))
    assert contents(out) == uninterrupted


def test_ctrl_c_saves(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    stop(start(out, tree, "--jobs", "1", "--checkpoint-every", "1000"), signal.SIGINT, out)
