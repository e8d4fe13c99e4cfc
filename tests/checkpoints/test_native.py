"""Our own checkpoints know what they are, are plain data, and are never seen half-written."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from defeat_cli.checkpoints import native
from defeat_cli.checkpoints.loading import load_weights
from defeat_cli.config.schema import Data, Recipe, Student
from defeat_cli.errors import CheckpointError


def content(**changes):
    recipe = Recipe(
        student=Student(backbone="resnet18", fpn_channels=64), data=Data(short_side=[480, 320], long_side=640)
    )
    state_dict = nn.Linear(2, 3).state_dict()
    plain = {"recipe": recipe.model_dump(), "classes": ["cat", "dog"], "student": state_dict, "training": {"step": 5}}
    return {**plain, "metrics": {"AP": 0.5}, **changes}


def test_a_checkpoint_knows_what_it_is(tmp_path):
    path = tmp_path / "runs" / "best.pt"
    saved = content()
    native.save(path, saved)
    weights = load_weights(path)
    assert weights.format == "native"
    assert (weights.architecture.backbone, weights.architecture.fpn_channels) == ("resnet18", 64)
    assert not hasattr(weights.architecture, "backbone_weights")
    assert weights.classes == ["cat", "dog"]
    assert (weights.short_side, weights.long_side) == (320, 640)
    assert all(torch.equal(weights.state_dict[key], value) for key, value in saved["student"].items())
    assert torch.load(path, weights_only=True)["training"] == {"step": 5}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    native.save(path, content())
    before = path.read_bytes()
    with pytest.raises((AttributeError, TypeError)):
        native.save(path, content(training=lambda: None))  # cannot be pickled
    assert path.read_bytes() == before
    assert [child.name for child in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 9}, "version 9; this defeat reads versions 1 to 2"),
        ({"classes": None}, "classes should be a list of names"),
        ({"student": {"w": 1}}, "student should be a state dict"),
        ({"recipe": {"student": {"backbonee": "resnet18"}}}, "student.backbonee: unknown key"),
    ],
)
def test_a_broken_checkpoint_is_refused(tmp_path, changes, said):
    path = tmp_path / "best.pt"
    torch.save({"format": "defeat", "version": 1, **content(), **changes}, path)
    with pytest.raises(CheckpointError, match=r"best\.pt: ") as caught:
        load_weights(path)
    assert said in str(caught.value)


def test_a_key_that_is_missing_is_named(tmp_path):
    path = tmp_path / "best.pt"
    broken = content()
    del broken["student"]
    torch.save({"format": "defeat", "version": 1, **broken}, path)
    with pytest.raises(CheckpointError, match="without student"):
        load_weights(path)
