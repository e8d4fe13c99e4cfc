"""Numbers that go wrong, through the real command: said with all that explains them, and nothing is lost."""

import json
import math
from contextlib import contextmanager

import pytest
import torch
from runs import metrics, setting

from defeat_cli.detectors.faster_rcnn import FasterRCNNDetector

LOSSES = FasterRCNNDetector.losses


@contextmanager
def spoiled(calls, factor=math.nan):
    """Within, the box loss of training steps is multiplied by a factor, by number of the call from 0."""
    count = iter(range(10_000))

    def losses(self, features, batch):
        found = LOSSES(self, features, batch)
        if next(count) in calls:
            found["loss_box_reg"] = found["loss_box_reg"] * factor
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FasterRCNNDetector, "losses", losses)
        yield


# --- a step that is not finite


@pytest.fixture(scope="module")
def overflown(tmp_path_factory, defeat, tiny, teacher):
    """A run whose learning rate is so high that its second step overflows, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "overflown"
    settings = setting(optimizer__lr="1e25", optimizer__clip_norm="null", schedule__warmup_steps=0)
    return folder, defeat("train", "-r", tiny, "-t", teacher, "-o", folder, *settings, code=2)


def test_the_message_has_step_values_rate_norm_and_images(overflown, shapes):
    folder, output = overflown
    assert "step 1: the loss is not finite (loss_classifier " in output
    assert all(f"{name} " in output for name in ("loss_box_reg", "loss_objectness", "neck_bg", "head_fg"))
    assert "lr 1e+25, gradient norm " in output
    assert "optimizer.skip_nonfinite" in output
    (images,) = [line for line in output.splitlines() if "images: " in line]
    names = images.split("images: ")[1].split(", ")
    assert len(names) == 4
    assert all((shapes / "images" / name.rsplit("/")[-1]).is_file() for name in names)
    assert f"--replay {folder / 'bad_step.pt'}" in output
    # The state before the step is there to go on from.
    assert "--resume" in output
    assert torch.load(folder / "last.pt", weights_only=True)["training"]["step"] == 1


def test_a_replay_makes_the_same_values_again(overflown, defeat):
    folder, _ = overflown
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    output = defeat("train", "--replay", folder / "bad_step.pt")
    assert "step 1, learning rate 1e+25, seed 0" in output
    assert output.count("images: ") == 4
    assert "the same values as in the run" in output
    for name in ("loss_classifier", "neck_bg", "backbone.fpn", "terms.neck", "all"):
        (line,) = [line.split() for line in output.splitlines() if line.split()[:1] == [name]]
        assert line[1] == line[2]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_replay_says_where_values_differ(overflown, defeat, tmp_path):
    content = torch.load(overflown[0] / "bad_step.pt", weights_only=True)
    content["batches"][0]["images"][0].zero_()
    content["state"]["student"] = {name: torch.zeros_like(value) for name, value in content["state"]["student"].items()}
    torch.save(content, tmp_path / "other.pt")
    output = defeat("train", "--replay", tmp_path / "other.pt")
    assert "not the values of the run" in output
    assert "the same values" not in output


def test_a_replay_refuses_what_it_cannot_use(overflown, defeat, tmp_path, teacher, tiny):
    bad = overflown[0] / "bad_step.pt"
    assert "leave out --recipe, --set" in defeat("train", "--replay", bad, "-r", tiny, "--set", "a=1", code=2)
    assert "not a bad_step.pt" in defeat("train", "--replay", teacher, code=2)
    assert "no such file" in defeat("train", "--replay", tmp_path / "nowhere.pt", code=2)
    for part, value in {"batches": [], "state": {}, "classes": [1], "version": 2, "arguments": None}.items():
        torch.save({**torch.load(bad, weights_only=True), part: value}, tmp_path / "changed.pt")
        assert f"changed.pt: cannot be used: {part}" in defeat("train", "--replay", tmp_path / "changed.pt", code=2)
    content = torch.load(bad, weights_only=True)
    del content["state"]["student"]["rpn.head.cls_logits.bias"]
    torch.save(content, tmp_path / "changed.pt")
    assert "rpn.head.cls_logits.bias" in defeat("train", "--replay", tmp_path / "changed.pt", code=2)
    torch.save({**torch.load(bad, weights_only=True), "teacher": None}, tmp_path / "plain.pt")
    assert "--teacher: without effect" in defeat("train", "--replay", tmp_path / "plain.pt", "-t", teacher, code=2)


# --- steps that are left out


@pytest.fixture(scope="module")
def left_out(tmp_path_factory, defeat, tiny):
    """A run of six steps of which three are not finite, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "left_out"
    with spoiled({1, 2, 4}):
        options = setting(run__log_every=1, optimizer__skip_nonfinite=2)
        return folder, defeat("train", "-r", tiny, *options, "-o", folder)


def test_steps_are_left_out_counted_and_logged(left_out):
    folder, output = left_out
    assert "step 1 is left out: its loss is not finite" in output
    lines = metrics(folder)
    assert [line["step"] for line in lines if line["kind"] == "left out"] == [2, 3, 5]
    assert [line["reason"] for line in lines if line["kind"] == "left out"] == ["loss"] * 3
    steps = {line["step"]: line for line in lines if line["kind"] == "train"}
    assert list(steps) == [1, 4, 6]
    assert [line.get("left_out") for line in steps.values()] == [None, {"nonfinite": 2}, {"nonfinite": 3}]
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_the_log_names_the_largest_gradient(left_out):
    folder, _ = left_out
    gradients = [line["gradient"] for line in metrics(folder, "train")]
    state = torch.load(folder / "student.pth", weights_only=True)
    assert len(gradients) == 3
    assert all(found["largest"] in state and found["norm"] > 0 and 0 < found["share"] <= 1 for found in gradients)


def test_a_run_that_stopped_goes_on_where_more_may_be_left_out(left_out, defeat, tiny, tmp_path):
    options = ["-r", tiny, "-o", tmp_path / "run", "--set", "run.log_every=1"]
    with spoiled({1, 2, 4}):
        output = defeat("train", *options, "--set", "optimizer.skip_nonfinite=1", code=2)
    assert "step 2: the loss is not finite" in output
    with spoiled({0, 2}):  # step 2 is made again, and is the first call now
        defeat("train", *options, "--set", "optimizer.skip_nonfinite=2", "--resume")
    assert metrics(tmp_path / "run") == metrics(left_out[0])
    ours, theirs = (torch.load(run / "student.pth", weights_only=True) for run in (tmp_path / "run", left_out[0]))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


# --- a loss that explodes


def test_a_loss_that_explodes_without_a_nan_ends_the_run(defeat, tiny, tmp_path):
    with spoiled(range(2, 100), factor=1e10):
        output = defeat("train", "-r", tiny, "-o", tmp_path / "run", code=2)
    assert "step 2: the training has diverged" in output
    assert "the run ended in the middle of a step, and nothing is saved" in output
    assert not (tmp_path / "run" / "results.json").exists()
