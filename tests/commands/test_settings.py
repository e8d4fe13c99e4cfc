"""Every inference setting, in every command that takes a checkpoint, has an effect or is refused by name."""

from __future__ import annotations

import json
import shutil
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from tiny import save_run

from defeat_cli.config.architecture import (
    INFERENCE,
    SIZES,
    STRUCTURE,
    TRAINING,
    Architecture,
    changed_settings,
    without_effect,
)
from defeat_cli.config.given import COMMAND_LINE, given_settings
from defeat_cli.config.schema import Recipe
from defeat_cli.data.formats.shapes import CLASSES
from defeat_cli.detectors.loading import load_detector
from defeat_cli.detectors.zoo import build_detector
from defeat_cli.errors import CheckpointError, RecipeError

PARTS = {
    "backbone": "regnet", "widths": [8, 8, 8, 64], "fpn_channels": 64, "head_channels": 8, "norm": "batch",
    "proposals": 30, "score_threshold": 0.0,
}  # fmt: skip
TINY = {
    "faster_rcnn": Architecture(anchor_sizes=[[s, 1.3 * s] for s in (8, 16, 32, 64, 96)], **PARTS),
    "retinanet": Architecture(detector="retinanet", anchor_sizes=[[s, 1.3 * s] for s in (8, 16, 32, 64, 96)], **PARTS),
    "fcos": Architecture(detector="fcos", **PARTS),
}
OTHER = {
    "anchor_sizes": [[s, 1.5 * s] for s in (9, 18, 36, 72, 99)],
    "anchor_ratios": [0.4, 1.0, 3.0],
    "proposals": 3,
    "proposals_before_nms": 4,
    "proposal_nms_threshold": 0.05,
    "candidates_per_level": 2,
    "score_threshold": 0.2,
    "nms_threshold": 0.05,
    "detections_per_image": 3,
    "conventions.image_mean": [0.1, 0.2, 0.3],
    "conventions.image_std": [0.5, 0.6, 0.7],
    "conventions.stride_in_1x1": True,
    "conventions.batch_norm_eps": 0.1,
    "conventions.roi_align_aligned": True,
    "conventions.roi_align_sampling_ratio": 1,
    "conventions.rounded_anchors": False,
    "conventions.anchor_order": "sizes-first",
    "conventions.nominal_strides": True,
    "conventions.p6_from": "c5",
    "conventions.p7_relu": False,
    "conventions.clip_after_nms": True,
    "conventions.clip_proposals": False,
    "conventions.clip_detections": False,
    "conventions.smallest_box": 30.0,
    "conventions.suppression": "linear",
    "conventions.suppression_sigma": 0.9,
    "conventions.suppression_least_score": 0.1,
    "conventions.suppression_across_classes": True,
    "conventions.keep_ratio": False,
    "conventions.channels": "bgr",
    "conventions.edge_cases": "mmdetection",
    "short_side": 64,
    "long_side": 80,
}
"""A value of every inference setting that is not the one of `TINY`."""


def checkpoint_of(family: str, folder: Path, shapes: Path) -> Path:
    data = {"path": str(shapes), "short_side": [96], "long_side": 128}
    return save_run(folder, CLASSES, changed_settings(TINY[family]), data)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, shapes) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {family: str(checkpoint_of(family, folder / family, shapes)) for family in TINY}


def test_every_setting_of_an_architecture_is_of_one_kind():
    names = {name for name in Architecture.__dataclass_fields__ if name != "conventions"}
    conventions = {name for name in INFERENCE if name.startswith("conventions.")}
    assert names | conventions == {*STRUCTURE, *TRAINING, *INFERENCE}
    assert OTHER.keys() == {*INFERENCE, *SIZES}


def seen(detector) -> list:
    """What a detector gives, and what it is made of, which for some settings shows only in rare cases."""
    rng = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 96, 96, generator=rng), torch.rand(3, 60, 96, generator=rng)]
    with torch.no_grad():
        outputs = [detector.eval().detect([image])[0] for image in images]
        features = [level.tolist() for level in detector.features(detector.prepare(images))]
    found = [{name: value.tolist() for name, value in output.items()} for output in outputs]
    return [found, features, [type(module).__name__ for module in detector.model.modules()]]


@pytest.fixture(scope="module")
def usual(checkpoints) -> dict[str, list]:
    return {family: seen(load_detector(checkpoint).detector) for family, checkpoint in checkpoints.items()}


