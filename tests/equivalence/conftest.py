"""The session's record of comparisons, its table, and the rule that comparing nothing is a failure."""

from __future__ import annotations

from pathlib import Path

import pytest

from .record import Record

_RECORD = pytest.StashKey[Record]()
_PARTIAL = pytest.StashKey[bool]()
_MODULE = str(Path(__file__).with_name("test_equivalence.py"))


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> Record:
    return request.config.stash.setdefault(_RECORD, Record())


@pytest.fixture(scope="session")
def backends(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return tuple(request.config.getoption("--backends").split(","))


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        if str(item.path) == _MODULE:
            item.config.stash[_PARTIAL] = True


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A session that ran the whole module must have compared every operation on every backend."""
    missing = _missing(session.config)
    if missing and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    record = config.stash.get(_RECORD, None)
    if record is not None:
        terminalreporter.section("equivalence with the spec: worst relative errors")
        for line in record.table():
            terminalreporter.write_line(line)
        terminalreporter.write_line(f"{record.comparisons} comparisons")
    for name in _missing(config):
        terminalreporter.write_line(f"FAILED: nothing was compared for {name}", red=True)


def _missing(config: pytest.Config) -> list[str]:
    partial = config.stash.get(_PARTIAL, False) or any("::" in argument for argument in config.args)
    if partial or config.option.collectonly:
        return []
    record = config.stash.get(_RECORD, None) or Record()
    return record.missing(tuple(config.getoption("--backends").split(",")))
