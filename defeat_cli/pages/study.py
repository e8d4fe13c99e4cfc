"""`study.html`: the tables and pictures of a study on one page that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

from defeat_cli.pages.rendering import write_page
from defeat_cli.tables import Sheet


def write_study(
    path: Path,
    title: str,
    sheets: Sequence[Sheet],
    *,
    legend: str,
    pictures: Mapping[str, Path],
    variants: Mapping[str, str],
) -> None:
    """Write the page.

    Args:
        legend: how to read the tables.
        pictures: PNG files, by what is on them.
        variants: name -> what it is.
    """
    sources = {
        what: f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}" for what, file in pictures.items()
    }
    write_page(path, "study.html", name=title, sheets=sheets, legend=legend, pictures=sources, variants=variants)
