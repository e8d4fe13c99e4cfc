"""What can be wrong with data: every rule by its name, and who stops at which.

Readers tell each fault where they find it. What happens then is for whoever opened the data: training stops at the
first that it cannot live with, `data.on_bad_image: skip` leaves images out, and `defeat check --data` lists them all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from defeat_cli.errors import DataError


class Rule(NamedTuple):
    """what: what breaks it, in words. refused: whether training stops at it; what is not refused is suspicious."""

    what: str
    refused: bool


RULES: dict[str, Rule] = {
    "climbs": Rule("image names that lead out of the folder", True),
    "missing": Rule("images that are not there", True),
    "empty": Rule("image files of zero bytes", True),
    "truncated": Rule("images that are cut short", True),
    "unreadable": Rule("files that are no image that can be read", True),
    "size": Rule("images of another size than annotated", True),
    "ambiguous": Rule("image names that several files answer to", True),
    "listed twice": Rule("images that are listed twice", True),
    "entry": Rule("entries that cannot be read", True),
    "numbers": Rule("boxes that are not four finite numbers", True),
    "unknown image": Rule("boxes of an image that is not listed", True),
    "unknown category": Rule("boxes of a category that is not listed", True),
    "duplicate id": Rule("ids that are there more than once", True),
    "units": Rule("boxes that are shares of the image, or corners", True),
    "boxless": Rule("splits without a box to learn from", True),
    "classes apart": Rule("training and validation without a class in common", True),
    "label alone": Rule("label files without their image", False),
    "negative": Rule("boxes with a negative width or height", False),
    "no area": Rule("boxes without area", False),
    "outside": Rule("boxes that reach beyond their image", False),
    "duplicate box": Rule("boxes that are there twice, with the same class", False),
    "duplicate annotation id": Rule("annotation ids that are there more than once", False),
    "same image": Rule("images with the same pixels as another of their split", False),
    "in both": Rule("validation images that are training images too", False),
    "one split": Rule("classes with boxes in one split only", False),
}
"""Every rule that data is held to, those that stop a training first."""
IMAGE_RULES = frozenset({"missing", "empty", "truncated", "unreadable", "size"})
"""Faults of one image file: without it the rest of the data is as good as before."""


@dataclass(frozen=True)
class Fault:
    """One place where data breaks a rule.

    text: a whole message: file or entry, what is wrong.
    image: the file, where it is about one that may be there.
    box: [x, y, width, height] in pixels, where it is about one.
    size: (height, width) of the image that the box is in.
    """

    rule: str
    text: str
    image: Path | None = None
    box: tuple[float, ...] | None = None
    size: tuple[int, int] | None = None


class Faults:
    """Takes faults: remembers those of rules that are tolerated, and stops at others that are refused.

    Args:
        tolerated: rules, keys of `RULES`.
        hint: what to add to messages about single images.

    Attributes:
        found: what was tolerated, in order.
    """

    def __init__(self, tolerated: Iterable[str] = (), hint: str = "") -> None:
        self.tolerated = frozenset(tolerated)
        self.hint = hint
        self.found: list[Fault] = []

    def tell(self, faults: Fault | Sequence[Fault], summary: str | None = None) -> None:
        """One fault, or several of a kind.

        Args:
            summary: the message of them together, where it is to be another than that of the first.

        Raises:
            DataError: of a rule that is refused and not tolerated.
        """
        for fault in [faults] if isinstance(faults, Fault) else faults:
            if fault.rule in self.tolerated:
                self.found.append(fault)
            elif RULES[fault.rule].refused:
                raise DataError((summary or fault.text) + (self.hint if fault.rule in IMAGE_RULES else ""))

    @property
    def counts(self) -> Counter[str]:
        """How many were found of each rule."""
        return Counter(fault.rule for fault in self.found)


class ImageError(DataError):
    """An image file that cannot be used; `rule` says by which of `IMAGE_RULES`."""

    rule = "unreadable"

    @classmethod
    def of(cls, rule: str, text: str) -> ImageError:
        """Not by a constructor: an exception that is sent from a loader process is made anew from its text alone."""
        error = cls(text)
        error.rule = rule
        return error


class EntryError(Exception):
    """What is wrong with one entry, and which rule it breaks; whoever reads the file adds where it is."""

    def __init__(self, text: str, rule: str = "entry") -> None:
        super().__init__(text)
        self.rule = rule
