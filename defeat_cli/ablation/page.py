"""A report as one page: Markdown beside its pictures, and HTML that holds them, so that it opens anywhere by itself."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from defeat_cli.files import replacing
from defeat_cli.tables import Sheet

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
div { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
caption { text-align: left; white-space: nowrap; color: #555; padding: .3rem 0; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: pre; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0; } figcaption { color: #555; font-size: .92rem; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .88rem; }
"""


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Picture:
    """path: of a PNG or JPEG file in the page's folder or below it."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Verbatim:
    """Text shown as it is, such as a file's."""

    text: str


CODE = re.compile(r"`([^`]+)`")

Block = str | Heading | Sheet | Picture | Verbatim
"""A string is a paragraph, with code between backticks."""


def write(folder: Path, name: str, title: str, blocks: Sequence[Block]) -> None:
    """Write NAME.md and NAME.html to a folder."""
    with replacing(folder / f"{name}.md") as temporary:
        parts = [f"# {title}", *(_markdown(block, folder) for block in blocks)]
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    with replacing(folder / f"{name}.html") as temporary:
        body = "\n".join([f"<h1>{escape(title)}</h1>", *map(_html, blocks)])
        head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
        text = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'
        temporary.write_text(text, encoding="utf-8")


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


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h2>{escape(block.text)}</h2>"
    if isinstance(block, Sheet):
        head = _row("th", block.header)
        return f"<div><table><caption>{escape(block.title)}</caption>{head}{_rows(block)}</table></div>"
    if isinstance(block, Picture):
        kind = "png" if block.path.suffix == ".png" else "jpeg"
        content = base64.b64encode(block.path.read_bytes()).decode()
        image = f'<img src="data:image/{kind};base64,{content}" alt="{escape(block.caption)}">'
        return f"<figure>{image}<figcaption>{escape(block.caption)}</figcaption></figure>"
    if isinstance(block, Verbatim):
        return f"<pre>{escape(block.text)}</pre>"
    with_code = CODE.sub(r"<code>\1</code>", escape(block))
    return f"<p>{with_code}</p>"


def _rows(sheet: Sheet) -> str:
    return "".join(_row("td", line) for line in sheet.cells)


def _row(kind: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{kind}>{escape(cell.strip())}</{kind}>' for cell in cells)}</tr>"
