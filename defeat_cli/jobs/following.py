"""One `defeat ablate` by a protocol: choose on tuning seeds, train what was chosen on others, and write one page."""

from __future__ import annotations

from defeat_cli.ablation.choice import BASELINE
from defeat_cli.ablation.processes import environments
from defeat_cli.ablation.protocol import LONGER, ProtocolStudy, as_long_as, chosen
from defeat_cli.ablation.protocol_page import PAGE, write_page
from defeat_cli.ablation.rows import check_sort
from defeat_cli.ablation.running import Calls, check_study, run_study, write_report
from defeat_cli.ablation.study import plan
from defeat_cli.config.protocol import OFF
from defeat_cli.console import Reporter
from defeat_cli.distillation import map_folder
from defeat_cli.engine.locking import locked
from defeat_cli.errors import DefeatError
from defeat_cli.files import require_place_for_file, require_place_for_folder
from defeat_cli.jobs import ablating
from defeat_cli.jobs.study_pictures import draw_pictures


def follow(
    asked: ProtocolStudy,
    *,
    jobs: int | None = None,
    gpus_per_run: int = 1,
    sort: str = "AP",
    quiet: bool = False,
) -> dict[str, str]:
    """Train what is not trained yet, and write the page.

    Args:
        jobs, gpus_per_run, sort: as in `run_study`.

    Returns:
        Run name -> why it failed, of both studies.

    Raises:
        DefeatError, Interrupted: as `run_study`; or a sweep has no value that could be chosen.
    """
    reporter = Reporter("protocol", quiet)
    calls = ablating.calls(asked.folder.resolve(), quiet, gpus_per_run)
    options = {"jobs": jobs, "gpus_per_run": gpus_per_run, "sort": sort, "quiet": quiet}
    with ablating.interruptible():
        check_sort(sort)
        environments(asked.recipe.run.device, jobs, gpus_per_run)  # refuses numbers that cannot be
        require_place_for_folder(asked.folder)
        for name in (f"{PAGE}.md", f"{PAGE}.html"):
            require_place_for_file(asked.folder / name)
        check_study(asked.foreseen(), calls, reporter)
        with locked(asked.folder):
            asked.save()
            failures = {} if asked.begun() else _tune(asked, calls, reporter, options)
            failures |= _report(asked, calls, reporter, options)
            try:
                draw_pictures(asked.folder, asked.foreseen(), quiet)
            except DefeatError as error:
                reporter.warn(f"pictures are left out: {error}")
            write_page(asked.folder, sort)
            if not failures:
                map_folder.remove(asked.folder / ablating.FEATURES)
    return failures


def _tune(asked: ProtocolStudy, calls: Calls, reporter: Reporter, options: dict) -> dict[str, str]:
    """Choose the best value of each sweep, and begin the final study with it."""
    tuning = asked.tuning()
    if tuning is None:
        asked.final({}).save()
        return {}
    reporter.note(f"tuning on seeds {', '.join(map(str, tuning.seeds))}, in {tuning.folder}")
    failures = run_study(tuning, calls, **options)
    best = chosen(write_report(tuning, options["sort"]).sweeps)
    for point in best.values():
        reporter.note(f"chosen for {point.base}: {point.said}")
    asked.final(best).save()
    return failures


def _report(asked: ProtocolStudy, calls: Calls, reporter: Reporter, options: dict) -> dict[str, str]:
    """Train what was chosen on the seeds that are reported, then the plain student of equal time."""
    final = asked.foreseen()
    reporter.note(f"reporting on seeds {', '.join(map(str, final.seeds))}, in {final.folder}")
    failures = run_study(final, calls, **options)
    wanted = asked.protocol.equal_time
    if wanted == OFF or LONGER in final.variants:
        return failures
    longer = as_long_as(wanted, final.outcomes(), final.variants[BASELINE], asked.recipe.schedule)
    if longer is None:
        reporter.note(f"no {LONGER}: it would have as many epochs as {BASELINE}")
        return failures
    reporter.note(f"{LONGER}: {longer.summary}")
    grown = plan(final.folder, {LONGER: longer}, final.seeds, asked.recipe)
    return failures | run_study(grown, calls, **options)
