"""Steps that are not finite are left out or end the run, exploding losses end it, and ordinary ones never do."""

import math

import pytest
import torch
from tiny import batch, build, distil

from defeat_cli.config import schema as recipes
from defeat_cli.distillation.distiller import StepLosses
from defeat_cli.engine.checkpoint import begin
from defeat_cli.engine.faults import EXPLODED_STEPS, BadStepError, Health, refuse_broken
from defeat_cli.engine.step import train_step
from defeat_cli.errors import RunError

CPU = torch.device("cpu")


def losses_of(**raw):
    return StepLosses({}, {name.replace("__", "/"): torch.tensor(float(value)) for name, value in raw.items()})


# --- explosions


def look(health, values, steps=1000, name="loss"):
    """Show a health the losses of steps in turn; the step at which it says that they exploded, or None."""
    for step, value in enumerate(values):
        try:
            health.look(losses_of(**{name: value}), float(value), steps, step)
        except RunError:
            return step
    return None


def test_a_loss_that_stays_a_thousand_times_its_first_value_has_exploded():
    usual = [3.0, 2.0, 1.0] * 50
    assert look(Health(), usual + [3001.0] * 100) == 150 + EXPLODED_STEPS - 1
    # 3000 is 1000 times the first value, and not above it.
    assert look(Health(), usual + [3000.0] * 100) is None
    assert look(Health(), usual + [3e26] * EXPLODED_STEPS) == 150 + EXPLODED_STEPS - 1


def test_what_comes_down_again_has_not_exploded():
    assert look(Health(), ([1e9] * (EXPLODED_STEPS - 1) + [2.0]) * 5) is None


def test_a_small_first_loss_is_no_measure():
    # A student that is trained already begins with 0.01; a loss of 5 is nothing unusual then.
    assert look(Health(), [0.01] + [5.0] * 100) is None
    assert look(Health(), [0.01] + [1001.0] * 100) == EXPLODED_STEPS


def test_a_short_training_has_exploded_after_fewer_steps():
    assert look(Health(), [2.0, 2.0, 1e10, 1e20], steps=8) == 3  # a quarter of 8 in a row


def test_a_term_that_starts_later_is_measured_by_its_own_first_value():
    health = Health()
    for step in range(100):
        health.look(losses_of(loss=2.0), 2.0, 1000, step)
    for step in range(100, 200):  # a term of another order of magnitude
        health.look(losses_of(loss=2.0, mgd=1e5, mgd__P3=1e5), 1e5 + 2, 1000, step)
    assert health.first == {"loss": 2.0, "mgd": 1e5}
    for step in range(381, 400):
        health.look(losses_of(loss=2.0, mgd=2e8), 2e8, 1000, step)
    with pytest.raises(RunError, match="step 400: the training has diverged"):
        health.look(losses_of(loss=2.0, mgd=2e8), 2e8, 1000, 400)


def test_what_is_remembered_goes_on_after_a_resume():
    health = Health()
    look(health, [3.0] + [1e9] * (EXPLODED_STEPS - 1))
    again = Health()
    again.load_state_dict(health.state_dict())
    assert again == health
    assert look(again, [1e9]) == 0


# --- steps that are not finite


@pytest.fixture
def training():
    settings = {"run": {"precision": "fp32"}, "optimizer": {"name": "adamw", "lr": 0.001, "ema": 0.9}}
    recipe = recipes.validate(settings, "test")
    return begin(recipe, distil(build(), build(seed=1, fpn_channels=16), ["neck"]), CPU)


def make_step(training, spoiled=None, **settings):
    """A step; `spoiled` multiplies the pixels of its first image."""
    images, targets = batch()
    if spoiled is not None:
        images[0] = images[0] * spoiled
    settings = {"skip_nonfinite": 0, **settings}
    return train_step(
        training,
        [(images, targets, [1, 2, 3])],
        seed=0,
        lr=0.001,
        strength=1.0,
        clip_norm=1.0,
        autocast=None,
        **settings,
    )


def content(training):
    """All tensors that a step may change."""
    state = training.state_dict()
    averages = {f"ema.{name}": value for name, value in state["ema"].items()}
    moments = {
        f"{number}.{name}": value for number, of in state["optimizer"]["state"].items() for name, value in of.items()
    }
    return {name: value.clone() for name, value in {**state["student"], **averages, **moments}.items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_step_that_ends_the_run_changes_nothing(training):
    make_step(training)
    before = content(training)
    with pytest.raises(
        BadStepError, match=r"step 1: the loss is not finite \(loss_classifier nan.*; lr 0.001, gradient norm nan\)"
    ) as bad:
        make_step(training, math.nan)
    # Batch normalisation has seen the batch, and forgets it.
    assert_same(content(training), before)
    assert training.step == 1
    assert all(parameter.grad is None for parameter in training.distiller.parameters())
    assert bad.value.batches[0][2] == [1, 2, 3]


def test_as_many_steps_in_a_row_are_left_out_as_one_says(training):
    make_step(training)
    before = content(training)
    for _ in range(2):
        assert make_step(training, math.nan, skip_nonfinite=2).left_out == "loss"
    assert_same(content(training), before)
    assert training.step == 3
    assert make_step(training, skip_nonfinite=2).left_out is None  # a good one: the row begins anew
    for _ in range(2):
        make_step(training, math.nan, skip_nonfinite=2)
    with pytest.raises(BadStepError):
        make_step(training, math.nan, skip_nonfinite=2)
    assert training.health.left_out == {"nonfinite": 4}


def test_a_gradient_that_is_not_finite_is_found_though_every_loss_is(training):
    class Root(torch.autograd.Function):
        """The square root of zero: finite, its slope is not."""

        @staticmethod
        def forward(context, value):
            return value

        @staticmethod
        def backward(context, gradient):
            return gradient / 0

    losses = training.distiller.student.losses
    training.distiller.student.losses = lambda *given: {k: Root.apply(v) for k, v in losses(*given).items()}
    with pytest.raises(BadStepError, match="step 0: the gradient is not finite"):
        make_step(training)


def test_a_step_that_fails_half_way_is_undone(training):
    before = content(training)
    training.distiller.terms["neck"].forward = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        make_step(training)
    assert_same(content(training), before)


@pytest.mark.parametrize(("scale", "left_out", "lowered"), [(2.0**16, "overflow", 2.0**15), (1.0, None, None)])
def test_an_overflow_is_the_scalers_affair_until_the_scale_is_not_at_fault(training, scale, left_out, lowered):
    training.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    make_step(training)
    before = content(training)
    parameter = training.distiller.student.model.rpn.head.cls_logits.weight
    hook = parameter.register_hook(lambda gradient: gradient * math.inf)
    if left_out:
        assert make_step(training).left_out == left_out
        assert training.health.left_out == {"overflow": 1}
        assert training.scaler.get_scale() == lowered
        assert_same(content(training), before)
        hook.remove()
        assert make_step(training).left_out is None
    else:
        with pytest.raises(BadStepError, match="the gradient is not finite"):
            make_step(training)


def test_a_state_that_is_not_finite_is_not_kept(training):
    refuse_broken(training.distiller, 7)
    training.distiller.student.model.rpn.head.cls_logits.bias.data[0] = math.inf
    with pytest.raises(RunError, match=r"step 7: the training is broken: rpn\.head\.cls_logits\.bias holds"):
        refuse_broken(training.distiller, 7)