@pytest.mark.parametrize("setting", OTHER)
@pytest.mark.parametrize("family", TINY)
def test_an_inference_setting_changes_what_is_detected_or_is_refused(checkpoints, usual, family, setting):
    dotted = f"data.{setting}" if setting in SIZES else f"student.{setting}"
    given = given_settings({dotted: OTHER[setting]}, COMMAND_LINE)
    if setting in without_effect(TINY[family]):
        with pytest.raises(RecipeError, match=rf"{dotted}.*without effect"):
            load_detector(checkpoints[family], given)
        return
    loaded = load_detector(checkpoints[family], given)
    assert seen(loaded.detector) != usual[family]
    assert any(f"in force: {dotted}" in note for note in loaded.notes)


class Reached(Exception):  # noqa: N818 - what a test waits for
    """The detector would be built now."""


SECTIONS = {
    "eval": "student",
    "gradmap": "student",
    "convert": "student",
    "check": "teacher.architecture",
    "train": "teacher.architecture",
    "ablate": "teacher.architecture",
    "gradmap, the teacher": "teacher.architecture",
}


def command_line(command: str, checkpoint: str, shapes: Path, tiny: Path, folder: Path) -> list[object]:
    image = next((shapes / "images").iterdir())
    return {
        "eval": ["eval", checkpoint],
        "gradmap": ["gradmap", image, "-c", checkpoint, "-o", folder],
        "convert": ["convert", checkpoint, folder / "x.pth"],
        "check": ["check", "-r", tiny, "-t", checkpoint],
        "train": ["train", "-r", tiny, "-t", checkpoint, "-o", folder],
        "ablate": ["ablate", "neck", "-r", tiny, "-t", checkpoint, "-o", folder],
        "gradmap, the teacher": ["gradmap", image, "-c", checkpoint, "-t", checkpoint, "-o", folder],
    }[command]


@pytest.mark.parametrize("command", SECTIONS)
def test_every_command_obeys_or_refuses_every_inference_setting(
    defeat, checkpoints, shapes, tiny, tmp_path, monkeypatch, command
):
    """That settings in force have an effect is shown above: here it is enough that a detector would be built so."""
    section, checkpoint = SECTIONS[command], checkpoints["faster_rcnn"]
    built = []

    def build(architecture, classes, short_side, long_side):
        if command == "gradmap, the teacher" and not built:
            built.append(architecture)
            return build_detector(architecture, classes, short_side, long_side)
        sides = {"short_side": short_side[-1], "long_side": long_side}
        raise Reached({**{name: attrgetter(name)(architecture) for name in INFERENCE}, **sides})

    monkeypatch.setattr("defeat_cli.detectors.loading.build_detector", build)
    for setting, value in OTHER.items():
        if setting in SIZES and section != "student":
            continue  # a teacher sees images in the student's size
        built.clear()
        dotted = f"data.{setting}" if setting in SIZES else f"{section}.{setting}"
        said = [value] if setting == "short_side" else value
        arguments = [
            *command_line(command, checkpoint, shapes, tiny, tmp_path / "out"),
            "--set",
            f"{dotted}={json.dumps(said)}",
        ]
        if setting in without_effect(TINY["faster_rcnn"]):
            assert f"{dotted} {value!r} (" in defeat(*arguments, code=2)
            continue
        with pytest.raises(Reached) as reached:
            defeat(*arguments)
        assert reached.value.args[0][setting] == value, setting


STRUCTURES = {
    "detector": "retinanet", "backbone": "resnet18", "widths": [8, 8, 8, 32], "depths": [1, 2, 1, 1],
    "fpn_channels": 32, "head_channels": 16,
}  # fmt: skip


@pytest.mark.parametrize("command", SECTIONS)
def test_every_command_refuses_another_structure_by_name(defeat, checkpoints, shapes, tiny, tmp_path, command):
    assert STRUCTURES.keys() == set(STRUCTURE)
    for name, value in STRUCTURES.items():
        dotted = f"{SECTIONS[command]}.{name}"
        arguments = command_line(command, checkpoints["faster_rcnn"], shapes, tiny, tmp_path / "out")
        output = defeat(*arguments, "--set", f"{dotted}={json.dumps(value)}", code=2)
        assert dotted in output
        assert "Traceback" not in output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("setting", "value"), [("anchor_sizes", [[8], [16], [32], [64], [96]]), ("anchor_ratios", [1.0])]
)
def test_another_number_of_anchors_is_refused_by_name(checkpoints, setting, value):
    with pytest.raises(CheckpointError, match=rf"rpn\.head[\s\S]*given: student\.{setting}"):
        load_detector(checkpoints["faster_rcnn"], given_settings({f"student.{setting}": value}, COMMAND_LINE))


