"""Sends what a run logs to its trackers: each line of metrics.jsonl once, however often the run is resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from defeat_cli.engine.runs import TRACKING
from defeat_cli.errors import RunError
from defeat_cli.files import write_json
from defeat_cli.tracking.mlflow import MLflow
from defeat_cli.tracking.tensorboard import TensorBoard
from defeat_cli.tracking.wandb import WeightsAndBiases


class Tracker(Protocol):
    """A run, begun or gone on with, in a tracker. Constructed with (folder, name, recipe, id).

    folder: of the run, where local files go. name: as people are to see it. recipe: nested plain values.
    id: the tracker's own name for the run that is gone on with; None begins one.
    """

    package: str
    id: str | None

    def log(self, scalars: Mapping[str, float], step: int) -> None: ...

    def show(self, pictures: Mapping[str, Image.Image], step: int) -> None: ...

    def close(self, finished: bool) -> None: ...


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose package is not installed.

    Raises:
        RunError: names each, and what to install.
    """
    # A folder of that name, which wandb leaves behind, is found too, but as a package without a file of its own.
    found = {name: find_spec(TRACKERS[name].package) for name in names}
    if missing := [name for name, spec in found.items() if spec is None or spec.origin is None]:
        packages = " ".join(TRACKERS[name].package for name in missing)
        raise RunError(
            f"run.track: {', '.join(missing)}: not installed; pip install 'defeat-cli[track]', or {packages} alone"
        )


class Tracking:
    """The trackers of one run.

    A tracker that fails while the run goes on is left out from then on, and that is said. Its lines are sent to it when
    the run is resumed.

    Args:
        folder, name, recipe: as of `Tracker`.
        warn: takes a line that deserves attention.

    Attributes:
        pictures: by title; they go with the next line.
        state: by tracker the `id` of its run, and `sent`, how many lines of metrics.jsonl it has.

    Raises:
        RunError: a tracker cannot be begun.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, name: str, recipe: Mapping[str, Any], warn: Callable[[str], None]
    ) -> None:
        self.path, self.warn = folder / TRACKING, warn
        self.state: dict[str, dict[str, Any]] = _state(self.path)
        self.trackers: dict[str, Tracker] = {}
        self.pictures: dict[str, Image.Image] = {}
        self.lines = 0
        for kind in names:
            before = self.state.setdefault(kind, {"id": None, "sent": 0})
            try:
                tracker = TRACKERS[kind](folder, name, recipe, before["id"])
            except Exception as error:  # whatever its client raises: no network, no permission, a wrong address
                self.close(finished=False)
                raise RunError(
                    f"run.track: {kind} cannot be begun: {error}. --resume goes on once it can, "
                    "or --resume --set run.track=[] without it"
                ) from error
            before["id"] = tracker.id
            self.trackers[kind] = tracker

    def catch_up(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Take in the lines that are in metrics.jsonl already; trackers get those that they do not have."""
        for entry in entries:
            self.take(entry)

    def take(self, entry: Mapping[str, Any]) -> None:
        """Take in the next line of metrics.jsonl.

        A resumed run writes again the lines after its last checkpoint. They are what they were, so that a tracker that
        has them needs them no more.
        """
        self.lines += 1
        due = {kind: tracker for kind, tracker in self.trackers.items() if self.state[kind]["sent"] < self.lines}
        values, pictures = scalars(entry), self.pictures
        self.pictures = {}
        for kind, tracker in due.items():
            try:
                tracker.log(values, entry["step"])
                if pictures:
                    tracker.show(pictures, entry["step"])
            except Exception as error:  # nothing that a tracker does ends a training
                del self.trackers[kind]
                self.warn(
                    f"run.track: {kind} is left out from step {entry['step']} on: {error}. What it misses is "
                    "sent when the run is resumed"
                )
            else:
                self.state[kind]["sent"] = self.lines
        if due:
            self._save()

    def close(self, finished: bool) -> None:
        """End the trackers' runs; finished: the run came to its own end."""
        for kind, tracker in self.trackers.items():
            try:
                tracker.close(finished)
            except Exception as error:
                self.warn(f"run.track: {kind} could not be closed: {error}")

    def _save(self) -> None:
        try:
            write_json(self.path, self.state)
        except OSError as error:
            self.warn(f"{self.path}: {error.strerror or error}; a resumed run may send lines to its trackers again")


def _state(path: Path) -> dict[str, dict[str, Any]]:
    """What a run's trackers have so far; nothing where that cannot be read, so that they begin anew."""
    try:
        content = json.loads(path.read_bytes())
        return {kind: {"id": one["id"], "sent": int(one["sent"])} for kind, one in content.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


@contextmanager
def tracked(
    names: Sequence[str], folder: Path, name: str, recipe: Mapping[str, Any], warn: Callable[[str], None]
) -> Iterator[Tracking]:
    """The trackers of a run, closed however it ends; see `Tracking`."""
    tracking = Tracking(names, folder, name, recipe, warn)
    finished = False
    try:
        yield tracking
        finished = True
    finally:
        tracking.close(finished)


def scalars(entry: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl by name: `train/loss`, `weighted/neck_fg`, `raw/neck_fg.P3`, `eval/AP`.

    Left out are the APs of what there was nothing to score (-1), and what is no number.
    """
    kind, found = entry["kind"], {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                add(f"{name}/{key.replace('/', '.')}", inner)
        elif isinstance(value, int | float) and not isinstance(value, bool) and (kind != "eval" or value >= 0):
            found[name] = float(value)

    for key, value in entry.items():
        if key not in ("kind", "step"):
            add(key if kind == "train" and isinstance(value, Mapping) else f"{kind}/{key}", value)
    return {name: value for name, value in found.items() if math.isfinite(value)}
