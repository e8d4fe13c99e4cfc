"""What a distillation step costs, and what each of its parts costs that it cannot do without.

The parts run in turn on the same batches, each from a standstill: the student's own step; what the terms ask of the
teacher; each term on maps that are there already, backward to those maps (its adapters, its masks and the student's
head on the teacher's regions are in it); and the whole step, as `train` makes it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from defeat_cli.benchmark.memory import Peak, size_of
from defeat_cli.benchmark.profiling import profiled
from defeat_cli.benchmark.timing import Spread, Stopwatch
from defeat_cli.data.loading import Loader
from defeat_cli.detectors.contract import Target
from defeat_cli.distillation.terms import Term, View
from defeat_cli.distillation.unlabelled import apart
from defeat_cli.engine.checkpoint import Training
from defeat_cli.engine.step import TrainingBatch, train_step

STUDENT, FORWARD, BACKWARD = "student's step", "  forward", "  backward"
UNLABELLED, TEACHER, TERMS, WHOLE = "student, unlabelled", "teacher", "terms together", "whole step"

KEPT = 4
"""Batches that are kept to measure on, in turn."""

WARM_UP = 2
"""Rounds that are not counted, at least."""


@dataclass(frozen=True)
class Memory:
    """Peak bytes of a step with its terms off and on; both hold the teacher's weights, which are `teacher`."""

    without_terms: int
    whole: int
    teacher: int


@dataclass(frozen=True)
class StepCost:
    """What a step was measured to cost.

    images: a batch has, unlabelled ones included.
    parts: by name, in the order of the table; `FORWARD` and `BACKWARD` are parts of `STUDENT`.
    terms: names of the terms among the parts.
    counts: for the step with its terms off and on, launches and waits; empty where there is no GPU.
    necessary: milliseconds of all that a step cannot do without; what several terms share counts once.
    ratio: the whole step over that, in the median of the rounds, each of which sees one batch and one state of the
        machine.
    """

    images: int
    parts: dict[str, Spread]
    terms: list[str]
    memory: Memory
    counts: dict[str, dict[str, int]]
    necessary: float
    ratio: float


def read_batches(loader: Loader, rounds: int) -> tuple[list[TrainingBatch], float]:
    """Batches to measure on, and the images that the loader gives a second where nobody else keeps it busy."""
    kept = list(islice(loader, KEPT))  # loader processes have started once these are there
    loader.batch_sampler.set_epoch(1)
    began = time.perf_counter()
    images = sum(len(batch[0]) for batch in islice(loader, rounds))
    return kept, images / (time.perf_counter() - began)


def measure_step(
    training: Training,
    batches: Sequence[TrainingBatch],
    rounds: int,
    *,
    settings: Mapping[str, Any],
    trace: Path | None = None,
) -> StepCost:
    """Measure a step and its parts. The learning rate is 0, so that the student is the same in every round.

    Args:
        rounds: how often each part is measured, after a warm-up.
        settings: `clip_norm` and `autocast`, as `train_step` takes them.
        trace: file for a profile of one whole step.

    Raises:
        RunError: a loss is not finite.
    """
    distiller = training.distiller.train()
    device = next(distiller.parameters()).device
    off = dict.fromkeys(distiller.terms)
    step = partial(train_step, training, seed=0, lr=0.0, **settings)
    watch, asked = Stopwatch(device), {}
    warm_up = WARM_UP if distiller.cache is None else max(WARM_UP, len(batches))  # then all features are found
    for number in range(warm_up + rounds):
        if number == warm_up:
            watch.forget()
        batch = batches[number % len(batches)]
        with watch.timing(STUDENT):
            step([batch], strength=off)
        _measure_parts(watch, training, _on(device, batch), settings["autocast"], asked)
        with watch.timing(WHOLE):
            step([batch], strength=1.0)

    resident = list(_resident(training))
    peaks = []
    for strength in (off, 1.0):
        with Peak(device, resident) as peak:
            step(batches[:1], strength=strength)
        peaks.append(peak.bytes)
    weights = list(distiller.teacher.state_dict().values()) if distiller.teacher is not None else []
    counts = {
        STUDENT: profiled(partial(step, batches[:1], strength=off), device),
        WHOLE: profiled(partial(step, batches[:1], strength=1.0), device, trace),
    }
    sums = _necessary(watch.seconds, list(distiller.terms))
    return StepCost(
        len(batches[0][0]),
        {name: watch.spread(name) for name in _ordered(watch.seconds, list(distiller.terms))},
        list(distiller.terms),
        Memory(*peaks, size_of(weights)),
        {name: count for name, count in counts.items() if count is not None},
        1000 * statistics.median(sums),
        statistics.median(whole / parts for whole, parts in zip(watch.seconds[WHOLE], sums, strict=True)),
    )