def test_what_a_recipe_says_of_training_is_no_obstacle_and_of_the_structure_is_one(checkpoints, tmp_path):
    said = {"student.norm": "frozen", "student.proposals_train": 7, "student.fpn_channels": 64}
    assert load_detector(checkpoints["faster_rcnn"], given_settings(said, "a recipe")).weights.stated
    with pytest.raises(CheckpointError, match=r"student\.fpn_channels 32 \(a recipe\); the weights are of 64"):
        load_detector(checkpoints["faster_rcnn"], given_settings({"student.fpn_channels": 32}, "a recipe"))
    with pytest.raises(RecipeError, match=r"student\.norm 'frozen' .*without effect"):
        load_detector(checkpoints["faster_rcnn"], given_settings({"student.norm": "frozen"}, COMMAND_LINE))


def leaves(settings: dict, prefix: str = "") -> list[str]:
    nested = {name: value for name, value in settings.items() if isinstance(value, dict) and value}
    flat = [f"{prefix}{name}" for name in settings if name not in nested]
    return flat + [leaf for name, value in nested.items() for leaf in leaves(value, f"{prefix}{name}.")]


EFFECTIVE = {
    "eval": {
        *("data.path", "data.format", "data.val_annotations", "data.val_images", "data.workers"),
        *("data.verify", "data.on_bad_image"),
        *("data.val_fraction", "data.split_seed", "data.classes"),
        *("data.short_side", "data.long_side", "run.device", "run.precision"),
        *(f"data.shapes.{name}" for name in ("train_images", "val_images", "size", "seed")),
        *(f"student.{name}" for name in (*STRUCTURE, *INFERENCE)),
    },
    "gradmap": {
        *("data.path", "data.format", "data.val_annotations", "data.val_images", "run.device"),
        *("data.val_fraction", "data.split_seed", "data.classes"),
        *("data.short_side", "data.long_side", "student.proposals_train", "student.regions_per_image"),
        *(f"data.shapes.{name}" for name in ("train_images", "val_images", "size", "seed")),
        *(f"student.{name}" for name in (*STRUCTURE, *INFERENCE)),
    },
    "convert": {"data.short_side", "data.long_side", *(f"student.{n}" for n in (*STRUCTURE, *INFERENCE, *TRAINING))},
}


@pytest.mark.parametrize("command", EFFECTIVE)
def test_every_other_key_of_a_recipe_is_refused_on_the_command_line(defeat, checkpoints, tmp_path, command):
    content = Recipe().model_dump()
    keys = [key for key in leaves(content) if key not in EFFECTIVE[command]]
    assert {"optimizer.lr", "distillation.warmup_steps", "data.flip", "data.batch_size", "run.seed"} <= set(keys)
    checkpoint = ["-c", checkpoints["fcos"]] if command == "gradmap" else [checkpoints["fcos"]]
    target = [tmp_path / "x.pth"] if command == "convert" else []
    for key in keys:
        value = content
        for part in key.split("."):
            value = value[part]
        output = defeat(command, *checkpoint, *target, "--set", f"{key}={json.dumps(value)}", code=2)
        assert f"--set {key}: without effect in `defeat {command}`" in output
    assert "did you mean score_threshold?" in defeat(
        command, *checkpoint, *target, "--set", "student.scor_threshold=0.5", code=2
    )


def test_a_recipe_that_is_empty_is_refused(defeat, checkpoints, tmp_path):
    for text in ("", "# nothing yet\n", "{}\n"):
        (tmp_path / "empty.yaml").write_text(text)
        assert "empty.yaml: is empty" in defeat("eval", checkpoints["fcos"], "-r", tmp_path / "empty.yaml", code=2)


# --- which data is meant


def drawn_run(folder: Path, shapes: Path, monkeypatch) -> Path:
    """A checkpoint of a run in `folder` on drawn data that it has drawn there, as a relative path."""
    monkeypatch.chdir(folder)
    shutil.copytree(shapes, folder / "runs" / "shapes")
    drawing = {"train_images": 12, "val_images": 6, "size": 64, "seed": 0}
    data = {"path": "runs/shapes", "format": "shapes", "shapes": drawing, "short_side": [64], "long_side": 64}
    return save_run(folder / "runs" / "mine", CLASSES, changed_settings(TINY["fcos"]), data)


