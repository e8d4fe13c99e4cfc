"""What an exported file gains and loses in fewer bits: size, time and AP, before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from defeat_cli import session
from defeat_cli.benchmark.timing import Stopwatch
from defeat_cli.config.schema import Data
from defeat_cli.console import counting, new_table, percent
from defeat_cli.data.dataset import DetectionDataset
from defeat_cli.data.transforms import read_image
from defeat_cli.engine.evaluation import evaluate
from defeat_cli.errors import DataError
from defeat_cli.export.fewer_bits import Precision, to_half, to_int8
from defeat_cli.export.graph import Input
from defeat_cli.export.runtime import OnnxDetector, as_input

CALIBRATED = 64
"""Training images that the ranges of 8-bit integers are taken from, spread over the data."""

TIMED = 8
"""Validation images, spread over the data, on which files are timed in turn."""


@dataclass(frozen=True)
class Cost:
    """size: bytes. milliseconds: an image, by onnxruntime on this machine's CPU. ap: on the validation images."""

    size: int
    milliseconds: float
    ap: float


def has_data(data: Data) -> bool:
    return data.path is not None and Path(data.path).exists()


def require_calibration(precision: Precision, data: Data) -> None:
    """Refuse integers without images to take the ranges of feature maps from.

    Raises:
        DataError: there are none.
    """
    if precision == "int8" and not has_data(data):
        missing = "" if data.path is None else f", and {data.path} is not there"
        raise DataError(
            f"--int8: needs images to take the ranges of feature maps from{missing}: give a folder with --data"
        )


def in_precision(content: bytes, precision: Precision, kind: Input, data: Data, quiet: bool = False) -> bytes:
    """An exported ONNX file in fewer bits.

    Args:
        kind: what the file takes.
        data: where the images are that integers are calibrated on.

    Raises:
        DefeatError: a package is missing, or the images cannot be used.
    """
    if precision == "half":
        return to_half(content)
    images = session.open_data(data, "train", train=False)
    with counting("calibrating", min(CALIBRATED, len(images)), quiet) as advance:
        return to_int8(content, _calibration(images, kind, advance))


def _calibration(data: DetectionDataset, kind: Input, advance: Callable[[int], None]) -> Iterator[np.ndarray]:
    count = min(CALIBRATED, len(data))
    for i in range(count):
        yield as_input(read_image(data.images / data.file_name(i * len(data) // count)), kind)
        advance(1)


def costs(files: Mapping[str, bytes], data: Data, quiet: bool = False) -> dict[str, Cost]:
    """What each file costs, by its name.

    Raises:
        DefeatError: the validation images cannot be used, or have no boxes.
    """
    images = session.open_data(data, "val", train=False)
    detectors = {name: OnnxDetector(content, name) for name, content in files.items()}
    times = _milliseconds(detectors, [images[i * len(images) // TIMED].image for i in range(TIMED)])
    found = {}
    for name, detector in detectors.items():
        with counting(f"evaluating {name}", len(images), quiet) as advance:
            metrics = evaluate(detector, images, workers=session.loader_processes(data.workers), on_image=advance)
        found[name] = Cost(len(files[name]), times[name], metrics["AP"])
    return found


def _milliseconds(detectors: Mapping[str, OnnxDetector], images: Sequence[Tensor]) -> dict[str, float]:
    """Median of each, by name; in turn, so that whatever else the machine does slows all of them."""
    watch = Stopwatch(torch.device("cpu"))
    for number, image in enumerate([images[0], *images]):
        if number == 1:
            watch.forget()
        for name, detector in detectors.items():
            with watch.timing(name):
                detector.detect([image])
    return {name: watch.spread(name).median for name in detectors}


def cost_table(costs: Mapping[str, Cost], data: Data) -> Table:
    """What a user sees of `costs`; differences are those to the first."""
    first = next(iter(costs.values()))
    rows = [
        [
            name,
            f"{cost.size / 2**20:.1f}",
            f"{cost.milliseconds:.1f}",
            percent(cost.ap),
            "" if cost is first else f"{100 * (cost.ap - first.ap):+.1f}",
        ]
        for name, cost in costs.items()
    ]
    title = f"before and after, by onnxruntime on this CPU, on the validation images of {data.path}"
    return new_table(title, ["", "MiB", "ms", "AP", "Δ AP"], rows)
