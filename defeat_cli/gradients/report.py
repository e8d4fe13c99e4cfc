"""One `defeat visualize-gradients`: maps, pictures and numbers for many images, with one image in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from torch import Tensor

from defeat_cli.config.schema import nearest
from defeat_cli.detectors.contract import Batch, Detector, level_names
from defeat_cli.distillation.distiller import Distiller
from defeat_cli.distillation.terms import View as Look
from defeat_cli.errors import CheckpointError, DataError, DefeatError
from defeat_cli.files import replacing, write_json
from defeat_cli.gradients import pictures
from defeat_cli.gradients.decoupling import draw_decoupling
from defeat_cli.gradients.images import Objects, Source, detected, device_of, distinct_names, require_classes, view_of
from defeat_cli.gradients.maps import PARTS, REDUCTIONS, detection_maps, loss_maps, neck_features, term_loss
from defeat_cli.gradients.numbers import cells_of_boxes, concise, map_numbers, own_area, summarize
from defeat_cli.gradients.pictures import Panel, Row, View
from defeat_cli.text import counted

SUMMARIES = CONTACT_SHEET, FIGURES = "contact_sheet.png", "gradients.json"
"""What is written once all images are done."""

UNITS = {"l2": "L2 norm of the gradient over channels", "mean-abs": "mean absolute gradient over channels"}
EVERY_LEVEL, OWN_LEVEL = "each box on every level", "each box on its own level, as in the distillation mask"

NamedMaps = tuple[str, list[int], list[Tensor]]
"""A row's name, its levels' strides, and one [h, w] map a level."""


@dataclass(frozen=True)
class Subject:
    """What one picture of an image shows: a row for each detector, or for each distillation term.

    name: ends the picture's file name, and is the key in `gradients.json`.
    own_level: a box is foreground on its own level only, instead of on every level.
    decades: colours follow the value's logarithm; else its square root.
    """

    name: str
    title: str
    own_level: bool
    decades: bool


@dataclass(frozen=True)
class Settings:
    """What is asked of every image.

    loss: `total`, `rpn`, `classification`, `regression`, or `distillation` for the distillation losses alone.
    distillation: the distillation losses are looked at too.
    samples, seed, reduce: as in `loss_maps`.
    own_level: a box is foreground on its own level only, instead of on every level; distillation always has it so.
    threshold: lowest score of a detection that stands in for ground truth.
    finest_scale: object side in pixels that the first level begins at.
    save_arrays: the maps are kept as .npz.
    """

    loss: str = "total"
    distillation: bool = False
    samples: int = 8
    seed: int = 0
    reduce: str = "l2"
    own_level: bool = False
    threshold: float = 0.5
    finest_scale: float = 56.0
    save_arrays: bool = False

    def __post_init__(self) -> None:
        for option, value, known in (
            ("--loss", self.loss, ("total", *PARTS, "distillation")),
            ("--reduce", self.reduce, tuple(REDUCTIONS)),
        ):
            if value not in known:
                raise DefeatError(f"{option} {value}: use one of {', '.join(known)}{nearest(value, known)}")
        if self.samples < 1 or self.seed < 0:
            raise DefeatError(f"--samples {self.samples} --seed {self.seed}: samples are at least 1, seeds at least 0")

    @property
    def detects(self) -> bool:
        """Whether the detection loss is looked at."""
        return self.loss != "distillation"

    @property
    def distils(self) -> bool:
        """Whether distillation losses are looked at."""
        return self.distillation or not self.detects

    @property
    def subjects(self) -> list[Subject]:
        """The pictures of an image."""
        loss = "the whole detection loss" if self.loss == "total" else f"the {self.loss} loss"
        title = f"gradient of {loss} on the neck"
        detection = Subject("gradients", title, self.own_level, decades=False)
        # Levels weigh the same in it however few cells they have: coarse cells are pulled far more strongly.
        title = "gradient of the distillation terms on the neck"
        distillation = Subject("distillation", title, own_level=True, decades=True)
        return [detection] * self.detects + [distillation] * self.distils


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
                for row in self.images[0][subject.name]
            }
            for subject in self.subjects
        }

    def to_dict(self) -> dict[str, Any]:
        """The content of `gradients.json`."""
        foreground = {subject.name: OWN_LEVEL if subject.own_level else EVERY_LEVEL for subject in self.subjects}
        told = {"foreground": foreground, "summary": self.summary, "images": self.images, "skipped": self.skipped}
        return self.about | told

    def tables(self) -> list[Table]:
        """The summary, as a user sees it."""
        summary = self.summary
        return [self._table(subject, summary[subject.name]) for subject in self.subjects]

    def _table(self, subject: Subject, rows: dict[str, dict[str, Any]]) -> Table:
        count = len(self.images)
        title = f"{subject.title}: {UNITS[self.about['reduce']]}, mean per cell over {counted(count, 'image')}"
        look = {"box": box.SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "padding": (0, 1, 0, 0)}
        table = Table(title=title, title_justify="left", **look)
        table.add_column("level", no_wrap=True)
        for column in (
            "inside\nboxes", "outside\n", "ratio\n[95% interval]", "share\ninside", "area\ninside", "images\nin > out"
        ):  # fmt: skip
            table.add_column(column, justify="right", no_wrap=True)
        for row, levels in rows.items():
            table.add_row(row, style="bold")
            for level, numbers in levels.items():
                table.add_row(f" {level}", *_cells(numbers), end_section=level == "overall")
        return table


def _cells(numbers: dict[str, Any]) -> list[str]:
    if not numbers["images"]:
        return ["-"] * 6
    ratio, higher = numbers["ratio"], numbers["foreground_higher"]
    interval = f" [{', '.join(map(concise, ratio['interval']))}]" if ratio["interval"] else ""
    return [
        f"{numbers['foreground_mean']['mean']:.2e}",
        f"{numbers['background_mean']['mean']:.2e}",
        f"{concise(ratio['mean'])}{interval}" if ratio["mean"] is not None else "-",
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
    about: Mapping[str, Any],
    teacher: Detector | None = None,
    teacher_boxes: bool = False,
    distiller: Distiller | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> GradientReport:
    """Measure and draw where a detector's gradients live, image by image.

    Writes `NAME_gradients.png` for each image (and `NAME_distillation.png`, `NAME_decoupled.png` of what the neck term
    compares, `NAME_gradients.npz` where asked for), `contact_sheet.png` and `gradients.json`. Detectors are put into
    eval mode.

    Args:
        student: the detector that is looked at; it prepares the images for the teacher too.
        about: what `gradients.json` says beside the settings; its `checkpoint` is what messages call the student.
        teacher: its maps stand beside the student's, on one colour scale.
        teacher_boxes: where there is no ground truth the teacher's detections stand in, not the student's.
        distiller: of both, with the terms that get a row each, where the settings ask for them.
        advance: called with 1 after each image.

    Returns:
        The report; images that could not be read are in its `skipped`.

    Raises:
        CheckpointError: a detector lacks classes of the ground truth, or its gradients are not finite.
        DataError: not one image could be used.
        DefeatError: the detector has no such loss.
    """
    require_classes(sources, student, about["checkpoint"])
    if teacher is not None and settings.detects:
        require_classes(sources, teacher, "the teacher")
    output.mkdir(parents=True, exist_ok=True)
    thumbnail = max(60, min(300, round(2400 / math.sqrt(3 * len(sources)))))
    look = _Look(student.eval(), teacher and teacher.eval(), distiller, settings, teacher_boxes, thumbnail)
    report = GradientReport({**about, **asdict(settings)}, settings.subjects)
    seen = []
    for source, stem in zip(sources, distinct_names(sources), strict=True):
        try:
            image = source.read()
        except DataError as error:
            report.skipped.append({"file": str(source.path), "reason": str(error)})
        else:
            entry, *on_sheet = look.at(source, image, output / stem)
            report.images.append(entry)
            seen.append(on_sheet)
        advance(1)
    if not report.images:
        raise DataError("\n  ".join(["no image could be used:", *(entry["reason"] for entry in report.skipped)]))
    first = report.subjects[0]
    note = (
        f"from left to right: image, {', '.join(report.images[0][first.name])}; sum over levels, each image on a "
        "colour scale of its own; ×: mean inside boxes over mean outside"
    )
    pictures.draw_contact_sheet(*zip(*seen, strict=True), output / CONTACT_SHEET, first.title, note)
    write_json(output / FIGURES, report.to_dict())
    return report


@dataclass(frozen=True)
class _Look:
    """What stays the same from image to image. thumbnail: longer side, in pixels, of pictures on the contact sheet."""

    student: Detector
    teacher: Detector | None
    distiller: Distiller | None
    settings: Settings
    teacher_boxes: bool
    thumbnail: int

    def at(self, source: Source, image: Tensor, stem: Path) -> tuple[dict[str, Any], Tensor, str]:
        """Measure, draw and write one image; its entry in `gradients.json`, its thumbnails and their caption."""
        objects = source.objects or self._stand_in(image)
        image = image.to(device_of(self.student))
        batch = self.student.prepare([image], [objects.target(self.student)])
        view = view_of(batch)
        entry: dict[str, Any] = {"file": str(source.path), "boxes": objects.origin, "objects": len(view.boxes)}
        views = self.distiller and self.distiller.views([image], [objects.target(self.student)])
        arrays, on_sheet = {}, []
        for subject in self.settings.subjects:
            distils = subject.name == "distillation"
            maps = self._distillation(*views) if distils else self._detection(image, objects)
            finest_scale = self.settings.finest_scale if subject.own_level else None
            rows = [_row(*named, batch, view, finest_scale) for named in maps]
            values = (panel.values for row in rows for panel in row.panels)
            scale = pictures.common_scale(values, UNITS[self.settings.reduce], subject.decades)
            path = stem.with_name(f"{stem.name}_{subject.name}.png")
            heading = f"{pictures.shortened(source.path.name, 60)} · {subject.title}"
            note = f"{_comparison(rows)}   Boxes: {objects.origin}."
            pictures.draw_panels(view, rows, scale, path, heading=heading, note=note)
            strip = pictures.thumbnails(view, [row.panels[-1] for row in rows], scale, self.thumbnail)
            on_sheet += [strip, f"{stem.name}   {_ratios(rows)}"]
            entry[subject.name] = {row.name: row.numbers for row in rows}
            for row in rows:
                levels = zip(list(row.numbers)[:-1], row.panels[:-1], strict=True)
                arrays |= {f"{row.name}/{level}": panel.values for level, panel in levels}
        if views and "neck" in self.distiller.terms:
            path = stem.with_name(f"{stem.name}_decoupled.png")
            heading = f"{pictures.shortened(source.path.name, 60)} · what DeFeat keeps apart"
            draw_decoupling(*views, self.distiller.terms["neck"], path, heading=heading, seed=self.settings.seed)
        if self.settings.save_arrays:
            with replacing(stem.with_name(f"{stem.name}_gradients.npz")) as temporary:
                np.savez_compressed(temporary, **arrays)
        return entry, *on_sheet[:2]

    def _stand_in(self, image: Tensor) -> Objects:
        """Detections where there is no ground truth."""
        by_teacher = self.teacher_boxes and self.teacher is not None
        finder, name = (self.teacher, "the teacher") if by_teacher else (self.student, "the checkpoint")
        return detected(finder, image, self.settings.threshold, name)

    def _detection(self, image: Tensor, objects: Objects) -> Iterator[NamedMaps]:
        """Each detector's name, strides, and maps of its loss, at the student's image size."""
        for name, detector in (("checkpoint", self.student), ("teacher", self.teacher)):
            if detector is not None:
                batch = self.student.prepare([image], [objects.target(detector)])
                yield name, detector.strides, detection_maps(detector, batch, self.settings.loss, **self._draws)

    def _distillation(self, ours: Look, theirs: Look) -> Iterator[NamedMaps]:
        """Each term's name, the student's strides, and maps of the term's loss."""
        features = neck_features(self.student, ours.batch)
        for name, term in self.distiller.terms.items():
            yield name, self.student.strides, loss_maps(term_loss(term, ours, theirs), features, **self._draws)

    @property
    def _draws(self) -> dict[str, Any]:
        return {key: getattr(self.settings, key) for key in ("samples", "seed", "reduce")}


