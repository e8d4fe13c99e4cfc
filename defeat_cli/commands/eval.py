"""`defeat eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from defeat_cli.commands.options import DataOption, DeviceOption, QuietOption, SetOption, overrides
from defeat_cli.console import show
from defeat_cli.errors import DefeatError
from defeat_cli.files import require_place_for_file


def evaluate(
    checkpoint: Annotated[
        str, typer.Argument(help="A checkpoint of any format, torchvision:NAME, or an .onnx file of `defeat export`.")
    ],
    data: DataOption = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", help="Settings in place of the checkpoint's own, and where the data is."),
    ] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "val",
    per_class: Annotated[bool, typer.Option("--per-class", help="AP of each class.")] = False,
    error_types: Annotated[bool, typer.Option("--errors", help="What kinds of errors cost how much (TIDE).")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    save_detections: Annotated[Path | None, typer.Option(help="Write raw detections in COCO results format.")] = None,
    device: DeviceOption = None,
    set_: SetOption = None,
    quiet: QuietOption = False,
) -> None:
    """Score a detector on a data set in any layout: the twelve COCO figures."""
    from defeat_cli.jobs import scoring

    if json_file is not None and json_file == save_detections:
        raise DefeatError(f"--json and --save-detections: {json_file} cannot hold both; name two files")
    for path in (json_file, save_detections):
        if path is not None:
            require_place_for_file(path)
    changes = overrides(set_, data__path=data, run__device=device)
    report = scoring.score(checkpoint, recipe, changes, split=split, error_types=error_types, quiet=quiet)
    report.write(json_file, save_detections)
    for table in report.tables(per_class):
        show(table)
