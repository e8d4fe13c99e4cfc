"""State dicts say what they are, and still are plain torchvision's; recipes beside say it for those that do not."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from torchvision.models import detection

from defeat_cli.checkpoints import native
from defeat_cli.checkpoints.loading import load_weights
from defeat_cli.checkpoints.meaning import ENTRY, Meaning, with_meaning
from defeat_cli.config.architecture import Architecture, Conventions
from defeat_cli.config.schema import recipes_folder
from defeat_cli.detectors.loading import load_detector
from defeat_cli.detectors.zoo import build_detector
from defeat_cli.errors import CheckpointError, DefeatError
from defeat_cli.jobs.asked import DETECTOR, ask

TINY = Architecture(
    backbone="regnet", widths=[8, 8, 8, 8], fpn_channels=8, head_channels=8, anchor_sizes=[[4], [8], [16], [32], [48]],
    score_threshold=0.3, proposals=20, conventions=Conventions(image_mean=[0.1, 0.2, 0.3], roi_align_aligned=True),
)  # fmt: skip
CLASSES = ["zebra", "ant", "cat"]
SAID = Meaning(TINY, CLASSES, 96, 128)


def state_of(architecture: Architecture, classes: list[str] = CLASSES) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build_detector(architecture, classes, [96], 128).model.state_dict()


def write(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("wrapper", [None, "model"])
def test_a_state_dict_says_what_it_is(tmp_path, wrapper, old_format):
    said = with_meaning(state_of(TINY), SAID)
    content = {wrapper: said} if wrapper else said
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not old_format)
    weights = load_weights(tmp_path / "x.pth")
    found = Meaning(weights.architecture, weights.classes, weights.short_side, weights.long_side)
    assert found == SAID
    assert weights.stated
    assert not weights.assumptions


def test_a_state_dict_that_says_what_it_is_loads_strict_in_plain_torchvision(tmp_path):
    model = detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=4)
    builder = Architecture(detector="fasterrcnn_mobilenet_v3_large_320_fpn", norm="batch")
    path = write(tmp_path / "x.pth", with_meaning(model.state_dict(), Meaning(builder, CLASSES, 320, 640)))
    content = torch.load(path, weights_only=True)
    assert content.keys() == model.state_dict().keys()
    assert content._metadata["backbone.body.0.1"] == {"version": 2}  # torch's own, of a BatchNorm
    fresh = detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=4)
    missing, unexpected = fresh.load_state_dict(content, strict=True)
    assert not missing
    assert not unexpected
    assert all(torch.equal(value, content[key]) for key, value in fresh.state_dict().items())


def test_what_a_newer_version_wrote_is_refused(tmp_path):
    said = with_meaning(state_of(TINY), SAID)
    said._metadata[ENTRY]["version"] = 2
    with pytest.raises(CheckpointError, match="says what it is in version 2; this defeat reads version 1"):
        load_weights(write(tmp_path / "x.pth", said))


RECIPE = {
    "student": {"backbone": "regnet", "widths": [8, 8, 8, 8], "fpn_channels": 8, "head_channels": 8, "proposals": 20},
    "data": {"short_side": [64, 96], "long_side": 128, "path": "data"},
    "distillation": {"a key of an older version": 1},
}


@pytest.mark.parametrize("name", ["x.yaml", "recipe.yaml"])
def test_a_recipe_beside_says_it_for_a_state_dict_that_does_not(tmp_path, name):
    (tmp_path / name).write_text(yaml.safe_dump(RECIPE))
    weights = load_weights(write(tmp_path / "x.pth", dict(state_of(TINY))))
    assert (weights.architecture.proposals, weights.short_side, weights.long_side) == (20, 96, 128)
    assert weights.stated
    assert any(str(tmp_path / name) in note for note in weights.notes)
    assert weights.recipe == RECIPE


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({**RECIPE, "student": {**RECIPE["student"], "fpn_channels": 16}}, "a detector of other weights"),
        ({**RECIPE, "student": {**RECIPE["student"], "anchor_ratios": [1.0]}}, "a detector of other weights"),
        ({"student": {"detector": "yolo"}}, "student.detector"),
        ({"student": {"fpn_chanels": 8}}, "fpn_chanels: unknown key"),
        ([1, 2], "expected a mapping"),
    ],
)
def test_a_recipe_beside_that_is_not_theirs_is_said_and_not_used(tmp_path, content, said):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    loaded = load_detector(str(write(tmp_path / "x.pth", dict(state_of(TINY)))))
    (told,) = [note for note in loaded.notes if "is not used" in note]
    assert said in told
    (assumed,) = loaded.assumptions
    for part in ("proposals 1000", "score_threshold 0.05", "anchor_sizes the usual", "short_side 800"):
        assert part in assumed


def test_a_run_of_an_older_version_is_read_whatever_its_other_sections_say():
    path = recipes_folder() / "quickstart_teacher.pt"
    content = torch.load(path, weights_only=True)
    assert content["version"] == 1
    content["recipe"]["distillation"] = {"neck_adapters": "flat", "no": "longer known"}
    del content["training"]
    weights = native.to_weights(content, "old.pt")
    assert (weights.architecture.widths, weights.short_side, len(weights.classes)) == ([32, 64, 128, 192], 128, 6)
    assert load_detector(weights).detector.model.transform.max_size == 128


@pytest.mark.parametrize(("version", "threshold", "detections"), [(1, 0.2, 100), (2, 0.05, 50)])
def test_version_1_ran_builders_with_their_own_thresholds_whatever_its_recipe_says(version, threshold, detections):
    student = {"detector": "fcos_resnet50_fpn", "score_threshold": 0.05, "detections_per_image": 50}
    content = {
        "format": "defeat", "version": version, "recipe": {"student": student}, "classes": ["a"], "metrics": {},
        "student": {"w": torch.zeros(1)},
    }  # fmt: skip
    architecture = native.to_weights(content, "x.pt").architecture
    assert (architecture.score_threshold, architecture.detections_per_image) == (threshold, detections)


def test_order_is_assumed_for_as_many_classes_without_names_and_said(tmp_path):
    path = str(write(tmp_path / "x.pth", dict(state_of(TINY))))
    loaded = load_detector(path, classes=["cat", "ant", "zebra"])
    assert loaded.detector.classes == ["cat", "ant", "zebra"]
    assert any("taken to be the data's, in the data's order (cat, ant, zebra)" in line for line in loaded.assumptions)
    with pytest.raises(CheckpointError, match="has 3 classes without names; the data has 2"):
        load_detector(path, classes=["cat", "ant"])
    named = str(write(tmp_path / "named.pth", with_meaning(state_of(TINY), SAID)))
    loaded = load_detector(named, classes=["cat", "ant", "zebra"])
    assert loaded.detector.classes == CLASSES
    assert not loaded.assumptions


def test_order_and_settings_survive_conversions_one_after_another(tmp_path, defeat):
    write(tmp_path / "a.pth", with_meaning(state_of(TINY), SAID))
    defeat("convert", tmp_path / "a.pth", tmp_path / "b.pth")
    (tmp_path / "far").mkdir()
    shutil.copy(tmp_path / "b.pth", tmp_path / "far" / "c.pt")
    defeat("convert", tmp_path / "far" / "c.pt", tmp_path / "d.pth", "--set", "student.score_threshold=0.4")
    loaded = load_detector(str(tmp_path / "d.pth"))
    assert loaded.meaning == Meaning(Architecture(**{**vars(TINY), "score_threshold": 0.4}), CLASSES, 96, 128)
    original = load_weights(tmp_path / "a.pth").state_dict
    assert all(torch.equal(value, original[key]) for key, value in loaded.weights.state_dict.items())


@pytest.mark.parametrize("name", ["student.onnx", "student", "student.safetensors"])
def test_convert_writes_no_torch_file_under_another_files_name(tmp_path, defeat, name):
    write(tmp_path / "a.pth", with_meaning(state_of(TINY), SAID))
    assert "name it .pth or .pt" in defeat("convert", tmp_path / "a.pth", tmp_path / name, code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


ODD = (None, -1, "x", [], {}, True, float("nan"), [None], {"x": 1})


def places(content: dict, above: tuple = ()) -> list[tuple]:
    """Where the plain values of nested content are."""
    found = []
    for name, value in content.items():
        found.append((*above, name))
        found += places(value, (*above, name)) if isinstance(value, dict) else []
    return found


def changed(content: dict, place: tuple, value: object) -> dict:
    """Content with another value at a place; `ODD` itself takes it away."""
    name, *rest = place
    if rest:
        return {**content, name: changed(content[name], tuple(rest), value)}
    left = {key: kept for key, kept in content.items() if key != name}
    return left if value is ODD else {**left, name: value}


def test_whatever_a_checkpoint_says_gives_a_detector_or_one_message(tmp_path):
    plain = Architecture(backbone="regnet", widths=[8, 8, 8, 8], fpn_channels=8, head_channels=8)
    state = dict(state_of(plain))
    student = asdict(plain)
    recipe = {"student": student, "data": {"path": "d", "short_side": [96], "long_side": 96, "workers": 0}}
    own = {"format": "defeat", "version": 2, "recipe": recipe, "classes": CLASSES, "metrics": {}, "folder": ".."}
    said = {"version": 1, "architecture": student, "classes": CLASSES, "short_side": 96, "long_side": 96}
    loaded, refused = 0, []
    for content in (own, said):
        for i, place in enumerate(places(content)):
            for value in (ODD[i % len(ODD)], ODD[(5 * i + 3) % len(ODD)], ODD):
                odd = changed(content, place, value)
                if content is own:
                    torch.save({**odd, "student": state}, tmp_path / "x.pt")
                else:
                    named = with_meaning(state, SAID)
                    named._metadata[ENTRY] = odd
                    torch.save(named, tmp_path / "x.pt")
                try:
                    asked = ask(str(tmp_path / "x.pt"), None, {}, command="eval", settings=DETECTOR)
                    load_detector(asked.weights, asked.given, classes=CLASSES)
                    loaded += 1
                except DefeatError as error:
                    refused.append(str(error))
    assert all("x.pt" in message for message in refused)
    assert loaded > 30
    assert len(refused) > 100
