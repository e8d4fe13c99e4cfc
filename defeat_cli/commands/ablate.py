"""`defeat ablate`: variants over seeds, and sweeps over settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from defeat_cli.console import console, show
from defeat_cli.errors import DefeatError
from defeat_cli.text import listed

if TYPE_CHECKING:
    from defeat_cli.config.protocol import Protocol

NAMES = "Variants (see --list): neck fg-only/bg-only …; or a sweep: neck:alpha_bg=1,4,16. Two settings make a grid."
ALONE = {
    "list_variants": {"variants"},
    "report_only": {"output", "sort", "against"},
    "protocol": {"variants", "recipe", "teacher", "data", "output", "jobs", "gpus_per_run", "sort", "device", "set_"},
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
    seeds: Annotated[
        str | None, typer.Option(help="Seeds, e.g. 0,1,2; three or more give intervals. 0, or a protocol's 10 … 14.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Whole trainings a seed that a sweep may cost: worse values stop early.")
    ] = None,
    protocol: Annotated[
        Path | None, typer.Option(help="YAML: variants, tuning_seeds, seeds, budget, equal_time. One page comes of it.")
    ] = None,
    tuning_seeds: Annotated[
        str | None, typer.Option(help="By a protocol: sweeps choose on these seeds, --seeds are reported.")
    ] = None,
    equal_time: Annotated[
        str | None, typer.Option(help="By a protocol: a plain student gets this variant's time; best, or off.")
    ] = None,
    variants: VariantsOption = None,
    output: OutputOption = None,
    jobs: Annotated[int | None, typer.Option(help="Runs side by side; as many as there are GPUs for.")] = None,
    gpus_per_run: Annotated[
        int, typer.Option(help="Processes that share each run, one a GPU; on the CPU with --device cpu.")
    ] = 1,
    sort: Annotated[str, typer.Option(help="What the tables are sorted by: AP, AP50, … or given.")] = "AP",
    report_only: Annotated[bool, typer.Option("--report-only", help="Rebuild the report; train nothing.")] = False,
    against: Annotated[str, typer.Option(help="With --report-only: the variant that differences are to.")] = "none",
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
        show_report(output, sort, against)
        return
    if "against" in options_said(ctx):
        raise DefeatError("--against: is for a study that is there; give it with --report-only and --output")
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
            console.print(f"written: {path}", soft_wrap=True, markup=False)
        return
    from defeat_cli.ablation.choice import choose
    from defeat_cli.engine.runs import RunFolder
    from defeat_cli.jobs.ablating import ablate as run
    from defeat_cli.session import settled

    before = RunFolder(folder)
    chosen = settled(chosen, before.recipe if before.exists else None)

    groups = [name for name, wanted in (("--all-masks", all_masks), ("--all-methods", all_methods)) if wanted]
    wanted = [*(names or []), *groups]
    followed = protocol_of(
        protocol, wanted, seeds=seeds, tuning_seeds=tuning_seeds, budget=budget, equal_time=equal_time
    )
    compared, optional = choose(followed.variants if followed else wanted, known, GROUPS, chosen)
    how = {"jobs": jobs, "gpus_per_run": gpus_per_run, "sort": sort, "quiet": quiet}
    if followed:
        from defeat_cli.ablation.protocol import prepare
        from defeat_cli.jobs.following import follow

        failures = follow(prepare(folder, followed, compared, optional, chosen), **how)
    else:
        study = plan(folder, compared, whole_numbers("--seeds", seeds or "0"), chosen, budget, optional)
        failures = run(study, **how)
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


def protocol_of(
    file: Path | None,
    names: list[str],
    *,
    seeds: str | None,
    tuning_seeds: str | None,
    budget: float | None,
    equal_time: str | None,
) -> Protocol | None:
    """The protocol of a file or of options; None where a plain study was asked for."""
    from defeat_cli.config import protocol as protocols

    if file is not None:
        return protocols.read(file)
    if tuning_seeds is None and equal_time is None:
        return None
    numbers = {"seeds": seeds, "tuning_seeds": tuning_seeds}
    said = {key: whole_numbers(f"--{key.replace('_', '-')}", text) for key, text in numbers.items() if text is not None}
    said |= {key: value for key, value in (("budget", budget), ("equal_time", equal_time)) if value is not None}
    return protocols.make({"variants": names, **said}, "the protocol of the command line")


def whole_numbers(option: str, text: str) -> list[int]:
    """`0,1,2` as numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise DefeatError(f"{option} {text}: expected whole numbers separated by commas, e.g. 0,1,2") from None


def show_report(folder: Path | None, sort: str, against: str = "none") -> None:
    """Write and print the report of the study in a folder."""
    if folder is None:
        raise DefeatError("--report-only: name the study's folder with --output")
    from defeat_cli.ablation.protocol_page import is_protocol, write_page
    from defeat_cli.ablation.running import write_report
    from defeat_cli.ablation.study import read_study

    if is_protocol(folder):
        report, at_equal_time = write_page(folder, sort, against)
        report.show()
        if at_equal_time:
            show(at_equal_time)
        console.print(
            f"written to {folder}/: report.md and report.html, one page of it all", soft_wrap=True, markup=False
        )
        return
    report = write_report(read_study(folder), sort, against)
    report.show()
    files = [
        "study.html",
        "study.md",
        "study.csv",
        "study.json",
        "study.png",
        *(["sweeps.png"] if report.sweeps else []),
    ]
    console.print(f"written to {folder}/: {', '.join(files)}", soft_wrap=True, markup=False)
