"""What `pip install .` copies: tests import the working tree, so nothing else sees a file that it leaves behind."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_every_package_is_installed():
    listed = ast.literal_eval(re.search(r"^packages = (\[.*?^\])", PYPROJECT, re.MULTILINE | re.DOTALL)[1])
    there = {".".join(file.relative_to(ROOT).parent.parts) for file in (ROOT / "defeat_cli").rglob("*.py")}
    assert sorted(listed) == sorted({*there, "defeat_cli.recipes"})


def test_every_file_beside_the_code_is_installed():
    data = {
        name: ast.literal_eval(globs) for name, globs in re.findall(r'^"([\w.]+)" = (\[.*\])$', PYPROJECT, re.MULTILINE)
    }
    folders = {"defeat_cli.pages": ROOT / "defeat_cli" / "pages", "defeat_cli.recipes": ROOT / "recipes"}
    installed = {file for name, globs in data.items() for glob in globs for file in folders[name].glob(glob)}
    beside = {file for folder in ("defeat_cli", "recipes") for file in (ROOT / folder).rglob("*") if file.is_file()}
    documents = {file for file in beside if file.name in {"README.md", "RESULTS.md"} or file.parent.name == "results"}
    assert {file for file in beside - documents if file.suffix not in {".py", ".pyc"}} == installed
