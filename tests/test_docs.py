"""The documentation is true: the Python on every page runs, from top to bottom, and what it asserts holds.

A page's blocks share one namespace. What a block needs but no reader wants to see (a folder, a small model) stands in a
comment of the page, ``<!-- runs first ... -->``, and is run in its place.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tokendyn import _dispatch
from tokendyn._layers import CONSTRUCTORS

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(
    path.relative_to(DOCS).as_posix()
    for path in DOCS.rglob("*.md")
    if not any(part.startswith("_") for part in path.relative_to(DOCS).parts)
)
CODE = re.compile(r"^(?:```python|<!-- runs first)\n(.*?)^(?:```|-->)$", re.DOTALL | re.MULTILINE)
MENTION = re.compile(r"^\s*[`~:]{3,}\s*(?:\{[\w-]+\}\s*)?(?:python|py|pycon)\b|<!-- runs first", re.MULTILINE)
#: Packages that a page uses and an installation may lack.
OPTIONAL = ("torch", "jax", "flax", "safetensors", "matplotlib", "sklearn", "transformers")


@pytest.fixture(autouse=True)
def a_process_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """An empty folder, the default backend, and no figure left open."""
    monkeypatch.setattr(_dispatch, "_process_default", _dispatch._process_default)
    monkeypatch.chdir(tmp_path)
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


def source(page: str) -> str:
    """The code of a page, each line at its line number on the page, so that a traceback points into it."""
    text = (DOCS / page).read_text(encoding="utf-8")
    lines = [""] * (text.count("\n") + 1)
    for block in CODE.finditer(text):
        first = text.count("\n", 0, block.start(1))
        for i, line in enumerate(block[1].splitlines()):
            lines[first + i] = line
    return "\n".join(lines)


@pytest.mark.parametrize("page", [page for page in PAGES if source(page).strip()])
def test_code_runs(page: str) -> None:
    code = source(page)
    for package in OPTIONAL:
        if re.search(rf"^\s*(?:import|from) {package}\b", code, re.MULTILINE):
            pytest.importorskip(package)
    exec(compile(code, str(DOCS / page), "exec"), {"__name__": "docs"})


@pytest.mark.parametrize("page", PAGES)
def test_no_block_is_missed(page: str) -> None:
    """Indented blocks, other fences and other names of the language would not be found, hence not run."""
    text = (DOCS / page).read_text(encoding="utf-8")
    assert len(CODE.findall(text)) == len(MENTION.findall(text))


def test_a_wrong_page_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "wrong.md").write_text("# Title\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    monkeypatch.setattr(sys.modules[__name__], "DOCS", tmp_path)
    with pytest.raises(AssertionError) as raised:
        test_code_runs("wrong.md")
    assert raised.traceback[-1].lineno + 1 == 8  # counted on the page


MODULES = (
    "tokendyn",
    "tokendyn.torch",
    "tokendyn.torch.models",
    "tokendyn.jax",
    "tokendyn.jax.models",
    "tokendyn.diagnose",
)
DIRECTIVE = re.compile(r"^\.\. auto(?:function|class|exception):: (?:[\w.]*\.)?(\w+)$", re.MULTILINE)


def public(module: str) -> dict[str, Any]:
    """The public functions and classes of a module, by name."""
    found = importlib.import_module(module)
    named = {name: getattr(found, name) for name in found.__all__}
    return {name: value for name, value in named.items() if inspect.isfunction(value) or inspect.isclass(value)}


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_in_the_reference(module: str) -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
    documented = set(DIRECTIVE.findall(pages))
    names = {*public(module), *CONSTRUCTORS}
    assert names <= documented, f"not in docs/reference: {sorted(names - documented)}"


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_describe_every_parameter(module: str) -> None:
    """By name; of a class its bases' docstrings count too."""
    for name, value in public(module).items():
        texts = [inspect.getdoc(part) or "" for part in (value.__mro__[:-1] if inspect.isclass(value) else [value])]
        assert texts[0], name
        if inspect.isclass(value) and issubclass(value, Warning):
            continue
        for parameter in inspect.signature(value).parameters.values():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or parameter.name.startswith("_"):
                continue
            named = re.compile(rf"(?<![\w.]){re.escape(parameter.name)}(?!\w)")
            assert any(map(named.search, texts)), f"{module}.{name}: {parameter.name} is not described"


#: What the reference can read: ``ShapeError, DTypeError: when``, continued further in.
RAISED = re.compile(r"^[A-Z]\w+(, [A-Z]\w+)*: \S|^ +\S")


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_say_when_what_is_raised(module: str) -> None:
    for name, value in public(module).items():
        section = re.search(r"^Raises:\n((?: +.*\n?)+)", inspect.getdoc(value) or "", re.MULTILINE)
        for line in textwrap.dedent(section[1]).splitlines() if section else ():
            assert RAISED.match(line), f"{module}.{name}: {line}"


def test_every_picture_has_a_text() -> None:
    for page in PAGES:
        text = (DOCS / page).read_text(encoding="utf-8")
        for alt in re.findall(r"!\[([^\]]*)\]\(", text):
            assert len(alt) > 5, page
        assert text.count("```{image}") == text.count(":alt:"), page


@pytest.mark.parametrize("page", PAGES)
def test_every_table_has_its_head(page: str) -> None:
    """A blank line inside a table would leave the rows below it as text."""
    text = re.sub(r"^(```|\$\$).*?^\1", "", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert re.fullmatch(r"\|[\s:|-]+\|", "".join(table.splitlines()[1:2])), f"{page}: {table.splitlines()[0]}"


def test_tables_of_results_are_those_of_the_measurements() -> None:
    assert load("tables.py").main(["--check"]) == 0, "run: python docs/tables.py"


def load(script: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(script).stem, DOCS / script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
