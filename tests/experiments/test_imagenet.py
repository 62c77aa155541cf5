"""The image study from command to report, small."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.experiments.trees import write_tree
from tokendyn import token_order
from tokendyn.experiments import _cli, _environment
from tokendyn.experiments._records import read_records
from tokendyn.experiments.imagenet.__main__ import main
from tokendyn.experiments.imagenet._measures import expected_places
from tokendyn.experiments.imagenet._task import mosaic

SETTINGS = "--steps 2 --batch-size 4 --log-every 1 --evaluate-every 1 --checkpoint-every 1 --threads 1 --jobs 1"
FAST = SETTINGS.split()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "tree", classes=3)


def read(place: Path) -> Any:
    return json.loads(place.read_bytes())


def test_study_and_report(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    out = tmp_path / "out"
    arms = ["baseline", "sorted", "published", "random"]
    command = ["--data-dir", str(tree), "--out", str(out), "--seeds", "0", "1", "--arms", *arms, *FAST]
    assert main(command) == 0
    printed = capsys.readouterr()
    result = read(out / "result.json")

    assert result["data"] == {"kind": "folder", "classes": 3, "train": 24, "held_out": 9} | {
        "names": result["data"]["names"]
    }
    assert list(result["arms"]) == arms
    for arm in arms:
        values = result["arms"][arm]
        runs = [out / arm / f"seed-{seed}" for seed in (0, 1)]
        by_seed = [read(run / "result.json")["held_out"] for run in runs]
        accuracies = [held_out["accuracy"] for held_out in by_seed]
        assert values["held_out"]["accuracy"]["values"] == accuracies
        np.testing.assert_allclose(values["held_out"]["accuracy"]["mean"], np.mean(accuracies))
        np.testing.assert_allclose(values["held_out"]["accuracy"]["deviation"], np.std(accuracies, ddof=1))
        assert values["cost"]["seconds_per_step"] > 0
        assert arm in printed.out
        for run in runs:
            assert [line["step"] for line in read_records(run / "metrics.jsonl") if line["split"] == "train"] == [1, 2]
    assert result["arms"]["baseline"]["orders"] == result["arms"]["random"]["orders"] == {}
    assert "difference" not in result["arms"]["baseline"]
    assert len(result["arms"]["sorted"]["difference"]["accuracy"]["interval95"]) == 2

    sorted_ones, averaged = result["arms"]["sorted"]["orders"], result["arms"]["published"]["orders"]
    assert len(sorted_ones) == len(averaged) == 2
    for module in sorted_ones.values():
        assert module["tokens"]["values"] == [64, 64]
        assert 1 < module["effective_tokens"]["mean"] < 8
        assert 0.3 < module["variance_kept"]["mean"] <= 1
    for module in averaged.values():
        assert module["effective_tokens"]["mean"] > 63
        assert module["variance_kept"]["mean"] < 1e-3

    with Image.open(out / "figures" / "study.png") as image:
        assert image.width > 1000
        assert np.asarray(image.convert("RGB"))[:3].min() == 255  # a light background
    assert "<svg" in (out / "figures" / "study.svg").read_text()[:1000]

    # Arms of one seed begin equal: at step 0 the orders act, but nothing was learned.
    first = {arm: read_records(out / arm / "seed-0" / "metrics.jsonl")[0] for arm in arms}
    assert first["baseline"]["loss"] == first["random"]["loss"] != first["sorted"]["loss"]
    assert abs(first["baseline"]["loss"] - first["sorted"]["loss"]) < 0.01
    assert not re.search(r"\x1b|\r", printed.err)  # no bar in a log
    assert printed.err.count("held-out loss") == 4 * 2 * 3

    # A finished study, continued, only reports again.
    before = {place: place.read_bytes() for place in out.rglob("*.json*") if place.name != "environment.json"}
    request.getfixturevalue("undrawn")
    assert main([*command, "--resume", "auto"]) == 0
    assert {place: place.read_bytes() for place in before} == before
    assert len(read(out / "environment.json")) == 2


@pytest.mark.usefixtures("undrawn")
def test_jobs_change_no_bit(tree: Path, tmp_path: Path) -> None:
    command = ["--data-dir", str(tree), "--seeds", "0", "--arms", "baseline", "straight_through", *FAST]
    assert main([*command, "--out", str(tmp_path / "one")]) == 0
    assert main([*command, "--out", str(tmp_path / "two"), "--jobs", "2"]) == 0
    for arm in ("baseline", "straight_through"):
        for name in ("metrics.jsonl", "result.json", "checkpoints/step-00000002/model.safetensors"):
            place = Path(arm, "seed-0", name)
            assert (tmp_path / "one" / place).read_bytes() == (tmp_path / "two" / place).read_bytes()


def test_a_loss_that_is_not_finite_has_its_own_exit_code(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``test_jobs.py`` holds that such errors come from other processes too."""
    command = ["--data-dir", str(tree), "--seeds", "0", "--arms", "published", *FAST, "--out", str(tmp_path / "out")]
    assert main([*command, "--learning-rate", "1e38", "--warmup", "0", "--steps", "20"]) == _cli.NON_FINITE
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"error: published, seed 0, (step \d+ of 20|after \d+ of 20 steps): .* is (nan|inf)", error)


