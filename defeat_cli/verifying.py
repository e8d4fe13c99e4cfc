"""A recipe's images read before the first step, and what there is to know of its data, for `train` and `check`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from defeat_cli.audit.anchors import Fit, Level, fit, input_boxes
from defeat_cli.audit.rules import class_faults
from defeat_cli.audit.summary import facts, in_words
from defeat_cli.config.architecture import DETECTOR_FAMILIES
from defeat_cli.config.schema import Data, Recipe
from defeat_cli.data.dataset import DetectionDataset, overlap
from defeat_cli.data.faults import IMAGE_RULES, Fault, Faults
from defeat_cli.data.known import cache_folder
from defeat_cli.data.unlabelled import ImageFolder
from defeat_cli.data.verification import Verifier, verified, verified_folder
from defeat_cli.detectors.contract import Detector, TorchvisionAnchors
from defeat_cli.detectors.zoo import build_detector
from defeat_cli.text import counted, listed, out_of

Watch = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Shows how far something is: given a title and a total, a context that gives what to call with the number done."""
SMALL = {"backbone": "regnet", "widths": [8, 8, 16, 16], "norm": "batch", "fpn_channels": 64, "head_channels": 16}
HINT = ". Mend or replace what is wrong, or leave such images out by --set data.on_bad_image=skip"


def unwatched(title: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Shows nothing."""
    return nullcontext(lambda done: None)


def faults_of(data: Data) -> Faults:
    """What takes faults as `data.on_bad_image` says."""
    return Faults(IMAGE_RULES) if data.on_bad_image == "skip" else Faults(hint=HINT)


def verify(opened: DetectionDataset, data: Data, split: str, workers: int, watch: Watch) -> DetectionDataset:
    """A split with every image read, as `data.verify` says, and without those left out by `data.on_bad_image`.

    Args:
        split: `training`, `validation` or `test`, for messages.

    Raises:
        DataError: an image is at fault and not to be left out, or no box is left.
    """
    with watch(f"reading {split} images", len(opened)) as advance:
        sound = verified(opened, faults_of(data), _verifier(data, workers, advance))
    sound.refuse_boxless(split)
    return sound


def verify_unlabelled(folder: ImageFolder, data: Data, workers: int, watch: Watch) -> ImageFolder:
    """As `verify`, of the images without annotations."""
    with watch("reading unlabelled images", len(folder)) as advance:
        return verified_folder(folder, faults_of(data), _verifier(data, workers, advance))


def _verifier(data: Data, workers: int, advance: Callable[[int], None]) -> Verifier:
    return Verifier(data.verify == "full", workers, cache_folder(), advance)


def notes_on(train: DetectionDataset, val: DetectionDataset, data: Data, student: Detector) -> list[tuple[str, bool]]:
    """What a user should know of the data before a run: lines, each with whether it is a warning."""
    notes = []
    for split, images in (("training", train), ("validation", val)):
        said = [f"{split}: {in_words(facts(images, data.short_side[-1], data.long_side))}"]
        said += images.notes if images is train else [f"validation: {note}" for note in images.notes]
        notes += [(text, False) for text in said]
        if left_out := note_on_left_out(images.left_out, len(images), split):
            notes.append((left_out, True))
    if shared := overlap(train, val):
        notes.append((shared, True))
    if apart := [fault.text for fault in class_faults(train, val)]:
        notes.append((listed(apart, 4), True))
    fitting = anchor_fit(student, train, data)
    if fitting is not None and fitting.bad:
        notes.append((fitting.in_words(), fitting.sizes is not None))
    return notes


def notes_on_unlabelled(
    folder: ImageFolder, data: Data, train: DetectionDataset, val: DetectionDataset
) -> list[tuple[str, bool]]:
    """What a user should know of the images without annotations, as `notes_on` gives it."""
    beside = min(data.unlabelled_a_batch, len(folder))
    others = f" (other files there: {folder.others})" if folder.others else ""
    said = (
        f"unlabelled: {counted(len(folder), 'image')}{others}, {beside} beside each batch of {data.batch_size} labelled"
    )
    notes = [(said, False)]
    if left_out := note_on_left_out(folder.left_out, len(folder), "unlabelled"):
        notes.append((left_out, True))
    for split, annotated in (("training", train), ("validation", val)):
        if shared := folder.shared_with(annotated):
            are = out_of(shared, len(folder), "image", f"is a {split} image", f"are {split} images")
            notes.append((f"data.unlabelled: {are} too", True))
    return notes


def note_on_left_out(left_out: Sequence[Fault], kept: int, split: str) -> str | None:
    """How many images were left out of how many, and why; None where none was."""
    if not left_out:
        return None
    are = out_of(len(left_out), len(left_out) + kept, f"{split} image", "is", "are")
    return f"{are} left out (data.on_bad_image: skip): {listed([fault.text for fault in left_out], 3)}"


def anchor_fit(student: Detector, train: DetectionDataset, data: Data) -> Fit | None:
    """How well a detector's anchors fit the boxes as it sees them; None where it has none."""
    if not isinstance(student, TorchvisionAnchors):
        return None
    generator = student.anchor_generator
    shapes = [(level[:, 2:] - level[:, :2]).cpu().numpy() for level in generator.cell_anchors]
    levels = [Level(stride, shape) for stride, shape in zip(student.strides, shapes, strict=True)]
    boxes = input_boxes(train, data.short_side[-1], data.long_side)
    return fit(boxes, levels, generator.aspect_ratios[0])


def recipe_anchor_fit(recipe: Recipe, data: DetectionDataset) -> Fit | None:
    """As `anchor_fit`, of the detector that a recipe's student would be."""
    architecture = recipe.student
    if architecture.detector in DETECTOR_FAMILIES:  # anchors are the same on any backbone, and this one costs nothing
        architecture = replace(architecture, **SMALL)
    sides = {"short_side": recipe.data.short_side, "long_side": recipe.data.long_side}
    return anchor_fit(build_detector(architecture, data.classes, **sides), data, recipe.data)
