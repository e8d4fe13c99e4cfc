"""What the loop watches: speed and memory by a clock and a GPU of the test's own, and terms that pull too hard."""

from types import SimpleNamespace

import pytest
import torch

from defeat_cli.engine import monitor
from defeat_cli.engine.distributed import ALONE
from defeat_cli.engine.monitor import Clock, Proportion


def training_on(device):
    parameter = SimpleNamespace(device=torch.device(device))
    return SimpleNamespace(seconds=0.0, distiller=SimpleNamespace(parameters=lambda: iter([parameter]), cache=None))


@pytest.mark.parametrize(("device", "memory"), [("cuda:1", {"memory_gib": 3.0}), ("cpu", {})])
def test_speed_and_memory_are_those_of_the_device_that_trains(monkeypatch, device, memory):
    """On a machine with two GPUs, whatever the run takes of them."""
    peaks = {torch.device("cuda:1"): 3 * 2**30}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: peaks.get(device, 0))
    now = [100.0]
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: now[0])
    training = training_on(device)
    clock = Clock(training, ALONE)
    for images in (4, 2):
        now[0] += 1.5
        clock.tick(images)
    with clock.paused():
        now[0] += 1000  # an evaluation
    assert clock.speed() == {"images_per_second": 2.0, **memory}  # 6 images in 3 seconds
    now[0] += 0.5
    clock.tick(4)
    assert clock.speed() == {"images_per_second": 8.0, **memory}  # since the last line
    assert training.seconds == 3.5


def test_a_term_that_pulls_far_harder_for_five_lines_is_told_of_once():
    told = []
    proportion = Proportion(SimpleNamespace(warn=told.append))
    hard, well = {"mgd": 30.0, "neck": 1.0}, {"mgd": 20.0, "neck": 1.0}
    for pull in (
        [hard] * 4 + [well] + [hard] * 2 + [{}] + [hard] * 2
    ):  # a line in which nothing was measured says nothing
        proportion.look(pull)
    assert told == []
    for _ in range(10):
        proportion.look(hard)
    assert len(told) == 1
    assert told[0].startswith("mgd has long pulled 30 times as hard as the detection loss")
