"""When a run is evaluated, and when it stops early, through the real command."""

import json

import pytest
import torch
from runs import assert_resumes_bit_for_bit, dying_at, metrics, setting

from defeat_cli.config import schema as recipes
from defeat_cli.engine.runs import RunFolder
from defeat_cli.errors import RecipeError


def test_evaluations_by_steps_resume_bit_for_bit(defeat, tiny, tmp_path):
    # Three steps an epoch, two epochs: evaluations at steps 2 and 4, and at 6, where the last epoch ends. It dies
    # before its step 5, and resumes at step 4 or 3, from which on the evaluation at 4 is made again.
    options = ["-r", tiny, *setting(run__evaluate_every="2 steps", run__save_every=4)]
    assert_resumes_bit_for_bit(defeat, options, tmp_path, step=5)
    evaluations = metrics(tmp_path / "whole", "eval")
    assert [(line["step"], line["epoch"]) for line in evaluations] == [(2, 0.667), (4, 1.333), (6, 2)]


def test_an_evaluation_that_is_made_again_is_logged_once(defeat, tiny, tmp_path):
    options = ["train", "-r", tiny, "-o", tmp_path / "run", *setting(run__evaluate_every="2 steps")]
    options += setting(run__save_every=2)
    with dying_at(3):  # last.pt is of step 2, saved before the evaluation there
        defeat(*options)
    defeat(*options, "--resume")
    assert [line["step"] for line in metrics(tmp_path / "run", "eval")] == [2, 4, 6]


@pytest.fixture(scope="module")
def impatient(defeat, tiny, tmp_path_factory):
    """A student that learns nothing: its first evaluation is its best."""
    folder = tmp_path_factory.mktemp("runs") / "impatient"
    frozen = setting(student__norm="frozen", optimizer__lr="1e-12", run__patience=2)
    options = ["-r", tiny, *frozen, "--set", "schedule.epochs=6"]
    output = defeat("train", *options, "-o", folder)
    return options, folder, output


def test_a_run_without_patience_left_stops_and_is_finished(impatient):
    _, folder, output = impatient
    assert "stopped early: 2 evaluations without a better AP" in output
    assert [line["epoch"] for line in metrics(folder, "eval")] == [1, 2, 3]
    results = json.loads((folder / "results.json").read_text())
    assert results["stopped_early_at_step"] == 9
    assert RunFolder(folder).finished


def test_one_that_was_cut_short_after_it_stopped_trains_no_further(impatient, defeat):
    options, folder, _ = impatient
    (folder / "results.json").unlink()
    before = torch.load(folder / "last.pt", weights_only=True)["training"]["step"]
    defeat("train", *options, "-o", folder, "--resume")
    assert [line["step"] for line in metrics(folder, "eval")] == [3, 6, 9]
    assert torch.load(folder / "last.pt", weights_only=True)["training"]["step"] == before == 9
    assert RunFolder(folder).results()["stopped_early_at_step"] == 9


def test_more_epochs_give_new_patience(impatient, defeat):
    options, folder, _ = impatient

    again = [*options[:-1], "schedule.epochs=7"]
    defeat("train", *again, "-o", folder, "--resume")
    assert [line["epoch"] for line in metrics(folder, "eval")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("value", ["0", "true", "steps", "-3 steps", "500 epochs", "1.5"])
def test_an_interval_that_is_none_is_refused_with_an_example(value):
    with pytest.raises(RecipeError, match=r"run\.evaluate_every: should be a number of epochs, e\.g\. 2, or of steps"):
        recipes.load(None, {"run.evaluate_every": {"0": 0, "true": True, "1.5": 1.5}.get(value, value)})
