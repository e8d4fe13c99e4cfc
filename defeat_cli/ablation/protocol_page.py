"""The page of a study by a protocol: what was asked, chosen and found, from what the folders hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from defeat_cli.ablation.choice import BASELINE
from defeat_cli.ablation.protocol import FINAL, LONGER, PROTOCOL, TUNING, at_the_edge
from defeat_cli.ablation.report import Report, ap_cells, difference, duration
from defeat_cli.ablation.rows import SECONDS, Row, Sweep, check_sort
from defeat_cli.ablation.running import write_report
from defeat_cli.ablation.statistics import measured
from defeat_cli.ablation.study import STUDY, Study, read_study
from defeat_cli.config import protocol as protocols
from defeat_cli.config.protocol import Protocol
from defeat_cli.errors import RunError
from defeat_cli.pages.blocks import Block, Heading, Picture, Verbatim, write_html, write_markdown
from defeat_cli.tables import Sheet
from defeat_cli.text import listed

PAGE, PICTURES = "report", "pictures"
"""The page's name, and the folder of its pictures of detections and gradients."""

DETECTIONS, GRADIENTS = "detections", "contact_sheet.png"
"""How the names of these pictures begin, and the name of the maps'."""


def is_protocol(folder: Path) -> bool:
    """Whether a folder holds a study by a protocol."""
    return (folder / PROTOCOL).is_file()


def write_page(folder: Path, sort: str = "AP", against: str = BASELINE) -> tuple[Report, Sheet | None]:
    """Write report.md and report.html, and the reports of the two studies.

    Args:
        against: the variant that differences are to, save those of the tuning and those at equal time.

    Returns:
        The report of the final study, or of the tuning where that is all there is; the variants at equal time.

    Raises:
        RunError: no such sort key, a variant that is not there or has its own table, or neither study is begun.
    """
    check_sort(sort)
    if against == LONGER:
        raise RunError(f"--against {LONGER}: the page has these differences already, at equal time; leave it out")
    protocol = protocols.read(folder / PROTOCOL)
    studies = [read_study(folder / name) for name in (TUNING, FINAL) if (folder / name / STUDY).is_file()]
    if not studies:
        raise RunError(f"{folder}: nothing was trained yet; give the command again that began it")
    reports = [write_report(study, sort, against if study is studies[-1] else BASELINE) for study in studies]
    blocks: list[Block] = []
    title = folder.name
    for study, report in zip(studies, reports, strict=True):
        if study.folder.name == FINAL:
            title = report.title.replace(f"{FINAL}: ", f"{folder.name}: ", 1)
            blocks = [*_found(study, report, protocol), *blocks]
        else:
            blocks += _choice(study, report)
    blocks += _pictures(folder)
    blocks += [Heading("What was asked"), Verbatim((folder / PROTOCOL).read_text(encoding="utf-8"))]
    blocks.append("recipe.yaml beside this page has every other value that was in force.")
    write_markdown(folder / f"{PAGE}.md", title, blocks)
    write_html(folder / f"{PAGE}.html", title, blocks)
    return reports[-1], equal_time_sheet(studies[-1], reports[-1].main_rows)


def _found(study: Study, report: Report, protocol: Protocol) -> Iterator[Block]:
    """What the final study found."""
    yield (
        f"Trained on seeds {listed(study.seeds, 20)}"
        + (", none of which had a say in any choice" if (study.folder.parent / TUNING).is_dir() else "")
        + f". {report.legend()}"
    )
    yield Heading("AP at equal epochs")
    rows = [row for row in report.main_rows if row.variant != LONGER]
    main, *others = replace(report, rows=rows).sheets()
    yield main
    yield Picture(
        study.folder / "study.png", f"AP of each variant, its difference to {report.against}, and AP over the epochs"
    )
    yield Heading("AP at equal time")
    yield from _equal_time(study, report.main_rows)
    yield Heading("Further figures")
    yield from others
    yield Heading("The variants")
    yield from (f"{row.variant}: {study.variants[row.variant].summary}" for row in report.main_rows)


def _equal_time(study: Study, rows: Sequence[Row]) -> Iterator[Block]:
    sheet = equal_time_sheet(study, rows)
    if sheet is None:
        yield (
            f"There is no {LONGER}: it was not asked for, is yet to come, or would have as many epochs as {BASELINE}. "
            "The times above say what each variant costs."
        )
        return
    yield f"{LONGER} is {study.variants[LONGER].summary}. Times leave evaluations out."
    yield sheet


def equal_time_sheet(study: Study, rows: Sequence[Row]) -> Sheet | None:
    """Each variant beside the plain student of equal time; None where there is none."""
    longer = next((row for row in rows if row.variant == LONGER), None)
    if longer is None:
        return None
    baseline = longer.measured["AP"].values if "AP" in longer.measured else {}
    cells = []
    for row in rows:
        ap = row.measured.get("AP")
        against = measured(ap.values, baseline if row is not longer else None) if ap else None
        epochs = study.variants[row.variant].overrides.get("schedule.epochs", study.recipe.schedule.epochs)
        figures = [duration(row.measured.get(SECONDS)), ap_cells(row)[0], difference(against, 100, 1)]
        cells.append([row.variant, str(epochs), *figures])
    return Sheet(f"AP, and Δ paired by seed to {LONGER}", ["variant", "epochs", "time", "AP", f"Δ to {LONGER}"], cells)


def _choice(study: Study, report: Report) -> Iterator[Block]:
    """How the tuning study chose."""
    yield Heading("How settings were chosen")
    cost = f"{study.budget:g} times a training, for a sweep and seed" if study.budget is not None else ""
    cut = f", worse values stopping early (budget: {cost})" if cost else ""
    seeds = listed(study.seeds, 20)
    yield f"Each sweep's best is the value with the highest mean AP at the last epoch on seeds {seeds}{cut}."
    cells = [[sweep.base, *_chosen_cells(sweep)] for sweep in report.sweeps]
    yield Sheet("Chosen", ["variant", "values", "at the edge of what was tried"], cells)
    if any(at_the_edge(sweep) for sweep in report.sweeps):
        yield "Beyond a value at the edge a better one may lie: widen that sweep."
    yield from report.sweep_sheets()
    yield Picture(study.folder / "sweeps.png", "AP over the values of each sweep")


def _chosen_cells(sweep: Sweep) -> list[str]:
    best = next((point for point, row in sweep.points if row is sweep.best), None)
    return ["-", "-"] if best is None else [best.said, ", ".join(at_the_edge(sweep)) or "no"]


def _pictures(folder: Path) -> Iterator[Block]:
    """What `study_pictures` has drawn."""
    detections = sorted((folder / PICTURES).glob(f"{DETECTIONS}*.jpg"))
    if detections:
        yield Heading("Detections of the same image")
        yield (
            f"By the teacher, {BASELINE} and the best variant after its last epoch, on the first seed. Images are "
            "spread evenly over the validation set, and nobody chose them. Boxes are from the score on at which all "
            "three have one recall."
        )
        yield from (Picture(path, path.stem.removeprefix(f"{DETECTIONS}_")) for path in detections)
    maps = folder / PICTURES / GRADIENTS
    if maps.is_file():
        yield Heading("Where the detection loss pulls")
        yield Picture(maps, "Gradient of the detection loss on the neck's features: the best variant, and the teacher")