def _row(
    name: str, strides: list[int], maps: list[Tensor], batch: Batch, view: View, finest_scale: float | None
) -> Row:
    """Maps cut to the image's own area, their sum over levels, and their numbers.

    Raises:
        CheckpointError: they are not finite.
    """
    if not all(values.isfinite().all() for values in maps):
        raise CheckpointError(f"{name}: its gradients are not finite; the weights hold NaN or huge numbers")
    cells = cells_of_boxes(batch.targets[0]["boxes"], [tuple(m.shape) for m in maps], strides, finest_scale)
    levels = own_area(maps, batch.sizes[0], strides)
    foreground = own_area([of_level.any(dim=0) for of_level in cells], batch.sizes[0], strides)
    outlined = [view.boxes[of_level.flatten(1).any(dim=1).cpu()] for of_level in cells]
    total = Panel("sum over levels", pictures.sum_over_levels(levels, strides), strides[0], view.boxes)
    numbers = map_numbers(levels, foreground, level_names("P", strides))
    return Row(name, [*pictures.level_panels(levels, strides, outlined), total], numbers)


def _ratios(rows: list[Row]) -> str:
    """`×3.2`, with the row's name before it where there are several."""
    texts = []
    for row in rows:
        overall = row.numbers["overall"]
        inside, outside = overall["foreground"]["mean"], overall["background"]["mean"]
        if inside and outside:
            text = f"×{concise(overall['ratio'])}"
        else:
            text = "all inside" if inside else "all outside" if outside else "nothing"
        texts.append(f"{row.name} {text}" if len(rows) > 1 else text)
    return ", ".join(texts)


def _comparison(rows: list[Row]) -> str:
    """What the numbers of one image say, in a sentence."""
    overall = rows[0].numbers["overall"]
    if not overall["foreground"]["cells"]:
        return "No boxes: every cell is background."
    if not overall["background"]["cells"]:
        return "Boxes cover the whole image: no cell is background."
    return f"Mean inside boxes over mean outside, all levels together: {_ratios(rows)}."
