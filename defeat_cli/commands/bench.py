"""`defeat bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from defeat_cli.commands.options import (
    DataOption,
    DeviceOption,
    QuietOption,
    RecipeOption,
    SetOption,
    TeacherOption,
    options_said,
    overrides,
    recipe_to_train,
)
from defeat_cli.console import show
from defeat_cli.errors import DefeatError


def bench(
    ctx: typer.Context,
    checkpoints: Annotated[list[str] | None, typer.Argument(help="Detectors to compare, .onnx files too.")] = None,
    recipe: RecipeOption = None,
    teacher: TeacherOption = None,
    variant: Annotated[str | None, typer.Option(help="Distillation variant; see `defeat ablate --list`.")] = None,
    data: DataOption = None,
    image_size: Annotated[int | None, typer.Option(min=32, help="Short and long side; none: each detector's.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of the larger batch that detectors get.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="How often each part is measured.")] = 20,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Write a trace of one step, for chrome://tracing.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw AP over latency here; needs --data.")] = None,
    device: DeviceOption = None,
    set_: SetOption = None,
    quiet: QuietOption = False,
) -> None:
    """Measure what a training step costs and its parts (--recipe), or compare detectors: speed, size, memory, AP."""
    idle = ("recipe", "teacher", "variant", "profile") if checkpoints else ("image_size", "batch_size", "picture")
    said = options_said(ctx)
    for name in idle:
        if name in said:
            what = "checkpoints are compared" if checkpoints else "a training step is measured"
            raise DefeatError(f"{said[name]}: without effect where {what}; leave it out")
    if not checkpoints and recipe is None:
        raise DefeatError("nothing to measure: name checkpoints to compare, or give --recipe to measure its step")
    from defeat_cli.jobs import benching

    changes = overrides(set_, teacher__checkpoint=teacher, data__path=data, run__device=device)
    if checkpoints:
        found = benching.bench_detectors(
            checkpoints, changes, image_size=image_size, batch_size=batch_size, rounds=rounds, picture=picture,
            quiet=quiet,
        )  # fmt: skip
    else:
        chosen = recipe_to_train(recipe, changes, variant)
        found = benching.bench_step(chosen, rounds=rounds, trace=profile, quiet=quiet)
    found.write(json_file)
    for table in found.tables:
        show(table)
