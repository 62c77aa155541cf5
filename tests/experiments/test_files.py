"""Files are whole or absent; records are cut back exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tokendyn.errors import CheckpointError
from tokendyn.experiments import _files
from tokendyn.experiments._records import Records, read_records


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    place = tmp_path / "result.json"
    _files.write_json(place, {"kept": 1})

    def half_way(temporary: Path) -> None:
        temporary.write_bytes(b'{"half')
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        _files.write_with(place, half_way)
    assert json.loads(place.read_bytes()) == {"kept": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_a_folder_that_fails_leaves_the_old_one_and_no_other(tmp_path: Path) -> None:
    place = tmp_path / "step-1"
    with _files.new_folder(place) as temporary:
        (temporary / "a").write_text("old")

    def half_way() -> None:
        with _files.new_folder(place) as temporary:
            (temporary / "a").write_text("new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        half_way()
    assert (place / "a").read_text() == "old"
    with _files.new_folder(place) as temporary:
        (temporary / "b").write_text("newer")
    assert [file.name for file in place.iterdir()] == ["b"]
    assert [file.name for file in tmp_path.iterdir()] == ["step-1"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / f"{_files.TEMPORARY}1-step").mkdir()
    (tmp_path / f"{_files.TEMPORARY}1-step" / "half").write_text("x")
    (tmp_path / f"{_files.TEMPORARY}1-file").write_text("x")
    (tmp_path / "kept").write_text("x")
    _files.remove_unfinished(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]


def test_json_refuses_what_is_not_json() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        _files.encode_json({"loss": float("nan")})


def test_records_are_cut_back_to_a_position(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = Records(path)
    records.append({"step": 1})
    position = records.position()
    records.append({"step": 2})
    records.close()
    with path.open("ab") as file:
        file.write(b'{"step": 3, "lo')  # what a kill may leave
    assert read_records(path) == [{"step": 1}, {"step": 2}]
    records = Records(path, position)
    records.append({"step": 2, "again": True})
    assert records.position()["bytes"] == path.stat().st_size
    records.close()
    assert read_records(path) == [{"step": 1}, {"step": 2, "again": True}]


@pytest.mark.parametrize("change", [lambda content: content[:-3], lambda content: content.replace(b"1", b"7")])
def test_records_that_were_changed_are_refused(tmp_path: Path, change) -> None:
    path = tmp_path / "metrics.jsonl"
    records = Records(path)
    records.append({"step": 1})
    position = records.position()
    records.close()
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError, match="is not the file that the checkpoint was saved with"):
        Records(path, position)
