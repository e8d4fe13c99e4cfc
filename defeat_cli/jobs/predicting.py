"""One `defeat predict`: detections in images, as pictures and as the files that other tools read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from defeat_cli.console import Reporter, counting, new_table
from defeat_cli.errors import DataError, RunError
from defeat_cli.export.detections import Found, coco_content, crops, yolo_text
from defeat_cli.export.pictures import draw, side_by_side
from defeat_cli.files import replacing, require_place_for_file, require_place_for_folder, write_json
from defeat_cli.gradients.images import Source, distinct_names, find_images
from defeat_cli.jobs.estimate import of_detecting
from defeat_cli.jobs.opening import Opened, open_finder
from defeat_cli.memory import told
from defeat_cli.text import counted

COCO, LABELS, CLASSES, CROPS = "predictions.json", "labels", "classes.txt", "crops"


@dataclass(frozen=True)
class Predictions:
    """images: in the order they were given. skipped: one reason for each image that could not be read."""

    classes: list[str]
    threshold: float
    images: list[Found] = field(repr=False)
    skipped: list[str]

    def table(self) -> Table:
        """Detections by class, the most frequent first."""
        counts, images = Counter(), Counter()
        for found in self.images:
            labels = found.labels.tolist()
            counts.update(labels)
            images.update(set(labels))
        rows = [[self.classes[label - 1], str(count), str(images[label])] for label, count in counts.most_common()]
        found, looked_at = counted(counts.total(), "detection"), counted(len(self.images), "image")
        title = f"{found} of score {self.threshold:g} and above in {looked_at}"
        return new_table(title, ["class", "detections", "images"], rows)


def predict(
    checkpoint: str,
    inputs: Sequence[str],
    output: Path,
    *,
    threshold: float = 0.5,
    coco: bool = False,
    yolo: bool = False,
    crop: bool = False,
    teacher: str | None = None,
    overwrite: bool = False,
    recipe_name: str | None = None,
    changes: dict[str, Any] | None = None,
    quiet: bool = False,
) -> Predictions:
    """Detect in images, one at a time, as `eval` does it, and write a picture of each to the folder `output`.

    An image that cannot be read is left out, and said.

    Args:
        checkpoint: any that `eval` takes, or an ONNX file of `defeat export`.
        inputs: image files, folders or patterns.
        threshold: lowest score that is taken.
        coco, yolo, crop: also write `predictions.json`; `labels/` and `classes.txt`; `crops/`.
        teacher: a detector whose detections are drawn beside.

    Raises:
        DefeatError: a checkpoint, the images as a whole, or the folder cannot be used.
    """
    sources = find_images(inputs)
    _refuse(output, sources, overwrite)
    require_place_for_folder(output)
    for folder, wanted in ((LABELS, yolo), (CROPS, crop)):
        if wanted:
            require_place_for_folder(output / folder)
    files = [f"{name}.jpg" for name in distinct_names(sources)]
    for name in [*files, *([COCO] if coco else []), *([CLASSES] if yolo else [])]:
        require_place_for_file(output / name)
    opened = open_finder(checkpoint, recipe_name, changes or {})
    if opened.named and "data.path" in (changes or {}):
        raise DataError(
            f"--data: {checkpoint} names its classes itself, and nothing else is taken from data; leave it out"
        )
    second = open_finder(teacher, None, _of_device(changes or {})) if teacher is not None else None
    reporter = Reporter("predict", quiet)
    for name, one in ((checkpoint, opened), (teacher, second)):
        if one is None:
            continue
        for note in one.notes:
            reporter.note(note if second is None or note.startswith(name) else f"{name}: {note}")
        if threshold < one.lowest:
            reporter.warn(f"{name} gives nothing below score {one.lowest:g}, which is above --threshold {threshold:g}")
    result = Predictions(opened.detector.classes, threshold, [], [])
    output.mkdir(parents=True, exist_ok=True)
    with counting("predicting", len(sources), quiet) as advance:
        for source, name in zip(sources, distinct_names(sources), strict=True):
            try:
                image = source.read()
            except DataError as error:
                result.skipped.append(str(error))
            else:
                found = find(opened, source, name, image, threshold)
                result.images.append(found)
                beside = [(second, find(second, source, name, image, threshold))] if second is not None else []
                write_picture(output / f"{name}.jpg", image, [(opened, found), *beside], [checkpoint, teacher])
                if crop:
                    _write_crops(output / CROPS, image, found, result.classes)
            advance(1)
    if coco:
        write_json(output / COCO, coco_content(result.images, result.classes))
    if yolo:
        _write_labels(output, result)
    return result


def _refuse(output: Path, sources: Sequence[Source], overwrite: bool) -> None:
    if output.is_dir() and any(source.path.resolve().parent == output.resolve() for source in sources):
        raise RunError(f"{output}: holds the images themselves; name another folder with --output")
    if output.exists() and not output.is_dir():
        raise RunError(f"{output}: is a file; --output must name a folder")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise RunError(f"{output}: is not empty; add --overwrite to write over what has the same name, or name another")


def _of_device(changes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in changes.items() if name == "run.device"}


@torch.no_grad()
def find(opened: Opened, source: Source, name: str, image: Tensor, threshold: float) -> Found:
    """The detections in an image from a score on."""
    with told(lambda: of_detecting(opened.detector, opened.device, f"detecting in {source.path}")):
        (output,) = opened.detector.detect([image.to(opened.device)])
    sure = output["scores"] >= threshold
    boxes, scores, labels = (output[key][sure].cpu() for key in ("boxes", "scores", "labels"))
    return Found(name, source.path, tuple(image.shape[-2:]), boxes.float(), scores.float(), labels)


def write_picture(
    path: Path, image: Tensor, detections: Sequence[tuple[Opened, Found]], titles: Sequence[str | None]
) -> None:
    """The image with its detections; where there are two detectors, one beside the other, a class of one colour."""
    names = list(dict.fromkeys(name for opened, _ in detections for name in opened.detector.classes))
    pictures = []
    for opened, found in detections:
        kinds = [opened.detector.classes[label - 1] for label in found.labels.tolist()]
        texts = [f"{kind} {score:.2f}" for kind, score in zip(kinds, found.scores.tolist(), strict=True)]
        pictures.append(draw(image, found.boxes, texts, [names.index(kind) for kind in kinds]))
    picture = pictures[0] if len(pictures) == 1 else side_by_side(pictures, titles)
    with replacing(path) as temporary:
        picture.save(temporary, quality=92)


def _write_crops(folder: Path, image: Tensor, found: Found, classes: Sequence[str]) -> None:
    folder.mkdir(exist_ok=True)
    for name, picture in crops(image, found, classes):
        with replacing(folder / name) as temporary:
            picture.save(temporary)


def _write_labels(output: Path, predictions: Predictions) -> None:
    """YOLO's label files, one an image, empty where nothing was found, and the names of the classes."""
    (output / LABELS).mkdir(exist_ok=True)
    texts = {output / LABELS / f"{found.name}.txt": yolo_text(found) for found in predictions.images}
    texts[output / CLASSES] = "".join(f"{name}\n" for name in predictions.classes)
    for path, text in texts.items():
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
