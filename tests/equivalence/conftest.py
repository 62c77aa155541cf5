"""The session's record of comparisons, its table, and the rule that comparing nothing is a failure."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..conftest import chosen_backends
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


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
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
