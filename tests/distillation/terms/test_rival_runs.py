"""Rivals through the real command: every loss in the log, bit-exact resuming, refusals before training."""

import json

import pytest
import torch

from defeat_cli.engine import loop

RETINANET = {
    "student.detector": "retinanet",
    "student.fpn_channels": "16",
    "student.anchor_sizes": "[[8, 11], [16, 22], [32, 45], [64, 90], [96, 120]]",
}
TWO_STAGE = {"pkd", "cwd", "fgd", "mgd", "frs", "fitnets", "dist"}
LOGGED = {
    "pkd", "cwd", "mgd", "fitnets", "fgd_fg", "fgd_bg", "fgd_attention", "fgd_relation", "frs_features", "frs_classes",
    "dist_regions", "dist_classes",
}  # fmt: skip


def options(settings):
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


def only(*terms):
    """Settings that switch these terms on and DeFeat's off."""
    return {"distillation.only": f"[{', '.join(sorted(terms))}]"}


def train_lines(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: line[k] for k in ("step", "weighted", "raw")} for line in lines if line["kind"] == "train"]


def assert_resumes_bit_for_bit(defeat, arguments, folder, monkeypatch):
    """A run that dies in its fifth step of six, and is resumed, equals one that does not. Returns its log."""
    short = {"schedule.epochs": 1, "data.batch_size": 2, "run.teacher_check_images": 0}
    arguments = ["train", *arguments, *options({**short, "run.log_every": 1, "run.checkpoint_every": 2})]
    defeat(*arguments, "-o", folder / "whole")
    make_step = loop.train_step

    def die(state, *positional, **named):
        if state.step == 4:
            raise MemoryError("killed")
        return make_step(state, *positional, **named)

    monkeypatch.setattr(loop, "train_step", die)
    with pytest.raises(MemoryError):
        defeat(*arguments, "-o", folder / "parts")
    monkeypatch.undo()
    defeat(*arguments, "-o", folder / "parts", "--resume")
    whole = train_lines(folder / "whole")
    assert train_lines(folder / "parts") == whole
    ours, theirs = (torch.load(folder / name / "last.pt", weights_only=True) for name in ("parts", "whole"))
    for part in ("student", "terms"):
        ours_of, theirs_of = ours["training"][part], theirs["training"][part]
        assert ours_of.keys() == theirs_of.keys()
        assert all(torch.equal(value, theirs_of[key]) for key, value in ours_of.items())
    return whole


def test_the_rivals_of_a_two_stage_pair(defeat, tiny, teacher, tmp_path, monkeypatch):
    arguments = ["-r", tiny, "-t", teacher, *options(only(*TWO_STAGE))]
    lines = assert_resumes_bit_for_bit(defeat, arguments, tmp_path, monkeypatch)
    for line in lines:
        assert {name for name in line["weighted"] if not name.startswith("loss_")} == LOGGED
    # Past the warm-up the published weight of a two-stage student is what a loss is multiplied by.
    assert lines[-1]["weighted"]["pkd"] == pytest.approx(6 * lines[-1]["raw"]["pkd"])
    assert lines[-1]["raw"]["pkd"] == pytest.approx(sum(lines[-1]["raw"][f"pkd/P{n}"] for n in (2, 3, 4, 5)))
    # FRS warms up over 500 steps by itself.
    assert lines[-1]["weighted"]["frs_features"] == pytest.approx(0.002 * 5 / 500 * lines[-1]["raw"]["frs_features"])


def test_crosskd_with_pkd_on_retinanets(defeat, tiny, tmp_path, monkeypatch):
    defeat("train", "-r", tiny, "-o", tmp_path / "teacher", *options({**RETINANET, "schedule.epochs": 1}), "--seed", 7)
    arguments = ["-r", tiny, "-t", tmp_path / "teacher" / "best.pt", *options({**RETINANET, **only("crosskd", "pkd")})]
    lines = assert_resumes_bit_for_bit(defeat, arguments, tmp_path, monkeypatch)
    assert set(lines[-1]["weighted"]) == {
        "classification", "bbox_regression", "pkd", "crosskd_classes", "crosskd_boxes"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distillation.crosskd": "{}"}, "distillation.crosskd: the student has no class and box towers"),
        ({"distillation.ld": "{}"}, "distillation.ld: ld distils the distribution"),
        ({"distillation.pkd": "{temperature: 2}"}, "distillation.pkd.temperature: unknown key"),
        ({"distillation.mgd": "{hidden: 1.5}"}, "distillation.mgd.hidden"),
        ({"distillation.crosskd": "{beta: 0.5}"}, "distillation.crosskd.beta"),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_is_written(settings, message, defeat, tiny, teacher, tmp_path):
    output = defeat("train", "-r", tiny, "-t", teacher, "-o", tmp_path / "run", *options(settings), code=2)
    assert message in output
    assert not (tmp_path / "run").exists()


def test_check_tells_of_the_rivals(defeat, tiny, teacher):
    output = defeat("check", "-r", tiny, "-t", teacher, *options(only("fgd", "frs", "mgd")))
    assert "fgd" in output
    assert "16x8x1x1" in output
