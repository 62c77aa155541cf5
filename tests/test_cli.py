"""The command line: what it prints, and what it says about mistakes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tokendyn
from tokendyn._dispatch import BACKENDS, load_backend
from tokendyn.cli import main

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "demo.png"
FAST = ["--mu", "1", "--s-delta", "0.7", "--a", "1", "--x0", "0.3", "-1", "1.2"]
PLANE = {"M": [[-1, 0.4], [0, -0.6]], "s_delta": [[0.4, -0.3], [0.2, 0.5]], "a": 1, "x0": [[1, 0.5], [-0.6, 1.1]]}


@pytest.fixture
def plane(tmp_path: Path) -> str:
    path = tmp_path / "plane.json"
    path.write_text(json.dumps(PLANE))
    return str(path)


def test_classify_prints_a_row_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", *FAST]) == 0
    out = capsys.readouterr().out
    assert "regime: fast divergence" in out
    assert out.count("blow-up") >= 3
    assert "6.20132" in out


def test_classify_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", *FAST, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "fast divergence"
    assert found["blow_up_bounds"][2] == pytest.approx(0.220443, rel=1e-5)
    assert found["constants"][1] is None


def test_commas_and_small_negative_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", "--mu", "1", "--s-delta=-1e-1", "--a", "1", "--x0=0.3,1e-3"]) == 0
    assert "slow divergence" in capsys.readouterr().out
    answers = []
    for x0 in (["--x0=-1e-3,-0.2,1"], ["--x0", "-1e-3", "-.2", "1"], ["--x0", "-1e-3,-2e-1", "1"]):
        assert main(["classify", "--mu", "-1e0", "--s-delta", "-1e-1", "--a", "1", *x0, "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0]["kind"] == "convergence"
    assert answers[0] == answers[1] == answers[2]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"tokendyn {tokendyn.__version__}\n"


def test_simulate_prints_times_and_events(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *FAST, "--t-end", "7", "--times", "0", "0.2", "1", "6.5"]) == 0
    out = capsys.readouterr().out
    assert "token 3 blows up" in out
    assert "-inf" in out
    assert main(["simulate", *FAST, "--t-end", "7", "--times=0,1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["times"] == [0, 1]
    assert found["tokens"][1][2] is None
    assert found["events"][0].endswith("token 3 blows up")


def test_problems_in_files_and_on_the_sphere(plane: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", "--problem", plane]) == 0
    assert "convergence" in capsys.readouterr().out
    assert main(["simulate", "--problem", plane, "--t-end", "5", "--sphere"]) == 0
    assert "⟨x_2, x_1⟩" in capsys.readouterr().out
    assert main(["classify", "--problem", plane, "--sphere"]) == 0
    assert "case B" in capsys.readouterr().out
    assert main(["classify", "--problem", plane, "--sphere", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["case"] == "B"


def test_tables_words_events_and_plots_number_tokens_alike(capsys: pytest.CaptureFixture[str]) -> None:
    """The first token is token 1 wherever one is named; arrays are indexed from 0."""
    pytest.importorskip("matplotlib")
    import matplotlib.figure

    from tokendyn import classify, simulate

    problem = {"mu": 1.0, "s_delta": 0.7, "a": 1.0, "x0": [0.3, -1.0, 1.2]}
    regime, trajectory = classify(**problem), simulate(**problem, t_end=1.0)
    last = int(np.argmin(trajectory.ended_at))
    assert last == 2
    assert f"token {last + 1} blows up" in str(trajectory.events[0])
    assert trajectory.events[0].index == last
    axes = trajectory.plot(matplotlib.figure.Figure().add_subplot())
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[:3] == ["token 1", "token 2", "token 3"]
    assert np.isfinite(regime.constants[[0, 2]]).all()
    assert "x_1 = 0.21" in regime.explain()  # S_Δ x_1, the first that can blow up by itself
    assert main(["classify", *FAST]) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if "blow-up" in line]
    assert rows[:3] == [["1", "0.3"], ["2", "-1"], ["3", "1.2"]]


def test_problem_from_stdin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps({"mu": -1, "s_delta": 1, "a": 1, "x0": [1, 2]})))
    assert main(["classify", "--problem", "-"]) == 0
    assert "convergence" in capsys.readouterr().out


@pytest.mark.parametrize("on", ["line", "plane", "ball"])
def test_pictures(on: str, tmp_path: Path, plane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("tokendyn.cli._animate.FRAMES", 5)
    ball = tmp_path / "ball.json"
    ball.write_text(json.dumps({"phi": [0.5], "x0": [[1, 0, 0], [0.5, 1, 0], [0, 0.2, 1]]}))
    problem = {"line": FAST, "plane": ["--problem", plane], "ball": ["--problem", str(ball), "--sphere"]}[on]
    plot, movie = tmp_path / "plot.svg", tmp_path / "movie.gif"
    assert main(["simulate", *problem, "--t-end", "0.5", "--plot", str(plot), "--animate", str(movie)]) == 0
    assert plot.read_text().count("<path") > 10
    assert movie.read_bytes()[:6] == b"GIF89a"


MISTAKES = {
    "missing": (["classify", "--mu", "1"], "--s-delta, --a, --x0 missing"),
    "not numbers": (["classify", "--mu", "1", "--s-delta", "1", "--a", "1", "--x0", "one"], "expected numbers"),
    "a = 0": (["classify", "--mu", "1", "--s-delta", "1", "--a", "0", "--x0", "1"], "a is 0.0, expected a > 0"),
    "no file": (["classify", "--problem", "nowhere.json"], "tokendyn: nowhere.json: No such file or directory"),
    "a folder": (["classify", "--problem", str(Path(__file__).parent)], "tests: Is a directory"),
    "no text": (["classify", "--problem", str(PICTURE)], "demo.png is not JSON"),
    "nowhere to draw": (["simulate", *FAST, "--t-end", "0.1", "--plot", "no/where.png"], "no folder no; make it first"),
    "times": (["simulate", *FAST, "--t-end", "1", "--times", "2"], "rising numbers"),
    "format": (["simulate", *FAST, "--t-end", "0.1", "--animate", "x.avi"], "ends in one of .gif, .mp4"),
    "format of a plot": (["simulate", *FAST, "--t-end", "0.1", "--plot", "x.doc"], "--plot x.doc: expected a name"),
    "no format": (
        ["simulate", *FAST, "--t-end", "0.1", "--plot", "x"],
        "--plot x: expected a name that ends in one of",
    ),
    "no figure": (["figures", "nosuch"], "no figure is called 'nosuch', choose from fig1_convergence, fig2"),
    "figure": (["figures", "fig1_convergance"], "did you mean 'fig1_convergence'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_sentence(mistake: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = MISTAKES[mistake]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_reader_that_has_seen_enough() -> None:
    command = [sys.executable, "-m", "tokendyn.cli", "classify", *FAST]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_wrong_problem_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "problem.json"
    path.write_text('{"x0": [[1, 0], [0, 0]]}')
    assert main(["classify", "--problem", str(path), "--sphere"]) == 2
    assert "a token x0 of norm 0" in capsys.readouterr().err
    for text, message in (("{", "is not JSON"), ('{"nu": 1}', "holds ['nu']"), ('{"mu": 1}', "holds no x0")):
        path.write_text(text)
        assert main(["classify", "--problem", str(path)]) == 2
        assert message in capsys.readouterr().err
    path.write_text(json.dumps({**PLANE, "phi": [1.0]}))
    assert main(["classify", "--problem", str(path)]) == 2
    assert "phi" in capsys.readouterr().err


def test_figures_with_their_data(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert main(["figures", "fig3_fast_divergence", "--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "fig3_fast_divergence.json").read_text())
    assert data["trajectory"]["ended_at"][2] == pytest.approx(0.212712, abs=1e-6)
    assert {path.suffix for path in tmp_path.iterdir()} == {".png", ".svg", ".json"}


def test_simulates_on_the_backend_chosen(
    plane: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["simulate", "--problem", plane, "--t-end", "2", "--times", "0", "1", "2", "--json"]
    assert main(command) == 0
    wanted = json.loads(capsys.readouterr().out)["tokens"]
    for backend in ("jax", "torch"):
        monkeypatch.setenv("TOKENDYN_BACKEND", backend)
        assert main(command) == 0
        np.testing.assert_allclose(json.loads(capsys.readouterr().out)["tokens"], wanted, rtol=1e-7)


@pytest.mark.parametrize("problem", ["line", "plane", "sphere"])
def test_classifies_on_the_backend_chosen(
    problem: str, plane: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for backend in ("torch", "jax"):
        ops = load_backend(backend)
        monkeypatch.setattr(
            ops, "from_numpy", lambda *a, make=ops.from_numpy, on=backend: (made.append(on), make(*a))[1]
        )
    arguments = FAST if problem == "line" else ["--problem", plane, *(["--sphere"] if problem == "sphere" else [])]
    answers = {}
    for backend in BACKENDS:
        monkeypatch.setenv("TOKENDYN_BACKEND", backend)
        assert main(["classify", *arguments, "--json"]) == 0
        answers[backend] = json.loads(capsys.readouterr().out)
    assert answers["numpy"] == answers["torch"] == answers["jax"]
    assert set(made) == {"torch", "jax"}


def test_a_backend_draws_its_own_points(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no times are named: as many rows as NumPy's integrator would show, and a picture of them."""
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("TOKENDYN_BACKEND", "torch")
    command = ["simulate", "--mu", "-1", "--s-delta", "0.3", "--a", "1", "--x0", "1", "-2", "--t-end", "30"]
    assert main([*command, "--plot", str(tmp_path / "plot.svg")]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "2 tokens at 241 times up to t = 30: reached t_end"
    assert out.splitlines()[-1].split()[0] == "30"
    assert (tmp_path / "plot.svg").stat().st_size > 10_000


def test_what_cannot_be_drawn_is_not_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("tokendyn.cli._commands._expect", lambda *_: pytest.fail("a simulation was begun"))
    for name in ("no/where.png", "x.doc", "x"):
        assert main(["simulate", *FAST, "--t-end", "0.1", "--plot", name]) == 2
        assert main(["simulate", *FAST, "--t-end", "0.1", "--animate", name]) == 2


@pytest.mark.parametrize(
    "command", [["classify", *FAST], ["simulate", *FAST, "--t-end", "1"], ["figures"], ["diagnose"]]
)
def test_every_command_knows_the_backends(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENDYN_BACKEND", "numpi")
    assert main(command) == 2
    assert "TOKENDYN_BACKEND is 'numpi'; choose one of 'numpy', 'torch', 'jax'" in capsys.readouterr().err


def test_commands_that_one_backend_runs_say_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENDYN_BACKEND", "jax")
    main(["figures", "nosuch"])
    assert "tokendyn figures: runs on numpy, though jax is chosen" in capsys.readouterr().err


def test_a_diagnosis_without_torch_names_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["diagnose", "folder"]) == 2
    assert capsys.readouterr().err == "tokendyn: diagnose: needs torch; run: pip install 'tokendyn[diagnose]'\n"
