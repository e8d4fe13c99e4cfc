"""`defeat check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.padding import Padding
from rich.text import Text

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
from defeat_cli.console import console, show
from defeat_cli.errors import DefeatError
from defeat_cli.files import require_place_for_file, write_json
from defeat_cli.text import counted


def check(
    recipe: RecipeOption = None,
    teacher: TeacherOption = None,
    data: DataOption = None,
    variant: Annotated[str | None, typer.Option(help="Distillation variant; see `defeat ablate --list`.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write what was found here.")] = None,
    sheet: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Without a recipe: draw the images that are suspicious.")
    ] = None,
    device: DeviceOption = None,
    set_: SetOption = None,
) -> None:
    """Tell what a run would do: data, detectors, how levels and classes pair up, terms, memory, the teacher's AP.

    With --data and neither --recipe nor --teacher: go through a data set for all that is wrong with it. Exit code 0
    where nothing is, 1 where something is, 2 where it cannot be read at all.
    """
    said = overrides(set_, teacher__checkpoint=teacher, data__path=data, run__device=device)
    for file in (json_file, sheet):
        if file is not None:
            require_place_for_file(file)
    if recipe is None and data is not None and "teacher.checkpoint" not in said:
        _refuse({"--variant": variant, "--device": device})
        _audit(said, json_file, sheet)
        return
    if sheet is not None:
        raise DefeatError("--sheet: draws what is wrong with a data set; give --data without --recipe and --teacher")
    chosen = recipe_to_train(recipe, said, variant)
    announce_loading(quiet=False)
    from defeat_cli.jobs import checking

    found = checking.check(chosen)
    _write(found.facts, json_file)
    for table in found.tables:
        show(table)


def _audit(said: dict[str, Any], json_file: Path | None, sheet: Path | None) -> None:
    from defeat_cli.jobs import auditing

    found = auditing.look(said)
    _write(found.values, json_file)
    tiles = auditing.write_sheet(found, sheet) if sheet is not None else 0
    for line in found.lines():
        console.print(escape(line))
    console.print()
    show(found.class_table())
    for title, places in found.problems():
        console.print(f"[bold]{escape(title)}[/]")
        console.print(Padding(Text("\n".join(places)), (0, 0, 0, 4), expand=False))
    console.print("no problems found" if found.values["clean"] else f"problems found: {found.total}")
    if sheet is not None:
        console.print(
            f"{sheet}: {counted(tiles, 'image')}" if tiles else f"{sheet}: not written, there is nothing to draw"
        )
    if not found.values["clean"]:
        raise typer.Exit(1)


def _refuse(options: dict[str, Any]) -> None:
    """Options that are about a run, where there is none."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise DefeatError(f"{', '.join(given)}: about a run, not about data alone; add --recipe or --teacher")


def _write(values: dict[str, Any], file: Path | None) -> None:
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, values)
