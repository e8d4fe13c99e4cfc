"""Processes that train together: the same numbers as one alone, whoever computes them, and one end for all."""

import re
import shutil
import signal
import time

import pytest
import torch
from processes import command, forked, together
from ranks import hang, save_slowly, scored, steps
from runs import metrics, setting

from defeat_cli.distillation.terms import TERMS
from defeat_cli.engine.distributed import ALONE

TWO_STAGE = [name for name in TERMS if name not in ("crosskd", "ld")]
ONE_STAGE = ["neck", "head", "crosskd", "mgd"]


@pytest.mark.parametrize(("family", "names"), [("faster_rcnn", TWO_STAGE), ("retinanet", ONE_STAGE)])
def test_two_processes_equal_one_that_accumulates_with_every_term(family, names):
    expected = steps(ALONE, family, names)
    main, other = together(2, steps, family, names)
    torch.testing.assert_close(main, expected, rtol=2e-4, atol=2e-6)
    # Both processes have, bit for bit, the same gradients, weights, balance and average.
    torch.testing.assert_close(main[1:], other[1:], rtol=0, atol=0)
    assert any(g is None for g in main[1][1])
    assert len(main[0][0]["pull"]) == len(names)


def test_what_shares_an_evaluation_changes_nothing(shapes):
    expected = scored(ALONE, shapes)
    assert len({d["image_id"] for d in expected[1]}) == 5
    for count in (2, 3):
        main, *others = together(count, scored, shapes)
        assert main == expected
        assert all(other == (expected[0], []) for other in others)


@pytest.fixture(scope="module")
def arguments(tiny, teacher):
    settings = setting(optimizer__accumulate=2, run__log_every=1, run__save_every=1, optimizer__ema=0.5)
    return ["train", "-r", tiny, "-t", teacher, *settings]


@pytest.fixture(scope="module")
def pair(arguments, tmp_path_factory):
    """A run of two processes, and how they ended."""
    folder = tmp_path_factory.mktemp("runs") / "pair"
    outcomes = command(2, *arguments, "-o", folder)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    return folder, outcomes


