"""`defeat gradmap`: options that would have no effect are refused, and figures that cannot be are explained."""

import pytest

CASES = {
    "a split without data": (["IMAGE", "--split", "train"], "--split: without effect, as there is no --data"),
    "data beside annotations": (["IMAGE", "--annotations", "FILE", "-d", "nowhere"], "--data: without effect"),
    "a split beside annotations": (["IMAGE", "--annotations", "FILE", "--split", "val"], "--split: without effect"),
    "annotations beside a data set": (["-d", "DATA", "--annotations", "FILE"], "--annotations: without effect"),
    "a threshold beside a data set": (["-d", "DATA", "--threshold", "0.2"], "--threshold: without effect"),
    "a threshold that no score reaches": (["IMAGE", "--threshold", "7"], "--threshold"),
    "a mask, which each of the neck's variants has": (
        ["IMAGE", "-t", "TEACHER", "--distillation", "--set", "distillation.neck={mask: full}"],
        "distillation.neck.mask: without effect",
    ),
    "shapes that are not drawn": (["-d", "DATA", "--set", "data.shapes.size=64"], "data.shapes.size: without effect"),
}


@pytest.mark.parametrize("case", CASES)
def test_options_without_effect_are_refused(case, defeat, shapes, teacher, tmp_path):
    arguments, told = CASES[case]
    places = {
        "IMAGE": next((shapes / "images").iterdir()),
        "FILE": shapes / "val.json",
        "DATA": shapes,
        "TEACHER": teacher,
    }
    arguments = [places.get(word, word) for word in arguments]
    assert told in defeat("gradmap", "-c", teacher, "-o", tmp_path / "out", *arguments, code=2)
    assert not (tmp_path / "out").exists()


def test_images_in_which_nothing_is_found_are_told(defeat, shapes, teacher, tmp_path):
    image = next((shapes / "images").iterdir())
    arguments = ("gradmap", "-c", teacher, "-o", tmp_path / "out", image, "--samples", 1, "--threshold")
    assert "no box in any image" in defeat(*arguments, 1.0)
    assert "no box in any image" not in defeat(*arguments, 0.05)
