"""The one way from a checkpoint to a detector: its weights, and the settings in force that decide inference.

A setting comes from the command line, else from the recipe named there, else from the checkpoint, else it is the
detector's own. What would change the weights' names or shapes is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from operator import attrgetter
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from pydantic import ValidationError

from defeat_cli.checkpoints.loading import load_weights
from defeat_cli.checkpoints.meaning import Meaning
from defeat_cli.checkpoints.weights import Weights, load_strict
from defeat_cli.config.architecture import (
    INFERENCE,
    SIZES,
    STRUCTURE,
    TRAINING,
    Architecture,
    own_settings,
    own_sizes,
    structure,
    without_effect,
)
from defeat_cli.config.given import COMMAND_LINE, Given, given_settings
from defeat_cli.config.schema import merged
from defeat_cli.detectors.contract import Detector
from defeat_cli.detectors.zoo import build_detector
from defeat_cli.errors import CheckpointError, RecipeError
from defeat_cli.text import counted, listed

UNTOLD = ("proposals", "score_threshold", "nms_threshold", "detections_per_image", "anchor_sizes")
"""Settings that have to be assumed where a checkpoint states none."""


TOLD_CHANNELS = ("mmdet", "detectron2")
"""Formats whose readers obey or refuse `conventions.channels` themselves: their weights take RGB once they are read."""


class Teller(Protocol):
    """What shows lines to a user; `console.Reporter` is one."""

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...


@dataclass(frozen=True)
class Loaded:
    """A detector from a checkpoint.

    weights: as they were read. meaning: what is in force, which may be other settings than the checkpoint's.
    notes, assumptions: what was read and chosen; what nothing says, and was taken for granted.
    """

    detector: Detector
    weights: Weights
    meaning: Meaning
    notes: list[str]
    assumptions: list[str]

    def tell(self, teller: Teller, who: str = "") -> None:
        """Show notes, and assumptions as warnings."""
        for line in self.notes:
            teller.note(f"{who}{line}")
        for line in self.assumptions:
            teller.warn(f"{who}{line}")


def load_detector(
    source: str | Weights,
    given: Mapping[str, Given] = MappingProxyType({}),
    *,
    section: str = "student",
    classes: list[str] | None = None,
    sizes: tuple[int, int] | None = None,
    ignored: Collection[str] = TRAINING,
) -> Loaded:
    """A detector from a checkpoint of any format.

    Args:
        source: a file, `torchvision:NAME`, `shipped:NAME`, or weights that are read already (with `hint`).
        given: what a user said, by dotted recipe names; see `config.given`.
        section: where in a recipe this detector's settings are: `student`, to which the image sizes of the data belong,
            or `teacher.architecture`. The others are not looked at.
        classes: names for weights that do not name theirs; must be as many. None numbers them.
        sizes: short and long side for a checkpoint that does not record its own; None takes the detector's own.
        ignored: settings that have no effect on what is done with the detector.

    Raises:
        CheckpointError: it cannot be read, does not say what it is, or a given setting does not go with its weights.
        RecipeError: a given setting has no effect, or no detector can have it.
    """
    settings = _settings(given, section)
    weights = source if isinstance(source, Weights) else load_weights(source, hint(given, section))
    if weights.format in TOLD_CHANNELS:
        settings.pop("conventions.channels", None)
    base, origin = weights.architecture, weights.origin
    _refuse_other_structure(settings, base, origin)
    architecture = _in_force(settings, base, origin, ignored)
    recorded = {side: getattr(weights, side) for side in SIZES if architecture.detector == base.detector}
    usual = dict(zip(SIZES, sizes, strict=True)) if sizes else own_sizes(architecture.detector)
    sides = {
        side: _last(settings[side].value) if side in settings else recorded.get(side) or usual[side] for side in SIZES
    }
    names = _names(weights, classes)
    detector = build_detector(architecture, names, [sides["short_side"]], sides["long_side"])
    changed = _changed(settings, weights, architecture, sides)
    try:
        load_strict(detector.model, weights.state_dict, origin)
    except CheckpointError as error:
        raise CheckpointError("\n  ".join([str(error), *(f"given: {line}" for line in changed)])) from None
    assumptions = [*weights.assumptions, *_assumed(settings, weights, architecture, sides)]
    if weights.classes is None and classes is not None:
        assumptions.append(
            f"{origin} does not name its {counted(len(names), 'class')}: taken to be the data's, in the data's order "
            f"({listed(names)})"
        )
    meaning = Meaning(architecture, weights.classes or classes, **sides)
    notes = [*weights.notes, *([f"in force: {'; '.join(changed)}"] if changed else [])]
    return Loaded(detector, weights, meaning, notes, assumptions)


def load_teacher(
    checkpoint: str, settings: Mapping[str, Any] | None, *, classes: list[str] | None, sizes: tuple[int, int]
) -> Loaded:
    """A teacher with the settings of a recipe's `teacher.architecture`; see `load_detector`."""
    section = "teacher.architecture"
    given = given_settings(settings or {}, "the recipe", f"{section}.")
    ignored = [name for name in TRAINING if name != "regions_per_image"]
    return load_detector(checkpoint, given, section=section, classes=classes, sizes=sizes, ignored=ignored)


def hint(given: Mapping[str, Given], section: str = "student") -> Architecture | None:
    """What a user says of a detector, for readers of checkpoints that do not tell it; None where nothing is said.

    Raises:
        RecipeError: no detector can have it.
    """
    settings = {name: item for name, item in _settings(given, section).items() if name in INFERENCE}
    return _built({}, settings) if settings else None