@pytest.mark.usefixtures("undrawn")
def test_a_folder_is_never_overwritten(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["--data-dir", "tree", "--seeds", "0", "--arms", "baseline", *FAST]
    assert main(command) == 0
    assert main(command) == 0
    assert sorted(place.name for place in Path("runs").iterdir()) == ["imagenet-demo", "imagenet-demo-2"]
    named = [*command, "--out", "runs/imagenet-demo"]
    assert main(named) == _cli.MISTAKE
    assert "already holds a run, which is not overwritten; continue it with --resume auto" in capsys.readouterr().err
    assert main([*named, "--resume", "auto", "--batch-size", "8", "--image-size", "8"]) == _cli.MISTAKE
    error = capsys.readouterr().err
    assert "config.data.image_size: 16 in the folder, 8 asked for" in error
    assert "config.train.batch_size: 4 in the folder, 8 asked for" in error
    assert main([*command, "--resume", "auto"]) == 0
    assert "results in runs/imagenet-demo-2" in capsys.readouterr().out
    Path("tree").rename("moved")
    assert main([*named, "--resume", "auto", "--data-dir", "moved"]) == 0
    Path("moved/train/class0/000.png").unlink()
    assert main([*named, "--resume", "auto", "--data-dir", "moved"]) == _cli.MISTAKE
    assert "data.train: 24 in the folder, 23 asked for" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_images_that_break_during_the_training(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in ("train/class1/002.png", "val/class2/001.png"):
        (tree / place).write_bytes(b"broken since the start")
    out = tmp_path / "out"
    command = ["--data-dir", str(tree), "--out", str(out), "--seeds", "0", "--arms", "baseline", *FAST]
    assert main([*command, "--cache-mb", "0", "--steps", "6"]) == 0
    printed = capsys.readouterr()
    bad = {str(tree / "train/class1/002.png"), str(tree / "val/class2/001.png")}
    assert set(read(out / "result.json")["skipped"]) == bad
    assert "2 images could not be read and were skipped" in printed.out
    assert printed.err.count("skipped:") == 2
    accuracy = read(out / "result.json")["arms"]["baseline"]["held_out"]["accuracy"]["mean"]
    assert accuracy * 8 == pytest.approx(round(accuracy * 8))  # 8 of the 9 held-out images count


@pytest.mark.usefixtures("undrawn")
def test_the_environment_is_a_whitelist(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "a-secret-nobody-should-see")
    out = tmp_path / "out"
    command = ["--data-dir", str(tree), "--out", str(out), "--seeds", "0", "--arms", "baseline", *FAST]
    assert main(command) == 0
    (record,) = read(out / "environment.json")
    known = "command tokendyn revision python packages system release machine cpu gpus cuda"
    assert set(record) == set(known.split())
    assert record["command"] == ["python", "-m", "tokendyn.experiments.imagenet", *command]
    typed = record.pop("command")
    text = json.dumps(record)
    for private in ("a-secret", socket.gethostname(), str(Path.home()), os.getcwd()):
        assert private not in text
    (timing, *_) = read_records(out / "baseline" / "seed-0" / "timings.jsonl")
    assert set(timing["engines"]) == {"selective_scan"}
    assert set(timing["engines"]["selective_scan"]) <= {"chunked", "plain"}
    assert record["revision"] == _environment.package_revision()
    with monkeypatch.context() as without:
        without.setattr(_environment, "_git", lambda *_: None)
        assert re.fullmatch("sha256:[0-9a-f]{64}", _environment.package_revision())

    (out / "environment.json").write_text(json.dumps([record | {"command": typed, "packages": {"torch": "0.1"}}]))
    assert main([*command, "--resume", "auto"]) == 0
    assert "note: not as in the last sitting: packages; the last bits may differ" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_a_size_that_the_model_is_not_made_for_is_said(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--data-dir", str(tree), "--seeds", "0", "--arms", "baseline", *FAST]
    for size in ("16", "18"):
        assert main([*command, "--image-size", size, "--out", str(tmp_path / size)]) == 0
        printed = capsys.readouterr().out
        assert f"demo: mambavision_16px, 24 training and 9 held-out images of {size} px" in printed
        assert ("mambavision_16px is made for images of 16 px, not 18; --model" in printed) == (size == "18")


def test_expected_places() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    np.testing.assert_array_equal(expected_places(token_order(scores, "hard")), [[3, 1, 2, 0]])
    np.testing.assert_allclose(expected_places(token_order(scores, tau=1e-3)), [[3, 1, 2, 0]], atol=1e-6)
    np.testing.assert_allclose(expected_places(token_order(scores, tau=1e6)), [[1.5] * 4], atol=1e-5)


def test_windows_are_laid_out_row_by_row() -> None:
    from tokendyn.backends.torch.models._mambavision_blocks import to_windows

    image = torch.arange(2 * 36.0).reshape(2, 1, 6, 6)
    windows = to_windows(image, 3).squeeze(-1)
    assert torch.equal(mosaic(windows, 2), image[:, 0])
