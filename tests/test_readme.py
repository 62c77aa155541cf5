"""The README is true: its examples run, its support matrix is the table's, its commands exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import tokendyn
from tokendyn import _dispatch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"<!-- example: (\w+) -->\n```python\n(.*?)```", README, flags=re.DOTALL))


@pytest.fixture(autouse=True)
def restore_default_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """An example may call ``use``; the next test must not see it."""
    monkeypatch.setattr(_dispatch, "_process_default", _dispatch._process_default)


@pytest.mark.parametrize("example", ["numpy", "torch", "jax", "dynamics"])
def test_example_runs(example: str) -> None:
    exec(compile(EXAMPLES[example], f"README.md, {example} example", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("example", ["numpy", "torch", "jax", "dynamics"])
def test_example_is_short(example: str) -> None:
    assert len([line for line in EXAMPLES[example].splitlines() if line.strip()]) <= 14


def test_support_matrix_is_the_tables() -> None:
    spec = importlib.util.spec_from_file_location("support_matrix", ROOT / "docs" / "_ext" / "support_matrix.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.replaced(README) == README, "run: python docs/_ext/support_matrix.py --write"


def test_files_named_in_the_readme_exist() -> None:
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", README) if not t.startswith("http")]
    assert targets
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert not missing


def test_every_extra_has_its_row() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    table = README.partition("| extra |")[2].partition("\n\n")[0]
    rows = [row.split("|")[1] for row in table.splitlines()[2:]]
    named = [extra for row in rows for extra in re.findall(r"`([\w-]+)`", row)]
    assert sorted(named) == sorted(project["optional-dependencies"])
    (everything,) = project["optional-dependencies"]["all"]
    held = set(re.findall(r"[\w-]+", everything))
    assert [extra for extra in named if extra not in held | {"all"}] == [
        "vision",
        "mamba-ssm",
    ]  # as the last row has it


def test_ci_runs_the_test_command_of_the_readme() -> None:
    command = next(line for line in README.splitlines() if line.startswith("python3 -m venv") and line.endswith("nox"))
    steps = [step.removeprefix("python3 -m venv .venv").strip() for step in command.split("&&")]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for step in filter(None, steps):
        assert step.replace(" -q ", " --quiet ").split(" -c ")[0].split(" --quiet")[0] in script


def test_version_is_in_the_citation_file() -> None:
    assert f"version: {tokendyn.__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
