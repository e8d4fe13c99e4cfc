"""Every command that a page or a recipe shows is one that the tool takes, in all its words; links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from defeat_cli.ablation.choice import choose
from defeat_cli.commands import ablate, gradmap
from defeat_cli.commands.app import app
from defeat_cli.commands.options import options_said, overrides
from defeat_cli.config import schema as recipes
from defeat_cli.config.variants import GROUPS, VARIANTS, find_variant

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "recipes").glob("*.md")),
    *sorted((ROOT / "defeat_cli").rglob("README.md")),
    ROOT / "tests" / "benchmarks" / "README.md",
]
COMMANDS = get_command(app).commands
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def in_blocks(text: str, block: str = r"```bash\n(.*?)```") -> list[list[str]]:
    """The command lines of our tool in blocks of shell, each as its words from the command's name on.

    A variable of one block is there in the next, as in the shell of who follows a page.
    """
    found = []
    variables: dict[str, str] = {}
    for shell in re.findall(block, text, re.DOTALL):
        for line in re.sub(r"\$\([^)]*\)", "", shell.replace("\\\n", " ")).splitlines():
            line = with_values(line, variables)
            if assigned := re.fullmatch(r"""([A-Z0-9]+)=(\S+|'.*'|".*")""", line):
                variables[assigned[1]] = assigned[2].strip("'\"")
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                starts = [i for i, word in enumerate(words) if re.fullmatch(r"(.*/)?defeat|defeat_cli", word)]
                if starts:
                    found.append([word.replace("…", "X") for word in words[starts[0] + 1 :]])
    return found


def with_values(line: str, variables: dict[str, str]) -> str:
    """A line with the values of the shell variables that are in it, which are words of their own where unquoted."""
    for name, value in variables.items():
        line = re.sub(rf"\${name}\b", lambda match, value=value: value, line)
    return line


def in_text(text: str) -> list[list[str]]:
    """As `in_blocks`, of what stands in backticks; often a name, with options that it has, in place of a whole line."""
    spans = [" ".join(span.split()) for span in re.findall(r"`defeat ([a-z][^`]*)`", text)]
    return [[word for word in shlex.split(span) if word != "…"] for span in spans]


BLOCKS = {
    **{str(page.relative_to(ROOT)): in_blocks(page.read_text(encoding="utf-8")) for page in PAGES},
    **{path.name: in_blocks(path.read_text(encoding="utf-8"), r"#   (defeat .+?)\n") for path in RECIPES},
}


def refuse_wrong(words: list[str]) -> None:
    """Raise where the tool would refuse a command by itself, whatever data and checkpoints there are."""
    name, *arguments = ["2" if word == "N" else word for word in words]
    if name not in COMMANDS:
        raise ValueError(f"no such command: {name}")
    context = COMMANDS[name].make_context(name, arguments)  # reads all as the shell would, and calls nothing
    said = context.params
    settings = overrides(said.get("set_"))
    recipe = recipes.validate(recipes.merged({}, settings), "--set")
    if said.get("recipe") and not re.search(r"\.yaml$|^[A-Z]+$", said["recipe"]):
        recipe = recipes.load(said["recipe"], settings)
    if said.get("variant"):
        find_variant(said["variant"], VARIANTS)
    if name == "ablate":
        ablate.refuse_idle(context)
        # Of the user's own variants only their file, which is not here, says what they are.
        own = (
            dict.fromkeys((n for n in said["names"] or [] if ":" not in n), VARIANTS["none"])
            if said["variants"]
            else {}
        )
        choose(said["names"] or [], {**own, **VARIANTS}, GROUPS, recipe)
        numbers = {key: said[key] for key in ("seeds", "tuning_seeds", "budget", "equal_time")}
        ablate.protocol_of(None, said["names"] or [], **numbers)
    if name == "gradmap":
        gradmap.refuse_idle(options_said(context))


def wrong(lines: list[list[str]]) -> list[str]:
    """Those that the tool would refuse, each with the reason."""
    found = []
    for words in lines:
        try:
            refuse_wrong(words)
        except Exception as error:
            found.append(f"defeat {shlex.join(words)}: {error}")
    return found


@pytest.mark.parametrize("page", BLOCKS)
def test_every_command_is_one_that_the_tool_takes(page):
    assert wrong([words for words in BLOCKS[page] if words]) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_in_the_text_is_one_that_the_tool_takes(page):
    known = {name: {o for p in command.params for o in p.opts} for name, command in COMMANDS.items()}
    whole = []
    for name, *rest in in_text(page.read_text(encoding="utf-8")):
        assert name in known
        options = {word for word in rest if word.startswith("-")}
        assert options <= known[name] | {"--help"}
        if len(options) < len(rest):
            whole.append([name, *rest])
    assert wrong(whole) == []


def test_the_commands_are_found():
    """So that the tests above have something to say."""
    assert len(BLOCKS["README.md"]) > 15
    assert ["train", "--recipe", "quickstart"] in BLOCKS["README.md"]
    assert [words[0] for words in BLOCKS["defeat_cli/engine/README.md"]] == ["train", "bench", "bench", "train"]
    assert all(BLOCKS[path.name] for path in RECIPES)
    (assigned, filled) = in_blocks("```bash\nB='a b'\ndefeat x:$B \"$B\" \\\n    --y && pip z\ndefeat w  # v\n```")
    assert (assigned, filled) == (["x:a", "b", "a b", "--y"], ["w"])  # as a shell has it
    assert len(in_text((ROOT / "README.md").read_text(encoding="utf-8"))) > 15


def test_the_protocol_is_one_that_ablate_takes(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "recipes" / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "protocol.yaml").write_text(text)
    followed = ablate.protocol_of(
        tmp_path / "protocol.yaml", [], seeds=None, tuning_seeds=None, budget=None, equal_time=None
    )
    compared, _ = choose(followed.variants, VARIANTS, GROUPS, recipes.load("quickstart"))
    assert len(compared) > 4


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("defeat train --recip quickstart", "No such option"),
        ("defeat trian --recipe quickstart", "no such command"),
        ("defeat train --recipe quikstart", "quikstart"),
        ("defeat train --set optimizer.rate=1", "optimizer.rate"),
        ("defeat train --variant fg", "fg"),
        ("defeat ablate nek --recipe quickstart", "nek"),
        ("defeat ablate neck --protocol p.yaml", "has no use"),
        ("defeat gradmap --split val x.png", "without effect"),
        ("defeat eval --per-class --nothing", "No such option"),
        ("defeat predict", "checkpoint"),
    ],
)
def test_a_wrong_command_would_be_found(line, problem):
    (words,) = in_blocks(f"```bash\n{line}   # a comment\n```")
    with pytest.raises(Exception, match=problem):
        refuse_wrong(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_that_pages_name_are_there(page):
    text = page.read_text(encoding="utf-8")
    spans = [" ".join(span.split()) for span in re.findall(r"`(--set [^`]+)`", text)]
    for span in spans:
        assignments = [word for word in shlex.split(span) if word != "--set"]
        recipes.validate(recipes.merged({}, overrides(assignments)), span)


def test_extras_that_pages_name_are_there():
    there = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE))
    named = {extra for page in PAGES for extra in re.findall(r"defeat-cli\[(\w+)\]", page.read_text(encoding="utf-8"))}
    assert named >= {"export", "fast", "track"}
    assert named <= there


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_repository_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert [link for link in links if "://" not in link and not page.parent.joinpath(link).exists()] == []
