"""The recipe at full scale: what can be shown on a CPU; with timm and torchvision also its steps at 224 px."""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.experiments.trees import write_image, write_tree
from tokendyn.backends.torch import models
from tokendyn.errors import OptionError
from tokendyn.experiments import _cli, _random
from tokendyn.experiments._config import TrainConfig
from tokendyn.experiments._optim import learning_rate
from tokendyn.experiments._records import read_records
from tokendyn.experiments.imagenet import _timm
from tokendyn.experiments.imagenet.__main__ import main
from tokendyn.experiments.imagenet._config import PRESETS


def importable() -> bool:
    try:
        importlib.import_module("timm.data")
    except Exception:  # torchvision refuses a torch that it was not built for with a RuntimeError
        return False
    return True


#: Where they are expected, what cannot be imported fails instead of being left out.
EXPECTED = "TOKENDYN_EXPECT_TIMM" in os.environ
needs_timm = pytest.mark.skipif(
    not EXPECTED and not importable(), reason="timm and torchvision cannot be imported beside this torch"
)


def test_the_schedule_is_the_published_one() -> None:
    train = PRESETS["table3_reorder"]().train
    epoch = 1_281_167 // train.batch_size
    total = train.epochs * epoch
    rates = [learning_rate(step, total, train) for step in (0, 20 * epoch - 1, 20 * epoch, total - 1)]
    np.testing.assert_allclose(rates, [1e-6, 8e-4, 8e-4, 5e-6], rtol=2e-2)
    assert learning_rate(3, 100, TrainConfig(warmup=0.1, learning_rate=1.0, initial_learning_rate=0.5)) == 0.7


def test_both_presets_differ_in_the_order_alone() -> None:
    one, two = PRESETS["table3_baseline"](), PRESETS["table3_reorder"]()
    assert (one.arms, two.arms) == (("baseline",), ("published",))
    assert (one.data, one.model, one.train, one.compute) == (two.data, two.model, two.train, two.compute)


def test_the_model_is_the_published_one() -> None:
    with torch.device("meta"):
        for order, parameters in ((None, 31_794_248), ("published", 31_794_728)):
            model = models.mambavision_t(order=order, parity="published")
            assert sum(value.numel() for value in model.parameters()) == parameters


def test_generators_inside_and_outside() -> None:
    def draw() -> list[float]:
        import random

        return [random.random(), np.random.rand(), torch.rand(1).item()]  # noqa: NPY002

    _random.seed_everything(1)
    expected = draw(), draw()
    _random.seed_everything(1)
    first = draw()
    with _random.isolated(5):
        inside = draw()
    with _random.isolated(5):
        assert draw() == inside
    assert (first, draw()) == expected


