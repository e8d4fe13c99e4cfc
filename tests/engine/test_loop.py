"""Schedules against hand-computed values; randomness of a step."""

import math

import pytest
import torch

from defeat_cli.engine.optimization import lr_factor
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