class _Setting(NamedTuple):
    """A given setting: its value, where it was said, and its name there."""

    value: Any
    where: str
    name: str

    def __str__(self) -> str:
        return f"{self.name} {self.value!r} ({self.where})"


def _settings(given: Mapping[str, Given], section: str) -> dict[str, _Setting]:
    """The settings of one detector by their names in `Architecture`, and of `SIZES`."""
    names = {name: f"{section}.{name}" for name in (*STRUCTURE, *TRAINING, *INFERENCE)}
    if section == "student":
        names |= {side: f"data.{side}" for side in SIZES}
    return {name: _Setting(*given[dotted], dotted) for name, dotted in names.items() if dotted in given}


def _refuse_other_structure(settings: Mapping[str, _Setting], base: Architecture, origin: str) -> None:
    """Refuse settings that other weights would be needed for."""
    asked = {name: settings[name] for name in STRUCTURE if name in settings}
    other = {name: item for name, item in asked.items() if item.value != getattr(base, name)}
    if not other:
        return
    try:
        same = structure(_built({name: getattr(base, name) for name in STRUCTURE}, asked)) == structure(base)
    except RecipeError:
        same = False
    if not same:
        lines = [f"{item}; the weights are of {getattr(base, name)!r}" for name, item in other.items()]
        raise CheckpointError("\n  ".join([f"{origin}: a trained detector cannot be given another structure:", *lines]))
    idle = [item for name, item in other.items() if name != "detector" and item.where == COMMAND_LINE]
    if idle:
        raise RecipeError(f"{', '.join(map(str, idle))}: without effect on {base.detector}")


def _in_force(
    settings: Mapping[str, _Setting], base: Architecture, origin: str, ignored: Collection[str]
) -> Architecture:
    """The architecture with everything that was given, and that it can have."""
    detector = settings["detector"].value if "detector" in settings else base.detector
    values = asdict(base)
    if detector != base.detector:  # another name for the same structure, whose own settings are meant
        values |= {"detector": detector, **own_settings(detector)}
    chosen = {name: item for name, item in settings.items() if name in (*TRAINING, *INFERENCE)}
    result = _built(values, chosen)
    idle = {*ignored, *without_effect(result)}
    refused = [
        item
        for name, item in chosen.items()
        if name in idle
        and _get(result, name) != _get(base, name)
        # Recipes of students say how they were trained, too.
        and not (name in TRAINING and item.name.startswith("student.") and item.where != COMMAND_LINE)
    ]
    if refused:
        raise RecipeError(f"{', '.join(map(str, refused))}: without effect on {origin}, a {detector}")
    return result


def _built(values: Mapping[str, Any], settings: Mapping[str, _Setting]) -> Architecture:
    """An architecture of values with settings over them."""
    nested = merged(dict(values), {name: item.value for name, item in settings.items()})
    try:
        return Architecture(**nested)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            name = ".".join(str(part) for part in item["loc"] if not isinstance(part, int))
            said = settings.get(name)
            problems.append(f"{said or name}: {item['msg'].removeprefix('Value error, ')}")
        raise RecipeError("\n  ".join(["settings that no detector can have:", *problems])) from None


def _get(architecture: Architecture, name: str) -> Any:
    return attrgetter(name)(architecture)


def _last(value: Any) -> Any:
    """Of several short sides the last is used at evaluation."""
    return value[-1] if isinstance(value, list) else value


def _changed(
    settings: Mapping[str, _Setting], weights: Weights, architecture: Architecture, sides: Mapping[str, int]
) -> list[str]:
    """What is in force and is not the checkpoint's own, a line each."""
    lines = []
    for name, item in settings.items():
        before = getattr(weights, name) if name in SIZES else _get(weights.architecture, name)
        after = sides[name] if name in SIZES else _get(architecture, name)
        if before != after and name not in TRAINING:
            told = before is not None and (weights.stated or name not in UNTOLD)
            own = f"the checkpoint says {before!r}" if told else "the checkpoint does not say"
            lines.append(f"{item.name} {after!r} from {item.where}, where {own}")
    return lines


def _assumed(
    settings: Mapping[str, _Setting], weights: Weights, architecture: Architecture, sides: Mapping[str, int]
) -> list[str]:
    """One line on what neither the checkpoint nor the user says."""
    missing = without_effect(architecture)
    values = {} if weights.stated else {name: _get(architecture, name) for name in UNTOLD if name not in missing}
    values |= {side: sides[side] for side in SIZES if getattr(weights, side) is None}
    spoken = [
        f"{name} {'the usual' if value is None else value}" for name, value in values.items() if name not in settings
    ]
    if not spoken:
        return []
    return [f"{weights.origin} does not say how it was run, nor does a recipe beside it; assumed: {', '.join(spoken)}"]


def _names(weights: Weights, classes: list[str] | None) -> list[str]:
    """Class names: those of the weights, else the data's, else numbers."""
    if weights.classes is not None:
        return weights.classes
    if classes is None:
        return [f"class {label}" for label in range(1, weights.num_classes + 1)]
    if len(classes) != weights.num_classes:
        raise CheckpointError(
            f"{weights.origin}: has {counted(weights.num_classes, 'class')} without names; the data has "
            f"{len(classes)}. Give the data it was trained on"
        )
    return classes
