"""`defeat train` through the real command: what it leaves behind, determinism, resuming, and bad input."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from runs import assert_resumes_bit_for_bit, dying_at, metrics

from defeat_cli.engine import loop as training
from defeat_cli.engine.evaluation import FIGURES

TERMS = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
DISTILLED = TERMS | {"neck_fg", "neck_bg", "head_fg", "head_bg"}


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, defeat, tiny, teacher):
    folder = tmp_path_factory.mktemp("runs") / "distilled"
    output = defeat("train", "-r", tiny, "-t", teacher, "-o", folder, "--compare-plain")
    return folder, output


def test_a_run_leaves_the_files_of_the_design(distilled):
    folder, output = distilled
    assert {path.name for path in folder.iterdir()} == {
        "recipe.yaml", "metrics.jsonl", "last.pt", "best.pt", "student.pth", "load_student.py", "results.json",
        "results.md", "report.html", "detections.png", "model_card.md", "curves.png", "plain"
    }  # fmt: skip
    results = json.loads((folder / "results.json").read_text())
    for who in ("student", "teacher", "plain"):
        assert set(FIGURES) <= set(results[who])
        assert set(results[who]["per_class"]) == {"circle", "square", "triangle", "star", "ring", "cross"}
    assert "teacher: AP" in output
    row = re.search(r"^distilled.*\d", output, re.MULTILINE).group().split()
    assert {*results["ms_per_image"]} == {"teacher", "student"}  # the plain one is the student's own network
    assert min(results["ms_per_image"].values()) > 0
    in_file = next(line for line in (folder / "results.md").read_text().splitlines() if line.startswith("| distilled"))
    assert in_file.strip("|").replace("|", " ").split() == row
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_hold_every_term_raw_and_weighted(distilled):
    folder, _ = distilled
    steps = metrics(folder, "train")
    assert [line["step"] for line in steps] == [2, 4, 6]
    assert [line["step"] for line in metrics(folder, "eval")] == [3, 6]
    for line in steps:
        assert set(line["weighted"]) == DISTILLED
        assert set(line["raw"]) == DISTILLED | {f"neck_{g}/P{n}" for g in ("fg", "bg") for n in range(2, 7)}
        assert line["loss"] == pytest.approx(sum(line["weighted"].values()))
    # Steps 4 and 5 are past the warm-up: the weighted term is alpha times the mean over levels of the raw ones.
    last = steps[-1]
    per_level = [last["raw"][f"neck_bg/P{n}"] for n in range(2, 7)]
    assert last["raw"]["neck_bg"] == pytest.approx(sum(per_level) / 5)
    assert last["weighted"]["neck_bg"] == pytest.approx(16 * last["raw"]["neck_bg"])
    assert last["weighted"]["head_fg"] == pytest.approx(2 * last["raw"]["head_fg"])


def test_the_plain_student_starts_the_same_and_has_no_distillation(distilled, tiny, defeat, tmp_path):
    folder, _ = distilled
    assert all(set(line["weighted"]) == TERMS for line in metrics(folder / "plain", "train"))
    # During the first step the distillation terms have weight 0, and the teacher draws no random number before the
    # student has: the detection losses of both are the same.
    first = ["--set", "run.log_every=1", "--set", "schedule.epochs=1"]
    taught = ["-t", folder / "best.pt", *first]
    output = defeat("train", "-r", tiny, "-o", tmp_path / "plain", "--variant", "none", *taught)
    assert "no term of distillation is on: the student is trained without its teacher" in output
    defeat("train", "-r", tiny, "-o", tmp_path / "distilled", *taught)
    one, other = (metrics(tmp_path / name)[0]["weighted"] for name in ("plain", "distilled"))
    assert {name: other[name] for name in TERMS} == one


def test_the_same_seed_gives_the_same_metrics_and_another_seed_others(distilled, defeat, tiny, teacher, tmp_path):
    folder, _ = distilled
    defeat("train", "-r", tiny, "-t", teacher, "-o", tmp_path / "again")
    assert metrics(tmp_path / "again") == metrics(folder)
    defeat("train", "-r", tiny, "-t", teacher, "-o", tmp_path / "other", "--seed", 1)
    assert metrics(tmp_path / "other") != metrics(folder)


@pytest.mark.parametrize(
    ("stop_after", "number", "code"), [(1, "SIGTERM", 143), (3, "SIGUSR1", 130), (5, "SIGHUP", 130)]
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    distilled, defeat, tiny, teacher, tmp_path, monkeypatch, stop_after, number, code
):
    folder, _ = distilled
    arguments = ["train", "-r", tiny, "-t", teacher, "-o", tmp_path / "run", "--set", "run.compare_plain=true"]
    make_step = training.train_step

    def step_then_stop(state, *positional, **named):
        terms = make_step(state, *positional, **named)
        if state.step == stop_after:
            os.kill(os.getpid(), getattr(signal, number))
        return terms

    monkeypatch.setattr(training, "train_step", step_then_stop)
    output = defeat(*arguments, code=code)
    assert "--resume" in output
    assert not (tmp_path / "run" / "results.json").exists()
    monkeypatch.undo()
    defeat(*arguments, "--resume")
    assert metrics(tmp_path / "run") == metrics(folder)
    ours, theirs = (torch.load(f / "student.pth", weights_only=True) for f in (tmp_path / "run", folder))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_run_that_died_resumes_from_its_last_checkpoint(distilled, defeat, tiny, teacher, tmp_path):
    folder, _ = distilled
    arguments = ["train", "-r", tiny, "-t", teacher, "-o", tmp_path / "run", "--set", "run.save_every=2"]
    with dying_at(5):
        defeat(*arguments)
    defeat(*arguments, "--resume")
    assert metrics(tmp_path / "run") == metrics(folder)


def test_averaging_and_accumulation_resume_bit_for_bit_too(defeat, tiny, teacher, tmp_path):
    options = ["--set", "optimizer.ema=0.5", "--set", "optimizer.accumulate=2", "--set", "run.log_every=1"]
    _, steps, last = assert_resumes_bit_for_bit(defeat, ["-r", tiny, "-t", teacher, *options], tmp_path, step=3)
    # Three batches an epoch in groups of two: two steps an epoch, the second on one batch.
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    key = "backbone.fpn.layer_blocks.0.0.weight"
    assert not torch.equal(last["student"][key], last["training"]["student"][key])


def test_a_recipe_can_train_its_own_teacher_first(defeat, tiny, tmp_path):
    arguments = ["train", "-r", tiny, "-o", tmp_path / "run", "--set", f"teacher.recipe={tiny}"]
    output = defeat(*arguments, "--set", "schedule.epochs=1")
    assert "training one by the recipe" in output
    results, of_teacher = (
        json.loads((tmp_path / "run" / part / "results.json").read_text()) for part in ("", "teacher")
    )
    assert results["teacher"] == of_teacher["student"]
    assert set(metrics(tmp_path / "run")[0]["weighted"]) == DISTILLED


def test_a_finished_run_is_refused_resumed_without_work_and_overwritten_when_told(distilled, defeat, tiny, teacher):
    folder, _ = distilled
    arguments = ["train", "-r", tiny, "-t", teacher, "-o", folder, "--compare-plain"]
    before = (folder / "best.pt").stat().st_mtime_ns
    assert "already holds a finished run" in defeat(*arguments, code=2)
    assert "finished already" in defeat(*arguments, "--resume")
    assert (folder / "best.pt").stat().st_mtime_ns == before


def test_the_saved_recipe_repeats_the_run(distilled, defeat, tmp_path):
    folder, _ = distilled
    defeat("train", "-r", folder / "recipe.yaml", "-o", tmp_path / "repeat")
    assert metrics(tmp_path / "repeat") == metrics(folder)


def test_a_loss_that_is_not_finite_stops_with_every_term(tiny, defeat, tmp_path, monkeypatch):
    from defeat_cli.detectors.faster_rcnn import FasterRCNNDetector

    losses = FasterRCNNDetector.losses

    def broken(self, features, batch):
        return {**losses(self, features, batch), "loss_box_reg": features[0].sum() * float("nan")}

    monkeypatch.setattr(FasterRCNNDetector, "losses", broken)
    output = defeat("train", "-r", tiny, "-o", tmp_path / "run", code=2)
    assert "step 0: the loss is not finite" in output
    assert all(term in output for term in TERMS)


def test_validation_images_without_boxes_are_refused_before_anything_is_trained(defeat, tiny, shapes, tmp_path):
    content = json.loads((shapes / "val.json").read_text())
    (tmp_path / "empty.json").write_text(json.dumps({**content, "annotations": []}))
    setting = f"data.val_annotations={tmp_path / 'empty.json'}"
    output = defeat("train", "-r", tiny, "-o", tmp_path / "run", "--set", setting, code=2)
    assert "validation images have no boxes" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-r", "quickstrat"], "did you mean quickstart"),
        (["-r", "{tiny}", "-t", "nowhere.pt"], "nowhere.pt"),
        (["-r", "{tiny}", "-d", "nowhere"], "nowhere"),
        (["-r", "{tiny}", "--set", "optimizer.lrr=1"], "optimizer.lrr: unknown key (did you mean lr?)"),
        (["-r", "{tiny}", "--set", "optimizer.lr=-1"], "optimizer.lr"),
        (["-r", "{tiny}", "--variant", "fg-onyl"], "did you mean fg-only"),
        (["-r", "{tiny}", "--device", "cuda:9"], "cuda:9"),
        (["-r", "{tiny}", "--device", "gpu"], "gpu"),
        (["-r", "{tiny}", "--set", "run.precision=fp16"], "needs a CUDA device"),
        (["-r", "{tiny}", "--student-weights", "{tiny}"], "tiny.yaml"),
        (["-r", "{tiny}", "--list-recipes"], "--list-recipes: has no use for --recipe, --output"),
    ],
)
def test_bad_input_gets_one_message_and_writes_nothing(defeat, tiny, tmp_path, arguments, message):
    output = defeat("train", *[a.format(tiny=tiny) for a in arguments], "-o", tmp_path / "run", code=2)
    assert message in output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_a_teacher_cannot_be_given_another_structure(defeat, tiny, teacher, tmp_path):
    state_dict = torch.load(teacher, weights_only=True)["student"]
    torch.save(state_dict, tmp_path / "teacher.pth")
    output = defeat(
        "train", "-r", tiny, "-t", tmp_path / "teacher.pth", "-o", tmp_path / "run",
        "--set", "teacher.architecture={backbone: resnet18}", code=2,
    )  # fmt: skip
    assert "teacher.architecture.backbone 'resnet18' (the recipe); the weights are of 'regnet'" in output
    assert not (tmp_path / "run").exists()


def test_a_teacher_without_a_shared_class_distils_the_neck_only_and_says_so(defeat, tiny, teacher, tmp_path):
    content = torch.load(teacher, weights_only=True)
    content["classes"] = ["one", "two", "three", "four", "five", "six"]
    torch.save(content, tmp_path / "teacher.pt")
    output = defeat("train", "-r", tiny, "-t", tmp_path / "teacher.pt", "-o", tmp_path / "run")
    assert "head distillation is off: teacher and student share no class" in output
    assert set(metrics(tmp_path / "run")[0]["weighted"]) == TERMS | {"neck_fg", "neck_bg"}


def test_shipped_recipes_are_listed(defeat):
    output = defeat("train", "--list-recipes")
    assert "quickstart" in output
    assert "faster_rcnn_r50_from_r152_coco" in output


def test_help_does_not_import_torch():
    code = "import sys, defeat_cli.commands.app; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
