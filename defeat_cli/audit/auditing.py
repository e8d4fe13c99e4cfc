"""A whole data set gone through: every split that it has, every rule."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from defeat_cli.audit.rules import box_faults, class_faults, images_in_both, repeated_images
from defeat_cli.data.dataset import DetectionDataset
from defeat_cli.data.faults import RULES, Fault, Faults
from defeat_cli.data.formats.splits import NAMES, NoSplitError
from defeat_cli.data.verification import Verifier, verified

ACROSS = "train and val"
"""Where faults are that show in two splits together."""


@dataclass
class Audit:
    """What a data set is like.

    splits: by name, each without what is at fault with its images.
    faults: of each split by name, and of two together, `ACROSS`.
    notes: what else there is to say, a line each.
    """

    splits: dict[str, DetectionDataset] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether no rule is broken anywhere."""
        return not any(self.faults.values())

    def by_rule(self) -> list[tuple[str, str, list[Fault]]]:
        """Rule, split, and the faults of that kind, those that stop a training first."""
        return [
            (rule, split, found)
            for rule in RULES
            for split, faults in self.faults.items()
            if (found := [fault for fault in faults if fault.rule == rule])
        ]


def audit(
    open_split: Callable[[str, Faults], DetectionDataset],
    verifier: Verifier,
    watch: Callable[[str, int], AbstractContextManager[Callable[[int], None]]],
) -> Audit:
    """Go through the splits of a data set; where there are none, through what is not divided.

    Args:
        open_split: a split by name, given what takes its faults.
        verifier: how its images are read.
        watch: shows how far that is, given a title and a total.

    Raises:
        DataError: nothing there that can be read as a data set.
    """
    result = Audit()
    opened: dict[str, tuple[DetectionDataset, Faults]] = {}
    absent: NoSplitError | None = None
    for split in NAMES:
        faults = Faults(RULES)
        try:
            opened[split] = open_split(split, faults), faults
        except NoSplitError as error:
            absent = absent or error
    if not opened:
        faults = Faults(RULES)
        try:
            opened["all"] = open_split("all", faults), faults
        except NoSplitError:
            raise absent from None
        result.notes.append("not divided into train and val; --set data.val_fraction=0.2 does that")
    for split, (data, faults) in opened.items():
        with watch(f"reading {split} images", len(data)) as advance:
            sound = verified(data, faults, verifier._replace(on_image=advance))
        faults.tell(box_faults(sound))
        faults.tell(repeated_images(sound))
        result.splits[split], result.faults[split] = sound, faults.found
        result.notes += sound.opening
        result.notes += sound.annotations.notes
    if "train" in opened and "val" in opened:
        train, val = result.splits["train"], result.splits["val"]
        result.faults[ACROSS] = [*images_in_both(train, val), *class_faults(train, val)]
    result.notes = list(dict.fromkeys(result.notes))
    return result


def as_values(result: Audit, examples: int) -> list[dict[str, Any]]:
    """The problems as plain values: rule, what it means, whether training stops at it, split, count, first examples."""
    return [
        {
            "rule": rule,
            "what": RULES[rule].what,
            "stops_training": RULES[rule].refused,
            "split": split,
            "count": len(found),
            "examples": [fault.text for fault in found[:examples]],
        }
        for rule, split, found in result.by_rule()
    ]
