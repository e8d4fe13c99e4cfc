"""What a session's detector is worth, on all validation images or a few."""

import json
import shutil

from runs import setting
from torch.utils.data import Subset

from defeat_cli.config import schema as recipes
from defeat_cli.console import Reporter
from defeat_cli.engine.evaluation import FIGURES
from defeat_cli.jobs.validating import score
from defeat_cli.session import assemble


def test_errors_are_told_of_all_images_only(tiny):
    """Of a few, every object in the others would be one that was missed."""
    session = assemble(recipes.load(str(tiny)))
    data, reporter = session.validation_data, Reporter("student", quiet=True)
    whole = score(session, session.student, reporter)
    few = score(session, session.student, reporter, subset=Subset(data, [0, 1]))
    assert {*whole} - {*few} == {"errors"}
    assert {*FIGURES} <= {*few}
    assert len(data) > 2


def test_a_teacher_is_not_judged_by_images_without_boxes(defeat, tiny, teacher, shapes, tmp_path):
    data = shutil.copytree(shapes, tmp_path / "data")
    content = json.loads((data / "val.json").read_text())
    first = content["images"][0]["id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != first]
    (data / "val.json").write_text(json.dumps(content))
    options = ["-r", tiny, "-t", teacher, "-d", data, *setting(run__teacher_check_images=1, schedule__epochs=1)]
    said = defeat("train", *options, "-o", tmp_path / "run")
    assert "teacher: its AP is not known, for there is no box in 1 validation image that it was tried on" in said
    assert "next to nothing" not in said
    assert "as good as its teacher" not in said
