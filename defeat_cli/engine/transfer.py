"""How a batch gets to the device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(images: list[Tensor], device: torch.device) -> list[Tensor]:
    """Images on a device, by one copy for all, which on a GPU is from pinned memory and not waited for.

    Args:
        images: of any shapes.

    Returns:
        Views of one tensor, or the images themselves where they are on the CPU and stay there.
    """
    if device.type == "cpu":
        return images
    if len({image.dtype for image in images}) > 1:
        return [image.to(device, non_blocking=True) for image in images]
    counts = [image.numel() for image in images]
    packed = torch.empty(sum(counts), dtype=images[0].dtype, pin_memory=device.type == "cuda")
    torch.cat([image.flatten() for image in images], out=packed)
    parts = packed.to(device, non_blocking=True).split(counts)
    return [part.view(image.shape) for part, image in zip(parts, images, strict=True)]
