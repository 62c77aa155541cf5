"""Checkpoints: what is loaded is what was saved, or it is refused in words."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tokendyn.errors import CheckpointError
from tokendyn.experiments._checkpoint import Checkpoint, load_checkpoint, load_newest, read_tensors, save_checkpoint


def make(step: int) -> Checkpoint:
    values = torch.from_numpy(np.random.default_rng(step).standard_normal((3, 4)))
    tied = values.float()
    tensors = {
        "model": {"weight": tied, "tied": tied, "half": values.bfloat16(), "count": torch.tensor(step)},
        "random": {"torch": torch.arange(9, dtype=torch.uint8)},
    }
    return Checkpoint(step, tensors, {"sums": {"loss": 0.1 + 0.2}, "none": None})


def assert_equal(left: Checkpoint, right: Checkpoint) -> None:
    assert left.step == right.step
    assert left.state == right.state
    assert left.tensors.keys() == right.tensors.keys()
    for group, tensors in left.tensors.items():
        assert tensors.keys() == right.tensors[group].keys()
        for name, value in tensors.items():
            assert value.dtype == right.tensors[group][name].dtype
            assert torch.equal(value, right.tensors[group][name])


def test_round_trip_and_keeping_the_newest(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        save_checkpoint(tmp_path, make(step), keep=2)
    assert sorted(place.name for place in tmp_path.iterdir()) == ["step-00000009", "step-00000010"]
    said: list[str] = []
    loaded = load_newest(tmp_path, said.append)
    assert loaded is not None
    assert_equal(loaded, make(10))
    assert said == []


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert load_newest(tmp_path, pytest.fail) is None
    assert load_newest(tmp_path / "absent", pytest.fail) is None


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-2]),
    "empty": lambda file: file.write_bytes(b""),
    "one bit flipped": flip,
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("name", ["model.safetensors", "random.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_last_good_one_used(tmp_path: Path, name: str, damage: str) -> None:
    save_checkpoint(tmp_path, make(1), keep=2)
    newest = save_checkpoint(tmp_path, make(2), keep=2)
    DAMAGE[damage](newest / name)
    said: list[str] = []
    loaded = load_newest(tmp_path, said.append)
    assert loaded is not None
    assert_equal(loaded, make(1))
    assert len(said) == 2
    assert "step-00000002 is damaged" in said[0]
    assert name in said[0]
    assert said[1] == "continuing from the last good checkpoint, step 1"


def test_saving_replaces_a_damaged_checkpoint_of_the_same_step(tmp_path: Path) -> None:
    newest = save_checkpoint(tmp_path, make(2), keep=2)
    flip(newest / "model.safetensors")
    save_checkpoint(tmp_path, make(2), keep=2)
    assert_equal(load_checkpoint(newest), make(2))


def test_only_damaged_checkpoints_is_an_error(tmp_path: Path) -> None:
    flip(save_checkpoint(tmp_path, make(1), keep=2) / "state.json")
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
        load_newest(tmp_path, lambda message: None)


def test_a_manifest_of_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = save_checkpoint(tmp_path, make(1), keep=1)
    monkeypatch.setattr("tokendyn.experiments._checkpoint.FORMAT", 99)
    with pytest.raises(CheckpointError, match=r"has format \d+, this version of tokendyn reads format 99"):
        load_checkpoint(place)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was read",)


def test_pickles_are_refused_by_name_and_by_content(tmp_path: Path) -> None:
    for name in ("model.pt", "model.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(CheckpointError, match="is refused: it is a pickle"):
            read_tensors(tmp_path / name)
    torch.save({"weight": torch.ones(2)}, tmp_path / "zip.safetensors")
    with pytest.raises(CheckpointError, match="is refused: it is a pickle"):
        read_tensors(tmp_path / "zip.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors at all")
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        read_tensors(tmp_path / "text.safetensors")


def test_a_pickle_beside_the_checkpoints_is_refused_and_the_last_good_one_used(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make(1), keep=1)
    (tmp_path / "step-00000002.pt").write_bytes(pickle.dumps(Bomb()))
    said: list[str] = []
    loaded = load_newest(tmp_path, said.append)
    assert loaded is not None
    assert loaded.step == 1
    assert len(said) == 1
    assert "step-00000002.pt is refused" in said[0]


def test_a_disk_that_cannot_be_written_leaves_older_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, make(1), keep=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tokendyn.experiments._checkpoint.write_tensors", full)
    with pytest.raises(CheckpointError, match=r"step 2 cannot be written .*No space left.*steps 1\)"):
        save_checkpoint(tmp_path, make(2), keep=1)
    assert [place.name for place in tmp_path.iterdir()] == ["step-00000001"]
    assert_equal(load_checkpoint(tmp_path / "step-00000001"), make(1))


def test_a_checkpoint_is_safetensors_and_json(tmp_path: Path) -> None:
    place = save_checkpoint(tmp_path, make(1), keep=1)
    assert {file.suffix for file in place.iterdir()} == {".safetensors", ".json"}
    manifest = json.loads((place / "manifest.json").read_bytes())
    assert manifest["step"] == 1
    assert manifest["files"].keys() == {"model.safetensors", "random.safetensors", "state.json"}
