"""Data that says nothing of a detector is refused by each command that scores one, before it does."""

import json
import shutil

import pytest


@pytest.fixture(scope="module")
def boxless(shapes, tmp_path_factory):
    """The drawn data, without a box in its validation images."""
    data = shutil.copytree(shapes, tmp_path_factory.mktemp("boxless") / "data")
    content = json.loads((data / "val.json").read_text())
    (data / "val.json").write_text(json.dumps({**content, "annotations": []}))
    return data


@pytest.mark.parametrize("command", [["eval"], ["bench", "--rounds", "1"]])
def test_there_is_nothing_to_score_on_without_boxes(command, defeat, teacher, boxless):
    name, *options = command
    said = defeat(name, teacher, "-d", boxless, *options, code=2)
    assert f"{boxless / 'val.json'}: the validation images have no boxes: nothing to learn or to score" in said
