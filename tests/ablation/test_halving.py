from __future__ import annotations

import pytest

from defeat_cli.ablation.halving import standing, stops
from defeat_cli.errors import RunError


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        # 8 values, 8 epochs. Halved once, at 4: 8 * 4/8 + 4 * 4/8 = 6 whole trainings.
        # Twice, at 2 and 4: 8 * 2/8 + 4 * 2/8 + 2 * 4/8 = 4. Three times: 8 * 1/8 + 4 * 1/8 + 2 * 2/8 + 1 * 4/8 = 2.5.
        (8, [8]),
        (7.9, [4, 8]),
        (6, [4, 8]),
        (5, [2, 4, 8]),
        (3, [1, 2, 4, 8]),
        (2.5, [1, 2, 4, 8]),
    ],
)
def test_a_sweep_is_halved_as_seldom_as_the_budget_allows(budget, expected):
    assert stops(8, 8, budget) == expected


def test_a_stop_is_at_an_evaluation():
    assert stops(4, 20, 2.9, every=4) == [8, 20]  # 4 * 8/20 + 2 * 12/20 = 2.8; half of 20 would be 10


def test_a_budget_that_no_halving_keeps_is_refused():
    with pytest.raises(RunError, match=r"--budget 2: .* 8 values costs at least 2\.5 whole trainings of 8 epochs"):
        stops(8, 8, 2)
    with pytest.raises(RunError, match="at least 1 whole"):
        stops(1, 8, 0.5)
    with pytest.raises(RunError, match=r"at least 1\.8 whole"):  # 3 * 2/8 + 2 * 2/8 + 1 * 4/8 = 1.75, rounded up
        stops(3, 8, 1, every=2)


def test_the_better_half_goes_on():
    curves = {"a": [{1: 0.1}], "b": [{1: 0.3}], "c": [{1: 0.2}]}
    now = standing(curves, [1, 2, 4])
    assert now.aims == {"a": 1, "b": 2, "c": 2}
    assert now.stopped == {"a"}
    curves["b"][0][2], curves["c"][0][2] = 0.3, 0.31
    now = standing(curves, [1, 2, 4])
    assert now.aims == {"a": 1, "b": 2, "c": 4}
    assert now.stopped == {"a", "b"}
    curves["c"][0][4] = 0.2
    assert standing(curves, [1, 2, 4]) == now


def test_values_are_judged_by_their_mean_over_seeds_when_all_are_there():
    curves = {"a": [{1: 0.5}, {}], "b": [{1: 0.1}, {1: 0.6}]}
    assert standing(curves, [1, 2]).aims == {"a": 1, "b": 1}
    curves["a"][1][1] = 0.1
    assert standing(curves, [1, 2]).aims == {"a": 1, "b": 2}


def test_nobody_waits_for_a_value_that_failed():
    curves = {"a": [{}], "b": [{1: 0.3}], "c": [{1: 0.2}]}
    assert standing(curves, [1, 2]).aims == {"a": 1, "b": 1, "c": 1}
    now = standing(curves, [1, 2], frozenset(["a"]))
    assert now.aims == {"a": 1, "b": 2, "c": 2}
    assert now.stopped == set()
    # Who is told of it later, when the others have gone on, sees the same.
    curves["b"][0][2] = 0.4
    assert standing(curves, [1, 2]) == now
