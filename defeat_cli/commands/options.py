"""Options that commands share, and what they mean for a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from defeat_cli.errors import DefeatError

RecipeOption = Annotated[
    str | None, typer.Option("--recipe", "-r", help="A recipe file, or the name of a shipped recipe.")
]
TeacherOption = Annotated[
    str | None,
    typer.Option("--teacher", "-t", help="Teacher checkpoint, or torchvision:NAME. Without one: plain training."),
]
DataOption = Annotated[
    str | None, typer.Option("--data", "-d", help="Data folder: COCO's layout, train.json/val.json/images, or VOC's.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Change a recipe key: optimizer.lr=0.01. Repeatable.")
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
VariantsOption = Annotated[
    Path | None, typer.Option("--variants", help="YAML file with variants of your own: name -> recipe overrides.")
]
OutputOption = Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write to.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Start again where the folder holds a run.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; warnings and results only.")]


def overrides(assignments: list[str] | None, **options: Any) -> dict[str, Any]:
    """Dotted recipe overrides from `--set` and from options of their own (`data__path` is data.path)."""
    from defeat_cli.config.yaml import parse_assignments

    given = {key.replace("__", "."): value for key, value in options.items() if value is not None}
    return {**parse_assignments(assignments or []), **given}


def required(recipe: str | None) -> str:
    """The recipe that a command cannot do without."""
    if recipe is None:
        raise DefeatError(
            "no recipe: give --recipe quickstart, or a file (defeat train --list-recipes shows the shipped)"
        )
    return recipe
