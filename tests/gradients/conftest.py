"""Pictures as the figures that they are made from."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from defeat_cli.gradients import pictures


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, which are saved all the same."""
    saved, save = [], pictures.save_figure
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: (saved.append(figure), save(figure, path)))
    return saved
