from __future__ import annotations

import math

import pytest

from defeat_cli.ablation.statistics import Delta, measured, paired_delta, t_quantile


@pytest.mark.parametrize(
    ("freedom", "t"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (29, 2.045), (100, 1.984)],
)
def test_quantiles_are_those_of_the_printed_table(freedom, t):
    assert t_quantile(freedom) == pytest.approx(t, abs=5e-4)


def test_quantiles_in_closed_form():
    # One degree is Cauchy's distribution: P(|T| <= t) = 2/pi * atan(t). Two: P(|T| <= t) = t / sqrt(2 + t^2).
    assert t_quantile(1, 0.5) == pytest.approx(1)
    assert t_quantile(2, 0.95) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)))


def test_deviation_divides_by_one_less():
    entry = measured({0: 1, 1: 2, 2: 6})
    assert entry.mean == 3
    assert entry.deviation == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert measured({0: 5}).deviation is None


def test_interval_of_three_pairs():
    # Differences 1, 2, 3: mean 2, deviation 1, half width 4.3027 / sqrt(3) = 2.4841.
    delta = paired_delta({0: 11, 1: 22, 2: 33}, {0: 10, 1: 20, 2: 30})
    assert delta.mean == 2
    assert (delta.low, delta.high) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-4)
    assert not delta.clear


def test_pairing_cancels_what_a_seed_does_to_both():
    delta = paired_delta({0: 11.0, 1: 51.1, 2: 90.9}, {0: 10.0, 1: 50.0, 2: 90.0})
    assert delta.clear
    assert 0.7 < delta.low < delta.mean < delta.high < 1.3


def test_fewer_than_three_pairs_have_no_interval():
    assert paired_delta({0: 3, 1: 5}, {0: 2, 1: 2}) == Delta(2)
    assert not Delta(2).clear


def test_only_seeds_that_both_have_are_paired():
    assert paired_delta({0: 3, 1: 5, 7: 100}, {0: 2, 1: 2, 8: 0}) == Delta(2)
    assert paired_delta({0: 3}, {1: 2}) is None
