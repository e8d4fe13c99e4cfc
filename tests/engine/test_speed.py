"""Milliseconds an image, by a clock that the detector itself moves."""

import pytest
import torch
from torch import nn

from defeat_cli.data.opening import open_split
from defeat_cli.engine import speed


class Clocked(nn.Module):
    """Takes the next of some times for each image."""

    def __init__(self, seconds):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seconds, self.now, self.seen = list(seconds), 0.0, []

    def detect(self, images):
        assert not self.training
        assert len(images) == 1
        self.now += self.seconds[len(self.seen)]
        self.seen.append(images[0])
        return []


@pytest.fixture
def data(shapes):
    return open_split(shapes, "train", train=True)


def test_it_is_the_median_without_the_first_two(data, monkeypatch):
    detector = Clocked([5.0, 1.0, *(i / 1000 for i in range(1, 11))]).train()
    monkeypatch.setattr(speed, "SECONDS", 60.0)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: detector.now)
    # Of 1 to 10 ms the median is 5.5.
    assert speed.milliseconds_per_image(detector, data) == 5.5
    assert len(detector.seen) == 12
    assert detector.training


def test_slow_detectors_are_timed_on_fewer_images(data, monkeypatch):
    detector = Clocked([3.0, 3.0, 3.0, 4.0])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: detector.now)
    assert speed.milliseconds_per_image(detector, data) == 3000
    assert len(detector.seen) == 3
