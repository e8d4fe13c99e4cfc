"""One `defeat export`: a detector as a file that runs elsewhere, put in place once it is known to detect the same."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from defeat_cli import session
from defeat_cli.config.schema import Data, Recipe
from defeat_cli.console import Reporter, counting, new_table
from defeat_cli.data.transforms import read_image
from defeat_cli.detectors.contract import in_unit_range
from defeat_cli.detectors.modes import evaluating
from defeat_cli.errors import DataError, DefeatError
from defeat_cli.export.fewer_bits import Precision
from defeat_cli.export.graph import FORMATS, INPUTS, OUTPUTS, SUFFIXES, Graph, Input
from defeat_cli.export.parity import BOX_TOLERANCE, SCORE_TOLERANCE, Comparison, Detections, compare
from defeat_cli.export.runtime import OnnxDetector, as_input
from defeat_cli.files import replacing, require_place_for_file
from defeat_cli.gradients.images import find_images, images_of
from defeat_cli.jobs.estimate import of_detecting
from defeat_cli.jobs.fewer_bits import cost_table, costs, has_data, in_precision, require_calibration
from defeat_cli.jobs.opening import open_detector
from defeat_cli.memory import told

CHECKED = 5
"""Images that the file is compared on, where the user names none; the blank one comes on top."""

STRETCHES = ((1.0, 1.0), (0.6, 0.6), (1.0, 0.7), (1.4, 1.4), (0.5, 0.9))
"""Factors of height and width that the images are resized by, in turn, so that sizes differ."""

Run = Callable[[Tensor], Detections]


@dataclass(frozen=True)
class Row:
    """One image of the comparison: its name and (height, width)."""

    name: str
    size: tuple[int, int]
    comparison: Comparison


@dataclass(frozen=True)
class Exported:
    """The file, its size in bytes, and the comparison, which is empty where none was asked for.

    costs: of a file in fewer bits, before and after; None where there is no data to know them by.
    """

    target: Path
    size: int
    rows: list[Row]
    fewer_bits: bool = False
    costs: Table | None = None

    @property
    def agrees(self) -> bool:
        return all(row.comparison.agrees for row in self.rows)

    @property
    def is_telling(self) -> bool:
        """Whether anything was detected that could be compared."""
        return any(max(row.comparison.counts) for row in self.rows)

    def table(self) -> Table:
        """What a user sees of the comparison, which is that of float32 where the file has fewer bits."""
        name = f"{self.target.name} in float32" if self.fewer_bits else self.target.name
        return new_table(
            f"{name} and torch: scores within {SCORE_TOLERANCE:g}, boxes within {BOX_TOLERANCE:g} pixels",
            ["image", "size", "torch", "file", "Δ score", "Δ box", "unmatched", ""],
            [_cells(row) for row in self.rows],
        )


def _cells(row: Row) -> list[str]:
    c = row.comparison
    ours, theirs = c.counts
    return [
        row.name,
        f"{row.size[1]}x{row.size[0]}",
        str(ours),
        str(theirs),
        f"{c.score:.1e}",
        f"{c.box:.1e}",
        str(c.unmatched),
        ("at the cut" if c.unmatched else "same") if c.agrees else "DIFFERS",
    ]


def export(
    checkpoint: str,
    target: Path,
    *,
    form: str = "onnx",
    kind: Input = "float",
    precision: Precision = "float",
    overwrite: bool = False,
    check: bool = True,
    images: Sequence[str] = (),
    recipe_name: str | None = None,
    changes: dict[str, Any] | None = None,
    quiet: bool = False,
) -> Exported:
    """Write a detector as one file that takes an image and gives its detections.

    The file is compared with the detector before it is put in place; where they differ nothing is written.

    Args:
        form: a key of `FORMATS`.
        kind: what the file takes; see `Card.input`.
        precision: what it computes in; fewer bits are taken of a file that detects the same.
        images: files, folders or patterns to compare on; none takes the recipe's validation images where they are
            there, else drawn noise.

    Raises:
        DefeatError: the checkpoint, target, format or images cannot be used, or a package is missing.
    """
    _refuse(target, form, kind, overwrite)
    if precision != "float" and form != "onnx":
        raise DefeatError(f"--{precision}: files of ONNX only; leave --format {form} out")
    if "run.device" in (changes or {}):
        raise DefeatError("--set run.device: files are made on the CPU and run anywhere; leave it out")
    folder = (changes or {}).get("data.path")
    if folder is not None and not Path(folder).is_dir():
        raise DataError(f"{folder}: no such folder")
    splits = ("train", "val") if precision == "int8" else ("val",)
    opened = open_detector(checkpoint, recipe_name, {**(changes or {}), "run.device": "cpu"}, "export", splits)
    require_calibration(precision, opened.recipe.data)
    compares_on_data = check and (precision != "float" or not images)
    if folder is not None and opened.named and precision != "int8" and not compares_on_data:
        instead = "--images are compared on" if check else "nothing is compared"
        raise DataError(f"--data: without effect, as {instead} and the checkpoint names its classes; leave it out")
    for note in opened.notes:
        Reporter("export", quiet).note(note)
    graph = Graph(opened.detector, kind).eval()
    shown = _images(images, opened.recipe, graph.card.long_side) if check else []
    rows = []
    with told(partial(of_detecting, opened.detector, opened.device, "exporting, and comparing the file")):
        content = FORMATS[form](graph)
        run = _runner(content, form, target, kind) if check else None
        with counting("comparing", len(shown), quiet) as advance, evaluating(graph):
            for name, image in shown:
                rows.append(_compared(name, image, graph, run))
                advance(1)
    exported = Exported(target, len(content), rows)
    if precision != "float" and exported.agrees:
        exported, content = _in_fewer_bits(exported, content, precision, kind, opened.recipe.data, check, quiet)
    if exported.agrees:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            temporary.write_bytes(content)
    return exported


def _in_fewer_bits(
    exported: Exported, content: bytes, precision: Precision, kind: Input, data: Data, check: bool, quiet: bool
) -> tuple[Exported, bytes]:
    smaller = in_precision(content, precision, kind, data, quiet)
    known = None
    if check and has_data(data):
        known = cost_table(costs({"float": content, precision: smaller}, data, quiet), data)
    return replace(exported, size=len(smaller), fewer_bits=True, costs=known), smaller


def _refuse(target: Path, form: str, kind: str, overwrite: bool) -> None:
    for option, value, known in (("--format", form, FORMATS), ("--input", kind, INPUTS)):
        if value not in known:
            raise DefeatError(f"{option} {value}: expected {' or '.join(known)}")
    if target.suffix not in SUFFIXES[form]:
        others = [f"--format {other}" for other, suffixes in SUFFIXES.items() if target.suffix in suffixes]
        hint = f", or add {others[0]}" if others else ""
        raise DefeatError(f"{target}: a file of {form} ends in {' or '.join(SUFFIXES[form])}; rename it{hint}")
    if target.exists() and not overwrite:
        raise DefeatError(f"{target}: is there already; add --overwrite, or name another file")
    require_place_for_file(target)


def _runner(content: bytes, form: str, target: Path, kind: Input) -> Run:
    """What detects in an image by the exported file."""
    if form == "onnx":
        detector = OnnxDetector(content, target.name)
        return lambda image: detector.detect([image])[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch means to replace TorchScript by torch.export
        module = torch.jit.load(io.BytesIO(content))
    return lambda image: dict(zip(OUTPUTS, module(torch.from_numpy(as_input(image, kind))), strict=True))


def _compared(name: str, image: Tensor, graph: Graph, run: Run) -> Row:
    ours = dict(zip(OUTPUTS, graph(torch.from_numpy(as_input(image, graph.kind))), strict=True))
    card = graph.card
    comparison = compare(ours, run(image), card.score_threshold, card.detections_per_image)
    return Row(name, tuple(image.shape[-2:]), comparison)


def _images(named: Sequence[str], recipe: Recipe, long_side: int) -> list[tuple[str, Tensor]]:
    """Images [3, H, W] uint8 by name: of different sizes, and a blank one, on which detectors find nothing."""
    if named:
        found = [(source.path.name, source.read()) for source in find_images(named)]
    else:
        found = _images_of_data(recipe) or _noise(long_side)
        found = [
            (name, _stretched(image, *STRETCHES[i % len(STRETCHES)])) for i, (name, image) in enumerate(found[:CHECKED])
        ]
    height, width = found[0][1].shape[-2:]
    return [*found, ("blank", torch.full((3, width, height + 1), 114, dtype=torch.uint8))]


def _images_of_data(recipe: Recipe) -> list[tuple[str, Tensor]]:
    """The first validation images of the recipe's data; none where there is no such data on this machine."""
    if recipe.data.path is None or not Path(recipe.data.path).exists():
        return []
    sources = images_of(session.open_data(recipe.data, "val", train=False), CHECKED)
    return [(source.path.name, read_image(source.path)) for source in sources]


def _noise(long_side: int) -> list[tuple[str, Tensor]]:
    """Images of coarse and fine blotches."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for i in range(CHECKED):
        cells = torch.rand(1, 3, 4 + 3 * i, 5 + 3 * i, generator=generator)
        image = F.interpolate(cells, size=(long_side * 3 // 4, long_side), mode="nearest")[0]
        images.append((f"noise {i + 1}", (image * 255).round().byte()))
    return images


def _stretched(image: Tensor, down: float, across: float) -> Tensor:
    if down == across == 1.0:
        return image
    size = [max(1, round(side * factor)) for side, factor in zip(image.shape[-2:], (down, across), strict=True)]
    resized = F.interpolate(in_unit_range(image)[None], size=size, mode="bilinear", antialias=True)[0]
    return (resized * 255).round().byte()
