"""One `defeat visualize-gradients`: maps, pictures and numbers for many images, with one image in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from torch import Tensor, nn

from defeat_cli.config.schema import nearest
from defeat_cli.detectors.contract import Batch, Detector
from defeat_cli.distillation.masks import valid_masks
from defeat_cli.engine.runs import write_json
from defeat_cli.errors import CheckpointError, DataError, DefeatError
from defeat_cli.files import replacing
from defeat_cli.gradients.images import Objects, Source, detected, device_of, distinct_names, require_classes, view_of
from defeat_cli.gradients.maps import LOSSES, NECK_VARIANTS, REDUCTIONS, distillation_maps, gradient_maps
from defeat_cli.gradients.numbers import (
    boxes_by_level,
    foreground_cells,
    level_name,
    map_numbers,
    own_area,
    summarize,
)
from defeat_cli.gradients.pictures import (
    ContactSheet,
    Means,
    Panel,
    Row,
    Scale,
    View,
    common_scale,
    draw_panels,
    sum_over_levels,
    times,
)

UNITS = {"l2": "L2 norm of the gradient over channels", "mean-abs": "mean absolute gradient over channels"}
EVERY_LEVEL, OWN_LEVEL = "each box on every level", "each box on its own level, as in the distillation mask"


@dataclass(frozen=True)
class Subject:
    """What one picture of an image shows.

    name: ends the picture's file name, and is the key in `gradients.json`.
    rows: what is compared: detectors, or variants of a term.
    own_level: a box is foreground on its own level only, instead of on every level.
    root: of the colour scale.
    """

    name: str
    title: str
    rows: list[str]
    own_level: bool
    root: int


@dataclass(frozen=True)
class Settings:
    """What is asked of every image.

    loss: `total`, `rpn`, `classification`, `regression`, or `distillation` for the neck term alone.
    distillation: the neck term's variants are looked at too.
    samples, seed, reduce: as in `gradient_maps`.
    own_level: a box is foreground on its own level only, instead of on every level; the neck term always has it so.
    threshold: lowest score of a detection that stands in for ground truth.
    alpha_fg, alpha_bg, finest_scale: of the neck term.
    save_arrays: the maps are kept as .npz.
    """

    loss: str = "total"
    distillation: bool = False
    samples: int = 8
    seed: int = 0
    reduce: str = "l2"
    own_level: bool = False
    threshold: float = 0.5
    alpha_fg: float = 4.0
    alpha_bg: float = 16.0
    finest_scale: float = 56.0
    save_arrays: bool = False

    def __post_init__(self) -> None:
        for option, value, known in (
            ("--loss", self.loss, ("total", *LOSSES, "distillation")),
            ("--reduce", self.reduce, tuple(REDUCTIONS)),
        ):
            if value not in known:
                raise DefeatError(f"{option} {value}: use one of {', '.join(known)}{nearest(value, known)}")
        if self.samples < 1 or self.seed < 0:
            raise DefeatError(f"--samples {self.samples} --seed {self.seed}: samples are at least 1, seeds at least 0")

    def subjects(self, teacher: bool) -> list[Subject]:
        """The pictures of an image, with or without a teacher's maps."""
        subjects = []
        if self.loss != "distillation":
            loss = "the whole detection loss" if self.loss == "total" else f"the {self.loss} loss"
            rows = ["checkpoint", "teacher"] if teacher else ["checkpoint"]
            subjects.append(Subject("gradients", f"gradient of {loss} on the neck", rows, self.own_level, root=2))
        if self.loss == "distillation" or self.distillation:
            # Levels weigh the same in it however few cells they have: coarse cells are pulled far more strongly.
            title = "gradient of the neck distillation term"
            subjects.append(Subject("distillation", title, list(NECK_VARIANTS), own_level=True, root=4))
        return subjects


@dataclass(frozen=True)
class Maps:
    """One row's maps of one image: cells of the image's own area, finest level first."""

    name: str
    strides: list[int]
    levels: list[np.ndarray]
    numbers: dict[str, dict[str, Any]]


