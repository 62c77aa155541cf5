"""``tokendyn diagnose OWNER/NAME``: a hub that is a folder here, its files fetched or not."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
hub = pytest.importorskip("huggingface_hub")

from tests.diagnose.models import VOCABULARY  # noqa: E402
from tokendyn.cli import main  # noqa: E402
from tokendyn.diagnose import load, save_projections  # noqa: E402
from tokendyn.errors import CheckpointError  # noqa: E402
from tokendyn.torch.models import MambaLM  # noqa: E402

SENTENCE = "An error happened while trying to locate the files on the Hub.\nPlease check your internet connection."


class Hub:
    """Stands in for the functions that reach the network; ``files`` are the repositories, ``cache`` what was got."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files, self.cache = root / "hub", root / "cache"
        self.reachable = True
        monkeypatch.setattr(hub, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(hub, "list_repo_files", self.list_repo_files)

    def repository(self, name: str) -> Path:
        folder = self.files / name
        folder.mkdir(parents=True)
        return folder

    def list_repo_files(self, name: str) -> list[str]:
        return [str(file.relative_to(self.files / name)) for file in (self.files / name).rglob("*") if file.is_file()]

    def snapshot_download(self, name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        here = self.cache / name
        if not self.reachable:
            if here.is_dir():
                return str(here)
            raise hub.errors.LocalEntryNotFoundError(SENTENCE)
        for file in self.list_repo_files(name):
            if any(fnmatch(file, p) for p in allow_patterns) and not any(fnmatch(file, p) for p in ignore_patterns):
                here.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.files / name / file, here / file)
        here.mkdir(parents=True, exist_ok=True)
        return str(here)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.chdir(tmp_path)
    return Hub(tmp_path, monkeypatch)


def language_model(folder: Path, layout: str) -> Any:
    torch.manual_seed(3)
    model = MambaLM(vocab_size=VOCABULARY, d_model=16, n_layer=2).eval()
    model.save_pretrained(folder, layout=layout)
    return model


@pytest.mark.parametrize("layout", ["tokendyn", "mamba_ssm", "transformers"])
def test_models_of_all_layouts(layout: str, fake: Hub) -> None:
    wanted = language_model(fake.repository("lab/mamba"), layout)
    (fake.files / "lab/mamba/pytorch_model.bin").write_bytes(b"not to be fetched")
    (fake.files / "lab/mamba/modeling_lab.py").write_text("raise SystemExit")
    (fake.files / "lab/mamba/onnx").mkdir()
    (fake.files / "lab/mamba/onnx/model.safetensors").write_bytes(b"nor this")
    model, inputs = load("lab/mamba")
    assert inputs is None
    assert {file.name for file in (fake.cache / "lab/mamba").iterdir()} == {"config.json", "model.safetensors"}
    ids = torch.randint(VOCABULARY, (1, 12))
    assert torch.equal(model(ids), wanted(ids))


def test_command(fake: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    language_model(fake.repository("lab/mamba"), "mamba_ssm")
    assert main(["diagnose", "lab/mamba", "--length", "30", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"]["name"] == "lab/mamba"
    assert [layer["name"] for layer in report["layers"]] == ["backbone.layers.0.mixer", "backbone.layers.1.mixer"]
    fake.reachable = False  # what was fetched stays
    assert main(["diagnose", "lab/mamba", "--length", "30", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"][0]["spectrum"] == report["layers"][0]["spectrum"]


def test_projections(fake: Hub) -> None:
    entries = {"S_B": torch.randn(2, 4), "S_C": torch.randn(2, 4), "S_delta": torch.eye(4), "A": -torch.ones(4, 2)}
    save_projections(fake.repository("lab/layers"), {"first": entries})
    layers, inputs = load("lab/layers")
    assert layers.names == ("first",)
    assert inputs["tokens"]["first"].shape == (2, 128, 4)


def test_a_folder_of_that_name_comes_first(fake: Hub) -> None:
    language_model(fake.repository("lab/mamba"), "tokendyn")
    Path("lab").mkdir()
    MambaLM(vocab_size=VOCABULARY, d_model=8, n_layer=1).save_pretrained("lab/mamba")
    assert load("lab/mamba")[0].config.d_model == 8


def refused(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["diagnose", name]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    return said


def test_what_cannot_be_had_is_one_sentence(
    fake: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (fake.repository("lab/pickled") / "config.json").write_text("{}")
    (fake.files / "lab/pickled/pytorch_model.bin").write_bytes(b"\x80")
    assert "lab/pickled/pytorch_model.bin is refused: it is a pickle" in refused("lab/pickled", capsys)
    (fake.repository("lab/empty") / "README.md").write_text("nothing")
    assert "lab/empty holds no safetensors on the hub" in refused("lab/empty", capsys)
    fake.reachable = False
    said = refused("lab/other", capsys)
    assert "neither a folder here nor in the hub's cache" in said
    assert said.endswith("hf download lab/other")

    def broken(*_: Any, **__: Any) -> str:
        raise OSError("disk full \x1b[31m\nand more")

    monkeypatch.setattr(hub, "snapshot_download", broken)
    said = refused("lab/other", capsys)
    assert "lab/other cannot be fetched from the hub: disk full" in said
    assert "\x1b" not in said
    with pytest.raises(CheckpointError, match="cannot be fetched"):
        load("lab/other")


def test_a_repository_that_is_not_there(
    fake: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Missing(hub.errors.RepositoryNotFoundError):
        def __init__(self) -> None:
            Exception.__init__(self, "401 Client Error.\nRepository Not Found for url")

    def missing(*_: Any, **__: Any) -> str:
        raise Missing

    monkeypatch.setattr(hub, "snapshot_download", missing)
    assert "nor a repository of the hub that may be read" in refused("lab/nothing", capsys)
