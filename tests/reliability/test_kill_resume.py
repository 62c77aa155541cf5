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
from tokendyn.experiments._files import TEMPORARY
from tokendyn.experiments.imagenet.__main__ import main

STEPS = 14
OPTIONS = f"--seeds 0 --steps {STEPS} --batch-size 4 --log-every 2 --evaluate-every 6 --checkpoint-every 2 --threads 1"
OPTIONS += " --arms baseline published"
NO_CHECKPOINTS = ("--checkpoint-every", "1000")
PATIENCE = 120  # seconds until a process that does nothing is a failure


def command(out: Path, tree: Path, *options: str) -> list[str]:
    return ["--data-dir", str(tree), "--out", str(out), "--resume", "auto", *OPTIONS.split(), *options]


def start(out: Path, tree: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tokendyn.experiments.imagenet", *command(out, tree, *options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str], pause: float = 0.005) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(pause)


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the process alone: those that it started must end by themselves."""
    process.kill()
    process.communicate(timeout=PATIENCE)


def checkpoints(out: Path) -> set[Path]:
    return set(out.glob("*/seed-*/checkpoints/step-*"))


def half_written(out: Path) -> set[Path]:
    """Checkpoints that are being written, or were when their process was killed."""
    return set(out.glob(f"*/seed-*/checkpoints/{TEMPORARY}*"))


def trained(out: Path) -> int:
    """How often training steps were logged."""
    return sum(file.read_bytes().count(b"train") for file in out.glob("*/seed-*/metrics.jsonl"))


def contents(out: Path, steps: int = STEPS) -> dict[str, bytes]:
    """What must be equal: all metrics, results, and the last checkpoints."""
    found = [*out.glob("*/seed-*/metrics.jsonl"), *out.glob("*/seed-*/result.json")]
    found += out.glob(f"*/seed-*/checkpoints/step-{steps:08d}/*.safetensors")
    return {str(file.relative_to(out)): file.read_bytes() for file in found}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("images") / "tree")


@pytest.fixture(scope="module")
def uninterrupted(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """In this process, as the last part of each run below: starting one takes longer than its steps."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert main(command(out, tree)) == 0
    found = contents(out)
    assert len(found) == 2 * 5  # files an arm
    return found


def test_killed_at_random_moments(tree: Path, uninterrupted: dict[str, bytes], tmp_path: Path) -> None:
    """Two runs at once within a fraction of a second after some checkpoint; then a run that is writing one."""
    out = tmp_path / "run"
    moments = random.Random(11)
    for jobs, aimed in (("2", False), ("1", True)):
        process = start(out, tree, "--jobs", jobs)
        seen, new = checkpoints(out), moments.randint(1, 3)
        wait_for(lambda seen=seen, new=new: len(checkpoints(out) - seen) >= new, process)
        if aimed:
            left = half_written(out)
            wait_for(lambda left=left, process=process: caught_writing(process, out, left), process, 0.0005)
        else:
            time.sleep(moments.random() * 0.15)
        kill(process)
        assert len(list(out.glob("*/seed-*/result.json"))) < 2, "the kill came too late to test anything"
    assert half_written(out)
    assert main(command(out, tree)) == 0
    assert contents(out) == uninterrupted
    assert not half_written(out)


def caught_writing(process: subprocess.Popen[str], out: Path, left: set[Path]) -> bool:
    """Stop a process that writes a checkpoint, and say whether it was stopped in time."""
    if not half_written(out) - left:
        return False
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.01)
    if half_written(out) - left:
        return True
    process.send_signal(signal.SIGCONT)
    return False


def test_signals_save(tree: Path, uninterrupted: dict[str, bytes], tmp_path: Path) -> None:
    """SIGTERM to two runs at once, then Ctrl-C to one. There are no checkpoints but those that are saved for them."""
    out = tmp_path / "run"
    for number, jobs in ((signal.SIGTERM, "2"), (signal.SIGINT, "1")):
        process, logged, saved = start(out, tree, "--jobs", jobs, *NO_CHECKPOINTS), trained(out), checkpoints(out)
        wait_for(lambda logged=logged: trained(out) > logged, process)
        assert checkpoints(out) == saved
        process.send_signal(number)
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 128 + number, output
        assert f"stopped by {number.name}: " in output
        assert "Traceback" not in output
        assert checkpoints(out) - saved
    assert main(command(out, tree, *NO_CHECKPOINTS)) == 0
    assert contents(out) == uninterrupted
