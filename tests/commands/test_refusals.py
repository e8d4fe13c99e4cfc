"""What `train` refuses, `check` refuses, in the same words, and neither has written anything."""

import json

import pytest
import yaml
from runs import metrics


@pytest.fixture
def boxless(shapes, tmp_path):
    """The drawn data without a box in its validation images."""
    folder = tmp_path / "boxless"
    folder.mkdir()
    (folder / "images").symlink_to(shapes / "images")
    for split in ("train", "val"):
        content = json.loads((shapes / f"{split}.json").read_text())
        (folder / f"{split}.json").write_text(
            json.dumps({**content, "annotations": content["annotations"] if split == "train" else []})
        )
    return folder


CASES = {
    "no such teacher": ["-t", "nowhere.pt"],
    "no such data": ["-d", "nowhere"],
    "no boxes to score on": ["-d", "BOXLESS"],
    "an unknown key": ["--set", "distillation.neck.alpha=3"],
    "a key of the flat form": ["--set", "distillation.alpha_fg=3"],
    "no such device": ["--device", "cuda:99"],
    "a precision without a GPU": ["--set", "run.precision=fp16"],
    "a mask that the student cannot have": [
        "-t", "TEACHER", "--set", "student.detector=fcos", "--set", "student.fpn_channels=64",
        "--set", "student.anchor_sizes=null", "--set", "distillation.neck.mask=fine-grained",
    ],
    "the same with a teacher that is not trained yet": [
        "--set", "teacher.recipe=TINY", "--set", "student.detector=fcos", "--set", "student.fpn_channels=64",
        "--set", "student.anchor_sizes=null", "--set", "distillation.neck.mask=fine-grained",
    ],
    "a comparison with nothing": ["--set", "run.compare_plain=true"],
    "an inheritance from nobody": ["--set", "student.inherit=[neck]"],
    "a class map of another class": ["-t", "TEACHER", "--set", "distillation.class_map={zebra: circle}"],
    "anchors for another number of levels": ["--set", "student.anchor_sizes=[[8]]"],
    "weights of another detector": ["--student-weights", "TEACHER"],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_check_and_train_refuse_alike_and_write_nothing(case, defeat, tiny, teacher, boxless, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"TEACHER": str(teacher), "BOXLESS": str(boxless)}
    arguments = [places.get(word, word).replace("TINY", str(tiny)) for word in CASES[case]]
    said = []
    for command in ("check", "train"):
        if command == "check" and "--student-weights" in arguments:
            arguments = ["--set", f"student.weights={teacher}"]
        output = defeat(command, "-r", tiny, *arguments, code=2)
        said.append(output[output.index("error:") :])
    assert said[0] == said[1]
    assert not (tmp_path / "runs").exists()


def test_a_teacher_to_be_trained_is_not_trained_for_a_student_that_cannot_have_it(defeat, tiny, tmp_path):
    content = yaml.safe_load(tiny.read_text())
    content["distillation"] = {"backbone": {}, "neck": None, "head": None}
    content["student"] |= {"frozen_stages": 0}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    options = ["--set", f"teacher.recipe={tiny}", "--set", "distillation.class_map={zebra: circle}"]
    output = defeat(
        "train", "-r", tmp_path / "r.yaml", *options, "--set", "distillation.head={}", "-o", tmp_path / "run", code=2
    )
    assert "zebra" in output
    assert not (tmp_path / "run").exists()


def test_options_without_effect_are_refused(defeat, tiny, teacher, tmp_path):
    run = tmp_path / "run"
    for options, told in [
        (["--variant", "fg-only"], "no teacher"),
        (["--compare-plain"], "no"),
        (["--resume"], "holds no run to resume"),
        (["--resume", "--overwrite"], "contradict each other"),
        (["--variants", tiny], "--variant"),
    ]:
        assert told in defeat("train", "-r", tiny, "-o", run, *options, code=2)
        assert not run.exists()


def test_more_epochs_go_on_with_a_finished_run_and_say_so(defeat, tiny, tmp_path):
    options = ["train", "-r", tiny, "-o", tmp_path / "run", "--set", "schedule.decay=cosine"]
    defeat(*options, "--set", "schedule.epochs=1")
    output = defeat(*options, "--set", "schedule.epochs=2", "--resume")
    assert "goes on to 2 epochs" in output
    steps = [line["step"] for line in metrics(tmp_path / "run")]
    assert steps[-1] == 6
    assert "epochs: 2" in (tmp_path / "run" / "recipe.yaml").read_text()
    assert "cannot be resumed with another recipe" in defeat(*options, "--set", "schedule.epochs=1", "--resume", code=2)


def test_a_data_set_that_is_drawn_into_a_new_folder_is_told(defeat, tiny, tmp_path):
    sizes = {"train_images": 4, "val_images": 2, "size": 64}
    options = [part for name, value in sizes.items() for part in ("--set", f"data.shapes.{name}={value}")]
    arguments = ["check", "-r", tiny, "-d", tmp_path / "new", "--set", "data.format=shapes", *options]
    assert f"{tmp_path / 'new'}: a new folder" in defeat(*arguments)
    assert "a new folder" not in defeat(*arguments)
