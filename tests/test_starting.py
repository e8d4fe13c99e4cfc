"""What a student starts from keeps its meaning: classes by name, and the conventions that it was trained with."""

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from defeat_cli.checkpoints.meaning import Meaning, with_meaning
from defeat_cli.config.architecture import Architecture
from defeat_cli.detectors.zoo import build_detector
from defeat_cli.errors import CheckpointError
from defeat_cli.starting import start_from

NAMES = ["cat", "dog", "bird"]
TINY = {"backbone": "regnet", "widths": [8, 8, 8, 64], "fpn_channels": 64, "head_channels": 8, "score_threshold": 0.0}


def detector(family: str, classes: list[str], seed: int, **settings):
    torch.manual_seed(seed)
    architecture = Architecture(detector=family, **TINY, **settings)
    return build_detector(architecture, classes, [64], 64), architecture


def saved(made, architecture: Architecture, path: Path, classes: list[str] | None) -> str:
    state = OrderedDict(made.model.state_dict())
    torch.save(with_meaning(state, Meaning(architecture, classes, 64, 64)), path)
    return str(path)


def outputs(made) -> dict[str, torch.Tensor]:
    """What the last layers of a detector give for each class."""
    rng = torch.Generator().manual_seed(0)
    if hasattr(made.model, "roi_heads"):
        scores, deltas = made.model.roi_heads.box_predictor(torch.rand(5, 8, generator=rng))
        given = torch.cat([scores[..., None], deltas.unflatten(1, (-1, 4))], dim=2)[:, 1:].unbind(1)
    else:
        given = made.model.head.classification_head([torch.rand(1, 64, 3, 2, generator=rng)])[..., 1:].unbind(-1)
    return {name.lower(): values for name, values in zip(made.classes, given, strict=True)}


@pytest.mark.parametrize("family", ["faster_rcnn", "retinanet", "fcos"])
def test_classes_go_by_name(family, tmp_path):
    source, architecture = detector(family, NAMES, seed=0)
    student, _ = detector(family, ["Bird", "cat", "dog"], seed=1)
    assert start_from(student, saved(source, architecture, tmp_path / "x.pth", NAMES), architecture) == []
    started, expected = outputs(student.eval()), outputs(source.eval())
    for name in NAMES:
        torch.testing.assert_close(started[name], expected[name])
    assert not torch.allclose(expected["cat"], expected["dog"])


def test_classes_of_other_names_and_without_names_are_said(tmp_path):
    source, architecture = detector("fcos", NAMES, seed=0)
    student, _ = detector("fcos", ["horse", "cat", "dog"], seed=1)
    (line,) = start_from(student, saved(source, architecture, tmp_path / "x.pth", NAMES), architecture)
    assert line.endswith("has other classes than the data; these start from another's weights: horse from bird")
    (line,) = start_from(student, saved(source, architecture, tmp_path / "y.pth", None), architecture)
    assert "does not name its 3 classes: taken to be the data's" in line


def test_other_conventions_are_refused_and_other_anchors_said(tmp_path):
    anchors = [[8.0], [16.0], [32.0], [64.0], [96.0]]
    settings = {"conventions": {"image_mean": [0.1, 0.2, 0.3], "roi_align_aligned": True}, "anchor_sizes": anchors}
    source, architecture = detector("faster_rcnn", NAMES, seed=0, **settings)
    path = saved(source, architecture, tmp_path / "x.pth", NAMES)
    student, plain = detector("faster_rcnn", NAMES, seed=1)
    before = {name: value.clone() for name, value in student.model.state_dict().items()}
    with pytest.raises(CheckpointError) as refused:
        start_from(student, path, plain)
    lines = str(refused.value).splitlines()
    assert [line.strip() for line in lines[1:]] == [
        "student.conventions.image_mean: [0.1, 0.2, 0.3]",
        "student.conventions.roi_align_aligned: True",
    ]
    assert all(torch.equal(before[name], value) for name, value in student.model.state_dict().items())
    student, same = detector("faster_rcnn", NAMES, seed=1, conventions=settings["conventions"])
    (line,) = start_from(student, path, same)
    usual = [[32.0], [64.0], [128.0], [256.0], [512.0]]
    assert line.endswith(f"trained with anchor_sizes {anchors}, where the student has {usual}")
    student, same = detector("faster_rcnn", NAMES, seed=1, conventions=settings["conventions"], anchor_sizes=anchors)
    assert start_from(student, path, same) == []


def test_a_run_on_data_in_another_order_of_classes_starts_where_the_other_ended(
    defeat, tiny, shapes, teacher, tmp_path
):
    data = tmp_path / "reversed"
    data.mkdir()
    (data / "images").symlink_to(shapes / "images")
    for split in ("train", "val"):
        content = json.loads((shapes / f"{split}.json").read_text())
        count = len(content["categories"])
        content["categories"] = [{**c, "id": count + 1 - c["id"]} for c in reversed(content["categories"])]
        for annotation in content["annotations"]:
            annotation["category_id"] = count + 1 - annotation["category_id"]
        (data / f"{split}.json").write_text(json.dumps(content))
    losses = []
    for number, folder in enumerate((shapes, data)):
        run = tmp_path / f"run{number}"
        defeat(
            "train", "-r", tiny, "-d", folder, "-o", run, "-q", "--student-weights", teacher,
            "--set", "student.fpn_channels=16", "--set", "run.log_every=1", "--set", "schedule.epochs=1",
        )  # fmt: skip
        losses.append(json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
