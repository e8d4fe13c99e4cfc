"""Weights & Biases: online where there is a key, else offline in the run's folder, for `wandb sync`."""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

PROJECT = "defeat"
HOST = "https://api.wandb.ai"


class WeightsAndBiases:
    """See `following.Tracker`. Its own environment variables (WANDB_MODE, WANDB_PROJECT, …) are obeyed.

    Steps go along as a value: W&B's own count of steps would refuse one that comes later than a larger one.
    """

    package = "wandb"

    def __init__(self, folder: Path, name: str, recipe: Mapping[str, Any], id: str | None) -> None:
        import wandb

        self.wandb = wandb
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=str(folder),
            id=id,
            name=name,
            config=dict(recipe),
            resume="allow",
            reinit="create_new",
            mode=None if "WANDB_MODE" in os.environ or has_key() else "offline",
            settings=wandb.Settings(console="off", silent=True),
        )
        self.id = self.run.id
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self.run.log({**scalars, "step": step})

    def show(self, pictures: Mapping[str, Image.Image], step: int) -> None:
        self.run.log({**{title: self.wandb.Image(picture) for title, picture in pictures.items()}, "step": step})

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)


def has_key() -> bool:
    """Whether there is a key for the server: in the environment, or where `wandb login` leaves it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", HOST)).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
