"""Small detectors with random weights that are sure of many things, for there to be something to compare."""

import torch

from defeat_cli.config.architecture import Architecture
from defeat_cli.detectors.zoo import build_detector

SMALL = {
    "faster_rcnn": {
        "fpn_channels": 16, "head_channels": 32, "proposals": 40, "anchor_sizes": [[8], [16], [32], [64], [96]],
    },
    "retinanet": {"fpn_channels": 16, "anchor_sizes": [[8, 11], [16, 22], [32, 45], [64, 90], [96, 120]]},
    "fcos": {"fpn_channels": 64},
}  # fmt: skip


def small(detector="faster_rcnn", **keys):
    """A small architecture, on a tiny RegNet unless another backbone is named."""
    usual = {"backbone": "regnet", "widths": [8, 8, 16, 16], "norm": "batch", "score_threshold": 0.01}
    return Architecture(detector=detector, **{**usual, **SMALL.get(detector, {}), **keys})


def random_detector(classes, architecture, short_side=64, long_side=96):
    """A detector in eval mode."""
    built = build_detector(architecture, classes, [48, short_side], long_side)
    generator = torch.Generator().manual_seed(0)
    for name, value in built.model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith(("running_mean", "bias")):
            value.normal_(std=0.1, generator=generator)
        elif value.ndim == 1 and name.endswith("weight"):
            value.uniform_(0.3, 0.7, generator=generator)
        elif value.ndim > 1:
            # Small at the end, for scores to stay apart from 0 and 1; elsewhere as deep networks are initialised.
            last = "cls" in name or "bbox" in name
            std = 0.05 if last else (2 / value[0].numel()) ** 0.5
            value.normal_(std=std, generator=generator)
    return built.eval()
