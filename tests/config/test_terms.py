"""How strong a term is over the steps, against hand-computed values."""

import math

import pytest

from defeat_cli.config.terms import TermSettings


def strengths(steps, warmup_steps=0, total=10, **settings):
    return [TermSettings(**settings).strength(step, total, warmup_steps) for step in steps]


def test_a_term_warms_up_linearly():
    assert strengths((0, 1, 2, 4, 9), warmup_steps=4) == [0.0, 0.25, 0.5, 1.0, 1.0]
    assert strengths((0,)) == [1.0]


def test_its_own_warm_up_comes_before_the_recipes():
    assert [TermSettings(warmup_steps=2).strength(step, 10, 4) for step in (0, 1, 2)] == [0.0, 0.5, 1.0]
    assert TermSettings(warmup_steps=0).strength(0, 10, 4) == 1.0


def test_it_begins_late_and_is_off_before():
    # Warm-up counts from the start: step 3 is its step 0.
    assert strengths((2, 3, 4, 5), warmup_steps=2, start=3) == [None, 0.0, 0.5, 1.0]


def test_it_stops_at_a_share_of_the_training():
    assert strengths((7, 8, 9), stop=0.8) == [1.0, None, None]


def test_it_decays_from_start_to_stop():
    # From step 0 to step 8 (80% of 10): a quarter of the way at step 2, half at 4.
    assert strengths((0, 2, 4, 8), stop=0.8, decay="linear") == [1.0, 0.75, 0.5, None]
    assert strengths((2, 4), stop=0.8, decay="cosine") == pytest.approx([0.5 * (1 + math.sqrt(0.5)), 0.5])


def test_a_balance_measures_twenty_times_over_the_warm_up():
    settings = TermSettings(start=10)
    assert [s for s in range(200) if settings.measured_at(s, 100)] == list(range(10, 110, 5))
    assert [s for s in range(200) if settings.measured_at(s, 0)] == list(range(10, 30))
