"""`defeat convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from defeat_cli.commands.options import RecipeOption, SetOption, overrides


def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint of mmdetection, detectron2, torchvision or this tool.")],
    target: Annotated[Path, typer.Argument(help="File for the plain state dict; its recipe is written beside it.")],
    recipe: RecipeOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    set_: SetOption = None,
) -> None:
    """Convert a checkpoint into a plain torchvision state dict."""
    from defeat_cli.jobs import converting

    converting.convert(source, target, recipe, overrides(set_), overwrite)
