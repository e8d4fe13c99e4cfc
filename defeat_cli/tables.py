"""A table as text: shown in the terminal by `console.show`, and written as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sheet:
    """header: the first column's name, then those of figures; cells: a list a row."""

    title: str
    header: Sequence[str]
    cells: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table in Markdown, without its title."""
        lines = [self.header, ["---"] + ["---:"] * (len(self.header) - 1), *self.cells]
        return "\n".join("| " + " | ".join(cell.strip().replace("|", "\\|") for cell in line) + " |" for line in lines)
