"""`defeat bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from defeat_cli.commands import options
from defeat_cli.commands.options import options_said, overrides
from defeat_cli.console import show
from defeat_cli.errors import DefeatError
from defeat_cli.files import require_place_for_file


def bench(
    ctx: typer.Context,
    checkpoints: Annotated[list[str] | None, typer.Argument(help="Detectors to compare, .onnx files too.")] = None,
    recipe: options.RecipeOption = None,
    teacher: options.TeacherOption = None,
    variant: Annotated[str | None, typer.Option(help="Distillation variant; see `defeat ablate --list`.")] = None,
    data: options.DataOption = None,
    image_size: Annotated[int | None, typer.Option(min=32, help="Short and long side; none: each detector's.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of the larger batch that detectors get.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="How often each part is measured.")] = 20,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Write a trace of one step, for chrome://tracing.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw AP over latency here; needs --data.")] = None,
    device: options.DeviceOption = None,
    set_: options.SetOption = None,
    quiet: options.QuietOption = False,
) -> None:
    """Measure what a training step costs and its parts (--recipe), or compare detectors: speed, size, memory, AP."""
    idle = ("recipe", "teacher", "variant", "profile") if checkpoints else ("image_size", "batch_size", "picture")
    done = "checkpoints are compared" if checkpoints else "a training step is measured"
    said = options_said(ctx)
    if ignored := [said[name] for name in idle if name in said]:
        raise DefeatError(f"{', '.join(ignored)}: without effect where {done}; leave it out")
    if not checkpoints and recipe is None:
        raise DefeatError("nothing to measure: name checkpoints to compare, or give --recipe to measure its step")
    for path in (path for path in (json_file, profile, picture) if path is not None):
        require_place_for_file(path)
    from defeat_cli.jobs import benching

    changes = overrides(set_, teacher__checkpoint=teacher, data__path=data, run__device=device)
    if checkpoints:
        found = benching.bench_detectors(
            checkpoints, changes, image_size=image_size, batch_size=batch_size, rounds=rounds, picture=picture,
            quiet=quiet,
        )  # fmt: skip
    else:
        chosen = options.recipe_to_train(recipe, changes, variant)
        found = benching.bench_step(chosen, rounds=rounds, trace=profile, quiet=quiet)
    found.write(json_file)
    for table in found.tables:
        show(table)
