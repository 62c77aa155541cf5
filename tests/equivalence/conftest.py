"""The session's record of comparisons, its table, and the rule that comparing nothing is a failure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ..conftest import chosen_backends
from .check import Case
from .record import Record

_RECORD = pytest.StashKey[Record]()
_DESELECTED = pytest.StashKey[bool]()
_MODULE = Path(__file__).with_name("test_equivalence.py")


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> Record:
    return request.config.stash.setdefault(_RECORD, Record())


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path == _MODULE:
            item.config.stash[_DESELECTED] = True


def _missing(config: pytest.Config) -> list[str]:
    """What a session that was asked to run all comparisons did not compare."""
    asked = any(Path(argument).resolve() in (_MODULE, *_MODULE.parents) for argument in config.args)
    if not asked or config.stash.get(_DESELECTED, False) or config.option.collectonly:
        return []
    return config.stash.get(_RECORD, Record()).missing(chosen_backends(config))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under ``pytest -n 2 --dist loadgroup``: what JAX compiles, nearly all of the time, is spread by what it tests.

    Of one subject a worker compiles each program once. The others share what the spec says about a case.
    """
    for item in items:
        if item.path.parent == _MODULE.parent:
            arguments = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
            case = arguments.get("case")
            subject = case.subject if isinstance(case, Case) else arguments.get("name", item.name)
            on_jax = arguments.get("backend") == "jax"
            item.add_marker(pytest.mark.xdist_group(f"{subject} on jax" if on_jax else "others"))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker process of pytest-xdist compared."""
    output = getattr(node, "workeroutput", {})
    node.config.stash.setdefault(_RECORD, Record()).merge(output.get("record", []))
    if output.get("deselected"):
        node.config.stash[_DESELECTED] = True


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:  # a worker process of pytest-xdist, which leaves the judgement to its parent
        output["record"] = session.config.stash.get(_RECORD, Record()).plain()
        output["deselected"] = session.config.stash.get(_DESELECTED, False)
        return
    if exitstatus == pytest.ExitCode.OK and _missing(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    record = config.stash.get(_RECORD, None)
    if record is not None:
        terminalreporter.section("equivalence with the spec: worst relative errors")
        for line in record.table():
            terminalreporter.write_line(line)
        terminalreporter.write_line(f"{record.comparisons} comparisons")
    if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        for name in _missing(config):
            terminalreporter.write_line(f"FAILED: nothing was compared for {name}", red=True)
