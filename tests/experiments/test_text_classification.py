"""The text classification study from command to report, small; its texts; its batches."""

from __future__ import annotations

import dataclasses
import gzip
import json
import lzma
import re
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tokendyn.backends.torch.models import MambaClassifier
from tokendyn.errors import DataError, ShapeError
from tokendyn.experiments import _cli
from tokendyn.experiments._order_arms import ARMS
from tokendyn.experiments._records import read_records
from tokendyn.experiments.text_classification.__main__ import main
from tokendyn.experiments.text_classification._config import PRESETS, DataConfig
from tokendyn.experiments.text_classification._task import TextTask
from tokendyn.experiments.text_classification._texts import PADDING, UNKNOWN, load_texts

SETTINGS = (
    "--steps 4 --batch-size 8 --log-every 2 --evaluate-every 2 --checkpoint-every 2 --threads 1 --jobs 1 --n-layer 1 "
    "--d-model 16 --d-state 4 --learning-rate 1e-2"
)
SHRUNK = SETTINGS.split()
TOPICS = {"animals": "cat dog bird fish horse", "things": "stone cup lamp door box"}


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    draw = np.random.default_rng(seed)
    found = []
    for i in range(count):
        label = list(TOPICS)[i % 2]
        words = draw.choice([*TOPICS[label].split(), "and", "the", "of", "a"], int(draw.integers(2, 12)))
        found.append({"text": " ".join(words), "label": label, "id": i})
    return found


def write(file: Path, entries: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode()
    file.write_bytes({".xz": lzma.compress, ".gz": gzip.compress}.get(file.suffix, bytes)(text))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "texts"
    place.mkdir()
    write(place / "zoo_train_v2.jsonl.xz", rows(40, 1))
    write(place / "zoo_test.jsonl.gz", rows(20, 2))
    return place


def read(place: Path) -> Any:
    return json.loads(place.read_bytes())


def test_study_and_report(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arms = ["baseline", "published", "straight_through", "sorted"]
    given = ["--data", str(folder), "--out", str(out), "--seeds", "0", "1", "--arms", *arms, *SHRUNK]
    given += ["--evaluate-every", "4", "--n-layer", "1"]
    assert main(given) == 0
    printed = capsys.readouterr().out
    result = read(out / "result.json")
    assert list(result["arms"]) == arms
    assert (result["data"]["train"], result["data"]["test"], result["data"]["classes"]) == (40, 20, [*TOPICS][::-1])
    assert result["reference"]["accuracy"] > 0.9
    for arm in arms:
        values = result["arms"][arm]
        held_out = [read(out / arm / f"seed-{seed}" / "result.json")["held_out"] for seed in (0, 1)]
        assert values["held_out"]["accuracy"]["values"] == [run["accuracy"] for run in held_out]
        lines = [line for line in read_records(out / arm / "seed-0" / "metrics.jsonl") if line["split"] == "held_out"]
        assert [line["step"] for line in lines] == [0, 4]
        assert lines[-1]["loss"] < lines[0]["loss"]
        assert set(values["orders"]) == (set() if arm == "baseline" else {"backbone.layers.0.mixer.order"})
        if arm != "baseline":
            assert len(values["difference"]["accuracy"]["interval95"]) == 2
            assert f"{arm} - baseline: " in printed
    orders = {arm: result["arms"][arm]["orders"]["backbone.layers.0.mixer.order"] for arm in arms[1:]}
    tokens = orders["published"]["tokens"]["mean"]
    assert orders["published"]["effective_tokens"]["mean"] > 0.99 * tokens
    assert orders["straight_through"]["effective_tokens"]["mean"] == 1
    assert orders["sorted"]["effective_tokens"]["mean"] < 0.7 * tokens
    assert "TF-IDF with logistic regression: " in printed
    assert "block 1 (" in printed
    page = (out / "report.md").read_text()
    assert "figures/study.png" in page
    with Image.open(out / "figures" / "study.png") as image:
        assert image.width > 1000


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_was_cut_off_ends_with_the_same_bits(folder: Path, tmp_path: Path) -> None:
    given = ["--data", str(folder / "zoo_train_v2.jsonl.xz"), *SHRUNK, "--seeds", "3", "--arms", "annealed"]
    assert main([*given, "--out", str(tmp_path / "whole")]) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    run = tmp_path / "cut" / "annealed" / "seed-3"
    for place in (tmp_path / "cut" / "result.json", run / "result.json"):
        place.unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    assert main([*given, "--out", str(tmp_path / "cut"), "--resume", "auto"]) == 0
    for name in ("metrics.jsonl", "result.json", "checkpoints/step-00000004/model.safetensors"):
        place = Path("annealed", "seed-3", name)
        assert (tmp_path / "whole" / place).read_bytes() == (tmp_path / "cut" / place).read_bytes()


def test_texts_become_ids_of_frequent_words(tmp_path: Path) -> None:
    write(
        tmp_path / "train.jsonl",
        [{"text": "B b<br />a,\u2028\x85it's", "label": 1}, {"title": "A", "text": "b", "label": 10}],
    )
    write(tmp_path / "test.jsonl", [{"text": "b Z b", "label": 10}, {"text": "", "label": "1"}])
    texts = load_texts(DataConfig(data=str(tmp_path), vocabulary=4, max_length=4))
    assert texts.classes == ("1", "10")
    assert texts.vocab_size == 6
    # b 3, a 2; then one each: "," "." "it's", of which the first two of the alphabet
    ids, lengths = texts.train.padded(np.array([0, 1]))
    assert ids.tolist() == [[2, 2, 3, 4], [3, 5, 2, PADDING]]
    assert lengths.tolist() == [4, 3]
    ids, lengths = texts.held_out.padded(np.array([0, 1]))
    assert ids.tolist() == [[2, UNKNOWN, 2], [UNKNOWN, PADDING, PADDING]]
    assert texts.held_out.labels.tolist() == [1, 0]


def test_the_embedded_news() -> None:
    texts = load_texts(DataConfig())
    assert (len(texts.train), len(texts.held_out), texts.classes) == (3000, 1000, ("0", "1", "2", "3"))
    assert np.bincount(texts.train.labels).tolist() == [750] * 4
    assert np.bincount(texts.held_out.labels).tolist() == [250] * 4
    assert not set(texts.train.texts) & set(texts.held_out.texts)


def test_an_epoch_takes_each_text_once_and_similar_lengths_together(folder: Path) -> None:
    texts = load_texts(DataConfig(data=str(folder)))
    config = PRESETS["demo"]()
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, batch_size=4),
        data=dataclasses.replace(config.data, word_dropout=0.5),
    )
    task = TextTask(texts, config, ARMS["baseline"], 7)
    batches = [task.batch(step).tensors for step in range(task.steps_per_epoch)]
    lengths = np.concatenate([batch["lengths"] for batch in batches])
    assert np.array_equal(np.sort(lengths), np.sort(texts.train.lengths))
    spreads = [int(batch["lengths"].max() - batch["lengths"].min()) for batch in batches]
    assert np.mean(spreads) <= 2
    again = TextTask(texts, config, ARMS["baseline"], 7).batch(3).tensors
    assert all(torch.equal(again[name], batches[3][name]) for name in again)
    assert not torch.equal(task.batch(3 + task.steps_per_epoch).tensors["ids"], batches[3]["ids"])
    words = torch.cat([batch["ids"][batch["ids"] != PADDING] for batch in batches])
    assert 0.4 < (words == UNKNOWN).float().mean() < 0.6
    for batch in batches:
        assert torch.equal((batch["ids"] != PADDING).sum(1), batch["lengths"])


