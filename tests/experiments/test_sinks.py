"""The study of sinks: what it finds where the answer is known, and that it runs."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tokendyn.errors import DataError  # noqa: E402
from tokendyn.experiments.sinks._command import main  # noqa: E402
from tokendyn.experiments.sinks._measure import EXPLANATIONS, Row, explain  # noqa: E402
from tokendyn.experiments.sinks._texts import cut_sequences, read_bytes, split, to_ids  # noqa: E402
from tokendyn.experiments.sinks._typeseg import load_typeseg  # noqa: E402


def _rows(layers: int, sequences: int, seed: int) -> list[Row]:
    """Sinks that follow ``step_ratio`` exactly; their level differs by layer as ``attraction`` does, no more."""
    rng = np.random.default_rng(seed)
    rows = []
    for depth in range(layers):
        for sequence in range(sequences):
            values = {name: float(rng.normal()) for name in EXPLANATIONS}
            values["attraction"] = 10 * depth + float(rng.normal())
            sink = 10 * depth + np.tanh(values["step_ratio"])
            rows.append(Row(f"layer {depth}", depth, sequence, sink, sink, 0.1, values))
    return rows


def test_differences_between_layers_explain_nothing_by_themselves() -> None:
    found = explain(_rows(5, 30, 0))
    assert found["step_ratio"]["correlation"] == pytest.approx(1.0)
    assert found["step_ratio"]["p"] < 0.01
    assert found["step_ratio"]["p_holm"] == pytest.approx(len(EXPLANATIONS) * found["step_ratio"]["p"])
    assert all(entry["p"] <= entry["p_holm"] <= 1 for entry in found.values())
    assert found["attraction"]["between_layers"] == pytest.approx(1.0)  # what a study without this control would report
    assert abs(found["attraction"]["correlation"]) < 0.3
    low, high = found["attraction"]["interval"]
    assert low < 0 < high


def test_the_permutation_test_holds_its_level() -> None:
    """Of explanations that explain nothing at most a few are called significant."""
    called = []
    for seed in range(6):
        found = explain(_rows(2, 12, 100 + seed))
        called += [found[name]["p"] < 0.05 for name in EXPLANATIONS if name not in ("step_ratio", "attraction")]
    assert np.mean(called) < 0.2


def test_interventions_on_a_scan_whose_answers_are_known() -> None:
    """Constant Δ and products: attention decays from the diagonal; a sink needs Δ next to 0."""
    from tokendyn.diagnose import Capture
    from tokendyn.experiments.sinks._interventions import INTERVENTIONS, intervene

    rng = np.random.default_rng(3)
    length, d, state = 40, 3, 2
    B, C = (torch.tensor(rng.uniform(0.5, 1.0, size=(1, state, length))) for _ in range(2))
    u = torch.tensor(rng.normal(size=(1, d, length)))
    delta = torch.full((1, d, length), 0.5, dtype=torch.float64)
    A = -torch.ones(d, state, dtype=torch.float64)
    scan = Capture("layer", "test", u=u, delta=delta, A=A, B=B, C=C, D=None, z=None, y=u)
    found = intervene(scan)
    assert list(found) == list(INTERVENTIONS)
    assert found["sign of M changed"] == found["as it is"]  # |P| does not know the sign of M
    # At the consensus |P_lj| is proportional to exp(-(l - j) / 2): the rows are geometric series.
    decay = np.exp(-0.5)
    wanted = np.mean([decay**l * (1 - decay) / (1 - decay ** (l + 1)) for l in range(1, length)])
    assert found["all tokens are token 1"] == pytest.approx(wanted, rel=1e-5)
    sinks = [found[name] for name in ("as it is", "later Δ × 0.1", "later Δ × 0.01", "later Δ × 0.001")]
    assert sinks == sorted(sinks)
    assert sinks[0] < 0.1
    assert sinks[-1] > 0.9
    assert float(scan.delta.min()) == 0.5  # the scan itself is left as it was


def test_texts() -> None:
    data = read_bytes(None)
    train, held_out = split(data)
    assert len(train) + len(held_out) == len(data) > 100_000
    assert 0 <= data.min() <= data.max() <= 128
    sequences = cut_sequences(held_out, 5, 100, 0)
    assert [tuple(s.shape) for s in sequences] == [(1, 100)] * 5
    assert len({tuple(s[0].tolist()) for s in sequences}) == 5
    with pytest.raises(DataError, match="expected at least"):
        cut_sequences(held_out[:50], 5, 100, 0)
    assert to_ids("aé".encode()).tolist() == [97, 128, 128]


def test_missing_or_other_arrays_are_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pip download --no-deps typeseg==0\.2\.7"):
        load_typeseg(tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", a=np.ones(2))
    with pytest.raises(DataError, match="does not hold typeseg's Mamba"):
        load_typeseg(tmp_path / "other.npz")
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    with pytest.raises(DataError, match="does not hold typeseg's Mamba"):
        load_typeseg(tmp_path / "objects.npz")


def test_the_study_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    call = ["--steps", "2", "--sequences", "3", "--length", "32", "--out", str(out)]
    assert main([*call, "--seeds", "0"]) == 0
    kept = (out / "mamba_lm_seed0" / "model.safetensors").stat().st_mtime_ns
    assert main([*call, "--seeds", "0", "1"]) == 0  # the first model is there already
    assert (out / "mamba_lm_seed0" / "model.safetensors").stat().st_mtime_ns == kept
    found = json.loads((out / "result.json").read_text())
    assert set(found) == {"settings", "mamba_lm", "mamba_lm_untrained"}
    assert [len(losses) for losses in found["mamba_lm"]["losses"]] == [2, 2]
    assert found["mamba_lm"]["losses"][0] != found["mamba_lm"]["losses"][1]
    for arm in ("plain", "rolled"):
        assert set(found["mamba_lm"][arm]["explains_attention"]) == set(EXPLANATIONS)
        assert len(found["mamba_lm"][arm]["sinks"]) == 8
    assert "| attraction |" in capsys.readouterr().out
    assert {"sinks.png", "sinks.svg"} <= {file.name for file in out.iterdir()}
    assert main([*call, "--length", "1"]) == 2
    assert "--length is 1, expected 8 or more" in capsys.readouterr().err
    assert main(["--text", str(tmp_path / "no"), "--out", str(out)]) == 2
    assert "is no file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("experiment", "mistake", "package"),
    [("sinks", ["--length", "1"], "torch"), ("figures", ["nosuch"], "matplotlib")],
)
def test_a_missing_package_is_named(
    experiment: str,
    mistake: list[str],
    package: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = importlib.import_module(f"tokendyn.experiments.{experiment}.__main__").main
    assert command(mistake) == 2
    assert "not installed" not in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, package, None)
    assert command(mistake) == 2
    assert capsys.readouterr().err == f"error: not installed: {package}; run: pip install 'tokendyn[experiments]'\n"
