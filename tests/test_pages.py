"""Commands that the pages show are commands that there are: names, options and their kinds, read as the shell would."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from defeat_cli.commands.app import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "recipes/README.md", "recipes/RESULTS.md", "defeat_cli/engine/README.md"]


def commands_of(page: str) -> list[list[str]]:
    """The arguments of each `defeat …` in a page's blocks of shell commands."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if not line.startswith("#SBATCH") and "$" not in line]
    commands = [found for line in words for found in _of_defeat(line)]
    assert commands, f"{page} shows no command"
    return commands


def _of_defeat(words: list[str]) -> list[list[str]]:
    """What follows `defeat` at a command's start, or `-m defeat_cli`; commands are joined by `&&`."""
    if "&&" in words:
        cut = words.index("&&")
        return _of_defeat(words[:cut]) + _of_defeat(words[cut + 1 :])
    if words[:1] in (["defeat"], [".venv/bin/defeat"]):
        return [words[1:]]
    return [words[words.index("defeat_cli") + 1 :]] if "defeat_cli" in words else []


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_understood(page):
    cli = get_command(app)
    for words in commands_of(page):
        name, *arguments = words
        # Raises click.UsageError where there is no such command, option or kind of value; calls nothing.
        cli.commands[name].make_context(name, ["quickstart" if word == "…" else word for word in arguments])


def test_a_command_that_is_not_there_is_seen():
    with pytest.raises(Exception, match="No such option"):
        get_command(app).commands["train"].make_context("train", ["--recipes", "quickstart"])


@pytest.mark.parametrize("page", [*PAGES, "defeat_cli/README.md", "CONTRIBUTING.md"])
def test_links_within_the_repository_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert [link for link in links if "://" not in link and not (ROOT / page).parent.joinpath(link).exists()] == []