@pytest.mark.parametrize("option", [["--augment", "timm"], ["--mixup", "0.8"]])
def test_missing_packages_are_named(
    option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("timm", "timm.data"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(OptionError, match=r"cannot be imported here \(.*timm.*pip install 'tokendyn\[vision\]'"):
        _timm.timm_data()
    tree = write_tree(tmp_path / "tree")
    assert main(["--data-dir", str(tree), "--batch-size", "4", "--out", str(tmp_path / "out"), *option]) == _cli.MISTAKE
    assert "need timm and torchvision" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_weights_are_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = write_tree(tmp_path / "tree", classes=3)
    torch.manual_seed(0)
    weights = models.mambavision_16px(num_classes=3).state_dict()
    save_file({f"model.{name}": value for name, value in weights.items()}, tmp_path / "weights.safetensors")
    command = ["--data-dir", str(tree), "--arms", "baseline", "--augment", "timm"]  # training alone would need timm
    found = []
    for workers, cache in (("0", "10"), ("1", "0")):
        options = ["--eval-only", str(tmp_path / "weights.safetensors"), "--workers", workers, "--cache-mb", cache]
        assert main([*command, *options]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    assert found[0]["images"] == 9
    assert found[0]["accuracy"] * 9 == pytest.approx(round(found[0]["accuracy"] * 9))
    assert main([*command, "--eval-only", str(tmp_path / "none.safetensors")]) == _cli.MISTAKE
    assert "is no file; expected weights as safetensors" in capsys.readouterr().err
    torch.save(weights, tmp_path / "weights.pth")
    assert main([*command, "--eval-only", str(tmp_path / "weights.pth")]) == _cli.MISTAKE
    assert "pickle" in capsys.readouterr().err
    save_file({"head.bias": torch.zeros(3)}, tmp_path / "part.safetensors")
    assert main([*command, "--eval-only", str(tmp_path / "part.safetensors")]) == _cli.MISTAKE
    assert "does not fit the model" in capsys.readouterr().err


def write_images_like_imagenet(tree: Path, shards: Path) -> None:
    """Twelve classes of JPEGs, as a tree and, the same bytes in the same order, as shards."""
    for split, count in (("train", 4), ("val", 2)):
        (shards / split).mkdir(parents=True)
        with tarfile.open(shards / split / "0.tar", "w") as archive:
            for label in range(12):
                for i in range(count):
                    place = tree / split / f"n{label:08d}" / f"{i}.jpg"
                    write_image(place, width=260 + 10 * i, height=240, level=15 * label, seed=i)
                    archive.add(place, f"{label}-{i}.jpg")
                    entry = tarfile.TarInfo(f"{label}-{i}.cls")
                    entry.size = len(str(label))
                    archive.addfile(entry, io.BytesIO(str(label).encode()))


@needs_timm
@pytest.mark.slow
@pytest.mark.parametrize("preset", ["table3_baseline", "table3_reorder"])
def test_two_steps_at_full_size(preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a tree here and from shards in two workers with the same metrics; the weights evaluate to the last ones."""
    write_images_like_imagenet(tmp_path / "tree", tmp_path / "shards")
    command = [preset, "--seeds", "0", "--steps", "2", "--batch-size", "4", "--no-compile", "--device", "cpu"]
    command += ["--log-every", "1", "--evaluate-every", "2", "--checkpoint-every", "1"]
    found = []
    for data, workers in (("tree", "0"), ("shards", "2")):
        out = tmp_path / f"out-{data}"
        options = ["--data-dir", str(tmp_path / data), "--workers", workers, "--out", str(out)]
        assert main([*command, *options]) == 0
        found.append(read_records(next(out.glob("*/seed-0/metrics.jsonl"))))
    assert found[0] == found[1]
    assert [line["step"] for line in found[0]] == [0, 1, 2, 2]
    assert {"accuracy", "accuracy_top5", "loss"} <= found[0][-1].keys()

    capsys.readouterr()
    weights = next(tmp_path.glob("out-tree/*/seed-0/checkpoints/step-00000002/model.safetensors"))
    options = ["--device", "cpu", "--workers", "0", "--data-dir", str(tmp_path / "tree"), "--eval-only", str(weights)]
    assert main([preset, *options]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert [evaluated[key] for key in ("loss", "accuracy", "accuracy_top5")] == [
        found[0][-1][key] for key in ("loss", "accuracy", "accuracy_top5")
    ]


@needs_timm
def test_timm_changes_with_epoch_and_image_alone(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", width=64, height=48)
    from PIL import Image

    options = {"size": 32, "rand_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.4}
    with Image.open(tmp_path / "a.png") as image:
        made = [
            _timm.augment(image, seed, smallest_area=0.08, flip=True, **options)
            for seed in ((0, 0, 3), (0, 0, 3), (0, 1, 3), (0, 0, 4))
        ]
    assert made[0].shape == (32, 32, 3)
    np.testing.assert_array_equal(made[0], made[1])
    assert (made[0] != made[2]).any()
    assert (made[0] != made[3]).any()


@needs_timm
def test_mixed_targets_sum_to_one() -> None:
    np.random.seed(0)  # noqa: NPY002
    images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    mixed, targets = _timm.mix(images.clone(), labels, mixup=0.8, cutmix=1.0, smoothing=0.1, classes=5)
    assert mixed.shape == images.shape
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(4))
    assert (targets > 0).all()
