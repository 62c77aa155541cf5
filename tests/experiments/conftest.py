"""Set-up common to the tests of the experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are composed but not drawn, which takes a second each: for tests that do not look at them."""
    from matplotlib.figure import Figure

    def savefig(figure: Figure, place: Path, **options: Any) -> None:
        Path(place).touch()

    monkeypatch.setattr(Figure, "savefig", savefig)
