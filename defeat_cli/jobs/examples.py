"""Detections of a session's detectors on a few of its validation images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from torch.nn.functional import interpolate

from defeat_cli.detectors.contract import Detector
from defeat_cli.export.pictures import SMALLEST, draw, one_below_the_other, side_by_side
from defeat_cli.files import replacing
from defeat_cli.jobs.estimate import of_detecting
from defeat_cli.memory import told
from defeat_cli.pages.examples import Boxes, Example, choose_examples, find_in
from defeat_cli.precision import AUTOCAST
from defeat_cli.session import Session

TRACKED = 4
"""Images that trackers are shown at each evaluation."""
PICTURED = 4
"""Images of `write_detections`."""


def find(session: Session, detector: Detector, examples: list[Example]) -> list[Boxes]:
    """What a detector finds in each, as evaluations do."""
    with told(lambda: of_detecting(detector, session.device)):
        return find_in(examples, detector, AUTOCAST[session.recipe.run.precision])


def drawn(session: Session, detector: Detector) -> dict[str, Image.Image]:
    """The pictures that trackers are shown, by title."""
    examples = choose_examples(session.validation_data, TRACKED)
    classes = [*dict.fromkeys([*session.validation_data.classes, *detector.classes])]
    found = find(session, detector, examples)
    return {
        f"detections/{example.name}": _draw(example, boxes, classes)
        for example, boxes in zip(examples, found, strict=True)
    }


def write_detections(path: Path, examples: Sequence[Example], found: Mapping[str, Sequence[Boxes]]) -> None:
    """Write one picture: a row for each of the first examples, with what is annotated and what each detector finds.

    Args:
        found: who -> what it finds in each of the examples.
    """
    rows = []
    for i, example in enumerate(examples[:PICTURED]):
        boxes = {"annotated": example.truth, **{who: per_image[i] for who, per_image in found.items()}}
        classes = [*dict.fromkeys(name for one in boxes.values() for name in one.names)]
        rows.append(side_by_side([_draw(example, one, classes, SMALLEST) for one in boxes.values()], list(boxes)))
    with replacing(path) as temporary:
        one_below_the_other(rows).save(temporary, format="PNG", optimize=True)


def _draw(example: Example, boxes: Boxes, classes: Sequence[str], most: int | None = None) -> Image.Image:
    """Objects or detections on their image, which `most` limits in pixels of its long side."""
    image, corners = example.image, boxes.corners
    factor = 1.0 if most is None else min(1.0, most / max(image.shape[-2:]))
    if factor < 1:
        size = [max(1, round(side * factor)) for side in image.shape[-2:]]
        image = interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0].round().byte()
        corners = corners * factor
    scores = [""] * len(boxes.names) if boxes.scores is None else [f" {score:.2f}" for score in boxes.scores.tolist()]
    texts = [name + score for name, score in zip(boxes.names, scores, strict=True)]
    return draw(image, corners, texts, [classes.index(name) for name in boxes.names])
