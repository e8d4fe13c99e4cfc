"""A frozen teacher's maps, kept, so that it looks at the same pixels once and not in every epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from hashlib import blake2b
from typing import Literal

import torch
from torch import Tensor

from defeat_cli.detectors.contract import Batch, Detector, Level
from defeat_cli.distillation.map_folder import Key, MapFolder


class FeatureCache:
    """Maps of a detector that does not change, by the pixels that they were computed from.

    Each image is looked at alone, as in evaluation, without the padding that it has in a batch with larger ones: so it
    is found again in any batch, and a run that is resumed, whose cache is empty, goes on bit for bit. An image that is
    mirrored or resized otherwise is another one.

    Maps stay on the device that computed them, in its precision: under autocast in 16 bits an element.

    Args:
        limit: bytes that are kept at most. What comes after that is computed each time.
        place: which maps, FPN features or backbone stages (from which a neck makes features quickly).

    Attributes:
        bytes: that are kept.
        folder: in which the runs of a study keep maps for each other; None outside of one.
    """

    def __init__(self, limit: int, place: Literal["neck", "backbone"] = "neck") -> None:
        self.limit, self.place, self.bytes = limit, place, 0
        self.folder: MapFolder | None = None
        self._kept: dict[Key, list[Tensor]] = {}

    @torch.no_grad()
    def maps(self, detector: Detector, batch: Batch) -> list[Tensor]:
        """What the detector makes of each image alone, and of nothing but padding around it.

        On a GPU the host waits for the pixels, once a batch.

        Returns:
            Finest first, each [N, C_l, h_l, w_l], float32: of the shapes that the detector gives for the batch.
        """
        images = batch.pixels.cpu()
        found = []
        for i, size in enumerate(batch.sizes):
            height, width = (math.ceil(side / detector.divisible) * detector.divisible for side in size)
            numbers = images[i, :, :height, :width].contiguous().view(torch.uint8).numpy()
            digest = blake2b(numbers, digest_size=16).digest()
            found.append(self._of(detector, batch.pixels[i : i + 1, :, :height, :width], size, digest))
        padding = self._of(detector, torch.zeros_like(batch.pixels[:1]), (0, 0), b"")
        levels = [torch.cat([level] * len(images)) for level in padding]
        for i, of_image in enumerate(found):
            for level, own in zip(levels, of_image, strict=True):
                level[i, :, : own.shape[-2], : own.shape[-1]] = own[0]
        return [level.to(batch.pixels.dtype) for level in levels]

    def clear(self) -> None:
        """Keep nothing of what is kept."""
        self._kept.clear()
        self.bytes = 0

    def _of(self, detector: Detector, pixels: Tensor, size: tuple[int, int], digest: bytes) -> list[Tensor]:
        """Each level of one image as [1, C_l, h, w]."""
        device = pixels.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else pixels.dtype
        key = (digest, pixels.shape, size, dtype)
        if key in self._kept:
            return self._kept[key]
        levels = self.folder.read(key) if self.folder is not None else None
        if levels is None:
            began = time.perf_counter()
            alone = Batch(pixels, [size])
            maps = detector.features(alone) if self.place == "neck" else detector.stages(alone)
            levels = [_of_its_own(level.to(dtype)) for level in maps]
            if self.folder is not None:
                self.folder.write(key, levels, time.perf_counter() - began)
        taken = sum(level.nbytes for level in levels)
        if self.bytes + taken <= self.limit:
            self._kept[key] = levels
            self.bytes += taken
        return levels


def _of_its_own(level: Tensor) -> Tensor:
    """The same map without a larger tensor that it is a part of, which would be kept with it."""
    return level if level.untyped_storage().nbytes() == level.nbytes else level.clone()


def bytes_of_maps(
    levels: Iterable[Level], sizes: Iterable[tuple[int, int]], divisible: int, dtype: torch.dtype | None
) -> int:
    """What a cache takes for images of these (height, width) in network-input pixels.

    Args:
        divisible: sides are padded to a multiple of it.
        dtype: of autocast; None is float32.
    """
    shapes = [[math.ceil(side / divisible) * divisible for side in size] for size in sizes]
    cells = sum(
        level.channels * math.ceil(height / level.stride) * math.ceil(width / level.stride)
        for level in levels
        for height, width in shapes
    )
    return cells * (dtype or torch.float32).itemsize
