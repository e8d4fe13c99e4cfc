"""What the loop watches as it goes: averages of the losses for the log, the terms' pulls, time and memory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from statistics import median
from typing import Any

import torch

from defeat_cli.distillation.distiller import StepLosses
from defeat_cli.engine.checkpoint import Training
from defeat_cli.engine.distributed import World


def add(training: Training, losses: StepLosses) -> None:
    """Add a step's values to the running sums, without waiting for the device."""
    for kind, values in (("weighted", losses.weighted), ("raw", losses.raw), ("pull", losses.pull)):
        for name, value in values.items():
            key = f"{kind}/{name}"
            value = value.detach().double()
            training.sums[key] = training.sums[key] + value if key in training.sums else value
            training.counts[key] = training.counts.get(key, 0) + 1


def averages(training: Training, world: World) -> dict[str, Any]:
    """Averages over all processes since the last log line, which start anew; on the main process, nothing elsewhere."""
    sums = torch.stack(list(training.sums.values())).tolist() if training.sums else []
    every = world.gather({key: (s, training.counts[key]) for key, s in zip(training.sums, sums, strict=True)})
    training.sums, training.counts = {}, {}
    if not world.is_main:
        return {}
    figures: dict[str, Any] = {"weighted": {}, "raw": {}, "pull": {}}
    for key in dict.fromkeys(chain.from_iterable(every)):
        kind, _, name = key.partition("/")
        found = [own[key] for own in every if key in own]
        figures[kind][name] = sum(total for total, _ in found) / sum(count for _, count in found)
    figures["loss"] = sum(figures["weighted"].values())
    return figures


def seen(training: Training, world: World) -> dict[str, int]:
    """How many images of each kind all processes have trained on so far; on the main process, nothing elsewhere."""
    every = world.gather(training.seen)
    return {kind: sum(own[kind] for own in every) for kind in training.seen} if world.is_main else {}


class Proportion:
    """Warns, once a term, where it has pulled far harder than the detection loss in several log lines on end."""

    MOST, LINES = 20.0, 5

    def __init__(self, reporter: Any) -> None:
        self.reporter = reporter
        self.lines: dict[str, int] = {}

    def look(self, pull: Mapping[str, float]) -> None:
        """Take in the pulls of a log line; those that were not measured in it say nothing."""
        for name, value in pull.items():
            self.lines[name] = self.lines.get(name, 0) + 1 if value > self.MOST else 0
            if self.lines[name] == self.LINES:
                self.reporter.warn(
                    f"{name} has long pulled {value:.0f} times as hard as the detection loss; lower its weights, or "
                    "let distillation.balance set them"
                )


class Clock:
    """Time spent training, evaluation left out, and what found features spared of it; images per second since the last
    log line, of all processes together; peak GPU memory of the process that needs most."""

    def __init__(self, training: Training, world: World) -> None:
        self.training = training
        self.world = world
        self.device = next(training.distiller.parameters()).device
        self.images = 0
        self.logged_at = training.seconds
        self.since = time.perf_counter()

    def tick(self, images: int) -> None:
        """A step on so many images is done."""
        now = time.perf_counter()
        self.training.seconds += now - self.since
        self.since = now
        cache = self.training.distiller.cache
        if cache is not None and cache.folder is not None:
            self.training.spared += cache.folder.take_spared()
        self.images += images

    @contextmanager
    def paused(self) -> Iterator[None]:
        yield
        self.since = time.perf_counter()

    def speed(self) -> dict[str, float]:
        """Figures for a log line, counted from the last one; on the main process, nothing elsewhere."""
        seconds = self.training.seconds - self.logged_at
        on_gpu = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else 0
        every = self.world.gather((self.images, peak))
        speed = {}
        if every:
            speed["images_per_second"] = round(sum(images for images, _ in every) / seconds, 2)
            if on_gpu:
                speed["memory_gib"] = round(max(peak for _, peak in every) / 2**30, 2)
        self.images, self.logged_at = 0, self.training.seconds
        return speed


class Pace:
    """How long a step takes: the median of the first steps, and again whenever a stretch of steps, each twice as long
    as the one before, has taken a share `OFF` more or less than that. Nothing where few steps are to come."""

    WARM, STEPS, OFF = 3, 10, 0.25
    """Steps that are not counted, for the first are slower; steps that are; and the share."""

    def __init__(self, training: Training, steps: int) -> None:
        self.training, self.steps = training, steps
        self.last = training.seconds
        self.step = training.step
        self.seconds: list[float] = []
        self.wanted = self.WARM + self.STEPS if steps - training.step > 2 * (self.WARM + self.STEPS) else 0
        self.told: float | None = None
        self.stretch = 2 * self.STEPS

    def known(self) -> float | None:
        """Seconds a step, asked after each; None until they are known, and while they stay what they were."""
        now, step = self.training.seconds, self.training.step
        if self.told is not None:
            return self._changed(now, step)
        if self.step == step - 1:  # else something else was done in between
            self.seconds.append(now - self.last)
        self.last, self.step = now, step
        if not self.wanted or len(self.seconds) < self.wanted:
            return None
        self.told = median(self.seconds[self.WARM :])
        return self.told

    def _changed(self, now: float, step: int) -> float | None:
        """Seconds a step over the stretch that ends here, all that was done in it included, where they are others."""
        made = step - self.step
        if made < self.stretch or self.steps - step < made:
            return None
        found = (now - self.last) / made
        self.last, self.step, self.stretch = now, step, 2 * self.stretch
        if abs(found - self.told) <= self.OFF * self.told:
            return None
        self.told = found
        return found
