"""`defeat export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from defeat_cli.commands.options import DataOption, QuietOption, RecipeOption, SetOption, overrides
from defeat_cli.console import console, errors, show


def export(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint of any format, or torchvision:NAME.")],
    target: Annotated[Path, typer.Argument(help="File to write: OUT.onnx, or OUT.torchscript with --format.")],
    form: Annotated[str, typer.Option("--format", help="onnx or torchscript.")] = "onnx",
    kind: Annotated[
        str,
        typer.Option(
            "--input", help="What the file takes: float [3, H, W] in [0, 1], or uint8 [H, W, 3] as Pillow reads it."
        ),
    ] = "float",
    half: Annotated[bool, typer.Option("--half", help="Compute in float16; for GPUs.")] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Compute in integers, calibrated on training images; for CPUs.")
    ] = False,
    images: Annotated[
        list[str] | None, typer.Option(help="Images or a folder to compare on; else the data's. Repeatable.")
    ] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Run the file and compare it with torch.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    recipe: RecipeOption = None,
    data: DataOption = None,
    set_: SetOption = None,
    quiet: QuietOption = False,
) -> None:
    """Write a detector as ONNX or TorchScript: an RGB image of any size in, boxes in its pixels out.

    Resizing, normalisation and non-maximum suppression are inside. The file is run and compared with torch; where they
    differ it is not written, and the exit code is 1. With --half and --int8 you are told AP on the data's validation
    images before and after.
    """
    from defeat_cli.errors import DefeatError
    from defeat_cli.jobs import exporting

    if images and not check:
        raise DefeatError("--no-check: has no use for --images; leave it out")
    if half and int8:
        raise DefeatError("--half and --int8: a file computes in one of them; give one")
    exported = exporting.export(
        checkpoint, target, form=form, kind=kind,
        precision="half" if half else "int8" if int8 else "float", overwrite=overwrite, check=check,
        images=images or [], recipe_name=recipe, changes=overrides(set_, data__path=data), quiet=quiet,
    )  # fmt: skip
    if check:
        show(exported.table())
    if not exported.agrees:
        errors.print(f"[bold red]not written:[/] {target} detects otherwise than torch (see DIFFERS)", soft_wrap=True)
        raise typer.Exit(1)
    if check and not exported.is_telling:
        errors.print(
            "[yellow]warning:[/] nothing was detected on these images, so little was compared; name some with --images",
            soft_wrap=True,
        )
    if exported.costs is not None:
        show(exported.costs)
    elif check and (half or int8):
        errors.print("[yellow]warning:[/] AP before and after is not known without data; name it with --data")
    console.print(f"written: {target}, {exported.size / 2**20:.1f} MiB, input {kind}", soft_wrap=True, markup=False)
