"""A study's report as a page of blocks: Markdown beside its pictures, and HTML that holds them and opens anywhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from defeat_cli.files import replacing
from defeat_cli.pages.rendering import write_page
from defeat_cli.tables import Sheet


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Picture:
    """path: of a PNG or JPEG file in the page's folder or below it."""

    path: Path
    caption: str

    @property
    def source(self) -> str:
        """The picture itself, as an address."""
        kind = "png" if self.path.suffix == ".png" else "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode(self.path.read_bytes()).decode()}"


@dataclass(frozen=True)
class Verbatim:
    """Text shown as it is, such as a file's."""

    text: str


Block = str | Heading | Sheet | Picture | Verbatim
"""A string is a paragraph, with code between backticks."""


def write_html(path: Path, title: str, blocks: Sequence[Block]) -> None:
    """Write a page that needs nothing else."""
    write_page(path, "blocks.html", name=title, blocks=[(type(block).__name__, block) for block in blocks])


def write_markdown(path: Path, title: str, blocks: Sequence[Block]) -> None:
    """Write a page that shows the pictures where they lie."""
    with replacing(path) as temporary:
        parts = [f"# {title}", *(_markdown(block, path.parent) for block in blocks)]
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _markdown(block: Block, folder: Path) -> str:
    if isinstance(block, Heading):
        return f"## {block.text}"
    if isinstance(block, Sheet):
        return f"{block.title}:\n\n{block.markdown()}"
    if isinstance(block, Picture):
        return f"![{block.caption}]({block.path.relative_to(folder).as_posix()})\n\n{block.caption}"
    if isinstance(block, Verbatim):
        return f"```\n{block.text.rstrip()}\n```"
    return block
