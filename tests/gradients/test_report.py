"""From checkpoints and images to pictures and numbers, and what is said of input that cannot be used."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from tiny import COMMON, OWN, build, save_run
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

from defeat_cli.checkpoints import native
from defeat_cli.data.annotations import read_annotations
from defeat_cli.data.transforms import read_image
from defeat_cli.detectors.faster_rcnn import FasterRCNNDetector
from defeat_cli.distillation.adapters import Adapter
from defeat_cli.errors import CheckpointError, DataError, DefeatError
from defeat_cli.gradients.images import Objects, Source, find_images
from defeat_cli.gradients.maps import detection_maps
from defeat_cli.gradients.mask_pictures import draw_masks
from defeat_cli.gradients.numbers import cells_of_boxes
from defeat_cli.gradients.report import GradientReport, Settings, run_gradient_maps
from defeat_cli.jobs.mapping import visualize

QUICK = Settings(samples=2)


def classes_of(shapes: Path) -> list[str]:
    return read_annotations(shapes / "val.json").classes


def checkpoint_of(folder: Path, shapes: Path, terms: dict | None = None, **student: object) -> Path:
    settings = {**COMMON, **OWN["faster_rcnn"], "score_threshold": 0.0, **student}
    data = {"path": str(shapes), "short_side": [64], "long_side": 96}
    return save_run(folder, classes_of(shapes), settings, data, terms)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    return checkpoint_of(tmp_path_factory.mktemp("runs") / "student", shapes)


def files(shapes: Path, count: int) -> list[str]:
    """Validation images, in the order of their annotations."""
    return [str(shapes / "images" / name) for name in read_annotations(shapes / "val.json").file_names[:count]]


def content(output: Path) -> dict:
    return json.loads(
        (output / "gradients.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON")
    )


def shown(report: GradientReport) -> str:
    """Tables on a screen of 80 columns, each below its title."""
    console = Console(file=io.StringIO(), width=80)
    for table in report.tables():
        console.print(table.title, soft_wrap=True)
        table.title = None
        console.print(table)
    return console.file.getvalue()


def test_pictures_and_numbers_of_a_data_set(checkpoint: Path, shapes: Path, tmp_path: Path):
    """The data set is the recipe's own; the numbers are those of the maps, and the maps those of the checkpoint."""
    settings = Settings(samples=2, seed=3, save_arrays=True)
    report = visualize(str(checkpoint), [], tmp_path / "out", settings, limit=2)
    stems = [Path(name).stem for name in files(shapes, 2)]
    of_images = {f"{stem}_gradients.{ending}" for stem in stems for ending in ("png", "npz")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == of_images | {"contact_sheet.png", "gradients.json"}
    told = content(tmp_path / "out")
    assert told == json.loads(json.dumps(report.to_dict()))
    assert [image["file"] for image in told["images"]] == files(shapes, 2)
    assert {image["boxes"] for image in told["images"]} == {"ground truth"}
    assert told["skipped"] == []

    (source,) = find_images(files(shapes, 1), read_annotations(shapes / "val.json"))
    detector = build(classes=classes_of(shapes), score_threshold=0.0).eval()
    batch = detector.prepare([source.read()], [source.objects.target(detector)])
    maps = detection_maps(detector, batch, samples=2, seed=3)
    arrays = np.load(tmp_path / "out" / f"{stems[0]}_gradients.npz")
    cells = cells_of_boxes(batch.targets[0]["boxes"], [tuple(m.shape) for m in maps], detector.strides)
    numbers = told["images"][0]["gradients"]["checkpoint"]
    assert list(numbers) == ["P2", "P3", "P4", "P5", "P6", "overall"]
    for level, values, mask in zip(numbers, maps, (of_level.any(dim=0) for of_level in cells), strict=False):
        # Images of 64 x 64 are not padded.
        np.testing.assert_allclose(arrays[f"checkpoint/{level}"], values.numpy(), rtol=1e-5)
        if mask.any():
            assert numbers[level]["foreground"]["mean"] == pytest.approx(float(values[mask].mean()), rel=1e-5)
    lines = shown(report).splitlines()
    assert max(map(len, lines[1:])) <= 80
    (overall,) = (line.split() for line in lines if line.strip().startswith("overall"))
    assert overall[1] == f"{told['summary']['gradients']['checkpoint']['overall']['foreground_mean']['mean']:.2e}"
    assert overall[-3:] in ([n, "of", "2"] for n in "012")


def test_padding_is_in_no_array(checkpoint: Path, tmp_path: Path):
    """80 x 60 is resized to 64 pixels of height and 85 of width, and padded to 96."""
    Image.new("RGB", (80, 60), "white").save(tmp_path / "wide.png")
    visualize(str(checkpoint), [str(tmp_path / "wide.png")], tmp_path / "out", Settings(samples=1, save_arrays=True))
    arrays = np.load(tmp_path / "out" / "wide_gradients.npz")
    shapes = [arrays[f"checkpoint/P{level}"].shape for level in (2, 3, 4, 5, 6)]
    assert shapes == [(16, 22), (8, 11), (4, 6), (2, 3), (1, 2)]


def test_annotations_and_data_say_the_same(checkpoint: Path, shapes: Path, tmp_path: Path):
    first = files(shapes, 1)
    of_data = visualize(str(checkpoint), [], tmp_path / "a", QUICK, limit=1)
    of_file = visualize(str(checkpoint), first, tmp_path / "b", QUICK, annotations=shapes / "val.json")
    of_both = visualize(str(checkpoint), first, tmp_path / "c", QUICK, changes={"data.path": str(shapes)})
    assert of_data.images == of_file.images == of_both.images


def test_plain_weights_look_at_what_they_detect(checkpoint: Path, shapes: Path, tmp_path: Path):
    settings = Settings(samples=1, threshold=0.0)
    student = str(checkpoint.parent / "student.pth")
    report = visualize(student, [str(shapes / "images")], tmp_path / "out", settings, limit=1)
    assert report.images[0]["boxes"] == "the checkpoint's detections of score 0 and above"
    assert report.images[0]["objects"] > 0
    nothing = visualize(student, files(shapes, 1), tmp_path / "out", Settings(samples=1, threshold=1.0))
    assert nothing.images[0]["objects"] == 0
    assert nothing.summary["gradients"]["checkpoint"]["overall"] == {"images": 0}
    assert " - " in shown(nothing)


def test_a_teacher_stands_beside_and_can_say_where_the_objects_are(
    checkpoint: Path, shapes: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
):
    teacher = checkpoint_of(tmp_path_factory.mktemp("runs") / "teacher", shapes, fpn_channels=16)
    settings = Settings(samples=1, threshold=0.0)
    first, out = files(shapes, 1), tmp_path / "out"
    report = visualize(str(checkpoint), first, out, settings, teacher=str(teacher), teacher_boxes=True)
    assert report.images[0]["boxes"] == "the teacher's detections of score 0 and above"
    rows = report.images[0]["gradients"]
    assert list(rows) == ["checkpoint", "teacher"]
    assert rows["checkpoint"]["P2"] != rows["teacher"]["P2"]

    with pytest.raises(CheckpointError, match="holds no adapters"):
        visualize(str(checkpoint), first, out, Settings(distillation=True), teacher=str(teacher))
    adapters = {f"neck.adapters.{i}.{k}": v for i in range(5) for k, v in Adapter(8, 16).state_dict().items()}
    distilled = checkpoint_of(tmp_path_factory.mktemp("runs") / "distilled", shapes, adapters)
    report = visualize(
        str(distilled),
        first,
        out,
        Settings(loss="distillation"),
        annotations=shapes / "val.json",
        teacher=str(teacher),
        changes={"distillation.neck.alpha_bg": 0.0},
    )
    rows = report.images[0]["distillation"]
    assert list(rows) == ["full", "fg-only", "bg-only", "neck"]
    assert rows["fg-only"] == rows["neck"]
    assert rows["bg-only"]["overall"]["background"]["mean"] == 0
    assert "gradients" not in report.images[0]
    assert (out / f"{Path(first[0]).stem}_distillation.png").is_file()
    assert (out / f"{Path(first[0]).stem}_decoupled.png").is_file()


def test_one_bad_image_is_named_and_skipped(checkpoint: Path, shapes: Path, tmp_path: Path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    good = files(shapes, 1)[0]
    report = visualize(str(checkpoint), [str(bad), good], tmp_path / "out", QUICK)
    assert [image["file"] for image in report.images] == [good]
    assert report.skipped == [{"file": str(bad), "reason": f"{bad}: is not an image that can be read"}]
    assert content(tmp_path / "out")["skipped"] == report.skipped
    with pytest.raises(DataError, match=r"no image could be used:\n  .*bad\.jpg"):
        visualize(str(checkpoint), [str(bad)], tmp_path / "none", QUICK)
    assert not (tmp_path / "none" / "gradients.json").exists()


def test_a_checkpoint_without_the_annotated_classes_is_refused(checkpoint: Path, shapes: Path, tmp_path: Path):
    foreign = json.loads((shapes / "val.json").read_text())
    foreign["categories"][0]["name"] = "zebra"
    (tmp_path / "foreign.json").write_text(json.dumps(foreign))
    with pytest.raises(CheckpointError, match=r"best\.pt has no class for zebra, .*; it knows "):
        visualize(str(checkpoint), files(shapes, 6), tmp_path / "out", QUICK, annotations=tmp_path / "foreign.json")
    assert not (tmp_path / "out").exists()


def test_options_that_make_no_sense_are_refused(checkpoint: Path, shapes: Path, tmp_path: Path):
    with pytest.raises(DefeatError, match="did you mean regression"):
        Settings(loss="regresion")
    with pytest.raises(DefeatError, match="--reduce max"):
        Settings(reduce="max")
    with pytest.raises(DefeatError, match="seeds at least 0"):
        Settings(seed=-1)
    with pytest.raises(DataError, match="--limit 0"):
        visualize(str(checkpoint), [], tmp_path, QUICK, limit=0)
    with pytest.raises(DefeatError, match="need a teacher"):
        visualize(str(checkpoint), [], tmp_path, Settings(distillation=True))
    with pytest.raises(DataError, match="no test data there"):
        visualize(str(checkpoint), [], tmp_path, QUICK, split="test")


def test_weights_that_diverged_are_refused(shapes: Path, tmp_path: Path):
    path = checkpoint_of(tmp_path / "run", shapes)
    saved = native.load(path)
    saved["student"]["backbone.fpn.layer_blocks.0.0.bias"][0] = float("nan")
    native.save(path, {key: saved[key] for key in native.KEYS})
    with pytest.raises(CheckpointError, match="not finite"):
        visualize(str(path), [], tmp_path / "out", QUICK, limit=1)


def test_levels_that_share_a_stride_all_have_their_numbers(tmp_path: Path):
    """torchvision's MobileNetV3 has two levels of stride 32 and a pooled one: 2 x 2, 2 x 2 and 1 cells of 64 pixels."""
    torch.manual_seed(0)
    model = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=2, min_size=64, max_size=64
    )
    detector = FasterRCNNDetector(model, ["thing"])
    assert detector.strides == [32, 32, 64]
    Image.new("RGB", (64, 64), "white").save(tmp_path / "x.png")
    objects = Objects(torch.tensor([[0.0, 0.0, 32.0, 64.0]]), ["thing"], "by hand")
    source = Source(tmp_path / "x.png", objects=objects)
    settings = Settings(samples=1, save_arrays=True)
    report = run_gradient_maps(detector, [source], tmp_path, settings, about={"checkpoint": "mobilenet"})
    numbers = report.images[0]["gradients"]["checkpoint"]
    cells = {level: [numbers[level][group]["cells"] for group in ("foreground", "background")] for level in numbers}
    assert cells == {"P5": [2, 2], "P5b": [2, 2], "P6": [1, 0], "overall": [5, 4]}
    arrays = np.load(tmp_path / "x_gradients.npz")
    assert arrays.files == ["checkpoint/P5", "checkpoint/P5b", "checkpoint/P6"]
    assert not np.array_equal(arrays["checkpoint/P5"], arrays["checkpoint/P5b"])


def test_masks_are_drawn_for_each_image(shapes: Path, tmp_path: Path, figures: list[Figure]):
    detector = build(classes=classes_of(shapes))
    sources = find_images(files(shapes, 1), read_annotations(shapes / "val.json"))
    (path,) = draw_masks(detector, sources, tmp_path)
    assert path.name == f"{sources[0].path.stem}_masks.png"
    figure = figures[0]
    assert [axes.get_ylabel() for axes in figure.axes[:24:6]] == ["boxes", "gaussian", "fine-grained", "full"]
    assert [axes.get_title(loc="left") for axes in figure.axes[1:6]] == [f"P{n} · stride {2**n}" for n in range(2, 7)]
    full = figure.axes[19].images[0].get_array()
    assert full[..., 1].min() > 100  # lit everywhere: the dimmed image is darker
    draw_masks(build("fcos"), sources, tmp_path)
    rows = [axes.get_ylabel() for axes in figures[1].axes if axes.get_ylabel()]
    assert rows == ["boxes", "gaussian", "full"]  # points have no anchors that a mask could be made of
    with pytest.raises(DataError, match="no boxes: give its ground truth, or a teacher"):
        draw_masks(detector, find_images(files(shapes, 1)), tmp_path)
    assert read_image(sources[0].path).shape == (3, 64, 64)
