"""`defeat convert`: a checkpoint of any format as a plain torchvision state dict."""

from __future__ import annotations

from pathlib import Path

import yaml

from defeat_cli.checkpoints.loading import load_weights
from defeat_cli.checkpoints.native import write_atomically
from defeat_cli.checkpoints.weights import load_strict
from defeat_cli.config.architecture import Architecture, changed_settings
from defeat_cli.config.schema import Data
from defeat_cli.detectors.zoo import build_detector
from defeat_cli.errors import CheckpointError
from defeat_cli.export.loader import loader_name, write_loader
from defeat_cli.files import replacing


def convert(source: str, target: Path, architecture: Architecture | None = None, overwrite: bool = False) -> list[str]:
    """Write `target` (a plain state dict) and beside it a recipe (`.yaml`) that says what it is a state dict of, and a
    script that loads it in plain torchvision.

    The recipe holds the numerical conventions of the library that trained the detector, which a state dict cannot.

    Args:
        architecture: for a plain state dict that does not say what it is.

    Returns:
        One line on each thing that was recognised, converted, dropped or written.

    Raises:
        CheckpointError: `source` cannot be read or represented, or `target` is there already.
    """
    recipe, loader = target.with_suffix(".yaml"), target.with_name(loader_name(target.name))
    for path in (target, recipe, loader):
        if path.exists() and not overwrite:
            raise CheckpointError(f"{path}: is there already; add --overwrite, or name another file")
    weights = load_weights(source, architecture)
    classes = weights.classes or [f"class {i}" for i in range(1, weights.num_classes + 1)]
    sizes = Data()
    short_side, long_side = weights.short_side or sizes.short_side[-1], weights.long_side or sizes.long_side
    detector = build_detector(weights.architecture, classes, short_side=[short_side], long_side=long_side)
    load_strict(detector.model, weights.state_dict, source)
    write_atomically(target, detector.model.state_dict())
    content = {
        "student": changed_settings(weights.architecture),
        "data": {"short_side": [short_side], "long_side": long_side},
    }
    with replacing(recipe) as temporary:
        temporary.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    write_loader(target, weights.architecture, classes, short_side, long_side)
    return [
        *weights.notes,
        f"{target}: {len(detector.model.state_dict())} tensors, {len(classes)} classes"
        + ("" if weights.classes is None else f" ({', '.join(classes[:5])}{', …' if len(classes) > 5 else ''})"),
        f"{recipe}: its architecture and conventions; use it as --recipe",
        f"{loader}: loads it in plain torchvision",
    ]
