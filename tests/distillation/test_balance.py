"""How strongly terms pull, and weights that are measured instead of set, against hand-derived numbers."""

import pytest
import torch
from runs import assert_resumes_bit_for_bit, metrics

from defeat_cli.config.terms import MEASUREMENTS
from defeat_cli.distillation.balance import Balance, pulls


def test_a_pull_is_the_ratio_of_gradient_norms_at_the_same_features():
    # d(sum(3 f)) = 3 everywhere: norm 3 sqrt(4) = 6. d(sum(f^2) / 2) = f = (1, 2, 2, 4): norm 5. The ratio is 5 / 6.
    features = torch.tensor([1.0, 2.0, 2.0, 4.0], requires_grad=True)
    measured = pulls((3 * features).sum(), {"a": features.square().sum() / 2, "b": features.detach().sum()}, [features])
    assert measured["a"].item() == pytest.approx(5 / 6)
    assert measured["b"].item() == 0


def test_a_term_that_does_not_reach_the_features_is_measured_at_the_next_place():
    stage = torch.tensor([3.0, 4.0], requires_grad=True)
    features = 2 * stage
    # At the stage the detection loss's gradient is (2, 2), norm sqrt(8); the term's is the stage itself, norm 5.
    measured = pulls(features.sum(), {"stage": stage.square().sum() / 2}, [features], [stage])
    assert measured["stage"].item() == pytest.approx(5 / 8**0.5)


def test_measuring_leaves_the_step_as_it_is():
    features = torch.tensor([1.0, 2.0], requires_grad=True)
    loss, term = features.sum(), features.square().sum()
    pulls(loss, {"a": term}, [features])
    (loss + term).backward()
    assert features.grad.tolist() == [3.0, 5.0]


def test_a_balance_is_the_wanted_pull_over_a_moving_geometric_average_and_then_fixed():
    balance = Balance(["a", "b"], ratio=0.5)
    assert {name: float(value) for name, value in balance.factors().items()} == {"a": 1.0, "b": 1.0}
    for pull in (2.0, 8.0):
        balance.add({"a": torch.tensor(pull), "b": torch.tensor(0.0)})
    # 2 to the power 0.8, times 8 = 2^3 to the power 0.2, is 2 to the power 1.4; a pull of 0 says nothing.
    assert float(balance.factors()["a"]) == pytest.approx(0.5 / 2**1.4)
    assert float(balance.factors()["b"]) == 1.0
    for _ in range(MEASUREMENTS - 2):
        balance.add({"a": torch.tensor(4.0)})
    fixed = balance.factors()["a"]
    balance.add({"a": torch.tensor(1e6)})
    assert balance.factors()["a"] == fixed
    again = Balance(["a", "b"], ratio=0.5)
    again.load_state_dict(balance.state_dict())
    assert again.factors()["a"] == fixed


def test_a_balanced_run_pulls_as_told_and_resumes_exactly(defeat, tiny, teacher, tmp_path):
    options = ["-r", tiny, "-t", teacher, "--set", "distillation.balance=0.5", "--set", "run.log_every=1"]
    options += ["--set", "run.pull_every=1", "--set", "distillation.warmup_steps=0"]
    steps = assert_resumes_bit_for_bit(defeat, options, tmp_path, step=3).steps
    # In the first step the factor is 0.5 over the pull itself, so that what is weighted pulls 0.5 times as hard.
    first = steps[0]
    neck = first["weighted"]["neck_fg"] / (4 * first["raw"]["neck_fg"])
    assert neck == pytest.approx(0.5 / first["pull"]["neck"], rel=1e-4)


def test_pulls_are_logged_and_change_nothing(defeat, tiny, teacher, tmp_path):
    options = ["-r", tiny, "-t", teacher, "--set", "run.log_every=1", "--set", "schedule.epochs=1"]
    for every in (0, 2):
        defeat("train", *options, "--set", f"run.pull_every={every}", "-o", tmp_path / str(every))
    without, measured = (metrics(tmp_path / every, "train") for every in ("0", "2"))
    assert [set(line["pull"]) for line in measured] == [{"neck", "head"}, set(), {"neck", "head"}]
    assert [{**line, "pull": {}} for line in measured] == [{**line, "pull": {}} for line in without]
    assert "pull of neck" in defeat("check", *options)


def test_a_student_inherits_the_teachers_neck_and_head(defeat, tiny, teacher, tmp_path):
    same = ["-r", tiny, "-t", teacher, "--set", "student.fpn_channels=16"]
    wider = [*same, "--set", "student.inherit=[neck, head]", "--set", "schedule.epochs=1", "--compare-plain"]
    output = defeat("train", *wider, "-o", tmp_path / "run", "--set", "optimizer.lr=1e-12")
    assert "student: starts with the teacher's neck, 16 of its 16 tensors" in output
    assert output.count("student: starts with the teacher's head") == 2  # the plain student's, too
    ours, theirs = (torch.load(p, weights_only=True)["student"] for p in (tmp_path / "run" / "best.pt", teacher))
    name = "backbone.fpn.layer_blocks.0.0.weight"
    torch.testing.assert_close(ours[name], theirs[name])
    body = next(key for key in ours if key.startswith("backbone.body") and key.endswith("weight"))
    assert not torch.equal(ours[body], theirs[body])


def test_inheriting_between_unlike_necks_or_without_a_teacher_is_refused(defeat, tiny, teacher, tmp_path):
    options = ["--set", "student.inherit=[neck]", "--set", "student.fpn_channels=12", "-o", tmp_path / "run"]
    assert "the teacher's neck is another one" in defeat("train", "-r", tiny, "-t", teacher, *options, code=2)
    assert "no teacher to inherit from" in defeat("train", "-r", tiny, *options, code=2)
    assert not (tmp_path / "run").exists()
