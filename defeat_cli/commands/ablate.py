"""`defeat ablate`: variants over seeds, and sweeps over settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from defeat_cli.commands.options import (
    DataOption,
    DeviceOption,
    OutputOption,
    QuietOption,
    RecipeOption,
    SetOption,
    TeacherOption,
    VariantsOption,
    announce_loading,
    options_said,
    overrides,
    recipe_to_train,
)  # fmt: skip
from defeat_cli.console import console
from defeat_cli.errors import DefeatError
from defeat_cli.text import listed

NAMES = "Variants (see --list): neck fg-only/bg-only …; or a sweep: neck:alpha_bg=1,4,16. Two settings make a grid."
ALONE = {
    "list_variants": {"variants"},
    "report_only": {"output", "sort"},
    "show_masks": {"recipe", "teacher", "data", "output", "device", "set_"},
}
"""Options that make another command of this one, and the options that have an effect then."""


def ablate(
    ctx: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(help=NAMES)] = None,
    all_masks: Annotated[bool, typer.Option("--all-masks", help="Every mask of the neck term.")] = False,
    all_methods: Annotated[bool, typer.Option("--all-methods", help="Every method.")] = False,
    recipe: RecipeOption = None,
    teacher: TeacherOption = None,
    data: DataOption = None,
    seeds: Annotated[str, typer.Option(help="Seeds, e.g. 0,1,2. Three or more give confidence intervals.")] = "0",
    budget: Annotated[
        float | None, typer.Option(help="Whole trainings a seed that a sweep may cost: worse values stop early.")
    ] = None,
    variants: VariantsOption = None,
    output: OutputOption = None,
    jobs: Annotated[int | None, typer.Option(help="Runs side by side; as many as there are GPUs for.")] = None,
    gpus_per_run: Annotated[
        int, typer.Option(help="Processes that share each run, one a GPU; on the CPU with --device cpu.")
    ] = 1,
    sort: Annotated[str, typer.Option(help="What the tables are sorted by: AP, AP50, … or given.")] = "AP",
    report_only: Annotated[bool, typer.Option("--report-only", help="Rebuild the report; train nothing.")] = False,
    show_masks: Annotated[
        list[str] | None, typer.Option(help="Draw every mask kind over this image instead. Repeatable.")
    ] = None,
    list_variants: Annotated[bool, typer.Option("--list", help="Explain every variant in one line.")] = False,
    device: DeviceOption = None,
    set_: SetOption = None,
    quiet: QuietOption = False,
) -> None:
    """Compare distillation variants over seeds. The same command goes on with a study that was stopped."""
    refuse_idle(ctx)
    from defeat_cli.config.variants import GROUPS, read_variants

    known = read_variants(variants)
    if list_variants:
        for name, variant in known.items():
            console.print(f"[bold]{escape(name):16}[/] {escape(variant.summary)}", soft_wrap=True)
        return
    if report_only:
        show_report(output, sort)
        return
    announce_loading(quiet)
    from defeat_cli.ablation.study import OWN_KEYS, plan

    said = overrides(set_, teacher__checkpoint=teacher, data__path=data, run__device=device)

    def folder_of(name: str) -> Path:
        return output or Path("runs") / f"ablate-{name}"

    chosen = recipe_to_train(recipe, said, folder=None if show_masks else folder_of, quiet=quiet)
    for key, owner in OWN_KEYS.items():
        if key in said:
            raise DefeatError(f"--set {key}: without effect in a study; give {owner}")
    folder = folder_of(chosen.run.name)
    if show_masks:
        from defeat_cli.jobs.mapping import show_masks as draw

        for path in draw(chosen, show_masks, folder):
            console.print(f"written: {path}", soft_wrap=True)
        return
    from defeat_cli.ablation.choice import choose
    from defeat_cli.engine.runs import RunFolder
    from defeat_cli.jobs.ablating import ablate as run
    from defeat_cli.session import settled

    before = RunFolder(folder)
    chosen = settled(chosen, before.recipe if before.exists else None)

    groups = [name for name, wanted in (("--all-masks", all_masks), ("--all-methods", all_methods)) if wanted]
    compared, optional = choose([*(names or []), *groups], known, GROUPS, chosen)
    study = plan(folder, compared, whole_numbers("--seeds", seeds), chosen, budget, optional)
    failures = run(study, jobs=jobs, gpus_per_run=gpus_per_run, sort=sort, quiet=quiet)
    show_report(folder, sort)
    if failures:
        raise typer.Exit(1)


def refuse_idle(ctx: typer.Context) -> None:
    """Refuse options that have no effect together with another."""
    said = options_said(ctx)
    for name, takes in ALONE.items():
        idle = said.keys() - takes - {name, "quiet"}
        if name in said and idle:
            raise DefeatError(f"{said[name]}: has no use for {listed(sorted(said[key] for key in idle))}; leave it out")


def whole_numbers(option: str, text: str) -> list[int]:
    """`0,1,2` as numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise DefeatError(f"{option} {text}: expected whole numbers separated by commas, e.g. 0,1,2") from None


def show_report(folder: Path | None, sort: str) -> None:
    """Write and print the report of the study in a folder."""
    if folder is None:
        raise DefeatError("--report-only: name the study's folder with --output")
    from defeat_cli.ablation.running import write_report
    from defeat_cli.ablation.study import read_study

    report = write_report(read_study(folder), sort)
    report.show()
    files = ["study.csv", "study.json", "study.md", "study.png", *(["sweeps.png"] if report.sweeps else [])]
    console.print(f"written to {folder}/: {', '.join(files)}", soft_wrap=True)
