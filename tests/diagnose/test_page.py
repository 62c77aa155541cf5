"""The page in a real browser: it draws offline, without errors, at a phone's width, from the keyboard.

Needs Chromium; skipped where there is none. The page is opened from a file with no network, and a script that stands in
a frame around it presses keys, measures, and writes what it saw into the document, which Chromium prints.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.diagnose.models import small  # noqa: E402
from tokendyn.diagnose import diagnose  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

PROBE = """
<script>
window.problems = [];
addEventListener("error", (e) => problems.push(String(e.message)));
addEventListener("securitypolicyviolation", (e) => problems.push("blocked " + e.blockedURI));
const said = console.error; console.error = (...words) => { problems.push(words.join(" ")); said(...words); };
</script>
"""
REPORT = """
<script>
addEventListener("load", () => setTimeout(() => {
  const plots = [...document.querySelectorAll(".plot svg")], first = plots[0];
  const press = (key) => first.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
  first.focus(); press("ArrowRight");
  const tip = document.querySelector(".tip"), told = tip.hidden ? null : tip.textContent;
  const places = () => [...first.querySelectorAll("rect")].map((r) => r.getAttribute("x")).join(" ");
  const before = places(); press("+"); press("+"); const zoomed = places(); press("0"); const reset = places();
  const button = document.querySelectorAll("#layers button")[1]; button.focus(); button.click();
  const drawn = [...document.querySelectorAll(".plot svg")];
  const shapes = () => drawn.map((svg) => svg.querySelectorAll("rect,circle,path").length);
  const look = (tries) => {
  if (tries && Math.min(...shapes()) < 2) return setTimeout(look, 100, tries - 1);  // drawn when first seen
  const found = {
    problems, told, zooms: before !== zoomed, resets: before === reset, focusable: document.activeElement.id,
    plots: drawn.length, shapes: shapes(),
    heights: drawn.map((svg) => Math.round(svg.getBoundingClientRect().height)),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    main: document.querySelector("main").getBoundingClientRect().width, chosen: document.getElementById("pick").value,
    limits: document.querySelectorAll("#detail tbody tr").length,
    scheme: getComputedStyle(document.body).backgroundColor,
  };
  const out = document.createElement("script"); out.type = "application/json"; out.id = "found";
  out.textContent = JSON.stringify(found); document.body.append(out);
  };
  setTimeout(look, 200, 100);
}, 200));
</script>
"""


@pytest.fixture(scope="module")
def page() -> str:
    model, ids = small(80, layers=2)
    return diagnose(model, ids, channels=(0,)).to_html()


def _open(page: str, folder: Path, width: int, *flags: str) -> dict[str, Any]:
    probed = page.replace("<style>", f"{PROBE}<style>", 1).replace("</body>", f"{REPORT}</body>")
    frame = folder / "probed.html"
    frame.write_text(probed, encoding="utf-8")
    command = [
        str(BROWSER),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--proxy-server=127.0.0.1:9",  # nothing answers there: what would be fetched fails
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},900",
        "--virtual-time-budget=20000",
        *flags,
        "--dump-dom",
        frame.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    written = re.search(r'id="found">(.*?)</script>', done.stdout, re.DOTALL)
    assert written is not None, done.stdout[-500:]
    return json.loads(written.group(1))


def _expect_whole(found: dict[str, Any]) -> None:
    assert found["problems"] == []
    assert found["plots"] >= 16
    assert min(found["shapes"]) >= 2
    assert min(found["heights"]) >= 200
    assert found["overflow"] <= 0
    assert found["limits"] >= 2  # ±x₁ at least
    assert found["told"]
    assert found["zooms"]
    assert found["resets"]
    assert found["chosen"] == "1"
    assert found["focusable"] == "pick"


def test_it_draws_and_answers_to_the_keyboard(page: str, tmp_path: Path) -> None:
    _expect_whole(_open(page, tmp_path, 1200))


def test_at_a_phones_width(page: str, tmp_path: Path) -> None:
    """Chromium's window has a least width of 500; the page itself is narrowed to 390."""
    page = page.replace("<html", '<html style="width:390px"', 1)
    found = _open(page, tmp_path, 500)
    _expect_whole(found)
    assert found["main"] <= 390


def test_dark(page: str, tmp_path: Path) -> None:
    light = _open(page, tmp_path, 800)["scheme"]
    dark = _open(page, tmp_path, 800, "--blink-settings=preferredColorScheme=0")
    _expect_whole(dark)
    assert light == "rgb(251, 250, 247)"
    assert dark["scheme"] == "rgb(20, 23, 27)"
