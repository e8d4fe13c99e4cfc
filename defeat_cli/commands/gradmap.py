"""`defeat gradmap`, or `visualize-gradients`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from defeat_cli.commands.options import (
    DataOption,
    DeviceOption,
    QuietOption,
    RecipeOption,
    SetOption,
    options_said,
    overrides,
)
from defeat_cli.console import console, errors, show
from defeat_cli.errors import DefeatError


def visualize_gradients(
    ctx: typer.Context,
    images: Annotated[list[str] | None, typer.Argument(help="Image files, folders or globs; none: the data's.")] = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", "-c", help="The detector; none: the newest run's.")
    ] = None,
    teacher: Annotated[str | None, typer.Option("--teacher", "-t", help="Put this detector's maps beside.")] = None,
    data: DataOption = None,
    annotations: Annotated[Path | None, typer.Option(help="COCO file with the images' boxes.")] = None,
    split: Annotated[str, typer.Option(help="train, val or test, of the data folder.")] = "val",
    limit: Annotated[int | None, typer.Option(min=1, help="Most images that are looked at.")] = None,
    loss: Annotated[str, typer.Option(help="total, rpn, classification, regression or distillation.")] = "total",
    distillation: Annotated[
        bool, typer.Option("--distillation", help="The neck term's variants, and all that it compares.")
    ] = False,
    samples: Annotated[int, typer.Option(min=1, help="Draws of the samplers that are averaged.")] = 8,
    reduce: Annotated[str, typer.Option(help="Over channels: l2 or mean-abs.")] = "l2",
    own_level: Annotated[bool, typer.Option("--own-level", help="Boxes count on their own level only.")] = False,
    teacher_boxes: Annotated[
        bool, typer.Option("--teacher-boxes", help="Teacher's boxes where none are known.")
    ] = False,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Lowest score of detections that stand in for boxes.")
    ] = 0.5,
    save_arrays: Annotated[bool, typer.Option("--save-arrays", help="Keep the raw maps as .npz.")] = False,
    recipe: RecipeOption = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")] = Path("runs/gradients"),
    seed: Annotated[int, typer.Option(min=0, help="Of the samplers and the intervals.")] = 0,
    device: DeviceOption = None,
    set_: SetOption = None,
    quiet: QuietOption = False,
) -> None:
    """Show where the detection loss pulls on the neck features, inside objects and outside."""
    refuse_idle(options_said(ctx))
    if checkpoint is None:
        from defeat_cli.engine.runs import newest_checkpoint

        checkpoint = str(newest_checkpoint(Path("runs")) or "shipped:quickstart_teacher.pt")
        console.print(f"no --checkpoint: {checkpoint} is taken", soft_wrap=True, markup=False)
    from defeat_cli.gradients.report import Settings
    from defeat_cli.jobs.mapping import visualize

    settings = Settings(
        loss=loss, distillation=distillation, samples=samples, seed=seed, reduce=reduce, own_level=own_level,
        threshold=threshold, save_arrays=save_arrays,
    )  # fmt: skip
    report = visualize(
        checkpoint, images or [], output, settings, recipe_name=recipe, annotations=annotations, split=split,
        changes=overrides(set_, data__path=data, run__device=device), limit=limit, teacher=teacher,
        teacher_boxes=teacher_boxes, quiet=quiet,
    )  # fmt: skip
    for table in report.tables():
        show(table)
    if not any(image["objects"] for image in report.images):
        origin = report.images[0]["boxes"]
        errors.print(
            f"[yellow]warning:[/] no box in any image ({escape(origin)}), so nothing is inside; ground truth comes "
            "with --data or --annotations, more detections with a lower --threshold",
            soft_wrap=True,
        )
    console.print(
        f"written to {output}/: a picture of each image, contact_sheet.png, gradients.json",
        soft_wrap=True,
        markup=False,
    )
    for skipped in report.skipped:
        errors.print(f"[bold red]skipped:[/] {escape(skipped['reason'])}", soft_wrap=True)
    if report.skipped:
        raise typer.Exit(2)


def refuse_idle(said: Mapping[str, str]) -> None:
    """Refuse options about boxes and images that have no effect together with the others."""
    if "images" not in said:
        idle, reason = ("annotations", "threshold", "teacher_boxes"), "the data set knows its images' boxes"
    elif "annotations" in said:
        idle, reason = ("data", "split"), "the boxes of the images are those of --annotations"
    elif "data" not in said:
        idle, reason = ("split",), "there is no --data"
    else:
        return
    for name in idle:
        if name in said:
            raise DefeatError(f"{said[name]}: without effect, as {reason}")
