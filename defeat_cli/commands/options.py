"""Options that commands share, and what they mean for a recipe."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from defeat_cli.errors import DefeatError

if TYPE_CHECKING:
    from defeat_cli.config.schema import Recipe

RecipeOption = Annotated[
    str | None, typer.Option("--recipe", "-r", help="A recipe file, or the name of a shipped one.")
]
TeacherOption = Annotated[
    str | None,
    typer.Option("--teacher", "-t", help="Teacher checkpoint, or torchvision:NAME. Without one: plain training."),
]
DataOption = Annotated[str | None, typer.Option("--data", "-d", help="Data folder; its layout is recognised.")]
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
    recipe: str | None,
    said: dict[str, Any],
    variant: str | None = None,
    variants: Path | None = None,
    *,
    folder: Callable[[str], Path] | None = None,
    quiet: bool = False,
) -> Recipe:
    """The recipe of a training, with a variant of it where one is named. Without a recipe one is chosen.

    Args:
        said: dotted overrides of the command line, which come last.
        variants: file with variants beside the shipped ones.
        folder: recipe's name, empty while none is chosen -> where a run may have been begun that is to go on, which it
            does by the recipe that it has.

    Raises:
        DefeatError: no such recipe or variant, or something was said that has no effect.
    """
    from defeat_cli.config.given import COMMAND_LINE, given_settings
    from defeat_cli.config.idle import idle_in_training, refuse_idle
    from defeat_cli.config.schema import ONLY, load, merged
    from defeat_cli.config.variants import find_variant, read_variants

    own = find_variant(variant, read_variants(variants)).overrides if variant else {}
    if ONLY in own and ONLY not in said:
        _refuse_terms_without(variant, own[ONLY], said)
    changes = {**own, **said}
    recipe = recipe or _begun(folder, "")
    if recipe is not None:
        chosen = load(recipe, changes)
    else:
        from defeat_cli.console import Reporter

        announce_loading(quiet)
        from defeat_cli.jobs.choosing import choose_recipe

        chosen = choose_recipe(changes, Reporter("recipe", quiet))
        begun = _begun(folder, chosen.run.name)
        chosen = load(begun, changes) if begun is not None else chosen
    if variant and chosen.distillation.terms and not (chosen.teacher.checkpoint or chosen.teacher.recipe):
        raise DefeatError(f"--variant {variant}: there is no teacher to distil from; add --teacher")
    # Null is what one says to undo a recipe's setting.
    spoken = {name: value for name, value in said.items() if value is not None}
    refuse_idle(given_settings(merged({}, spoken), COMMAND_LINE), idle_in_training(chosen))
    return chosen


def _refuse_terms_without(variant: str, terms: list[str], said: dict[str, Any]) -> None:
    """Refuse settings of a term that is not among a variant's: they would switch it on again."""
    from defeat_cli.config.schema import ONLY
    from defeat_cli.config.terms import SETTINGS

    for key, value in said.items():
        section, name = [*key.split("."), ""][:2]
        if section == "distillation" and name in SETTINGS and name not in terms and value is not None:
            raise DefeatError(
                f"{key}: --variant {variant} is without {name}; leave one of the two out, or name the terms: "
                f"--set {ONLY}=[{', '.join([*terms, name])}]"
            )


def announce_loading(quiet: bool) -> None:
    """Say that PyTorch is being loaded, where it is yet to be: that alone may take half a minute."""
    from defeat_cli.console import Reporter

    if "torch" not in sys.modules:
        Reporter("", quiet).doing("loading PyTorch")


def _begun(folder: Callable[[str], Path] | None, name: str) -> str | None:
    """The recipe of what was begun in a run's folder."""
    path = folder(name) / "recipe.yaml" if folder is not None else None
    return str(path) if path is not None and path.is_file() else None
