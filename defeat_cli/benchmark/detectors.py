"""Detectors as users deploy them: an image in, its detections out, nothing else asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from defeat_cli.benchmark.memory import Peak
from defeat_cli.benchmark.timing import Spread, Stopwatch
from defeat_cli.engine.evaluation import Finder

WARM_UP = 3
"""Rounds that are not counted."""

BLOTCHES = (3, 9, 27)
"""Cells a side of the blotches that drawn images are made of, coarse to fine."""


@dataclass(frozen=True)
class Cost:
    """What detecting costs.

    parameters: of the model; None where they are not known.
    gflops: floating-point operations of one image, in 10^9, a multiplication and an addition being two; None likewise.
    memory: peak bytes at batch 1, weights included; None likewise.
    one, many: milliseconds of a call with one image, and with as many as a batch has.
    """

    parameters: int | None
    gflops: float | None
    memory: int | None
    one: Spread
    many: Spread


@torch.no_grad()
def compare(finders: Mapping[str, tuple[Finder, Sequence[Tensor]]], device: torch.device, rounds: int) -> list[Cost]:
    """Measure detectors in turn, round by round.

    Args:
        finders: by name, each in eval mode and on the device, and the images of its batch, [3, H, W] on the device.
    """
    watch = Stopwatch(device)
    for number in range(WARM_UP + rounds):
        if number == WARM_UP:
            watch.forget()
        for name, (finder, images) in finders.items():
            with watch.timing(f"{name}, one"):
                finder.detect([images[number % len(images)]])
            with watch.timing(f"{name}, many"):
                finder.detect(list(images))
    return [
        Cost(
            *_size(finder, images[0], device),
            one=watch.spread(f"{name}, one"),
            many=watch.spread(f"{name}, many"),
        )
        for name, (finder, images) in finders.items()
    ]


def _size(finder: Finder, image: Tensor, device: torch.device) -> tuple[int | None, float | None, int | None]:
    """Parameters, GFLOPs and peak bytes of detecting on an image."""
    if not isinstance(finder, nn.Module):
        return None, None, None
    resident = [*finder.model.parameters(), *finder.model.buffers()]
    with Peak(device, resident) as peak:
        finder.detect([image])
    return sum(parameter.numel() for parameter in finder.model.parameters()), gflops(finder, [image]), peak.bytes


@torch.no_grad()
def gflops(detector: Any, images: list[Tensor]) -> float:
    """Floating-point operations of detecting on images, in 10^9. The detector is in eval mode.

    Convolutions and matrix products count; what they leave out is small.
    """
    counter = FlopCounterMode(display=False)
    with counter:
        detector.detect(images)
    return counter.get_total_flops() / 1e9


def drawn_images(count: int, height: int, width: int) -> list[Tensor]:
    """Images [3, height, width] uint8 of coarse and fine blotches, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for _ in range(count):
        layers = [
            nn.functional.interpolate(torch.rand(1, 3, cells, cells, generator=generator), size=(height, width))[0]
            for cells in BLOTCHES
        ]
        images.append((torch.stack(layers).mean(dim=0) * 255).round().byte())
    return images
