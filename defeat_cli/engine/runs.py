"""The folder that a run leaves behind (design, section 4). Files are written to a temporary name, then renamed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from defeat_cli.config import schema as recipes
from defeat_cli.config.schema import Recipe
from defeat_cli.errors import RunError
from defeat_cli.files import replacing, require_place_for_file, require_place_for_folder, temporary_of

RECIPE, METRICS, LAST, BEST = "recipe.yaml", "metrics.jsonl", "last.pt", "best.pt"
BAD_STEP = "bad_step.pt"
PREVIOUS = "previous.pt"
"""What last.pt was before it was saved anew, while the run is unfinished."""
STUDENT, LOADER, RESULTS, CURVES = "student.pth", "load_student.py", "results.json", "curves.png"
SUMMARY = "results.md"
REPORT, CARD, DETECTIONS = "report.html", "model_card.md", "detections.png"
TRACKING = "tracking.json"
"""What the run's trackers have of it so far."""
RUN_FILES = (
    *(RECIPE, METRICS, TRACKING, LAST, PREVIOUS, BEST, BAD_STEP),
    *(STUDENT, LOADER, RESULTS, SUMMARY, CURVES, REPORT, CARD, DETECTIONS),
)
EVENTS = "tensorboard"
"""Folder of TensorBoard's event files."""


