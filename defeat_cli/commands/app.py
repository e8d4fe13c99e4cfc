"""The `defeat` command. Each subcommand turns its options into a call; heavy imports wait until one is chosen."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from defeat_cli import __version__
from defeat_cli.commands import ablate, check, train
from defeat_cli.commands.options import (
    DataOption,
    DeviceOption,
    QuietOption,
    RecipeOption,
    SetOption,
    overrides,
)
from defeat_cli.console import console, errors, show
from defeat_cli.errors import DefeatError, Interrupted

REFUSED_BY_THE_SYSTEM = {
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EMFILE,
    errno.ENAMETOOLONG, errno.ENOENT, errno.EEXIST,
}  # fmt: skip
"""Disk full, no permission, a folder where a file should be, and the like: nothing that a traceback explains better."""


class CleanErrors(TyperGroup):
    """Prints bad input and what the system refuses as one message with exit code 2; programming errors keep their
    traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DefeatError as error:
            errors.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(2) from None
        except OSError as error:
            if error.errno not in REFUSED_BY_THE_SYSTEM:
                raise
            place = f"{error.filename}: " if error.filename else ""
            errors.print(f"[bold red]error:[/] {escape(f'{place}{error.strerror}')}", soft_wrap=True)
            raise typer.Exit(2) from None
        except Interrupted as stop:
            errors.print(f"[yellow]stopped:[/] {escape(str(stop))}", soft_wrap=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=CleanErrors,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        console.print(__version__)
        raise typer.Exit


@app.callback()
def defeat(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Distil a large object detector into a small one (DeFeat, CVPR 2021)."""


@app.command("eval")
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint of any format, or torchvision:NAME.")],
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
    """Score a detector on COCO-format data: the twelve COCO figures."""
    from defeat_cli.jobs import scoring

    changes = overrides(set_, data__path=data, run__device=device)
    report = scoring.score(checkpoint, recipe, changes, split=split, error_types=error_types, quiet=quiet)
    report.write(json_file, save_detections)
    for table in report.tables(per_class):
        show(table)


def visualize_gradients(
    images: Annotated[list[str] | None, typer.Argument(help="Image files, folders or globs; none: the data's.")] = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", "-c", help="The detector: any format that `eval` takes.")
    ] = None,
    teacher: Annotated[str | None, typer.Option("--teacher", "-t", help="Put this detector's maps beside.")] = None,
    data: DataOption = None,
    annotations: Annotated[Path | None, typer.Option(help="COCO file with the images' boxes.")] = None,
    split: Annotated[str, typer.Option(help="train, val or test, of the data folder.")] = "val",
    limit: Annotated[int | None, typer.Option(min=1, help="Most images that are looked at.")] = None,
    loss: Annotated[str, typer.Option(help="total, rpn, classification, regression or distillation.")] = "total",
    distillation: Annotated[bool, typer.Option("--distillation", help="The neck term's variants too.")] = False,
    samples: Annotated[int, typer.Option(min=1, help="Draws of the samplers that are averaged.")] = 8,
    reduce: Annotated[str, typer.Option(help="Over channels: l2 or mean-abs.")] = "l2",
    own_level: Annotated[bool, typer.Option("--own-level", help="Boxes count on their own level only.")] = False,
    teacher_boxes: Annotated[
        bool, typer.Option("--teacher-boxes", help="Teacher's boxes where none are known.")
    ] = False,
    threshold: Annotated[float, typer.Option(help="Lowest score of detections that stand in for boxes.")] = 0.5,
    save_arrays: Annotated[bool, typer.Option("--save-arrays", help="Keep the raw maps as .npz.")] = False,
    recipe: RecipeOption = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")] = Path("runs/gradients"),
    seed: Annotated[int, typer.Option(min=0, help="Of the samplers and the intervals.")] = 0,
    device: DeviceOption = None,
    set_: SetOption = None,
    quiet: QuietOption = False,
) -> None:
    """Show where the detection loss pulls on the neck features, inside objects and outside."""
    if checkpoint is None:
        raise DefeatError("no detector: give one with --checkpoint")
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
    console.print(f"written to {output}/: a picture of each image, contact_sheet.png, gradients.json", soft_wrap=True)
    for skipped in report.skipped:
        errors.print(f"[bold red]skipped:[/] {escape(skipped['reason'])}", soft_wrap=True)
    if report.skipped:
        raise typer.Exit(2)


app.command("visualize-gradients")(visualize_gradients)
app.command("gradmap", help="The same as visualize-gradients.")(visualize_gradients)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint of mmdetection, detectron2, torchvision or this tool.")],
    target: Annotated[Path, typer.Argument(help="File for the plain state dict; its recipe is written beside it.")],
    recipe: RecipeOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    set_: SetOption = None,
) -> None:
    """Convert a checkpoint into a plain torchvision state dict."""
    from defeat_cli.jobs import converting

    converting.convert(source, target, recipe, overrides(set_), overwrite)


app.command("ablate")(ablate.ablate)
app.command("train")(train.train)
app.command("check")(check.check)


def main() -> None:
    """The console script."""
    app()
