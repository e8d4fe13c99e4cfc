"""One way to load a detector's weights, whoever trained it: the format is recognised from the content."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from defeat_cli.checkpoints import detectron2, mmdet, native, torchvision
from defeat_cli.checkpoints.reading import described, read
from defeat_cli.checkpoints.weights import Weights
from defeat_cli.config.architecture import Architecture
from defeat_cli.config.schema import recipes_folder
from defeat_cli.errors import CheckpointError

FORMATS = {"native": native, "mmdet": mmdet, "detectron2": detectron2, "torchvision": torchvision}
"""Formats by name, in the order they are tried.

Each is a module with `matches(content) -> bool` and `to_weights(content, origin, architecture) -> Weights`.
"""

TORCHVISION_PREFIX = "torchvision:"
SHIPPED_PREFIX = "shipped:"
"""Before the name of a file that comes with the tool, beside its recipes."""


def load_weights(source: str | Path, architecture: Architecture | None = None) -> Weights:
    """The detector in a checkpoint file, or torchvision's own by `torchvision:NAME`. No code in the file is run.

    Args:
        architecture: what the caller says of the detector; readers ask it for what neither file nor keys tell.

    Raises:
        CheckpointError: the file cannot be read (says what is inside), or holds no detector that we know.
    """
    if str(source).startswith(TORCHVISION_PREFIX):
        return replace(torchvision.download(str(source).removeprefix(TORCHVISION_PREFIX)), origin=str(source))
    path = file_of(source)
    content = read(path)
    form = next((form for form in FORMATS.values() if form.matches(content)), None)
    if form is None:
        raise CheckpointError(
            f"{path}: no detector of a known format ({', '.join(FORMATS)}) is inside. Found: {described(content)}"
        )
    try:
        return replace(form.to_weights(content, str(path), architecture), origin=str(source))
    except ValidationError as error:  # settings in the file that no detector can have
        problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise CheckpointError("\n  ".join([f"{path}: its settings cannot be used:", *problems])) from None


def file_of(source: str | Path) -> Path:
    """The file that a checkpoint's name means: `shipped:NAME` is one that comes with the tool."""
    name = str(source)
    if name.startswith(SHIPPED_PREFIX):
        return recipes_folder() / name.removeprefix(SHIPPED_PREFIX)
    return Path(source)
