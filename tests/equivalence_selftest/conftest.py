"""The table of planted faults and what caught them, printed at the end of a session."""

from __future__ import annotations

import pytest

SURVIVED = "SURVIVED"
Catch = tuple[str, str, str, str, str, str]

_CAUGHT = pytest.StashKey[list[Catch]]()


@pytest.fixture(scope="session")
def caught(request: pytest.FixtureRequest) -> list[Catch]:
    """Rows of (fault, operation, backend, dtype, check that caught it or SURVIVED, case)."""
    return request.config.stash.setdefault(_CAUGHT, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(_CAUGHT, None)
    if not rows:
        return
    terminalreporter.section("planted faults and what caught them")
    for fault, subject, backend, dtype, check, case in rows:
        terminalreporter.write_line(f"{fault:<50}{subject:<24}{backend:<7}{dtype:<9}{check:<18}{case}")
    survived = sum(row[4] == SURVIVED for row in rows)
    terminalreporter.write_line(f"{len(rows)} planted, {len(rows) - survived} caught")
