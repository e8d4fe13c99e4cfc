"""Processes that train together: the same numbers as one alone, whoever computes them, and one end for all."""

import os
import re
import shutil
import signal
import time

import pytest
import torch
from processes import command, forked, together
from runs import metrics, setting
from tiny import batch as make_batch
from tiny import build, distil

from defeat_cli.config import schema as recipes
from defeat_cli.data.loading import BatchOrder
from defeat_cli.data.opening import open_split
from defeat_cli.data.sharing import StepOrder
from defeat_cli.distillation.balance import Balance
from defeat_cli.distillation.terms import TERMS
from defeat_cli.engine import loop, watch
from defeat_cli.engine.checkpoint import begin
from defeat_cli.engine.distributed import ALONE, joined
from defeat_cli.engine.evaluation import evaluate
from defeat_cli.engine.monitor import add, averages
from defeat_cli.engine.step import train_step
from defeat_cli.errors import RunError

TWO_STAGE = [name for name in TERMS if name not in ("crosskd", "ld")]
ONE_STAGE = ["neck", "head", "crosskd", "mgd"]
OFF = {"neck", "fgd", "crosskd"}
"""Terms that one step leaves out: their adapters have no gradient then."""


def steps(world, distiller):
    """Gradients, weights, averages and balance after three steps of two batches, the last of which has but one."""
    recipe = recipes.validate({"optimizer": {"ema": 0.9, "momentum": 0.5}}, "tiny")
    training = begin(recipe, distiller.train(), torch.device("cpu"), world)
    gradients = []
    training.optimizer.register_step_pre_hook(
        lambda *_: gradients.append([None if p.grad is None else p.grad.clone() for p in distiller.parameters()])
    )
    order = StepOrder(BatchOrder([(64, 64 + i) for i in range(9)], 2, seed=1), 2, world.rank, world.size)
    images, targets = make_batch()
    logged = []
    for step, share in enumerate(order.shares):
        batches = []
        for part in share.parts:
            chosen = [i % 3 for _, i in part.keys]
            # An image without annotations goes along with each batch.
            some = [targets[i] for i in chosen]
            batches.append(([images[i] for i in chosen] + images[:1], [*some, None], []))
        strength = {name: None if step == 1 and name in OFF else 0.5 for name in distiller.terms}
        made = train_step(
            training, batches, seed=0, lr=0.01, strength=strength, clip_norm=5.0, autocast=None, measure=step < 2,
            share=share, world=world,
        )  # fmt: skip
        for losses in made.losses:
            add(training, losses)
        logged.append(averages(training, world))
    weights = {name: p.detach().clone() for name, p in distiller.named_parameters()}
    average = [p.clone() for p in training.ema.module.parameters()]
    return logged, gradients, weights, distiller.balance.factors(), average


@pytest.mark.parametrize(("family", "names"), [("faster_rcnn", TWO_STAGE), ("retinanet", ONE_STAGE)])
def test_two_processes_equal_one_that_accumulates_with_every_term(family, names):
    def fresh():
        distiller = distil(build(family), build(family, seed=1), names)
        distiller.balance = Balance(names, 2.0)
        return distiller

    expected = steps(ALONE, fresh())
    main, other = together(2, steps, fresh())
    torch.testing.assert_close(main, expected, rtol=2e-4, atol=2e-6)
    # Both processes have, bit for bit, the same gradients, weights, balance and average.
    torch.testing.assert_close(main[1:], other[1:], rtol=0, atol=0)
    assert any(g is None for g in main[1][1])
    assert len(main[0][0]["pull"]) == len(names)


def test_what_shares_an_evaluation_changes_nothing(shapes):
    data = open_split(shapes, "val", train=False)
    few = torch.utils.data.Subset(data, [5, 0, 3, 1, 4])
    detector = build("fcos", classes=data.classes, score_threshold=0.0)

    def scored(world):
        found = []
        return evaluate(detector, few, keep_detections=found, world=world), found

    expected, found = scored(ALONE)
    assert len({d["image_id"] for d in found}) == 5
    for count in (2, 3):
        main, *others = together(count, scored)
        assert main == (expected, found)
        assert all(other == (expected, []) for other in others)


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


def test_a_recipe_gives_the_same_run_on_any_number_of_processes(pair, arguments, defeat, tmp_path):
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


def dying(step, how):
    """`train_step` for a process of rank 1 that comes to an end before a step, counted from 0."""
    make_step = loop.train_step

    def step_or_die(state, *positional, **named):
        if state.step == step and named["world"].rank == 1:
            how()
        return make_step(state, *positional, **named)

    return step_or_die


def same_run(folder, expected):
    assert metrics(folder) == metrics(expected)
    found, whole = (torch.load(run / "last.pt", weights_only=True)["training"] for run in (folder, expected))
    del found["seconds"], whole["seconds"]
    torch.testing.assert_close(found, whole, rtol=0, atol=0)
    assert (folder / "student.pth").read_bytes() == (expected / "student.pth").read_bytes()


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", dying(3, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        began = time.monotonic()
        outcomes = command(2, *arguments, "-o", folder)
    assert time.monotonic() - began < 45
    assert [outcome.code for outcome in outcomes] == [1, -signal.SIGKILL]
    assert re.search(r"process 1 of 2 \(.*\) is gone", said(outcomes))
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


