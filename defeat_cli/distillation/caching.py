"""A frozen teacher's maps, kept, so that it looks at the same pixels once and not in every epoch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Literal

import torch
from torch import Tensor

from defeat_cli.detectors.contract import Batch, Detector, Level

Key = tuple[bytes, torch.Size, tuple[int, int], torch.dtype]


class FeatureCache:
    """Maps of a detector that does not change, by the pixels that they were computed from.

    An image is found again wherever its pixels are the same: mirrored, resized or padded otherwise it is another one.
    Each is computed alone, kept or not, because the last bits of a convolution may depend on what else is in the batch:
    so a run that is resumed, whose cache is empty, goes on bit for bit.

    Maps stay on the device that computed them, in its precision: under autocast in 16 bits an element.

    Args:
        limit: bytes that are kept at most. What comes after that is computed each time.
        place: which maps, FPN features or backbone stages (from which a neck makes features quickly).

    Attributes:
        bytes: that are kept.
    """

    def __init__(self, limit: int, place: Literal["neck", "backbone"] = "neck") -> None:
        self.limit, self.place, self.bytes = limit, place, 0
        self._kept: dict[Key, list[Tensor]] = {}

    @torch.no_grad()
    def maps(self, detector: Detector, batch: Batch) -> list[Tensor]:
        """What the detector gives, but for rounding: finest first, each [N, C_l, h_l, w_l], float32.

        On a GPU the host waits for the pixels, once a batch.
        """
        found = [self._of_image(detector, batch, i, pixels) for i, pixels in enumerate(batch.pixels.cpu())]
        return [torch.cat(level).to(batch.pixels.dtype) for level in zip(*found, strict=True)]

    def clear(self) -> None:
        """Keep nothing of what is kept."""
        self._kept.clear()
        self.bytes = 0

    def _of_image(self, detector: Detector, batch: Batch, i: int, pixels: Tensor) -> list[Tensor]:
        """Each level as [1, C_l, h_l, w_l]."""
        device = batch.pixels.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else pixels.dtype
        numbers = pixels.contiguous().view(torch.uint8).numpy()
        key = (blake2b(numbers, digest_size=16).digest(), pixels.shape, batch.sizes[i], dtype)
        if key not in self._kept:
            alone = replace(batch, pixels=batch.pixels[i : i + 1], sizes=batch.sizes[i : i + 1], targets=None)
            computed = detector.features(alone) if self.place == "neck" else detector.stages(alone)
            levels = [_of_its_own(level.to(dtype)) for level in computed]
            size = sum(level.nbytes for level in levels)
            if self.bytes + size > self.limit:
                return levels
            self._kept[key] = levels
            self.bytes += size
        return self._kept[key]


def _of_its_own(level: Tensor) -> Tensor:
    """The same map without a larger tensor that it is a part of, which would be kept with it."""
    return level if level.untyped_storage().nbytes() == level.nbytes else level.clone()


def bytes_of_maps(levels: Sequence[Level], sizes: Iterable[tuple[int, int]], dtype: torch.dtype | None) -> int:
    """What a cache takes for images of these (height, width), padding included, in network-input pixels.

    Args:
        dtype: of autocast; None is float32.
    """
    numbers = sum(
        level.channels * math.ceil(height / level.stride) * math.ceil(width / level.stride)
        for height, width in sizes
        for level in levels
    )
    return numbers * (dtype or torch.float32).itemsize