@pytest.mark.parametrize("order", [None, "published", "straight_through", "mean"])
def test_the_classifier_does_not_see_padding(order: str | None) -> None:
    torch.manual_seed(2)
    model = MambaClassifier(3, vocab_size=11, d_model=8, n_layer=2, d_state=3, order=order).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    ids, lengths = torch.randint(11, (3, 9)), torch.tensor([9, 5, 1])
    logits = model(ids, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = model(ids[row : row + 1, :length])
        torch.testing.assert_close(logits[row : row + 1], alone, rtol=1e-10, atol=1e-10)
    with pytest.raises(ShapeError, match=r"expected ids \(b, L\)"):
        model(torch.zeros(2, 3))


def test_hugging_face_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, configuration: str | None) -> Any:
        asked.append((path, configuration))
        return {"train": rows(6, 3), "test": rows(4, 4)} | ({"unsupervised": []} if path == "imdb" else {})

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert len(load_texts(DataConfig(data="hf:imdb")).train) == 6
    assert len(load_texts(DataConfig(data="hf:some/set:english")).held_out) == 4
    assert asked == [("imdb", None), ("some/set", "english")]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs the package datasets"):
        load_texts(DataConfig(data="hf:imdb"))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_print(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--print-config"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["preset"] == name
    assert set(shown["orders"]) == {"baseline", "published", "published_restored", "straight_through", "sorted"}
    assert len(shown["seeds"]) >= 3
    if name != "demo":
        assert main([name]) == _cli.MISTAKE
        assert f"the preset {name} needs texts; give --data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "more", "words"),
    [
        ({}, ["--data", "nowhere"], "--data nowhere: no such file or folder"),
        ({}, ["--test", "x.jsonl"], "--test was given without --data"),
        ({"train.jsonl": rows(4, 1)}, ["--data", "."], "holds 0 files of JSON lines named test"),
        ({"a_train.jsonl": [], "b_train.jsonl": []}, ["--data", "."], "holds 2 files of JSON lines named train"),
        ({"train.jsonl": [], "test.jsonl": []}, ["--data", "."], "holds no texts"),
        (
            {"train.jsonl": [{"text": 3, "label": 1}]},
            ["--data", ".", "--test", "train.jsonl"],
            "line 1: expected an obj",
        ),
        ({"train.jsonl": rows(1, 1)}, ["--data", ".", "--test", "train.jsonl"], "have one label only"),
        (
            {"train.jsonl": rows(4, 1), "test.jsonl": [{"text": "x", "label": "plants"}]},
            ["--data", "."],
            "the label 'plants' of the test texts is none",
        ),
        ({"train.jsonl": rows(4, 1), "test.jsonl": rows(4, 1)}, ["--data", "."], "only 4 training texts"),
        ({}, ["--cuda-graphs", "--device", "cpu"], "--cuda-graphs needs an NVIDIA GPU, and --device is cpu"),
        ({}, ["--arms", "sortd"], r"unknown arm 'sortd' \(did you mean 'sorted'\?\)"),
    ],
)
def test_mistakes_are_one_sentence(
    files: dict[str, Any],
    more: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, entries in files.items():
        write(tmp_path / name, entries)
    assert main([*SHRUNK, "--out", str(tmp_path / "out"), *more]) == _cli.MISTAKE
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(words, error)
    assert not (tmp_path / "out").exists()
