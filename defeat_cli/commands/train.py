"""`defeat train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from defeat_cli.commands.next_steps import next_steps
from defeat_cli.commands.options import (
    DataOption,
    DeviceOption,
    OutputOption,
    OverwriteOption,
    QuietOption,
    RecipeOption,
    SetOption,
    TeacherOption,
    VariantsOption,
    announce_loading,
    options_said,
    overrides,
    recipe_to_train,
    without,
)
from defeat_cli.console import console, results_sheet, show
from defeat_cli.errors import DefeatError


def train(
    ctx: typer.Context,
    recipe: RecipeOption = None,
    teacher: TeacherOption = None,
    data: DataOption = None,
    student_weights: Annotated[
        str | None, typer.Option(help="Detector checkpoint that the student starts from.")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Distillation variant; see `defeat ablate --list`.")] = None,
    variants: VariantsOption = None,
    output: OutputOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    overwrite: OverwriteOption = False,
    changed_data: Annotated[
        bool, typer.Option("--changed-data", help="With --resume: go on though the data is not what it was.")
    ] = False,
    device: DeviceOption = None,
    gpus: Annotated[
        int | None, typer.Option(help="Processes, one a GPU of this machine; on the CPU with --device cpu.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Fixes everything random.")] = None,
    plain: Annotated[
        bool | None, typer.Option("--compare-plain", help="Also train the same student without the teacher.")
    ] = None,
    set_: SetOption = None,
    quiet: QuietOption = False,
    replay: Annotated[
        Path | None,
        typer.Option(
            help="Make the step of a bad_step.pt again, alone. With --device and --teacher; nothing is written."
        ),
    ] = None,
    list_recipes: Annotated[bool, typer.Option("--list-recipes", help="Show the shipped recipes.")] = False,
) -> None:
    """Distil a student from a teacher (or, without one, train a detector)."""
    if list_recipes:
        if idle := [option for name, option in options_said(ctx).items() if name != "list_recipes"]:
            raise DefeatError(f"--list-recipes: has no use for {', '.join(idle)}; leave it out")
        show_recipes()
        return
    if replay is not None:
        show_replay(replay, device, teacher, options_said(ctx))
        return
    if variants and not variant:
        raise DefeatError("--variants: names no variant to train; add --variant NAME, or use defeat ablate")
    said = overrides(
        set_,
        teacher__checkpoint=teacher,
        data__path=data,
        student__weights=student_weights,
        run__device=device,
        run__seed=seed,
        run__compare_plain=plain,
    )
    if not (recipe or said or output):
        raise DefeatError(f"nothing to train. What to do next:\n{next_steps()}")
    console.quiet = os.environ.get("RANK", "0") != "0"  # of several processes the first one speaks

    def folder_of(name: str) -> Path:
        return output or Path("runs") / name

    several = gpus is not None and gpus > 1
    chosen = recipe_to_train(
        recipe, said, variant, variants, folder=folder_of if resume else None, quiet=quiet or several
    )
    folder = folder_of(chosen.run.name)
    announce_loading(quiet)
    if gpus is not None:
        from defeat_cli.engine import launching

        launching.check_count(gpus, chosen.run.device)
    if several:
        raise typer.Exit(launching.launch(gpus, ["defeat_cli", *without("--gpus", ctx.find_root().obj)]))
    from defeat_cli.jobs import training
    from defeat_cli.jobs.together import working_together

    with working_together() as world:
        results = training.train(
            chosen,
            folder,
            resume=resume,
            overwrite=overwrite,
            changed_data=changed_data,
            quiet=quiet,
            world=world,
        )
        show(results_sheet(results))
        files = "report.html, detections.png, student.pth (for torchvision), best.pt, results.md, model_card.md"
        console.print(f"written to {folder}/: {files}", soft_wrap=True, markup=False)


def show_replay(file: Path, device: str | None, teacher: str | None, said: dict[str, str]) -> None:
    """Print a step that is made again.

    Raises:
        DefeatError: an option is given that has no effect on it.
    """
    if idle := [option for name, option in said.items() if name not in ("replay", "device", "teacher")]:
        raise DefeatError(f"--replay takes all else from {file}; leave out {', '.join(idle)}")
    from defeat_cli.jobs.replaying import replay

    again = replay(file, device, teacher)
    for line in again.lines:
        console.print(escape(line), soft_wrap=True)
    for table in again.tables():
        show(table)
    console.print("the same values as in the run" if again.same else "[yellow]not the values of the run[/]")


def show_recipes() -> None:
    """Print the shipped recipes with their first comment line."""
    from defeat_cli.config.schema import shipped_recipes

    for name, path in shipped_recipes().items():
        summary = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        console.print(f"[bold]{name}[/]\n    {escape(summary)}", soft_wrap=True)
