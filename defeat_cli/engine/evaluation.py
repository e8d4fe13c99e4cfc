"""COCO mAP of a detector on a dataset."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from itertools import chain, zip_longest
from typing import Any, Protocol

import torch
from pycocotools.coco import COCO
from torch import Tensor, nn
from torch.utils.data import Subset

from defeat_cli.data.dataset import DetectionDataset
from defeat_cli.data.loading import evaluation_loader
from defeat_cli.detectors.modes import detecting
from defeat_cli.distillation.pairing import match_classes
from defeat_cli.engine import scorers
from defeat_cli.engine.distributed import ALONE, World
from defeat_cli.engine.watch import EVALUATING, REST
from defeat_cli.errors import DataError
from defeat_cli.text import listed

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""pycocotools' twelve figures in its own order; fractions 0-1, -1 where there is nothing to score."""


class CocoEvaluator:
    """Collects detections and scores them against COCO annotations.

    Args:
        coco: ground truth.
        classes: the detector's class names, label `i + 1` being `classes[i]`, matched to the data's as
            `pairing.match_classes` does it. Detections of classes that the data does not have are left out.

    Raises:
        DataError: no class name is in the ground truth.
    """

    def __init__(self, coco: COCO, classes: list[str]) -> None:
        self.coco = coco
        categories = coco.loadCats(coco.getCatIds())
        names = [category["name"] for category in categories]
        self.category_of_label = {d + 1: categories[c]["id"] for c, d in match_classes(names, classes)}
        if not self.category_of_label:
            raise DataError(
                f"the detector and the data share no class: the detector knows {listed(classes)}; "
                f"the data has {listed(names)}"
            )
        self.reset()

    def reset(self) -> None:
        """Forget all detections."""
        self.image_ids: list[int] = []
        self.detections: list[dict[str, Any]] = []

    def process(self, image_ids: list[int], outputs: list[dict[str, Tensor]]) -> None:
        """Add the detections of some images, as `Detector.detect` gives them."""
        for image_id, output in zip(image_ids, outputs, strict=True):
            self.image_ids.append(image_id)
            boxes = output["boxes"].float().cpu()
            boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
            for box, score, label in zip(
                boxes.tolist(), output["scores"].tolist(), output["labels"].tolist(), strict=True
            ):
                category = self.category_of_label.get(label)
                if category is not None:
                    self.detections.append({"image_id": image_id, "category_id": category, "bbox": box, "score": score})

    def gather(self, world: World) -> None:
        """Take in, on the main process, what all of them have found on images that they took in turn."""
        every = world.gather((self.image_ids, self.detections))
        if every:
            turns = zip_longest(*(image_ids for image_ids, _ in every))
            self.image_ids = [image_id for turn in turns for image_id in turn if image_id is not None]
            place = {image_id: i for i, image_id in enumerate(self.image_ids)}
            found = chain.from_iterable(detections for _, detections in every)
            self.detections = sorted(found, key=lambda detection: place[detection["image_id"]])

    def evaluate(self) -> dict[str, Any]:
        """The twelve `FIGURES` over the processed images, and `per_class`: name -> AP (-1 where it has no boxes)."""
        scorer = scorers.score(self.coco, self._results(), self.image_ids)
        metrics: dict[str, Any] = dict(zip(FIGURES, map(float, scorer.stats), strict=True))
        precision = scorer.eval["precision"][:, :, :, 0, -1]  # IoU x recall x class, all areas, 100 detections
        names = {category["id"]: category["name"] for category in self.coco.loadCats(scorer.params.catIds)}
        metrics["per_class"] = {}
        for k, category in enumerate(scorer.params.catIds):
            scored = precision[:, :, k][precision[:, :, k] > -1]
            metrics["per_class"][names[category]] = float(scored.mean()) if scored.size else -1.0
        return metrics

    def _results(self) -> COCO:
        if self.detections:
            with contextlib.redirect_stdout(io.StringIO()):
                return self.coco.loadRes([dict(detection) for detection in self.detections])
        empty = COCO()
        empty.dataset = {**self.coco.dataset, "annotations": []}
        with contextlib.redirect_stdout(io.StringIO()):
            empty.createIndex()
        return empty


class Finder(Protocol):
    """What evaluation needs of a detector; see `detectors.contract.Detector`. One that is no module is on the CPU."""

    @property
    def classes(self) -> list[str]: ...

    def detect(self, images: list[Tensor]) -> list[dict[str, Tensor]]: ...


def evaluate(
    detector: Finder,
    dataset: DetectionDataset | Subset,
    *,
    workers: int = 0,
    autocast: torch.dtype | None = None,
    on_image: Callable[[int], None] = lambda images: None,
    keep_detections: list[dict[str, Any]] | None = None,
    world: World = ALONE,
) -> dict[str, Any]:
    """Detect on one image at a time, as plain torchvision does in use, and score the result.

    In a batch an image would be padded to the size of others, and its detections would depend on them.

    Args:
        dataset: images with their ground truth, or some of them.
        workers: loader processes.
        autocast: dtype of autocast, None for full precision.
        on_image: told the number of images done after each, by all processes together.
        keep_detections: a list that the detections are appended to, in COCO results format; on the main process.
        world: the processes that share the images out, each of which has to call this.

    Returns:
        The metrics of `CocoEvaluator.evaluate`, the same on every process.
    """
    whole = dataset.dataset if isinstance(dataset, Subset) else dataset
    evaluator = CocoEvaluator(whole.coco, detector.classes)
    is_module = isinstance(detector, nn.Module)
    device = next(detector.parameters()).device if is_module else torch.device("cpu")
    mine = dataset if world.size == 1 else Subset(dataset, range(world.rank, len(dataset), world.size))
    loader = evaluation_loader(mine, workers, pin_memory=device.type == "cuda")
    with detecting(detector, autocast) if is_module else contextlib.nullcontext():
        for images, _, image_ids in loader:
            evaluator.process(image_ids, detector.detect([image.to(device, non_blocking=True) for image in images]))
            on_image(len(images) * world.size)
            world.watch.at(EVALUATING)
    world.watch.at(REST)
    evaluator.gather(world)
    if keep_detections is not None and world.is_main:
        keep_detections.extend(evaluator.detections)
    return world.on_main(evaluator.evaluate)
