"""Detectors: what distillation needs of them, torchvision's families by it, and what they are built from."""

from defeat_cli.detectors.contract import Batch, Detector, FeatureDetector, Regions

__all__ = ["Batch", "Detector", "FeatureDetector", "Regions"]
