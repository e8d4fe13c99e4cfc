"""`defeat init`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from defeat_cli.commands.options import DeviceOption, SetOption, TeacherOption, overrides
from defeat_cli.console import Reporter, console


def init(
    data: Annotated[str, typer.Argument(help="Data folder; its layout is recognised.")],
    teacher: TeacherOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; else DATA.yaml in the current folder.")
    ] = None,
    device: DeviceOption = None,
    set_: SetOption = None,
) -> None:
    """Write a recipe for a data set, as `train` would choose it, with a comment on every choice."""
    from defeat_cli.jobs.choosing import write_recipe

    said = overrides(set_, teacher__checkpoint=teacher, data__path=data, run__device=device)
    path = write_recipe(said, output, Reporter("init"))
    console.print(f"written: {path}", soft_wrap=True, markup=False)
    console.print(f"next: defeat check -r {path}, then defeat train -r {path}", soft_wrap=True, markup=False)
