from __future__ import annotations

import math

import pytest

from defeat_cli.ablation.power import chance, seeds_needed


@pytest.mark.parametrize("pairs", [2, 3, 5, 30, 300])
def test_without_a_difference_one_study_in_twenty_finds_one(pairs):
    assert chance(0.0, pairs) == pytest.approx(0.05, abs=1e-5)


def test_two_pairs_by_hand():
    # One degree of freedom: w = |N| for a standard normal N, so T = (Z + λ) / |N| and |T| > t where |Z + λ| > t |N|.
    # The point (Z + λ, N) is then within a double wedge around the first axis of half angle atan(1 / t), seen from
    # 0: for λ = 0 a share of 2/π · atan(1 / 12.706) = 0.05 of the plane. For λ -> infinity all of it.
    assert 2 / math.pi * math.atan(1 / 12.7062) == pytest.approx(0.05, abs=1e-5)
    assert chance(0.0, 2) == pytest.approx(0.05, abs=1e-5)
    assert chance(1000.0, 2) == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize(("effect", "pairs"), [(0.2, 199), (0.3, 90), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_pairs_are_those_of_the_published_tables(effect, pairs):
    # Cohen's small, medium and large effects among them; as in the tables of the paired t-test for a power of 80%.
    assert seeds_needed(100 * effect, 100) == pairs
    assert seeds_needed(-effect, 1) == pairs


def test_more_power_needs_more_pairs():
    assert seeds_needed(0.5, 1, power=0.9) == 44  # the same tables, 90%


def test_large_samples_agree_with_the_normal_formula():
    # ((1.96 + 0.8416) / d)² + 1.96² / 2, the usual approximation.
    for effect in (0.1, 0.15, 0.25):
        assert seeds_needed(effect, 1) == pytest.approx((2.80159 / effect) ** 2 + 1.92, abs=1)


def test_no_number_of_seeds_finds_what_is_not_there():
    assert seeds_needed(0.0, 1.0) is None
    assert seeds_needed(0.01, 1.0) is None
    assert seeds_needed(0.0, 0.0) is None
    assert seeds_needed(1.0, 0.0) == 2
