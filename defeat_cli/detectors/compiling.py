"""`torch.compile` for backbones and necks, in place: no key of a state dict changes.

What follows them (proposals, matching, sampling, losses) depends on what is found in the images, and stays as it is.
"""

from __future__ import annotations

import torch

from defeat_cli.detectors.contract import Detector, TorchvisionDetector
from defeat_cli.errors import RunError

BACKEND = "inductor"
"""torch's own name of what compiles."""


def require_compiler(device: torch.device) -> None:
    """Find out whether `torch.compile` works on a device.

    Raises:
        RunError: it does not; says why.
    """
    try:
        torch.compile(lambda x: x.sin() + 1, backend=BACKEND)(torch.zeros(8, device=device))
    except Exception as error:  # whatever a missing compiler makes of itself
        reason = " ".join([line for line in str(error).splitlines() if line.strip()][:2]) or type(error).__name__
        raise RunError(f"run.compile: torch cannot compile for {device.type} here ({reason}); use false") from error


def compile_networks(*detectors: Detector | None) -> None:
    """Compile the body and the neck of each detector, at the first batches that they see.

    A few times for each of them: for the shape of the first batch, then once for batches of any other height and width,
    of any other number of images, and of one image.
    """
    for detector in detectors:
        if isinstance(detector, TorchvisionDetector):
            detector.model.backbone.body.compile(backend=BACKEND)
            detector.model.backbone.fpn.compile(backend=BACKEND)