def assert_close(found, expected):
    """Two lines of a log say the same, to float tolerance."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_close(found[key], value)
        else:
            assert found[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-3, abs=1e-5)), key


def test_whole_batches_give_the_same_run_on_any_number_of_processes(pair, arguments, defeat, tmp_path):
    folder, (main, other) = pair
    assert "2 processes share each step's 8 images (2 batches of 4), which optimizer.lr 0.01 is for" in main.output
    assert (other.output, other.errors, main.errors) == ("", "", "")
    defeat(*arguments, "-o", tmp_path / "alone")
    assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "alone").iterdir()}
    found, expected = metrics(folder, "train"), metrics(tmp_path / "alone", "train")
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    for line, other_line in zip(found, expected, strict=True):
        assert_close(line, other_line)
    one, two = (torch.load(run / "last.pt", weights_only=True)["training"] for run in (tmp_path / "alone", folder))
    assert [len(saved["processes"]) for saved in (one, two)] == [1, 2]
    norms = {name for name in one["student"] if "running" in name or "num_batches" in name}
    for name in one["student"].keys() - norms:
        torch.testing.assert_close(two["student"][name], one["student"][name], rtol=1e-3, atol=1e-5)


def said(outcomes):
    """The one error that several processes have printed."""
    errors = [line for outcome in outcomes for line in outcome.errors.splitlines() if line]
    assert len(errors) == 1, errors
    assert errors[0].startswith("error: ")
    return errors[0]


@pytest.fixture(scope="module")
def broken_off(arguments, tmp_path_factory):
    """A run of two processes of which one was killed before its last step."""
    folder = tmp_path_factory.mktemp("runs") / "broken_off"
    began = time.monotonic()
    outcomes = command(2, *arguments, "-o", folder, fault=("die", 3))
    assert time.monotonic() - began < 45
    # On a busy machine the thread that trains may find it before the one that watches; either says it, once.
    assert outcomes[0].code in (1, 2)
    assert outcomes[1].code == -signal.SIGKILL
    assert re.search(r"process 1 of 2 \(.*\) is gone|lost the connection to another process", said(outcomes))
    return folder


@pytest.fixture
def killed(broken_off, tmp_path):
    return shutil.copytree(broken_off, tmp_path / "run")


def test_one_of_two_that_is_killed_ends_the_other_and_the_run_resumes_exactly(killed, pair, arguments):
    folder, _ = pair
    assert [outcome.code for outcome in command(2, *arguments, "-o", killed, "--resume")] == [0, 0]
    assert metrics(killed) == metrics(folder)
    found, whole = (torch.load(run / "last.pt", weights_only=True)["training"] for run in (killed, folder))
    del found["seconds"], whole["seconds"]
    torch.testing.assert_close(found, whole, rtol=0, atol=0)
    assert (killed / "student.pth").read_bytes() == (folder / "student.pth").read_bytes()


def test_one_that_is_asked_to_stop_stops_all_and_saves_once(arguments, tmp_path):
    outcomes = command(2, *arguments, "-o", tmp_path / "run", fault=("stop", 2))
    assert [outcome.code for outcome in outcomes] == [143, 143]
    assert [outcome.errors.count("stopped:") for outcome in outcomes] == [1, 0]
    assert "step 3 is saved" in outcomes[0].errors
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["training"]["step"] == 3


def test_another_number_of_processes_goes_on_at_the_same_step(killed, pair, arguments, defeat):
    folder, _ = pair
    output = defeat(*arguments, "-o", killed, "--resume")
    assert "2 processes until step 3, 1 from there on" in output
    for line, other in zip(metrics(killed, "train"), metrics(folder, "train"), strict=True):
        assert_close(line, other)


def test_an_error_of_one_is_said_once_and_ends_all(arguments, tmp_path):
    outcomes = command(2, *arguments, "-o", tmp_path / "run", fault=("fail", 2))
    assert [outcome.code for outcome in outcomes] == [1, 2]
    assert said(outcomes) == "error: process 1 of 2: step 3: it cannot go on"


def test_a_loss_that_is_not_finite_on_one_ends_all_with_the_state_saved(arguments, tmp_path, defeat):
    run = tmp_path / "run"
    rarely = [str(argument).replace("save_every=1", "save_every=100") for argument in arguments]
    rarely += setting(schedule__epochs=3, run__evaluate_every=3)
    main, other = command(2, *rarely, "-o", run, fault=("nan", 3))
    assert (main.code, other.code) == (1, 2)
    assert "error: process 1 of 2: step 3: the loss is not finite" in other.errors
    assert "error" not in main.errors
    assert "step 3 is saved" in main.output
    assert torch.load(run / "last.pt", weights_only=True)["training"]["step"] == 3
    # The last step of an epoch has one batch, which this process has repeated.
    assert torch.load(run / "bad_step.pt", weights_only=True)["arguments"]["parts"] == [0]
    assert "loss_objectness" in defeat("train", "--replay", run / "bad_step.pt")


def test_a_step_that_is_not_finite_on_one_is_left_out_by_all(arguments, tmp_path):
    run = tmp_path / "run"
    outcomes = command(2, *arguments, "-o", run, *setting(optimizer__skip_nonfinite=1), fault=("nan", 1))
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert [(line["step"], line["reason"]) for line in metrics(run, "left out")] == [(2, "loss")]
    saved = torch.load(run / "last.pt", weights_only=True)
    assert all(value.isfinite().all() for value in saved["student"].values() if value.is_floating_point())
    assert saved["training"]["health"]["skipped"] == 1


def test_an_error_of_all_is_said_once_and_nothing_is_written(arguments, tmp_path):
    outcomes = command(2, *arguments, "-o", tmp_path / "run", *setting(student__weights="nowhere.pt"))
    assert 0 not in [outcome.code for outcome in outcomes]
    assert "nowhere.pt" in said(outcomes)
    assert not (tmp_path / "run").exists()


def test_one_that_hangs_ends_all():
    began = time.monotonic()
    outcomes = forked(2, hang)
    assert time.monotonic() - began < 30
    assert [outcome.code for outcome in outcomes] == [1, 1]
    assert re.search(r"process 1 of 2 \(.*\): no progress for \d+ s, in step 2", said(outcomes))


def test_one_that_saves_is_waited_for():
    assert together(2, save_slowly) == [True, True]
