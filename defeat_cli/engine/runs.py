"""The folder that a run leaves behind (design, section 4). Files are written to a temporary name, then renamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from defeat_cli.config import schema as recipes
from defeat_cli.config.schema import Recipe
from defeat_cli.errors import RunError
from defeat_cli.files import replacing

RECIPE, METRICS, LAST, BEST = "recipe.yaml", "metrics.jsonl", "last.pt", "best.pt"
STUDENT, LOADER, RESULTS, CURVES = "student.pth", "load_student.py", "results.json", "curves.png"
RUN_FILES = (RECIPE, METRICS, LAST, BEST, STUDENT, LOADER, RESULTS, CURVES)


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class RunFolder:
    """One run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return (self / RECIPE).is_file()

    @property
    def finished(self) -> bool:
        """Whether a run was completed here."""
        return (self / RESULTS).is_file() and (self / STUDENT).is_file()

    def check(self, recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> None:
        """Find out, writing nothing, whether a run of `recipe` can be made here.

        Raises:
            RunError: the folder holds a run and neither `resume` nor `overwrite` says what to do with it; or it is to
                be resumed with a recipe that differs from its own.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path}: is a file; --output must name a folder")
        if not self.exists or overwrite:
            return
        if not resume:
            state = "a finished run" if self.finished else "an unfinished run"
            raise RunError(
                f"{self.path}: already holds {state}; add --resume to go on with it, --overwrite to start it again, "
                "or choose another --output"
            )
        if differing := self._differences(recipe):
            raise RunError("\n  ".join([f"{self.path}: cannot be resumed with another recipe:", *differing]))

    def open(self, recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> None:
        """Make the folder ready for a run of `recipe`; a new run starts without the files of an old one."""
        self.check(recipe, resume=resume, overwrite=overwrite)
        if self.exists and resume:
            if self.prolonged_by(recipe):
                for name in (RESULTS, STUDENT):  # of the shorter run: this one is not finished
                    (self / name).unlink(missing_ok=True)
                recipes.save(recipe, self / RECIPE)
            return
        self.path.mkdir(parents=True, exist_ok=True)
        for name in RUN_FILES:
            (self / name).unlink(missing_ok=True)
        recipes.save(recipe, self / RECIPE)

    def holds(self, recipe: Recipe) -> bool:
        """Whether the run that was begun here is one of this recipe."""
        return self.exists and not self._differences(recipe)

    def prolonged_by(self, recipe: Recipe) -> bool:
        """Whether the recipe trains for more epochs than the run that was begun here."""
        return recipe.schedule.epochs > recipes.load(str(self / RECIPE)).schedule.epochs

    def _differences(self, recipe: Recipe) -> list[str]:
        before = recipes.load(str(self / RECIPE)).model_dump()
        return [
            f"{name}: {old!r} there, {new!r} here"
            for name, old, new in _differences(before, recipe.model_dump())
            if not (name == "schedule.epochs" and new > old)
        ]

    def results(self) -> dict[str, Any]:
        """The content of results.json."""
        return json.loads((self / RESULTS).read_text(encoding="utf-8"))

    def log(self, entry: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with (self / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        if not (self / METRICS).is_file():
            return []
        # What follows the last newline is a line that a crash cut short.
        lines = (self / METRICS).read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines if line]

    def forget_after(self, step: int) -> None:
        """Drop the metrics of steps after `step`, which a resumed run will take again."""
        kept = [entry for entry in self.metrics() if entry["step"] <= step]
        with replacing(self / METRICS) as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")


NOT_COMPARED = {
    "run.device",
    "run.name",
    "data.workers",
    "data.verify",
    "run.log_every",
    "run.checkpoint_every",
    "run.pull_every",
}
"""Recipe keys that may change when a run is resumed: they do not change what is computed."""


def _differences(old: dict, new: dict, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in dict.fromkeys([*old, *new]):
        name, there, here = f"{prefix}{key}", old.get(key), new.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            yield from _differences(there, here, f"{name}.")
        elif there != here and name not in NOT_COMPARED:
            yield name, there, here
