"""What a page is made of: whether its tags are closed, what it asks for from elsewhere, its tables."""

from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "hr", "input", "col", "area", "base", "embed", "source", "track", "wbr"}


class Page(HTMLParser):
    """tags: how often each is there. resources: what href, src and style name. tables: cells, row by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.resources, self.tables, self.ids = [], {}, [], [], set()
        self.cell = None
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.note(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.cell = ""

    def handle_startendtag(self, tag, attrs):
        self.note(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> at line {self.getpos()}"
        if tag in ("td", "th"):
            self.tables[-1][-1].append(self.cell.strip())
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data
        if self.open and self.open[-1] == "style":
            assert "url(" not in data
            assert "@import" not in data

    def note(self, tag, attrs):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        values = dict(attrs)
        assert len(values) == len(attrs), f"an attribute twice in <{tag}>"
        self.ids.add(values.get("id"))
        self.resources += [value for name, value in attrs if name.split(":")[-1] in ("href", "src", "srcset", "data")]

    def assert_stands_alone(self):
        """Nothing is asked for from elsewhere, and no script is run."""
        assert "script" not in self.tags
        assert "link" not in self.tags
        for resource in self.resources:
            assert resource.startswith("data:image/") or (resource[0] == "#" and resource[1:] in self.ids), resource
