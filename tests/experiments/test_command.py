"""The command line: its flags, presets, and one sentence with exit code 2 for every mistake."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tyro

from tests.experiments.trees import write_image, write_tree
from tokendyn._layers import OrderConfig
from tokendyn.errors import OptionError
from tokendyn.experiments import _cli
from tokendyn.experiments._config import TrainConfig, differences
from tokendyn.experiments._order_arms import ARMS, Arm, describe_order, resolve_arm
from tokendyn.experiments.imagenet.__main__ import main
from tokendyn.experiments.imagenet._config import PRESETS, ImageNetConfig

# The flags that users have. To remove or rename one breaks their scripts: say so in the change log.
FLAG_LIST = """
--arms --seeds
--data-dir --image-size --crop-padding --flip --no-flip --cache-mb --max-megapixels
--skip-corrupt --no-skip-corrupt --crop-area
--augment --rand-augment --color-jitter --mixup --cutmix --crop-share --interpolation
--on-device --no-on-device --mechanism --no-mechanism
--eval-only
--model --drop-path --label-smoothing --parity
--cuda-graphs --no-cuda-graphs --parallel --sync-batch-norm --no-sync-batch-norm
--epochs --steps --batch-size --learning-rate --initial-learning-rate --final-learning-rate
--warmup --weight-decay --beta1 --beta2
--clip-norm --ema-decay --log-every --evaluate-every --checkpoint-every --keep-checkpoints
--device --threads --precision --compile --no-compile --channels-last --no-channels-last
--deterministic --no-deterministic
--out --resume --jobs --workers --log-to --max-minutes --print-config
"""
FLAGS = FLAG_LIST.split()


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command with a mistake prints: one sentence on stderr, with exit code 2."""
    assert main(list(arguments)) == _cli.MISTAKE
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert "Traceback" not in printed.err
    assert "│" not in printed.err
    return lines[0]


def test_the_flags_are_frozen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        tyro.cli(ImageNetConfig, args=["--help"], config=(tyro.conf.OmitArgPrefixes,))
    assert stop.value.code == 0
    found = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", capsys.readouterr().out)) - {"--help"}
    assert found == set(FLAGS)


