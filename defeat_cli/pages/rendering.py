"""Templates of this folder, filled in."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from defeat_cli.files import replacing


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("defeat_cli.pages"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def write_page(path: Path, template: str, **content: Any) -> None:
    """Fill a template in and write it whole. In .html templates all text is escaped."""
    text = _templates().get_template(template).render(**content)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
