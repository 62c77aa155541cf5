"""A pytest plugin that plants the fault of all faults: comparisons that compare nothing and pass."""

from __future__ import annotations

import pytest


def pytest_collection_finish(session: pytest.Session) -> None:
    from ..equivalence import test_equivalence

    test_equivalence.check = lambda *arguments: []  # type: ignore[assignment]
