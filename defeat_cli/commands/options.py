"""Options that commands share, and what they mean for a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from defeat_cli.errors import DefeatError

if TYPE_CHECKING:
    from defeat_cli.config.schema import Recipe

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
    assigned = parse_assignments(assignments or [])
    for key in given.keys() & assigned.keys():
        raise DefeatError(f"--set {key}: another option of the command line says it too; give one of them")
    return {**assigned, **given}


def without(option: str, arguments: list[str]) -> list[str]:
    """A command line without an option that takes a value."""
    kept, skip = [], False
    for argument in arguments:
        if skip or argument.startswith(f"{option}="):
            skip = False
        elif argument == option:
            skip = True
        else:
            kept.append(argument)
    return kept


def options_said(ctx: typer.Context) -> dict[str, str]:
    """Parameters that the command line gave, by name, each as it is spelled there."""
    return {p.name: p.opts[0] for p in ctx.command.params if ctx.get_parameter_source(p.name).name == "COMMANDLINE"}


def recipe_to_train(
    recipe: str | None, said: dict[str, Any], variant: str | None = None, variants: Path | None = None
) -> Recipe:
    """The recipe of a training, with a variant of it where one is named.

    Args:
        said: dotted overrides of the command line, which come last.
        variants: file with variants beside the shipped ones.

    Raises:
        DefeatError: no such recipe or variant, or something was said that has no effect.
    """
    from defeat_cli.config.given import COMMAND_LINE, given_settings
    from defeat_cli.config.idle import idle_in_training, refuse_idle
    from defeat_cli.config.schema import load, merged
    from defeat_cli.config.variants import find_variant, read_variants

    if recipe is None:
        raise DefeatError(
            "no recipe: give --recipe quickstart, or a file (defeat train --list-recipes shows the shipped)"
        )
    own = find_variant(variant, read_variants(variants)).overrides if variant else {}
    chosen = load(recipe, {**own, **said})
    if variant and chosen.distillation.terms and not (chosen.teacher.checkpoint or chosen.teacher.recipe):
        raise DefeatError(f"--variant {variant}: there is no teacher to distil from; add --teacher")
    # Null is what one says to undo a recipe's setting.
    spoken = {name: value for name, value in said.items() if value is not None}
    refuse_idle(given_settings(merged({}, spoken), COMMAND_LINE), idle_in_training(chosen))
    return chosen