def _necessary(measured: Mapping[str, list[float]], terms: Sequence[str]) -> list[float]:
    """The sum of the parts that a step cannot do without, in each round."""
    names = [STUDENT, UNLABELLED, TEACHER, *([TERMS] if len(terms) > 1 else terms)]
    return [sum(parts) for parts in zip(*(measured[name] for name in names if name in measured), strict=True)]


def _ordered(measured: Mapping[str, Any], terms: Sequence[str]) -> list[str]:
    order = [STUDENT, FORWARD, BACKWARD, UNLABELLED, TEACHER, *terms, TERMS, WHOLE]
    return [name for name in order if name in measured]


def _on(device: torch.device, batch: TrainingBatch) -> TrainingBatch:
    images, targets, image_ids = batch
    targets = [t and {key: value.to(device) for key, value in t.items()} for t in targets]
    return [image.to(device) for image in images], targets, image_ids


def _resident(training: Training) -> list[Tensor]:
    """What is on the device between steps: weights, and what the optimizer and an average keep."""
    modules = [training.distiller, *([training.ema] if training.ema is not None else [])]
    kept = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    states = (value for state in training.optimizer.state.values() for value in state.values())
    return kept + [value for value in states if isinstance(value, Tensor)]


def _measure_parts(
    watch: Stopwatch,
    training: Training,
    batch: TrainingBatch,
    autocast: torch.dtype | None,
    asked: dict[int, list[str]],
) -> None:
    """Every part but the two steps.

    Args:
        batch: on the device.
        asked: what terms ask of the teacher in each look at a batch; filled in the first round.
    """
    distiller = training.distiller
    images, targets, unlabelled = apart(batch[0], batch[1])
    with torch.autocast(watch.device.type, dtype=autocast, enabled=autocast is not None):
        with watch.timing(FORWARD):
            losses = distiller(images, targets, dict.fromkeys(distiller.terms))
        loss = sum(losses.weighted.values())
    with watch.timing(BACKWARD):
        loss.backward()
    training.optimizer.zero_grad(set_to_none=True)
    if distiller.terms:
        looks = [(images, targets), *([(unlabelled, None)] if unlabelled else [])]
        _measure_terms(watch, training, looks, autocast, asked)
        training.optimizer.zero_grad(set_to_none=True)


def _measure_terms(
    watch: Stopwatch,
    training: Training,
    looks: Sequence[tuple[list[Tensor], list[Target] | None]],
    autocast: torch.dtype | None,
    asked: dict[int, list[str]],
) -> None:
    """The teacher, and each term; the looks at one batch, at its labelled and its unlabelled images, are added up."""
    distiller = training.distiller
    terms: dict[str, Term] = dict(distiller.terms.items())
    cast = partial(torch.autocast, watch.device.type, dtype=autocast, enabled=autocast is not None)
    pairs: list[tuple[View, View]] = []
    for number, (images, targets) in enumerate(looks):
        student, teacher = distiller.views(images, targets)
        if targets is None:
            with watch.timing(UNLABELLED), cast():
                torch.autograd.backward(student.features, [torch.ones_like(level) for level in student.features])
        with torch.no_grad(), cast():
            _ = student.features
            if number not in asked:
                asked[number] = _asked(terms, student, teacher)
        pairs.append((student, distiller.views(images, targets)[1]))
    with watch.timing(TEACHER), cast():
        for number, (_, teacher) in enumerate(pairs):
            teacher.look_at(asked[number])
    groups = {name: [term] for name, term in terms.items()} | ({TERMS: terms.values()} if len(terms) > 1 else {})
    for name, group in groups.items():
        cut = [(student.cut_loose(), teacher) for student, teacher in pairs]
        with watch.timing(name):
            with cast():
                losses = [loss for pair in cut for term in group for loss in term(*pair).values()]
                total = sum(loss.weight * loss.value for loss in losses)
            if total.requires_grad:
                total.backward()


@torch.no_grad()
def _asked(terms: Mapping[str, Term], student: View, teacher: View) -> list[str]:
    """What the terms ask of the teacher's view."""
    for term in terms.values():
        term(student.cut_loose(), teacher)
    return teacher.looked_at
