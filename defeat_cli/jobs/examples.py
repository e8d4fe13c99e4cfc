"""Detections of a session's detectors on a few of its validation images."""

from __future__ import annotations

from PIL import Image

from defeat_cli.detectors.contract import Detector
from defeat_cli.export.pictures import draw
from defeat_cli.jobs.estimate import of_detecting
from defeat_cli.memory import told
from defeat_cli.pages.examples import Boxes, Example, choose_examples, find_in
from defeat_cli.precision import AUTOCAST
from defeat_cli.session import Session

TRACKED = 4
"""Images that trackers are shown at each evaluation."""


def find(session: Session, detector: Detector, examples: list[Example]) -> list[Boxes]:
    """What a detector finds in each, as evaluations do."""
    with told(lambda: of_detecting(detector, session.device)):
        return find_in(examples, detector, AUTOCAST[session.recipe.run.precision])


def drawn(session: Session, detector: Detector) -> dict[str, Image.Image]:
    """The pictures that trackers are shown, by title."""
    examples = choose_examples(session.validation_data, TRACKED)
    classes = [*dict.fromkeys([*session.validation_data.classes, *detector.classes])]
    pictures = {}
    for example, boxes in zip(examples, find(session, detector, examples), strict=True):
        texts = [f"{name} {score:.2f}" for name, score in zip(boxes.names, boxes.scores.tolist(), strict=True)]
        kinds = [classes.index(name) for name in boxes.names]
        pictures[f"detections/{example.name}"] = draw(example.image, boxes.corners, texts, kinds)
    return pictures
