from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

from PIL import Image

from defeat_cli.pages.blocks import Heading, Picture, Verbatim, write_html, write_markdown
from defeat_cli.tables import Sheet


class Read(HTMLParser):
    """What a browser would show: cells, and pictures' sources."""

    def __init__(self, text):
        super().__init__()
        self.words, self.sources, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_a_page_is_whole_without_a_network(tmp_path):
    Image.new("RGB", (3, 2), "red").save(tmp_path / "a.png")
    blocks = [
        Heading("Found <it>"), "Text & `more`.", Sheet("Table", ["name", "AP"], [["a|b", "+1 [0, 2]*"]]),
        Picture(tmp_path / "a.png", "red"), Verbatim("seeds:\n- 1\n"),
    ]  # fmt: skip
    write_html(tmp_path / "report.html", "My study", blocks)
    write_markdown(tmp_path / "report.md", "My study", blocks)
    text = (tmp_path / "report.html").read_text()
    shown = Read(text)
    assert shown.open == []
    for word in ("My study", "Found <it>", "Text & ", "more", "a|b", "+1 [0, 2]*", "seeds:\n- 1\n", "red"):
        assert word in shown.words, word
    (source,) = shown.sources
    assert source.startswith("data:image/png;base64,")
    assert base64.b64decode(source.partition(",")[2]) == (tmp_path / "a.png").read_bytes()
    assert not re.search(r"https?://", text)

    markdown = (tmp_path / "report.md").read_text()
    assert markdown.startswith("# My study\n\n## Found <it>\n\nText & `more`.\n\nTable:\n\n| name | AP |")
    assert "| a\\|b | +1 [0, 2]* |" in markdown
    assert "![red](a.png)" in markdown
    assert "```\nseeds:\n- 1\n```" in markdown
