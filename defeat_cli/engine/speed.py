"""How long a detector takes for an image, in use: one at a time, from pixels to boxes."""

from __future__ import annotations

import time
from statistics import median

import torch

from defeat_cli.data.dataset import DetectionDataset
from defeat_cli.detectors.contract import Detector
from defeat_cli.detectors.modes import detecting

WARM, MOST, SECONDS = 2, 10, 5.0
"""Images that are not counted, most that are, and the time after which no further one is begun."""


def milliseconds_per_image(detector: Detector, data: DetectionDataset, autocast: torch.dtype | None = None) -> float:
    """Median over a few images, spread over the data, in milliseconds. Reading them is not counted."""
    device = next(detector.parameters()).device
    taken: list[float] = []
    begun = time.perf_counter()
    chosen = [i * len(data) // (WARM + MOST) for i in range(WARM + MOST)]
    with detecting(detector, autocast):
        for index in chosen:
            images = [data[index].image.to(device)]
            _wait(device)
            start = time.perf_counter()
            detector.detect(images)
            _wait(device)
            taken.append(1000 * (time.perf_counter() - start))
            if len(taken) > WARM and time.perf_counter() - begun > SECONDS:
                break
    return round(median(taken[WARM:]), 2)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