class RunFolder:
    """One run's folder.

    watchers: called with each line of metrics.jsonl once it is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.watchers: list[Callable[[dict[str, Any]], None]] = []
        self._unwritten: list[dict[str, Any]] = []

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return any((self / name).is_file() for name in (RECIPE, LAST, PREVIOUS))

    @property
    def finished(self) -> bool:
        """Whether a run was completed here. Results that cannot be read are none."""
        try:
            self.results()
        except RunError:
            return False
        return (self / STUDENT).is_file()

    def check(self, recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> None:
        """Find out, writing nothing, whether a run of `recipe` can be made here.

        Raises:
            RunError: nothing can be written here; or the folder holds a run and neither `resume` nor `overwrite` says
                what to do with it; or it is to be resumed with a recipe that differs from its own.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path}: is a file; --output must name a folder")
        require_place_for_folder(self.path)
        for name in RUN_FILES:
            require_place_for_file(self / name)
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
        for name in RUN_FILES:
            temporary_of(self / name).unlink(missing_ok=True)
        if self.exists and resume:
            if self.prolonged_by(recipe):
                for name in (RESULTS, STUDENT):  # of the shorter run: this one is not finished
                    (self / name).unlink(missing_ok=True)
                recipes.save(recipe, self / RECIPE)
            return
        self.path.mkdir(parents=True, exist_ok=True)
        for name in RUN_FILES:
            (self / name).unlink(missing_ok=True)
        for file in (self / EVENTS).glob("events.out.tfevents.*"):
            file.unlink()  # the curves of both runs would be drawn as one
        recipes.save(recipe, self / RECIPE)

    @property
    def recipe(self) -> Recipe:
        """The recipe of the run that was begun here."""
        return recipes.load(str(self / RECIPE))

    def holds(self, recipe: Recipe) -> bool:
        """Whether the run that was begun here is one of this recipe."""
        return self.exists and not self._differences(recipe)

    def prolonged_by(self, recipe: Recipe) -> bool:
        """Whether the recipe trains for more epochs than the run that was begun here."""
        return recipe.schedule.epochs > self.recipe.schedule.epochs

    def _differences(self, recipe: Recipe) -> list[str]:
        before = self.recipe.model_dump()
        return [
            f"{name}: {old!r} there, {new!r} here"
            for name, old, new in _changes(before, recipe.model_dump())
            if not (name == "schedule.epochs" and new > old)
        ]

    def results(self) -> dict[str, Any]:
        """The content of results.json.

        Raises:
            RunError: it is missing or damaged.
        """
        try:
            content = json.loads((self / RESULTS).read_bytes())
        except (OSError, ValueError) as error:
            raise RunError(f"{self / RESULTS}: cannot be read: {error}") from None
        if not isinstance(content, dict) or not isinstance(content.get("student", {}), dict):
            raise RunError(f"{self / RESULTS}: damaged: it holds no figures")
        return content

    def log(self, *entries: dict[str, Any]) -> None:
        """Append lines to metrics.jsonl, and before them those that could not be written earlier.

        Raises:
            OSError: the system refuses; the file is as it was, and the lines wait for the next call.
        """
        self._unwritten += entries
        if not self._unwritten:
            return
        content = "".join(json.dumps(entry) + "\n" for entry in self._unwritten).encode()
        with (self / METRICS).open("ab", buffering=0) as file:
            size = file.tell()
            written = 0
            try:
                while written < len(content):
                    written += file.write(content[written:])
            except OSError as error:
                file.truncate(size)
                raise OSError(error.errno, error.strerror, str(self / METRICS)) from None
        written, self._unwritten = self._unwritten, []
        for watcher in self.watchers:
            for entry in written:
                watcher(entry)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl.

        Raises:
            RunError: one of them is damaged.
        """
        lines = self._lines()
        for number, line in enumerate(lines, start=1):
            if line is None:
                raise RunError(f"{self / METRICS}:{number}: damaged, not what was written; delete the line")
        return lines

    def log_seal(self) -> dict[str, Any]:
        """What tells whether metrics.jsonl is, up to here, what it is now: `bytes` and their `sha256`."""
        content = (self / METRICS).read_bytes() if (self / METRICS).is_file() else b""
        return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def rewind(self, seal: dict[str, Any]) -> bool:
        """Cut metrics.jsonl back to where it was sealed; False, and nothing is done, where it is not what it was."""
        content = (self / METRICS).read_bytes() if (self / METRICS).is_file() else b""
        content = content[: seal["bytes"]]
        if len(content) < seal["bytes"] or hashlib.sha256(content).hexdigest() != seal["sha256"]:
            return False
        with replacing(self / METRICS) as temporary:
            temporary.write_bytes(content)
        return True

    def forget_after(self, step: int, judged_at: float = math.inf) -> None:
        """Drop the metrics of what a run that goes on from `step` will do again.

        Damaged lines go too.

        Args:
            judged_at: step of the last evaluation that will not be made again.
        """
        last = {"eval": min(step, judged_at)}
        kept = [line for line in self._lines() if line is not None and line["step"] <= last.get(line.get("kind"), step)]
        with replacing(self / METRICS) as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")

    def _lines(self) -> list[dict[str, Any] | None]:
        """Each line of metrics.jsonl; None in place of one that is damaged."""
        if not (self / METRICS).is_file():
            return []
        # What follows the last newline is a line that a crash cut short.
        return [_entry(line) for line in (self / METRICS).read_bytes().split(b"\n")[:-1] if line]


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None


def newest_checkpoint(folder: Path) -> Path | None:
    """`best.pt` of the run that was finished last, anywhere in a folder; None where there is none."""
    runs = [RunFolder(file.parent) for file in folder.rglob(RESULTS) if (file.parent / BEST).is_file()]
    finished = [run for run in runs if run.exists and run.finished]
    newest = max(finished, key=lambda run: (run / RESULTS).stat().st_mtime_ns, default=None)
    return newest / BEST if newest is not None else None


NOT_COMPARED = {
    "run.device",
    "run.name",
    "data.workers",
    "data.verify",
    "run.log_every",
    "run.save_every",
    "run.pull_every",
    "run.patience",
    "run.track",
    "run.plain_beside",
    "optimizer.skip_nonfinite",
}
"""Recipe keys that may change when a run is resumed: they do not change what is computed, but for rounding."""


def _changes(old: dict, new: dict, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in dict.fromkeys([*old, *new]):
        name, there, here = f"{prefix}{key}", old.get(key), new.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            yield from _changes(there, here, f"{name}.")
        elif there != here and name not in NOT_COMPARED:
            yield name, there, here
