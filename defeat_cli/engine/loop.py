"""The training loop: `train_step` makes one step, `fit` alone logs, evaluates and saves."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from defeat_cli.config.schema import Recipe
from defeat_cli.detectors.contract import Detector
from defeat_cli.distillation.distiller import StepLosses
from defeat_cli.engine.checkpoint import Training
from defeat_cli.engine.optimization import lr_factor
from defeat_cli.engine.runs import BEST, LAST, RunFolder
from defeat_cli.errors import Interrupted, RunError

TrainingBatch = tuple[list[Tensor], list[dict[str, Tensor] | None], list[int]]
"""Images, targets (None for unlabelled images) and image ids."""


def seed_step(seed: int, step: int, part: int = 0) -> None:
    """Make randomness depend on (seed, step, which of the step's batches) alone.

    So resuming needs no generator state, and what the teacher draws for one batch changes nothing in the next.
    """
    torch.manual_seed((seed * 1_000_003 + step) * 1_009 + part)


def train_step(
    training: Training,
    batches: list[TrainingBatch],
    *,
    seed: int,
    lr: float,
    strength: float | Mapping[str, float | None],
    clip_norm: float | None,
    autocast: torch.dtype | None,
    measure: bool = False,
) -> StepLosses:
    """One optimizer step on one or more batches, whose gradients are averaged.

    Args:
        strength, measure: of the distillation terms; see `Distiller.forward`.

    Returns:
        The losses of the last batch.

    Raises:
        RunError: a loss is not finite; names the step and every loss's value. The student is left as it was.
    """
    optimizer, scaler = training.optimizer, training.scaler
    for group in optimizer.param_groups:
        group["lr"] = lr
    device = next(training.distiller.parameters()).device
    for part, (images, targets, _) in enumerate(batches):
        seed_step(seed, training.step, part)
        images = [image.to(device, non_blocking=True) for image in images]
        targets = [t and {key: value.to(device, non_blocking=True) for key, value in t.items()} for t in targets]
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            losses = training.distiller(images, targets, strength, measure=measure and part == len(batches) - 1)
        total = torch.stack([value.float() for value in losses.weighted.values()]).sum()
        scaler.scale(total / len(batches)).backward()
        # Asked only after backward is queued: on a GPU the host waits here while the device works.
        if not math.isfinite(total.item()):
            values = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.weighted.items())
            raise RunError(
                f"step {training.step}: the loss is not finite ({values}). Lower optimizer.lr or optimizer.clip_norm, "
                "or lengthen schedule.warmup_steps and distillation.warmup_steps"
            )
    if clip_norm is not None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if training.ema is not None:
        training.ema.update_parameters(training.distiller.student)
    training.step += 1
    return losses


def fit(
    training: Training,
    loader: Any,
    run: RunFolder,
    recipe: Recipe,
    *,
    evaluate: Callable[[Detector], dict[str, Any]],
    save: Callable[[Training, str, dict[str, Any]], None],
    reporter: Any,
    autocast: torch.dtype | None = None,
    until: int | None = None,
) -> None:
    """Train to the recipe's last epoch, from wherever `training` stands.

    Args:
        loader: batches of an epoch; `loader.batch_sampler.set_epoch(epoch, start)` chooses them.
        evaluate: detector -> metrics with `AP`.
        save: writes a checkpoint of `training` under a name in the run folder, with metrics where it was evaluated.
        reporter: shows progress; see `console.Reporter`.
        until: epoch after whose evaluation to stop, where that is not the last.

    Raises:
        Interrupted: asked to stop by SIGINT or SIGTERM, or at `until`; the state is saved.
    """
    epochs, accumulate = recipe.schedule.epochs, recipe.optimizer.accumulate
    steps_per_epoch = math.ceil(loader.batch_sampler.batches_per_epoch / accumulate)
    steps = steps_per_epoch * epochs
    schedule, terms = recipe.schedule.model_dump(), recipe.distillation.terms
    clock, proportion = _Clock(training), _Proportion(reporter)
    reporter.begin(training.step, steps, epochs)
    metrics: dict[str, Any] = {}
    with stop_requested() as stop:
        for epoch in range(training.epochs, epochs):
            training.distiller.train()
            loader.batch_sampler.set_epoch(epoch, start=(training.step - epoch * steps_per_epoch) * accumulate)
            for batches in _groups(loader, accumulate):
                lr = recipe.optimizer.lr * lr_factor(training.step, steps_per_epoch=steps_per_epoch, **schedule)
                strength = {
                    name: settings.strength(training.step, steps, recipe.distillation.warmup_steps)
                    for name, settings in terms.items()
                }
                due = bool(recipe.run.pull_every) and training.step % recipe.run.pull_every == 0
                losses = train_step(
                    training,
                    batches,
                    seed=recipe.run.seed,
                    lr=lr,
                    strength=strength,
                    clip_norm=recipe.optimizer.clip_norm,
                    autocast=autocast,
                    measure=due or training.distiller.balancing(training.step, recipe.distillation.warmup_steps),
                )
                _add(training, losses)
                clock.tick(sum(len(images) for images, _, _ in batches))
                _count(training, batches, distilled=any(factor is not None for factor in strength.values()))
                if training.step % recipe.run.log_every == 0:
                    entry = {"kind": "train", "step": training.step, "epoch": epoch + 1, "lr": lr, "strength": strength}
                    entry |= _averages(training) | clock.speed()
                    if recipe.data.unlabelled is not None:
                        entry["seen"] = dict(training.seen)
                    run.log(entry)
                    reporter.logged(entry)
                    proportion.look(entry["pull"])
                reporter.stepped(training.step)
                if stop():
                    save(training, LAST, metrics)
                    raise Interrupted(f"{run.path}: step {training.step} is saved; --resume goes on from there")
                if training.step % recipe.run.checkpoint_every == 0:
                    save(training, LAST, metrics)
            training.epochs = epoch + 1
            if training.epochs % recipe.run.evaluate_every == 0 or training.epochs in (until, epochs):
                with clock.paused():
                    metrics = evaluate(training.evaluated)
                run.log({"kind": "eval", "step": training.step, "epoch": epoch + 1, **metrics})
                reporter.evaluated(epoch + 1, metrics)
                if metrics["AP"] > training.best_ap:
                    training.best_ap = metrics["AP"]
                    save(training, BEST, metrics)
            save(training, LAST, metrics)
            if training.epochs == until and until < epochs:
                raise Interrupted(f"{run.path}: epoch {until} of {epochs} is saved; --resume goes on from there")


def _groups(loader: Iterable[TrainingBatch], size: int) -> Iterator[list[TrainingBatch]]:
    batches = iter(loader)
    while group := list(islice(batches, size)):
        yield group


def _count(training: Training, batches: list[TrainingBatch], *, distilled: bool) -> None:
    """Count a step's images; where no term is on, unlabelled ones are of no use and not looked at."""
    for _, targets, _ in batches:
        labelled = sum(target is not None for target in targets)
        training.seen["labelled"] += labelled
        training.seen["unlabelled"] += distilled * (len(targets) - labelled)


def _add(training: Training, losses: StepLosses) -> None:
    """Add a step's values to the running sums, without waiting for the device."""
    for kind, values in (("weighted", losses.weighted), ("raw", losses.raw), ("pull", losses.pull)):
        for name, value in values.items():
            key = f"{kind}/{name}"
            value = value.detach().double()
            training.sums[key] = training.sums[key] + value if key in training.sums else value
            training.counts[key] = training.counts.get(key, 0) + 1


def _averages(training: Training) -> dict[str, Any]:
    """Averages since the last log line, which start anew."""
    sums = torch.stack(list(training.sums.values())).tolist()
    averages: dict[str, Any] = {"weighted": {}, "raw": {}, "pull": {}}
    for key, value in zip(training.sums, sums, strict=True):
        kind, _, name = key.partition("/")
        averages[kind][name] = value / training.counts[key]
    averages["loss"] = sum(averages["weighted"].values())
    training.sums, training.counts = {}, {}
    return averages


class _Proportion:
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


class _Clock:
    """Time spent training, evaluation left out; images per second since the last log line; peak GPU memory."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.images = 0
        self.logged_at = training.seconds
        self.since = time.perf_counter()

    def tick(self, images: int) -> None:
        """A step on so many images is done."""
        now = time.perf_counter()
        self.training.seconds += now - self.since
        self.since = now
        self.images += images

    @contextmanager
    def paused(self) -> Iterator[None]:
        yield
        self.since = time.perf_counter()

    def speed(self) -> dict[str, float]:
        """Figures for a log line, counted from the last one."""
        seconds = self.training.seconds - self.logged_at
        speed = {"images_per_second": round(self.images / seconds, 2)}
        if torch.cuda.is_available():
            speed["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.images, self.logged_at = 0, self.training.seconds
        return speed


@contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Within, SIGINT and SIGTERM are remembered instead of stopping at once; a second one stops at once."""
    received = []

    def remember(number: int, _: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