@dataclass
class GradientReport:
    """What was measured.

    about: what was asked; images: one entry an image; skipped: file and reason of images that could not be used.
    """

    about: dict[str, Any]
    subjects: list[Subject]
    images: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    @property
    def summary(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Subject -> row -> level -> numbers over all images."""
        return {
            subject.name: {
                row: summarize([image[subject.name][row] for image in self.images], self.about["seed"])
                for row in subject.rows
            }
            for subject in self.subjects
        }

    def to_dict(self) -> dict[str, Any]:
        """The content of `gradients.json`."""
        foreground = {subject.name: OWN_LEVEL if subject.own_level else EVERY_LEVEL for subject in self.subjects}
        return {
            **self.about,
            "foreground": foreground,
            "summary": self.summary,
            "images": self.images,
            "skipped": self.skipped,
        }

    def tables(self) -> list[Table]:
        """The summary, as a user sees it."""
        summary = self.summary
        return [self._table(subject, summary[subject.name]) for subject in self.subjects]

    def _table(self, subject: Subject, rows: dict[str, dict[str, Any]]) -> Table:
        count = len(self.images)
        title = f"{subject.title}: {UNITS[self.about['reduce']]}, mean per cell over {count} image{'s' * (count != 1)}"
        table = Table(title=title, title_justify="left")
        for column in ("", "level"):
            table.add_column(column)
        columns = (
            "inside boxes",
            "outside",
            "ratio [95% interval]",
            "share inside",
            "area inside",
            "images inside > outside",
        )
        for column in columns:
            table.add_column(column, justify="right")
        for row, levels in rows.items():
            for level, numbers in levels.items():
                last = level == "overall"
                name = row if level == next(iter(levels)) else ""
                table.add_row(name, level, *_cells(numbers), style="bold" if last else "", end_section=last)
        return table


def _cells(numbers: dict[str, Any]) -> list[str]:
    if not numbers["images"]:
        return ["-"] * 6
    ratio, higher = numbers["ratio"], numbers["foreground_higher"]
    interval = " [{:.2f}, {:.2f}]".format(*ratio["interval"]) if ratio["interval"] else ""
    return [
        f"{numbers['foreground_mean']['mean']:.2e}",
        f"{numbers['background_mean']['mean']:.2e}",
        f"{ratio['mean']:.2f}{interval}" if ratio["mean"] is not None else "-",
        f"{numbers['foreground_share']['mean']:.0%}",
        f"{numbers['foreground_area']['mean']:.0%}",
        f"{round(higher['mean'] * numbers['images'])} of {numbers['images']}",
    ]


def run_gradient_maps(
    student: Detector,
    sources: Sequence[Source],
    output: Path,
    settings: Settings,
    *,
    name: str,
    teacher: Detector | None = None,
    teacher_boxes: bool = False,
    adapters: Sequence[nn.Module] = (),
    advance: Callable[[int], None] = lambda done: None,
) -> GradientReport:
    """Measure and draw where a detector's gradients live, image by image.

    Writes `NAME_gradients.png` for each image (and `NAME_distillation.png`, `NAME_gradients.npz` where asked for),
    `contact_sheet.png` and `gradients.json`. Detectors are put into eval mode.

    Args:
        student: the detector that is looked at; it prepares the images for the teacher too.
        name: what messages and numbers call its checkpoint.
        teacher: its maps stand beside the student's, on one colour scale.
        teacher_boxes: where there is no ground truth the teacher's detections stand in, not the student's.
        adapters: the neck's, one for each pair of levels; needed for distillation.
        advance: called with 1 after each image.

    Returns:
        The report; images that could not be read are in its `skipped`.

    Raises:
        CheckpointError: a detector lacks classes of the ground truth, or its gradients are not finite.
        DataError: not one image could be used.
        DefeatError: the detector has no such loss.
    """
    subjects = settings.subjects(teacher is not None)
    require_classes(sources, student, name)
    if teacher is not None and "teacher" in subjects[0].rows:
        require_classes(sources, teacher, "the teacher")
    output.mkdir(parents=True, exist_ok=True)
    look = _Look(student.eval(), teacher and teacher.eval(), adapters, settings, subjects, teacher_boxes)
    about = {"checkpoint": name, **asdict(settings)}
    report = GradientReport(about, subjects)
    note = (
        f"from left to right: image, {', '.join(subjects[0].rows)}; sum over levels, each image on a colour scale of "
        "its own; ×: mean inside boxes over mean outside"
    )
    sheet = ContactSheet(len(sources), len(subjects[0].rows), subjects[0].title, note)
    for source, stem in zip(sources, distinct_names(sources), strict=True):
        try:
            image = source.read()
        except DataError as error:
            report.skipped.append({"file": str(source.path), "reason": str(error)})
        else:
            report.images.append(look.at(source, image, output / stem, sheet))
        advance(1)
    if not report.images:
        raise DataError("\n  ".join(["no image could be used:", *(entry["reason"] for entry in report.skipped)]))
    sheet.save(output / "contact_sheet.png")
    write_json(output / "gradients.json", report.to_dict())
    return report


@dataclass(frozen=True)
class _Look:
    """What stays the same from image to image."""

    student: Detector
    teacher: Detector | None
    adapters: Sequence[nn.Module]
    settings: Settings
    subjects: list[Subject]
    teacher_boxes: bool

    def at(self, source: Source, image: Tensor, stem: Path, sheet: ContactSheet) -> dict[str, Any]:
        """Measure, draw and write one image; its entry in `gradients.json`."""
        objects = source.objects or self._stand_in(image)
        batch = self._prepared(image, objects, self.student)
        view = view_of(batch)
        entry: dict[str, Any] = {"file": str(source.path), "boxes": objects.origin, "objects": len(view.boxes)}
        arrays = {}
        for subject in self.subjects:
            rows = (
                self._distillation(batch) if subject.name == "distillation" else self._detection(batch, image, objects)
            )
            rows = [self._measured(name, *maps, batch, subject.own_level) for name, maps in rows.items()]
            heading = f"{source.path.name} · {subject.title}"
            path = stem.with_name(f"{stem.name}_{subject.name}.png")
            sums, scale = self._draw(subject, rows, view, objects, heading, path)
            if subject is self.subjects[0]:
                sheet.add(view, sums, scale, f"{stem.name}   {_ratios(rows)}")
            entry[subject.name] = {row.name: row.numbers for row in rows}
            for row in rows:
                names = [f"{row.name}/{level_name(stride)}" for stride in row.strides]
                arrays |= dict(zip(names, row.levels, strict=True))
        if self.settings.save_arrays:
            with replacing(stem.with_name(f"{stem.name}_gradients.npz")) as temporary:
                np.savez_compressed(temporary, **arrays)
        return entry

    def _stand_in(self, image: Tensor) -> Objects:
        """Detections where there is no ground truth."""
        if self.teacher_boxes and self.teacher is not None:
            return detected(self.teacher, image, self.settings.threshold, "the teacher")
        return detected(self.student, image, self.settings.threshold, "the checkpoint")

    def _prepared(self, image: Tensor, objects: Objects, detector: Detector) -> Batch:
        """The image as the student resizes it, with a detector's labels."""
        return self.student.prepare([image.to(device_of(self.student))], [objects.target(detector)])

    def _detection(self, batch: Batch, image: Tensor, objects: Objects) -> dict[str, tuple[list[int], list[Tensor]]]:
        """Detector -> strides and maps of the detection loss."""
        settings = self.settings
        rows = {}
        for name, detector in (("checkpoint", self.student), ("teacher", self.teacher)):
            if detector is not None:
                own = batch if detector is self.student else self._prepared(image, objects, detector)
                maps = gradient_maps(detector, own, settings.loss, settings.samples, settings.seed, settings.reduce)
                rows[name] = detector.strides, maps
        return rows

    def _distillation(self, batch: Batch) -> dict[str, tuple[list[int], list[Tensor]]]:
        """Variant of the neck term -> strides and maps."""
        settings = self.settings
        variants = distillation_maps(
            self.student,
            self.teacher,
            self.adapters,
            batch,
            alpha_fg=settings.alpha_fg,
            alpha_bg=settings.alpha_bg,
            finest_scale=settings.finest_scale,
            reduce=settings.reduce,
        )
        return {name: (self.student.strides, maps) for name, maps in variants.items()}

    def _measured(self, name: str, strides: list[int], maps: list[Tensor], batch: Batch, own_level: bool) -> Maps:
        """Maps cut to the image's own area, with their numbers."""
        if not all(values.isfinite().all() for values in maps):
            raise CheckpointError(f"{name}: its gradients are not finite; the weights hold NaN or huge numbers")
        shapes = [tuple(values.shape) for values in maps]
        scale = self.settings.finest_scale if own_level else None
        inside = foreground_cells(batch.targets[0]["boxes"], shapes, strides, scale)
        valid = [mask[0] for mask in valid_masks(batch.valid, shapes)]
        levels, foreground = own_area(maps, valid), own_area(inside, valid)
        return Maps(name, strides, levels, map_numbers(levels, foreground, strides))

    def _draw(
        self, subject: Subject, rows: list[Maps], view: View, objects: Objects, heading: str, path: Path
    ) -> tuple[list[Panel], Scale]:
        """Write an image's picture; returns its sums over levels and their scale, for the contact sheet."""
        sums = [Panel("sum over levels", sum_over_levels(row.levels, row.strides), row.strides[0]) for row in rows]
        values = [*(level for row in rows for level in row.levels), *(panel.values for panel in sums)]
        root = {2: "square root", 4: "fourth root"}[subject.root]
        scale = common_scale(values, f"{UNITS[self.settings.reduce]}; {root} scale, one for all panels", subject.root)
        finest = self.settings.finest_scale if subject.own_level else None
        drawn = [
            Row(row.name, [*_level_panels(row, view, finest), total], _means(row))
            for row, total in zip(rows, sums, strict=True)
        ]
        note = f"{_comparison(rows)}   Boxes: {objects.origin}."
        draw_panels(view, drawn, scale, path, heading=heading, note=note, boxes=f"image, {len(view.boxes)} boxes")
        return sums, scale


def _level_panels(row: Maps, view: View, finest_scale: float | None) -> list[Panel]:
    shapes = [values.shape for values in row.levels]
    boxes = boxes_by_level(view.boxes, shapes, row.strides, finest_scale)
    return [
        Panel(f"{level_name(stride)} · stride {stride}", values, stride, outlined)
        for stride, values, outlined in zip(row.strides, row.levels, boxes, strict=True)
    ]


def _means(row: Maps) -> Means:
    names = [level_name(stride) for stride in row.strides]
    inside, outside = (
        np.array([row.numbers[name][group]["mean"] for name in names], dtype=float)  # None becomes NaN
        for group in ("foreground", "background")
    )
    return Means(names, inside, outside)


def _ratios(rows: list[Maps]) -> str:
    """`×3.2`, with the row's name before it where there are several."""
    texts = []
    for row in rows:
        overall = row.numbers["overall"]
        inside, outside = overall["foreground"]["mean"], overall["background"]["mean"]
        if not inside or not outside:
            text = "all inside" if inside else "all outside" if outside else "nothing"
        else:
            text = times(overall["ratio"])
        texts.append(f"{row.name} {text}" if len(rows) > 1 else text)
    return ", ".join(texts)


def _comparison(rows: list[Maps]) -> str:
    """What the numbers of one image say, in a sentence."""
    overall = rows[0].numbers["overall"]
    if not overall["foreground"]["cells"]:
        return "No boxes: every cell is background."
    if not overall["background"]["cells"]:
        return "Boxes cover the whole image: no cell is background."
    return f"Mean inside boxes over mean outside, all levels together: {_ratios(rows)}."
