"""The interactive page computes what the core computes, and shows it.

Its JavaScript is run by Node against the library, and the page is opened in Chromium from a file, with no network; each
part is skipped where there is none of these.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tokendyn
from tokendyn.core import flow_rhs, sphere_flow

FOLDER = Path(__file__).parents[1] / "docs" / "_extra" / "explore"
NODE = shutil.which("node")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
RUN = """
const { flow, attention, simulate } = require("./dynamics.js"), { classify } = require("./regimes.js");
const finite = (key, value) => (typeof value === "number" && !Number.isFinite(value) ? String(value) : value);
const answers = JSON.parse(require("fs").readFileSync(0)).map(({ problem, times }) => {
  const trajectory = simulate(problem, times[times.length - 1]), tokens = times.map(trajectory.at);
  const { at, ...rest } = trajectory;
  const now = { flow: flow(problem, problem.x0), attention: attention(problem, problem.x0) };
  return { ...now, tokens, ...rest, regime: classify(problem) };
});
console.log(JSON.stringify(answers, finite));
"""
LINES = 12
SPACES = 4

needs_node = pytest.mark.skipif(NODE is None, reason="no Node on this machine")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


def line_problem(case: int) -> dict[str, Any]:
    rng = np.random.default_rng(case)
    sign = -1.0 if case % 3 == 0 else 1.0
    x0 = rng.normal(size=rng.integers(1, 7)) * 1.5
    s_delta = rng.normal()
    if case % 3 == 1:  # slow divergence
        x0 = -np.sign(s_delta) * np.abs(x0)
    if case == 4:
        x0[0] = 0.0
    bias = float(rng.normal()) if case % 2 else 0.0
    return {"mu": sign * rng.uniform(0.3, 2), "s_delta": s_delta, "a": rng.uniform(0.2, 2), "bias": bias, "x0": x0}


def space_problem(space: str, per_channel: bool, case: int) -> dict[str, Any]:
    rng = np.random.default_rng([space == "sphere", per_channel, case])
    D = 2 if space == "plane" else 3
    M = rng.normal(size=(D, D))
    if case == 0:
        M = -M @ M.T - 0.1 * np.eye(D) if space == "plane" else M @ M.T
    x0 = rng.normal(size=(rng.integers(2, 5), D)) * 0.7
    if space == "sphere":
        x0 /= np.linalg.norm(x0, axis=1, keepdims=True)
    s_delta = 0.6 * rng.normal(size=(D, D) if per_channel else D)
    return {"M": M, "s_delta": s_delta, "a": rng.uniform(0.2, 2), "bias": 0.2 * rng.normal(), "x0": x0}


LINE_PROBLEMS = [("line", line_problem(case)) for case in range(LINES)]
SPACE_PROBLEMS = [
    (space, space_problem(space, per_channel, case))
    for space in ("plane", "sphere")
    for per_channel in (False, True)
    for case in range(SPACES)
]
PROBLEMS = LINE_PROBLEMS + SPACE_PROBLEMS


def trajectory_of(space: str, problem: dict[str, Any], t_end: float, times: Any = None) -> tokendyn.Trajectory:
    run = tokendyn.simulate_sphere if space == "sphere" else tokendyn.simulate
    return run(**problem, t_end=t_end, times=times, max_steps=1000)


def times_of(space: str, problem: dict[str, Any]) -> list[float]:
    """Four times, before the first token ends (or turns ever faster, as some do in the plane)."""
    trajectory = trajectory_of(space, problem, 20.0)
    last = 0.98 * min(trajectory.stopped_at, float(trajectory.ended_at.min()))
    return [0.0, 0.1 * last, 0.5 * last, last]


def ask(problems: list[tuple[str, dict[str, Any], list[float]]]) -> list[dict[str, Any]]:
    """What the page's JavaScript answers: of each problem right-hand side, attention, tokens at the times, regime."""
    asked = []
    for space, problem, times in problems:
        named = {"sDelta" if key == "s_delta" else key: np.asarray(value).tolist() for key, value in problem.items()}
        asked.append({"problem": {"space": space, **named}, "times": times})
    command = [str(NODE), "-e", RUN]
    done = subprocess.run(
        command, input=json.dumps(asked), capture_output=True, text=True, cwd=FOLDER, timeout=60, check=True
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def answers() -> list[dict[str, Any]]:
    return ask([(space, problem, times_of(space, problem)) for space, problem in PROBLEMS])


def numbers(values: Any) -> np.ndarray:
    """Nested lists in which NaN and infinities are words."""
    return np.array(values, dtype=object).astype(float)


@needs_node
@pytest.mark.parametrize("case", range(len(PROBLEMS)))
def test_right_hand_side_and_attention(case: int, answers: list[dict[str, Any]]) -> None:
    space, problem = PROBLEMS[case]
    parameters = {key: value for key, value in problem.items() if key != "x0"}
    expected = (sphere_flow if space == "sphere" else flow_rhs)(problem["x0"], **parameters)
    np.testing.assert_allclose(numbers(answers[case]["flow"]), expected, rtol=1e-12, atol=1e-13)
    trajectory = trajectory_of(space, problem, 1e-3, [0.0])
    np.testing.assert_allclose(numbers(answers[case]["attention"]), trajectory.attention(0), rtol=1e-12, atol=1e-13)


@needs_node
@pytest.mark.parametrize("case", range(len(PROBLEMS)))
def test_trajectory(case: int, answers: list[dict[str, Any]]) -> None:
    space, problem = PROBLEMS[case]
    times = times_of(space, problem)
    expected = trajectory_of(space, problem, times[-1], times)
    np.testing.assert_allclose(numbers(answers[case]["tokens"]), expected.tokens, rtol=1e-6, atol=1e-7)


@needs_node
@pytest.mark.parametrize("case", range(LINES))
def test_regime_on_the_line(case: int, answers: list[dict[str, Any]]) -> None:
    problem, found = PROBLEMS[case][1], answers[case]["regime"]
    regime = tokendyn.classify(**problem)
    assert (found["kind"], found["certainty"], found["fates"]) == (regime.kind, regime.certainty, list(regime.fates))
    np.testing.assert_allclose(found["margin"], regime.margin, rtol=1e-12)
    np.testing.assert_allclose(numbers(found["constants"]), regime.constants, rtol=1e-10)
    np.testing.assert_allclose(numbers(found["bounds"]), regime.blow_up_bounds, rtol=1e-10)
    assert all(found["explanation"])


@needs_node
@pytest.mark.parametrize("case", [i for i, (space, _) in enumerate(PROBLEMS) if space == "plane"])
def test_regime_in_the_plane(case: int, answers: list[dict[str, Any]]) -> None:
    problem, found = PROBLEMS[case][1], answers[case]["regime"]
    regime = tokendyn.classify(**problem)
    assert (found["kind"], found["certainty"], found["fates"]) == (regime.kind, regime.certainty, list(regime.fates))


@needs_node
@pytest.mark.parametrize("case", [i for i, (space, _) in enumerate(PROBLEMS) if space == "sphere"])
def test_regime_on_the_sphere(case: int, answers: list[dict[str, Any]]) -> None:
    problem, found = PROBLEMS[case][1], answers[case]["regime"]
    regime = tokendyn.classify_sphere(**problem)
    assert (found["kind"], found["certainty"]) == (regime.kind, regime.certainty)
    np.testing.assert_array_equal(numbers(found["signs"]), regime.signs)
    np.testing.assert_allclose(numbers(found["rates"]), regime.rates, rtol=1e-10)


@needs_node
def test_blow_ups_end_when_the_library_says() -> None:
    problem: dict[str, Any] = {"mu": 1.0, "s_delta": 0.7, "a": 1.0, "bias": 0.0, "x0": [0.3, -1.0, 1.2]}
    found, expected = ask([("line", problem, [0.1, 10.0])])[0], tokendyn.simulate(**problem, t_end=10.0)
    np.testing.assert_allclose(numbers(found["endedAt"]), expected.ended_at, rtol=1e-6)
    assert found["endedBy"] == expected.ended_by.tolist()
    assert found["reason"] == expected.reason
    assert found["tokens"][1] == []


def test_the_problems_are_of_every_kind() -> None:
    kinds = {tokendyn.classify(**problem).kind for space, problem in PROBLEMS if space != "sphere"}
    assert {"convergence", "slow divergence", "fast divergence"} <= kinds
    assert {tokendyn.classify_sphere(**problem).kind for space, problem in PROBLEMS if space == "sphere"} >= {
        "consensus",
        "repulsion",
    }


PROBE = """
<script>
window.problems = [];
addEventListener("error", (e) => problems.push(String(e.message)));
</script>
"""
REPORT = """
<script>
addEventListener("load", () => {
  const $ = (id) => document.getElementById(id), seen = {};
  const change = (input, type = "change") => input.dispatchEvent(new Event(type));
  const paths = () => [...document.querySelectorAll("#paths path.path")];
  const drawn = () => paths().filter((path) => path.getAttribute("d").length > 10).length;
  const pressed = (key) => new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true });
  const state = () => JSON.parse(decodeURIComponent(location.hash.slice(1)));
  const luminance = (colour) => {
    const scale = colour.startsWith("rgb") ? 255 : 1, part = colour.match(/[\\d.]+/g).map((v) => v / scale);
    const [r, g, b] = part.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (e) => {
    const colour = getComputedStyle(e).backgroundColor;
    return colour === "rgba(0, 0, 0, 0)" ? behind(e.parentElement) : colour;
  };
  const contrast = (e, key) => {
    const [x, y] = [getComputedStyle(e)[key], behind(e)].map(luminance), opaque = getComputedStyle(e).opacity === "1";
    return opaque ? (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05) : 1;
  };
  const faintest = { text: Infinity, mark: Infinity };
  const look = () => {
    for (const e of document.querySelectorAll("body *:not(script, style)")) {
      const words = [...e.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
      if (!words || !e.checkVisibility()) continue;
      faintest.text = Math.min(faintest.text, contrast(e, e.closest("svg") ? "fill" : "color"));
    }
    for (const e of document.querySelectorAll("#paths :is(.path, .start, .now, .outline, .ended)"))
      faintest.mark = Math.min(faintest.mark, contrast(e, e.matches(".now") ? "fill" : "stroke"));
  };
  for (const option of $("preset").options) {
    $("preset").value = option.value; change($("preset")); look();
    seen[option.value] = {
      kind: document.querySelector(".kind").textContent, drawn: drawn(), code: $("python").textContent,
      cells: $("attention").querySelectorAll("td[style]").length, tokens: state().x0.length };
  }
  $("preset").value = "Fast divergence"; change($("preset"));
  const slider = $("parameters").querySelector("input[type=range]");
  slider.value = -1; change(slider, "input");
  const moved = document.querySelector(".kind").textContent;
  $("add").click(); $("add").click(); $("remove").click();
  const before = $("moment").textContent;
  $("paths").focus();
  for (let i = 0; i < 30; i++) $("paths").dispatchEvent(pressed("ArrowRight"));
  const unnamed = [...document.querySelectorAll("input, select, button")].filter(
    (e) => !(e.labels && e.labels.length) && !e.getAttribute("aria-label") && !e.textContent.trim());
  const found = { problems, seen, moved, faintest, tokens: state().x0.length,
    walked: before !== $("moment").textContent,
    focused: document.activeElement.id, unnamed: unnamed.map((e) => e.outerHTML),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    widest: Math.max(...[...document.querySelectorAll("form, .card")].map((e) => e.getBoundingClientRect().right)),
    scheme: getComputedStyle(document.body).backgroundColor };
  const out = document.createElement("script"); out.type = "application/json"; out.id = "found";
  out.textContent = JSON.stringify(found); document.body.append(out);
});
</script>
"""


def open_page(folder: Path, width: int, *flags: str, style: str = "") -> dict[str, Any]:
    copied = shutil.copytree(FOLDER, folder / "explore")
    page = (copied / "index.html").read_text(encoding="utf-8")
    page = page.replace("</head>", f"{PROBE}</head>").replace("</body>", f"{REPORT}</body>")
    (copied / "index.html").write_text(page.replace("<html", f'<html style="{style}"'), encoding="utf-8")
    command = [
        str(BROWSER),
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000"),
        "--proxy-server=127.0.0.1:9",  # nothing answers there: what would be fetched fails
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},900",
        *flags,
        "--dump-dom",
        (copied / "index.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    written = re.search(r'id="found">(.*?)</script>', done.stdout, re.DOTALL)
    assert written is not None, done.stdout[-500:]
    return json.loads(written.group(1))


@needs_browser
def test_every_example_shows_the_librarys_regime(tmp_path: Path) -> None:
    found = open_page(tmp_path, 1200)
    assert found["problems"] == []
    assert len(found["seen"]) == 10
    for name, shown in found["seen"].items():
        regime = eval(shown["code"], {"tokendyn": tokendyn})  # what the page says the same in Python is
        assert shown["kind"] == regime.kind, name
        assert shown["drawn"] >= shown["tokens"], name
        assert shown["cells"] == shown["tokens"] * (shown["tokens"] + 1) // 2, name


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_controls_keyboard_and_a_phones_width(dark: bool, tmp_path: Path) -> None:
    """Chromium's window has a least width of 500; the page itself is narrowed to 390."""
    flags = ["--blink-settings=preferredColorScheme=0"] if dark else []
    found = open_page(tmp_path, 500, *flags, style="width:390px")
    assert found["problems"] == []
    assert found["moved"] == "convergence"
    assert found["tokens"] == 4
    assert found["walked"]
    assert found["focused"] == "paths"
    assert found["unnamed"] == []
    assert found["overflow"] <= 0
    assert found["widest"] <= 390
    assert found["faintest"]["text"] >= 4.5
    assert found["faintest"]["mark"] >= 3
    assert found["scheme"] == ("rgb(20, 23, 27)" if dark else "rgb(251, 250, 247)")
