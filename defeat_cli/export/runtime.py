"""Exported ONNX files as detectors, run by onnxruntime on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from defeat_cli.detectors.contract import in_unit_range
from defeat_cli.errors import CheckpointError
from defeat_cli.export.graph import METADATA, OUTPUTS, Card, missing_package

SUFFIX = ".onnx"


class OnnxDetector:
    """An exported file, with what prediction needs of a detector: `classes` and `detect`.

    Args:
        file: the file, or its content.
        origin: names it in an error.

    Raises:
        DefeatError: onnxruntime is not installed.
        CheckpointError: the file cannot be run, or was not written by `defeat export`.
    """

    def __init__(self, file: Path | bytes, origin: str | None = None) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise missing_package("onnxruntime", f"running {origin or file}") from None
        origin = origin or str(file)
        if isinstance(file, Path) and not file.is_file():
            raise CheckpointError(f"{origin}: no such file")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors only
        try:
            self.session = onnxruntime.InferenceSession(
                file if isinstance(file, bytes) else str(file), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's own exceptions share no class
            raise CheckpointError(f"{origin}: onnxruntime cannot run it: {error}") from None
        try:
            self.card = Card.from_json(self.session.get_modelmeta().custom_metadata_map[METADATA])
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"{origin}: not an ONNX file as `defeat export` writes it: {error}") from None

    @property
    def classes(self) -> list[str]:
        return self.card.classes

    def detect(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """As `Detector.detect`: images [3, H, W], RGB, uint8 or floats in [0, 1]."""
        return [dict(zip(OUTPUTS, self._run(image), strict=True)) for image in images]

    def _run(self, image: Tensor) -> list[Tensor]:
        outputs = self.session.run(list(OUTPUTS), {"image": as_input(image, self.card.input)})
        return [torch.from_numpy(output) for output in outputs]


def as_input(image: Tensor, kind: str) -> np.ndarray:
    """An image [3, H, W], uint8 or floats in [0, 1], as an exported graph takes it."""
    if kind == "float":
        return in_unit_range(image).numpy()
    pixels = (image * 255).round().byte() if image.is_floating_point() else image
    return pixels.permute(1, 2, 0).contiguous().numpy()
