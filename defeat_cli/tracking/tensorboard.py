"""TensorBoard: event files in the run's folder, `tensorboard --logdir runs` shows all runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from defeat_cli.engine.runs import EVENTS


class TensorBoard:
    """See `following.Tracker`. A run that is resumed adds a file, which TensorBoard reads as one with the others."""

    package = "tensorboard"
    id = None

    def __init__(self, folder: Path, name: str, recipe: Mapping[str, Any], id: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        begun = any((folder / EVENTS).glob("*"))
        self.writer = SummaryWriter(str(folder / EVENTS))
        if not begun:
            text = yaml.safe_dump(dict(recipe), sort_keys=False)
            self.writer.add_text("recipe", "".join(f"    {line}\n" for line in text.splitlines()))

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def show(self, pictures: Mapping[str, Image.Image], step: int) -> None:
        for title, picture in pictures.items():
            self.writer.add_image(title, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        self.writer.flush()

    def close(self, finished: bool) -> None:
        self.writer.close()