@pytest.mark.parametrize("name", ["best.pt", "student.pth"])
def test_data_is_found_from_any_folder(defeat, shapes, tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    path = drawn_run(tmp_path / "here", shapes, monkeypatch).parent / name
    at_home = defeat("eval", Path("runs/mine") / name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    output = defeat("eval", path)
    assert f"data: {tmp_path}/here/runs/shapes, which the checkpoint remembers as runs/shapes" in output
    assert "data:" not in at_home
    figures = [line for line in output.splitlines() if " AP" in line or " AR" in line]
    assert figures == [line for line in at_home.splitlines() if " AP" in line or " AR" in line]
    assert not list((tmp_path / "elsewhere").iterdir())
    shutil.move(tmp_path / "here", tmp_path / "moved")
    assert f"{tmp_path}/moved/runs/shapes" in defeat("eval", tmp_path / "moved" / "runs" / "mine" / name)


def test_a_folder_that_is_named_is_read_as_it_is_and_never_drawn(defeat, shapes, tmp_path, monkeypatch):
    checkpoint = drawn_run(tmp_path, shapes, monkeypatch)
    assert "no such folder" in defeat("eval", checkpoint, "-d", tmp_path / "mistyped", code=2)
    assert "no such folder" in defeat("eval", checkpoint, "--set", f"data.path={tmp_path / 'mistyped'}", code=2)
    assert not (tmp_path / "mistyped").exists()
    # Drawn with other settings than those that the checkpoint remembers, it is read all the same.
    other = tmp_path / "other"
    shutil.copytree(shapes, other)
    content = json.loads((other / "shapes.json").read_text())
    (other / "shapes.json").write_text(json.dumps({**content, "seed": 5}))
    assert f"6 val images of {other}" in defeat("eval", checkpoint, "-d", other)
    # In another layout, too, though the checkpoint remembers this one.
    (other / "annotations").mkdir()
    (other / "val.json").rename(other / "annotations" / "instances_val2017.json")
    (other / "images").rename(other / "val2017")
    assert f"6 val images of {other}" in defeat("eval", checkpoint, "-d", other)


def test_file_names_that_a_checkpoint_remembers_are_for_its_own_folder(defeat, shapes, tmp_path):
    content = torch.load(checkpoint_of("fcos", tmp_path / "run", shapes), weights_only=True)
    content["recipe"]["data"]["val_annotations"] = "train.json"
    torch.save(content, tmp_path / "x.pt")
    shutil.copytree(shapes, tmp_path / "other")
    assert "12 val images" in defeat("eval", tmp_path / "x.pt")
    assert "12 val images" in defeat("eval", tmp_path / "x.pt", "-d", shapes)
    output = defeat("eval", tmp_path / "x.pt", "-d", tmp_path / "other")
    assert "6 val images" in output
    assert "data.val_annotations 'train.json' belongs to the checkpoint's own data and is not used" in output


def test_images_without_boxes_cannot_be_scored(defeat, checkpoints, shapes, tmp_path):
    content = json.loads((shapes / "val.json").read_text())
    (tmp_path / "empty.json").write_text(json.dumps({**content, "annotations": []}))
    options = ["--set", f"data.val_annotations={tmp_path / 'empty.json'}"]
    assert "nothing to learn or to score" in defeat("eval", checkpoints["fcos"], *options, code=2)


def test_the_precision_of_its_own_run_is_said_where_the_device_does_not_have_it(defeat, checkpoints, tmp_path):
    content = torch.load(checkpoints["fcos"], weights_only=True)
    content["recipe"]["run"] = {"precision": "fp16"}
    torch.save(content, tmp_path / "x.pt")
    assert "evaluated in fp16" in defeat("eval", tmp_path / "x.pt", "--device", "cpu")
    options = ["--device", "cpu", "--set", "run.precision=fp32"]
    assert "fp16" not in defeat("eval", tmp_path / "x.pt", *options)


def test_data_that_a_checkpoint_remembers_and_no_one_knows_is_one_message(defeat, checkpoints, tmp_path):
    content = torch.load(checkpoints["fcos"], weights_only=True)
    content["recipe"]["data"]["format"] = "parquet"
    torch.save(content, tmp_path / "x.pt")
    output = defeat("eval", tmp_path / "x.pt", code=2)
    assert "x.pt: the data that it remembers cannot be used" in output
    assert "data.format" in output


def test_a_setting_of_a_term_that_the_variant_is_without_is_refused(defeat, tiny, teacher, tmp_path):
    """It would switch the term on again: `none` would be distilled."""
    run = ["train", "-r", tiny, "-t", teacher, "-o", tmp_path / "run", "--variant"]
    output = defeat(*run, "none", "--set", "distillation.neck.finest_scale=20", code=2)
    assert "distillation.neck.finest_scale: --variant none is without neck" in output
    assert "--set distillation.only=[neck]" in output
    assert "distillation.neck: " in defeat(*run, "none", "--set", "distillation.neck={alpha_fg: 2}", code=2)
    output = defeat(*run, "neck", "--set", "distillation.head.beta_fg=2", code=2)
    assert "--set distillation.only=[neck, head]" in output
    assert not (tmp_path / "run").exists()
    defeat("check", "-r", tiny, "-t", teacher, "--variant", "neck", "--set", "distillation.neck.finest_scale=20")
    defeat("check", "-r", tiny, "-t", teacher, "--variant", "neck", "--set", "distillation.head=null")
