"""`defeat predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from defeat_cli.commands.options import DataOption, DeviceOption, QuietOption, RecipeOption, SetOption, overrides
from defeat_cli.console import console, errors, show
from defeat_cli.text import counted


def predict(
    checkpoint: Annotated[str, typer.Argument(help="Any that `eval` takes, or an .onnx file of `defeat export`.")],
    images: Annotated[list[str], typer.Argument(help="Image files, folders (video frames, by number) or globs.")],
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Lowest score that is taken.")] = 0.5,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")] = Path("runs/predict"),
    save_coco: Annotated[bool, typer.Option("--save-coco", help="Write predictions.json.")] = False,
    save_yolo: Annotated[bool, typer.Option("--save-yolo", help="Write labels/*.txt and classes.txt.")] = False,
    crop: Annotated[bool, typer.Option("--crop", help="Write each detection as a picture of its own.")] = False,
    side_by_side: Annotated[
        str | None, typer.Option(metavar="TEACHER", help="Draw this detector's detections beside.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")] = False,
    recipe: RecipeOption = None,
    data: DataOption = None,
    device: DeviceOption = None,
    set_: SetOption = None,
    quiet: QuietOption = False,
) -> None:
    """Draw what a detector finds in images, with names and scores. Images that cannot be read are named (exit 2)."""
    from defeat_cli.jobs import predicting

    predictions = predicting.predict(
        checkpoint, images, output, threshold=threshold, coco=save_coco, yolo=save_yolo, crop=crop,
        teacher=side_by_side, overwrite=overwrite, recipe_name=recipe,
        changes=overrides(set_, data__path=data, run__device=device), quiet=quiet,
    )  # fmt: skip
    show(predictions.table())
    files = [
        "a picture of each image",
        *([predicting.COCO] if save_coco else []),
        *([f"{predicting.LABELS}/", predicting.CLASSES] if save_yolo else []),
        *([f"{predicting.CROPS}/"] if crop else []),
    ]
    console.print(escape(f"written to {output}/: {', '.join(files)}"), soft_wrap=True)
    for reason in predictions.skipped:
        errors.print(f"[bold red]skipped:[/] {escape(reason)}", soft_wrap=True)
    if predictions.skipped:
        total = len(predictions.skipped) + len(predictions.images)
        errors.print(f"{len(predictions.skipped)} of {counted(total, 'image')} could not be read", soft_wrap=True)
        raise typer.Exit(2)
