"""The table of planted faults and what caught them, printed at the end of a session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

SURVIVED = "SURVIVED"
Catch = tuple[str, str, str, str, str, str]

_CAUGHT = pytest.StashKey[list[Catch]]()


@pytest.fixture(scope="session")
def caught(request: pytest.FixtureRequest) -> list[Catch]:
    """Rows of (fault, operation, backend, dtype, check that caught it or SURVIVED, case)."""
    return request.config.stash.setdefault(_CAUGHT, [])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under ``pytest -n 2 --dist loadgroup``: the faults of one subject together, which share what the spec says."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            arguments = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
            subject = arguments["fault"].subject if "fault" in arguments else item.name
            on_jax = arguments.get("backend") == "jax"
            item.add_marker(pytest.mark.xdist_group(f"{subject} on jax" if on_jax else subject))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker process of pytest-xdist caught."""
    node.config.stash.setdefault(_CAUGHT, []).extend(map(tuple, getattr(node, "workeroutput", {}).get("caught", [])))


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["caught"] = session.config.stash.get(_CAUGHT, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(_CAUGHT, None)
    if not rows:
        return
    terminalreporter.section("planted faults and what caught them")
    for fault, subject, backend, dtype, check, case in sorted(rows, key=lambda row: row[1]):
        terminalreporter.write_line(f"{fault:<50}{subject:<24}{backend:<7}{dtype:<9}{check:<18}{case}")
    survived = sum(row[4] == SURVIVED for row in rows)
    terminalreporter.write_line(f"{len(rows)} planted, {len(rows) - survived} caught")
