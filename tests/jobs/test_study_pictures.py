"""Pictures of a study: the same images for teacher, plain and best student, each from a score of its own on."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image
from runs import planned

from defeat_cli.config import schema as recipes
from defeat_cli.jobs import study_pictures
from defeat_cli.jobs.study_pictures import _scores, draw_pictures


def test_the_same_images_are_drawn_for_teacher_plain_and_best(tmp_path, tiny, teacher, monkeypatch):
    monkeypatch.setattr(study_pictures, "IMAGES", 2)
    base = recipes.load(str(tiny), {"teacher.checkpoint": str(teacher)})
    study = planned(tmp_path / "final", ["neck", "full"], base)
    draw_pictures(tmp_path, study, quiet=True)
    assert not (tmp_path / "pictures").exists()  # nothing is trained
    # A trained detector stands for the plain student and for `neck`; `full` is not trained.
    for run in study.runs()[:2]:
        shutil.copytree(teacher.parent, run.folder)
        recipes.save(run.recipe, run.folder / "recipe.yaml")
        results = json.loads((run.folder / "results.json").read_text())
        (run.folder / "results.json").write_text(json.dumps({**results, "teacher": results["student"]}))
    draw_pictures(tmp_path, study, quiet=True)
    pictures = sorted((tmp_path / "pictures").glob("detections_*.jpg"))
    assert len(pictures) == 2
    with Image.open(pictures[0]) as image:
        assert image.width > 3 * 480  # three of them, each enlarged, side by side
    assert (tmp_path / "pictures" / "contact_sheet.png").is_file()


def test_every_detector_is_drawn_from_its_own_score_on_at_one_recall():
    def errors(*scores):
        return {"background_at_recall": [{"recall": 0.4 * (i + 1), "score": s} for i, s in enumerate(scores)]}

    students = {"none": errors(0.3, 0.1), "neck": errors(0.9, 0.6)}
    assert _scores(students, errors(0.95, 0.9)) == {"none": 0.1, "neck": 0.6, "teacher": 0.9}
    assert _scores(students, errors(0.95)) == {"none": 0.3, "neck": 0.9, "teacher": 0.95}
    assert _scores(students, {}) == pytest.approx({"none": 0.5, "neck": 0.5, "teacher": 0.5})
