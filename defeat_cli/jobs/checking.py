"""`defeat check`: what a run would do, told before it is started."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table
from torch import Tensor

from defeat_cli.benchmark.detectors import gflops
from defeat_cli.config.schema import Recipe
from defeat_cli.console import Reporter, bare_table, counting
from defeat_cli.detectors.contract import Detector
from defeat_cli.distillation.distiller import Distiller
from defeat_cli.distillation.pairing import match_classes
from defeat_cli.jobs.estimate import images_a_batch, of_training, training_bytes
from defeat_cli.jobs.training import tell
from defeat_cli.jobs.validating import count_pseudo_labels, score_teacher
from defeat_cli.memory import told
from defeat_cli.session import Session, assemble
from defeat_cli.verifying import anchor_fit


@dataclass(frozen=True)
class Check:
    """What was found: tables to show, and the same as plain values."""

    tables: list[Table]
    facts: dict[str, Any]


def check(recipe: Recipe) -> Check:
    """Build everything that a run of the recipe would use, and describe it. Nothing is written but drawn data.

    Raises:
        DefeatError: the run could not be started.
    """
    reporter = Reporter("check")
    session = assemble(recipe, doing=reporter.doing, watch=counting)
    tell(session, reporter)
    with told(lambda: of_training(session)):
        return _checked(session, reporter)


def _checked(session: Session, reporter: Reporter) -> Check:
    """What is found of a session."""
    recipe = session.recipe
    student, teacher, data = session.student, session.teacher, session.training_data
    distiller = session.distiller.to(session.device)
    a_batch = images_a_batch(session)
    image, target, _ = data[0]
    images, targets = [image.to(session.device)], [target]

    detectors = {"teacher": teacher, "student": student}
    terms, pull = _losses(distiller, images, targets)
    facts: dict[str, Any] = {
        "detectors": {name: _describe(d, images) for name, d in detectors.items() if d is not None},
        "terms": terms,
        "pull": pull,
        "notes": [{"text": note.text, "warning": note.warning} for note in session.notes],
        "memory_gib": round(training_bytes(distiller, images, targets, recipe, a_batch) / 2**30, 2),
    }
    fitting = anchor_fit(student, data, recipe.data)
    if fitting is not None:
        facts["anchor_fit"] = fitting.mean
    tables = [_detectors_table(facts["detectors"])]
    if teacher is not None:
        facts["levels"] = [
            {"term": name, **asdict(pairing)} for name, term in distiller.terms.items() for pairing in term.pairings()
        ]
        facts["classes"] = [
            (student.classes[s], teacher.classes[t])
            for s, t in match_classes(student.classes, teacher.classes, recipe.distillation.class_map)
        ]
        tables += [_levels_table(facts["levels"]), _classes_table(facts["classes"], student, teacher)]
        if session.teacher_is_trained:
            facts["teacher_ap"] = score_teacher(session, reporter)
            count_pseudo_labels(session, reporter)
    tables.append(_run_table(facts, recipe))
    return Check(tables, facts)


def _describe(detector: Detector, images: list[Tensor]) -> dict[str, Any]:
    """Parameters, and the floating-point operations of detecting on one image as the data has it."""
    return {
        "kind": type(detector.model).__name__,
        "classes": len(detector.classes),
        "parameters": sum(parameter.numel() for parameter in detector.model.parameters()),
        "gflops": round(gflops(detector.eval(), images), 2),
        "levels": [(level.stride, level.channels) for level in detector.levels],
    }


def _losses(
    distiller: Distiller, images: list[Tensor], targets: list[dict[str, Tensor]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Every loss of one step on one image, at full weight, and how hard each term pulls."""
    distiller.train()
    losses = distiller(images, targets, measure=True)
    return tuple({name: value.item() for name, value in of.items()} for of in (losses.weighted, losses.pull))


def _detectors_table(detectors: dict[str, dict[str, Any]]) -> Table:
    table = bare_table("Detectors, on the first training image")
    for column in ("", "kind", "classes", "parameters", "GFLOPs", "levels (stride: channels)"):
        table.add_column(column, justify="right" if column in ("classes", "parameters", "GFLOPs") else "left")
    for name, facts in detectors.items():
        levels = ", ".join(f"{stride}: {channels}" for stride, channels in facts["levels"])
        table.add_row(
            name, facts["kind"], str(facts["classes"]), f"{facts['parameters'] / 1e6:.2f} M",
            f"{facts['gflops']:.2f}", levels,
        )  # fmt: skip
    return table


def _levels_table(levels: list[dict[str, Any]]) -> Table:
    table = bare_table("How the levels pair up")
    for column in ("term", "stride", "student channels", "teacher channels", "adapter"):
        table.add_column(column, justify="left" if column in ("term", "adapter") else "right")
    for row in levels:
        adapter = "no partner, left out" if row["adapter"] is None else row["adapter"]
        table.add_row(row["term"], str(row["stride"]), str(row["student"]), str(row["teacher"] or "-"), adapter)
    return table


def _classes_table(pairs: list[tuple[str, str]], student: Detector, teacher: Detector) -> Table:
    table = bare_table(
        f"Shared classes: {len(pairs)} of the student's {len(student.classes)}, of the teacher's {len(teacher.classes)}"
    )
    table.add_column("student")
    table.add_column("teacher")
    for s, t in pairs[:12]:
        table.add_row(escape(s), escape(t))
    if len(pairs) > 12:
        table.add_row("…", "…")
    return table


def _run_table(facts: dict[str, Any], recipe: Recipe) -> Table:
    table = bare_table("One training step", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in facts["terms"].items():
        table.add_row(f"{name}, one image at full weight", f"{value:.4g}")
    for name, value in facts["pull"].items():
        table.add_row(f"pull of {name} (1: as hard as the detection loss)", f"{value:.3g}")
    if "anchor_fit" in facts:
        table.add_row("mean IoU of a box's best anchor", f"{facts['anchor_fit']:.2f}")
    table.add_row(f"memory at batch size {recipe.data.batch_size}, estimated", f"{facts['memory_gib']:.2f} GiB")
    return table
