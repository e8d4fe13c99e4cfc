"""What numbers say of maps made by hand, and of many images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from defeat_cli.gradients.numbers import cells_of_boxes, concise, map_numbers, own_area, summarize


def test_foreground_is_on_every_level_or_on_its_own():
    boxes = torch.tensor([[8.0, 8.0, 24.0, 16.0], [0.0, 0.0, 32.0, 32.0]])
    shapes, strides = [(8, 8), (4, 4)], [4, 8]
    everywhere = cells_of_boxes(boxes, shapes, strides)
    assert [mask.sum(dim=(1, 2)).tolist() for mask in everywhere] == [[8, 64], [2, 16]]
    own = cells_of_boxes(boxes, shapes, strides, finest_scale=16.0)
    # sqrt(16 * 8) / 16 < 1 goes to level 0, 32 / 16 = 2 to level 1.
    assert own[0].nonzero().tolist() == [[0, row, column] for row in (2, 3) for column in (2, 3, 4, 5)]
    assert not own[1][0].any()
    assert own[1][1].all()
    assert [mask.shape for mask in cells_of_boxes(boxes[:0], shapes, strides, 16.0)] == [(0, 8, 8), (0, 4, 4)]


def test_cells_that_begin_in_the_padding_are_cut_away():
    """An image of 9 x 16 pixels: cells of 4 pixels begin at 0, 4, 8 and at 0 to 12; cells of 16 only at 0."""
    fine, coarse = own_area([torch.ones(8, 8), torch.ones(2, 2)], (9, 16), [4, 16])
    assert (fine.shape, coarse.shape) == ((3, 4), (1, 1))


def test_ratios_are_written_with_the_digits_they_deserve():
    ratios = (0.0, 0.8512, 0.9999, 3.24, 9.97, 41.3)
    assert [concise(ratio) for ratio in ratios] == ["0.00", "0.85", "1.0", "3.2", "10", "41"]


def test_numbers_of_a_map_made_by_hand():
    fine = np.array([[1.0, 3.0, 0.0, 0.0], [5.0, 7.0, 2.0, 0.0]])
    inside = np.array([[True, True, False, False], [True, True, False, False]])
    coarse = np.array([[10.0, 2.0]])
    numbers = map_numbers([fine, coarse], [inside, np.array([[True, False]])], ["P2", "P3"])
    assert numbers["P2"] == {
        "foreground": {"cells": 4, "mean": 4.0, "median": 4.0},
        "background": {"cells": 4, "mean": 0.5, "median": 0.0},
        "ratio": 8.0,
        "foreground_share": 16 / 18,
        "foreground_area": 0.5,
    }
    assert numbers["P3"]["ratio"] == 5.0
    overall = numbers["overall"]
    assert overall["foreground"] == {"cells": 5, "mean": 26 / 5, "median": 5.0}
    assert overall["background"] == {"cells": 5, "mean": 4 / 5, "median": 0.0}
    assert overall["foreground_share"] == 26 / 30


def test_numbers_without_foreground_or_pull_say_so():
    (numbers, overall) = map_numbers([np.zeros((1, 3))], [np.zeros((1, 3), dtype=bool)], ["P3"]).values()
    assert numbers == overall
    assert numbers["foreground"] == {"cells": 0, "mean": None, "median": None}
    assert numbers["ratio"] is None
    assert numbers["foreground_share"] is None


def entry(inside: float, outside: float) -> dict:
    return map_numbers([np.array([[inside, outside]])], [np.array([[True, False]])], ["P3"])


def test_summary_over_images():
    images = [entry(4.0, 1.0), entry(2.0, 3.0), entry(6.0, 2.0)]
    images.append(map_numbers([np.ones((1, 2))], [np.zeros((1, 2), dtype=bool)], ["P3"]))  # no box: not compared
    summary = summarize(images, seed=1)
    assert summary == summarize(images, seed=1)
    assert summary["P3"] == summary["overall"]
    level = summary["P3"]
    assert level["images"] == 3
    assert level["foreground_mean"]["mean"] == 4.0
    assert level["background_mean"]["mean"] == 2.0
    assert level["ratio"]["mean"] == 2.0
    assert level["foreground_higher"]["mean"] == pytest.approx(2 / 3)
    low, high = level["ratio"]["interval"]
    assert 2 / 3 <= low < 2.0 < high <= 4.0  # every resample lies between the lowest and the highest ratio


def test_the_seed_decides_the_interval():
    images = [entry(float(value), 1.0) for value in np.random.default_rng(0).random(20)]
    intervals = [summarize(images, seed=seed)["P3"]["ratio"]["interval"] for seed in (1, 1, 2)]
    assert intervals[0] == intervals[1] != intervals[2]


def test_the_interval_covers_what_a_resampling_by_hand_gives():
    """Of images 0 and 1 the mean of a resample is 0, 1/2 or 1 with chances 1/4, 1/2, 1/4: the middle 95% is [0, 1]."""
    level = summarize([entry(0.0, 1.0), entry(1.0, 1.0)])["P3"]
    assert level["foreground_mean"]["interval"] == [0.0, 1.0]
    assert level["background_mean"]["interval"] == [1.0, 1.0]


def test_intervals_are_left_out_where_there_is_nothing_to_resample():
    one = summarize([entry(4.0, 1.0)])["P3"]
    assert one["ratio"] == {"mean": 4.0, "interval": None}
    dark = summarize([entry(1.0, 0.0), entry(1.0, 1.0)])["P3"]
    assert dark["ratio"]["mean"] == 2.0
    assert dark["ratio"]["interval"] is None
    assert summarize([]) == {}
