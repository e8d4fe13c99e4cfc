"""`defeat check`."""

from __future__ import annotations

from typing import Annotated

import typer

from defeat_cli.commands.options import (
    DataOption,
    DeviceOption,
    RecipeOption,
    SetOption,
    TeacherOption,
    announce_loading,
    overrides,
    recipe_to_train,
)
from defeat_cli.console import show


def check(
    recipe: RecipeOption = None,
    teacher: TeacherOption = None,
    data: DataOption = None,
    variant: Annotated[str | None, typer.Option(help="Distillation variant; see `defeat ablate --list`.")] = None,
    device: DeviceOption = None,
    set_: SetOption = None,
) -> None:
    """Tell what a run would do: detectors, how levels and classes pair up, active terms, memory, the teacher's AP."""
    said = overrides(set_, teacher__checkpoint=teacher, data__path=data, run__device=device)
    chosen = recipe_to_train(recipe, said, variant)
    announce_loading(quiet=False)
    from defeat_cli.jobs import checking

    for table in checking.check(chosen).tables:
        show(table)