@pytest.mark.parametrize("arguments", [["--help"], ["cifar10", "--help"], ["--preset", "imagenette", "--help"]])
def test_help(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in PRESETS:
        assert name in text
    for flag in FLAGS:
        assert flag in text
    chosen = next((word for word in arguments if word in PRESETS), "demo")
    assert f"defaults below are those of the preset {chosen}" in " ".join(text.split())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_print(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert PRESETS[name]() == PRESETS[name]()
    assert PRESETS[name].__doc__
    for arguments in (
        [name, "--print-config"],
        ["--print-config", "--preset", name],
        [f"--preset={name}", "--print-config"],
    ):
        assert main(arguments) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["preset"] == name
        assert shown["train"] == dataclasses.asdict(PRESETS[name]().train)
        assert shown["orders"].keys() == set(PRESETS[name]().arms)


def test_flags_change_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["--seeds", "5", "--learning-rate", "1e-4", "--no-deterministic", "--arms", "baseline", "sorted:tau=0.3"]
    assert main(["--print-config", *changes]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["seeds"] == [5]
    assert shown["train"]["learning_rate"] == 1e-4
    assert shown["compute"]["deterministic"] is False
    assert shown["orders"]["sorted:tau=0.3"]["tau"] == 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demoo"], r"unknown preset 'demoo' \(did you mean 'demo'\?\); the presets are demo, "),
        (["--preset"], "--preset was given without a name"),
        (["--learning-rat", "1"], r"unknown option '--learning-rat' \(did you mean '--learning-rate'\?\)"),
        (["demo", "stray"], "unknown option 'stray'"),
        (["--learning-rate", "fast"], "--learning-rate.*'fast'"),
        (["--seeds", "one"], "--seeds.*'one'"),
        (["--seeds", "1", "1"], "--seeds is 1 1, expected one or more, each once"),
        (["--seeds", "-1"], "--seeds is -1, expected 0 to"),
        (["--seeds"], "--seeds is empty"),
        (["--resume", "maybe"], "'maybe'.*'never', 'auto'"),
        (["--batch-size", "0"], "--batch-size is 0, expected at least 1"),
        (["--warmup", "2"], "--warmup is 2.0, expected 0 to 1"),
        (["--learning-rate", "nan"], "--learning-rate is nan"),
        (["--batch-size", "5000"], "--batch-size is 5000, but there are only 1437 training images"),
        (["--arms", "sort"], r"unknown arm 'sort' \(did you mean 'sorted'\?\)"),
        (["--arms", "baseline:tau=1"], "changes baseline, which orders nothing"),
        (["--arms", "sorted:heat=1"], "'heat=1' in 'sorted:heat=1' is no change; expected FIELD=VALUE of method, tau"),
        (["--arms", "sorted:tau=hot"], "'hot' in 'sorted:tau=hot', expected a number"),
        (["--arms", "sorted:restore=perhaps"], "'perhaps' in 'sorted:restore=perhaps', expected true or false"),
        (["--arms", "sorted:tau=0"], "tau is 0.0"),
        (["--arms", "sorted:final_tau=0"], "final_tau is 0.0, expected a number above 0"),
        (["--arms", "reversed:final_tau=1"], "final_tau is 1.0 for reversed, restored, which has no temperature"),
        (["--crop-area", "2"], "--crop-area is 2.0, expected 0.01 to 1"),
        (["--on-device", "--cache-mb", "0", "--data-dir", "TREE"], "--data-dir TREE is no folder"),
        (["--cuda-graphs", "--device", "cpu"], "--cuda-graphs needs an NVIDIA GPU, and --device is cpu"),
        (["--device", "tpu"], "--device is 'tpu', expected cpu, cuda"),
        (["cifar10"], "the preset cifar10 needs images; give --data-dir FOLDER"),
        (["--data-dir", "nowhere"], "--data-dir nowhere is no folder"),
    ],
)
def test_mistakes_in_the_command(
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(message, complaint(capsys, *arguments))
    assert list(tmp_path.iterdir()) == []


def test_mistakes_in_the_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Each kind of mistake is tested in test_images; here that they arrive as a sentence."""
    tree = str(write_tree(tmp_path / "tree"))
    common = ["--data-dir", tree, "--batch-size", "4", "--out", str(tmp_path / "out")]
    write_image(tmp_path / "tree/val/class0/huge.png", width=1010, height=1000)
    assert "huge.png is 1010 x 1000 pixels" in complaint(capsys, *common, "--max-megapixels", "1")
    (tmp_path / "tree/val/class0/huge.png").write_bytes(b"\x89PNG")
    assert "huge.png" in complaint(capsys, *common)
    for file in (tmp_path / "tree/val/class0").iterdir():
        file.unlink()
    assert "holds no images" in complaint(capsys, *common)
    assert not (tmp_path / "out").exists()


def test_mistakes_with_the_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    assert "holds files but no run" in complaint(capsys, "--out", str(tmp_path), "--resume", "auto")
    assert "cannot be used" in complaint(capsys, "--out", str(tmp_path / "notes" / "below"))


def test_a_missing_package_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_cli.REQUIRED, "absent_module", "absent-package")
    assert complaint(capsys, "--help") == (
        "error: not installed: absent-package; run: pip install 'tokendyn[experiments]'"
    )


@pytest.mark.parametrize("experiment", ["imagenet", "text_classification", "wikitext103"])
def test_a_missing_logger_is_named(
    experiment: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    command = importlib.import_module(f"tokendyn.experiments.{experiment}.__main__")
    assert command.main(["--log-to", "wandb"]) == _cli.MISTAKE
    assert "--log-to wandb: wandb is not installed" in capsys.readouterr().err


def test_help_needs_no_framework() -> None:
    check = (
        "import sys; sys.argv[1:] = ['--help']; import runpy\n"
        "try: runpy.run_module('tokendyn.experiments.imagenet', run_name='__main__')\n"
        "except SystemExit as stop: print(stop.code, 'torch' in sys.modules, 'matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 False False", done.stderr


def test_arms() -> None:
    assert resolve_arm("baseline") == Arm(None)
    assert resolve_arm("published") == Arm(OrderConfig.published())
    assert resolve_arm("published:restore=true,tau=0.5") == Arm(OrderConfig("softsort", tau=0.5))
    assert resolve_arm("sorted:method=hard").order == dataclasses.replace(ARMS["sorted"].order, method="hard")
    annealed = resolve_arm("annealed:tau=4,final_tau=0.04")
    np.testing.assert_allclose([annealed.tau(p) for p in (0, 0.5, 1)], [4, 0.4, 0.04], rtol=1e-12)
    assert annealed.to_json() == {**dataclasses.asdict(annealed.order), "final_tau": 0.04}
    assert resolve_arm("sorted").tau(0.7) == 0.02
    assert describe_order(annealed) == "SoftSort, τ = 4 to 0.04, unit scores, restored"
    assert describe_order(resolve_arm("published")) == "SoftSort, τ = 1, not restored"
    assert describe_order(resolve_arm("reversed")) == "reversed, restored"


def test_differences_are_named() -> None:
    old = {"a": {"b": 1, "c": [1, 2]}, "gone": 0}
    new = {"a": {"b": 2, "c": [1, 2]}, "new": None}
    assert differences(old, new) == [
        "a.b: 1 in the folder, 2 asked for",
        "gone: 0 in the folder, unknown here",
        "new: not in the folder, None asked for",
    ]
    assert differences(new, json.loads(json.dumps(new))) == []


def test_parts_check_themselves() -> None:
    with pytest.raises(OptionError, match="--checkpoint-every is 0"):
        TrainConfig(checkpoint_every=0)
