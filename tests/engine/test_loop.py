"""Schedules against hand-computed values; randomness of a step."""

import math
from types import SimpleNamespace

import pytest
import torch

from defeat_cli.config.schema import Optimizer, Schedule
from defeat_cli.engine.monitor import Pace
from defeat_cli.engine.optimization import learning_rate_text, lr_factor
from defeat_cli.engine.step import seed_step


def test_steps_schedule_with_warm_up():
    def factor(step):
        return lr_factor(
            step, steps_per_epoch=10, epochs=12, warmup_steps=4, warmup_factor=0.2, milestones=[8, 11], gamma=0.1
        )

    # Warm-up from 0.2 to 1 in 4 steps of (1 - 0.2) / 4 = 0.2.
    assert [factor(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factor(79) == 1.0
    assert factor(80) == pytest.approx(0.1)
    assert factor(109) == pytest.approx(0.1)
    assert factor(110) == pytest.approx(0.01)


def test_cosine_schedule():
    def factor(step):
        return lr_factor(step, steps_per_epoch=10, epochs=4, decay="cosine")

    assert factor(0) == 1.0
    assert factor(10) == pytest.approx(0.5 * (1 + math.sqrt(0.5)))  # cos 45 degrees
    assert factor(20) == pytest.approx(0.5)
    assert factor(40) == pytest.approx(0.0)


def test_a_steps_randomness_depends_on_seed_step_and_part_alone():
    def draw(*arguments):
        seed_step(*arguments)
        return torch.rand(3)

    assert torch.equal(draw(1, 2, 0), draw(1, 2, 0))
    for other in [(2, 2, 0), (1, 3, 0), (1, 2, 1)]:
        assert not torch.equal(draw(1, 2, 0), draw(*other))


def test_the_learning_rate_in_words():
    optimizer = Optimizer(lr=0.02)
    assert learning_rate_text(optimizer, Schedule()) == (
        "learning rate 0.02, after 500 steps of warm-up, times 0.1 after epoch 8 and 11"
    )
    assert learning_rate_text(optimizer, Schedule(decay="cosine", warmup_steps=0)) == (
        "learning rate 0.02, falling as a cosine"
    )
    assert learning_rate_text(optimizer, Schedule(epochs=8, warmup_steps=0)) == "learning rate 0.02"


def test_the_pace_is_the_median_of_ten_steps_after_three():
    training = SimpleNamespace(seconds=0.0, step=0)
    pace = Pace(training, 100)
    told = []
    # The first three are slow and one of the ten too; the steps 5 and 6 measure pulls and are not asked about.
    for seconds in [9, 9, 9, 2, 2, 7, 7, 2, 9, 2, 2, 2, 2, 2, 2, 2, 2, 2]:
        training.seconds += seconds
        training.step += 1
        if seconds != 7 and (known := pace.known()) is not None:
            told.append((training.step, known))
    # Sixteen are asked about, of which the first and the one after the measured are not whole steps of their own.
    assert told == [(16, 2)]
    assert Pace(training, 18 + 26).wanted == 0


def test_a_pace_that_has_changed_is_told_again():
    """Told after 13 steps, then looked at after 20, 40, 80 and 160 more: 33, 73, 153 and 313."""
    training = SimpleNamespace(seconds=0.0, step=0)
    pace = Pace(training, 600)
    told = []
    for step in range(1, 601):
        # Twice as slow from step 14 on; in the 80 from step 74 on a quarter of the steps takes 6 instead of 2.
        training.seconds += 1 if step <= 13 else 6 if 74 <= step <= 93 else 2
        training.step = step
        if (known := pace.known()) is not None:
            told.append((step, known))
    # (20 * 6 + 60 * 2) / 80 = 3; then 2 again, which is a third less.
    assert told == [(13, 1), (33, 2), (153, 3), (313, 2)]