def test_one_that_is_asked_to_stop_stops_all_and_saves_once(arguments, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", dying(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        outcomes = command(2, *arguments, "-o", tmp_path / "run")
    assert {outcome.code for outcome in outcomes} <= {130, 143}
    assert [outcome.errors.count("stopped:") for outcome in outcomes] == [1, 0]
    assert "step 3 is saved" in outcomes[0].errors
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["training"]["step"] == 3


def test_another_number_of_processes_goes_on_at_the_same_step(killed, pair, arguments, defeat):
    folder, _ = pair
    output = defeat(*arguments, "-o", killed, "--resume")
    assert "2 processes until step 3, 1 from there on" in output
    for line, other in zip(metrics(killed, "train"), metrics(folder, "train"), strict=True):
        assert_close(line, other)


def test_an_error_of_one_is_said_once_and_ends_all(arguments, tmp_path, monkeypatch):
    def fail():
        raise RunError("step 3: the loss is not finite")

    monkeypatch.setattr(loop, "train_step", dying(2, fail))
    outcomes = command(2, *arguments, "-o", tmp_path / "run")
    assert [outcome.code for outcome in outcomes] == [1, 2]
    assert said(outcomes) == "error: process 1 of 2: step 3: the loss is not finite"


def spoiling(step):
    """`train_step` that shows rank 1 pixels which are no numbers in a step, counted from 0."""
    make_step = loop.train_step

    def spoil(state, batches, **named):
        if state.step == step and named["world"].rank == 1:
            batches = [([image * float("nan") for image in images], *rest) for images, *rest in batches]
        return make_step(state, batches, **named)

    return spoil


def test_a_loss_that_is_not_finite_on_one_ends_all_with_the_state_saved(arguments, tmp_path, monkeypatch, defeat):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", spoiling(3))
        rarely = [str(argument).replace("save_every=1", "save_every=100") for argument in arguments]
        main, other = command(2, *rarely, "-o", run, *setting(schedule__epochs=3, run__evaluate_every=3))
    assert (main.code, other.code) == (1, 2)
    assert "error: process 1 of 2: step 3: the loss is not finite" in other.errors
    assert "error" not in main.errors
    assert "step 3 is saved" in main.output
    assert torch.load(run / "last.pt", weights_only=True)["training"]["step"] == 3
    assert "batch" in defeat("train", "--replay", run / "bad_step.pt")
    values = torch.load(run / "bad_step.pt", weights_only=True)
    assert values["arguments"]["parts"] == [1]


def test_a_step_that_is_not_finite_on_one_is_left_out_by_all(arguments, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", spoiling(1))
        outcomes = command(2, *arguments, "-o", run, *setting(optimizer__skip_nonfinite=1))
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    left_out = metrics(run, "left out")
    assert [(line["step"], line["reason"]) for line in left_out] == [(2, "loss")]
    saved = torch.load(run / "last.pt", weights_only=True)
    assert all(value.isfinite().all() for value in saved["student"].values() if value.is_floating_point())
    assert saved["training"]["health"]["skipped"] == 1


def test_an_error_of_all_is_said_once_and_nothing_is_written(arguments, tmp_path):
    outcomes = command(2, *arguments, "-o", tmp_path / "run", *setting(student__weights="nowhere.pt"))
    assert 0 not in [outcome.code for outcome in outcomes]
    assert "nowhere.pt" in said(outcomes)
    assert not (tmp_path / "run").exists()


def test_one_that_hangs_ends_all(monkeypatch):
    monkeypatch.setattr(watch, "HANG_SECONDS", 1.0)

    def hang():
        with joined() as world:
            world.watch.at(watch.COMPUTED, 1)
            world.watch.at(watch.REST)
            world.wait()
            world.watch.at(watch.LOADING, 2)
            if world.rank == 0:
                world.watch.at(watch.COMPUTED)
                world.wait()
            time.sleep(60)

    began = time.monotonic()
    outcomes = forked(2, hang)
    assert time.monotonic() - began < 20
    assert [outcome.code for outcome in outcomes] == [1, 1]
    assert re.search(r"process 1 of 2 \(.*\): no progress for \d+ s, in step 2", said(outcomes))


def test_one_that_saves_is_waited_for(monkeypatch):
    monkeypatch.setattr(watch, "HANG_SECONDS", 1.0)

    def work(world):
        world.watch.at(watch.COMPUTED, 1)
        world.watch.at(watch.REST)
        if world.is_main:
            time.sleep(4)
        else:
            world.watch.at(watch.COMPUTED, 2)
        world.wait()
        return True

    assert together(2, work) == [True, True]
