"""The training loop: `train_step` makes one step, `fit` alone logs, evaluates and saves."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from defeat_cli.detectors.contract import Detector
from defeat_cli.distillation.distiller import Distiller, Terms
from defeat_cli.engine.runs import BEST, LAST, RunFolder
from defeat_cli.errors import Interrupted, RunError

TrainingBatch = tuple[list[Tensor], list[dict[str, Tensor]], list[int]]


@dataclass
class Training:
    """All that changes during training, saved and restored as one.

    step: optimizer steps done; epochs: epochs done and evaluated; best_ap: best AP so far.
    seconds: time spent training, evaluation left out.
    sums: running sums of the logged values since the last log line, on the device; count: steps in them.
    """

    distiller: Distiller
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: AveragedModel | None = None
    step: int = 0
    epochs: int = 0
    best_ap: float = -math.inf
    seconds: float = 0.0
    sums: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0

    @property
    def evaluated(self) -> Detector:
        """The student as it is evaluated and exported: averaged where there is an average."""
        return self.ema.module if self.ema is not None else self.distiller.student

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, for `torch.load(weights_only=True)`."""
        return {
            "student": self.distiller.student.model.state_dict(),
            "neck_adapters": self.distiller.neck_adapters.state_dict(),
            "stage_adapters": self.distiller.stage_adapters.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "step": self.step,
            "epochs": self.epochs,
            "best_ap": self.best_ap,
            "seconds": self.seconds,
            "sums": self.sums,
            "count": self.count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; it must come from the same recipe."""
        self.distiller.student.model.load_state_dict(state["student"])
        self.distiller.neck_adapters.load_state_dict(state["neck_adapters"])
        self.distiller.stage_adapters.load_state_dict(state["stage_adapters"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        device = next(self.distiller.parameters()).device
        self.step, self.epochs, self.best_ap = state["step"], state["epochs"], state["best_ap"]
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.count, self.seconds = state["count"], state["seconds"]


def make_ema(student: Detector, decay: float) -> AveragedModel:
    """An exponential moving average of the student's parameters and buffers."""
    return AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def lr_factor(
    step: int,
    *,
    steps_per_epoch: int,
    epochs: int,
    warmup_steps: int = 0,
    warmup_factor: float = 0.001,
    decay: str = "steps",
    milestones: Iterable[int] = (),
    gamma: float = 0.1,
) -> float:
    """Share of the base learning rate at a step, counted from 0: linear warm-up, then `steps` or `cosine` decay."""
    warm = 1.0
    if step < warmup_steps:
        warm = warmup_factor + (1 - warmup_factor) * step / warmup_steps
    if decay == "cosine":
        return warm * 0.5 * (1 + math.cos(math.pi * step / (steps_per_epoch * epochs)))
    return warm * gamma ** sum(step >= milestone * steps_per_epoch for milestone in milestones)


def distillation_warmth(step: int, warmup_steps: int) -> float:
    """Factor on the distillation terms at a step: linear from 0 to 1 over `warmup_steps` (design 1.4)."""
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0


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
    warm: float,
    clip_norm: float | None,
    autocast: torch.dtype | None,
) -> Terms:
    """One optimizer step on one or more batches, whose gradients are averaged.

    Returns:
        The loss terms of the last batch.

    Raises:
        RunError: a term is not finite; names the step and every term's value. The student is left as it was.
    """
    optimizer, scaler = training.optimizer, training.scaler
    for group in optimizer.param_groups:
        group["lr"] = lr
    device = next(training.distiller.parameters()).device
    for part, (images, targets, _) in enumerate(batches):
        seed_step(seed, training.step, part)
        images = [image.to(device, non_blocking=True) for image in images]
        targets = [{key: value.to(device, non_blocking=True) for key, value in target.items()} for target in targets]
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            terms = training.distiller(images, targets, warm)
        total = torch.stack([value.float() for value in terms.weighted.values()]).sum()
        scaler.scale(total / len(batches)).backward()
        # Asked only after backward is queued: on a GPU the host waits here while the device works.
        if not math.isfinite(total.item()):
            values = ", ".join(f"{name} {value.item():.4g}" for name, value in terms.weighted.items())
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
    return terms


def fit(
    training: Training,
    loader: Any,
    run: RunFolder,
    *,
    epochs: int,
    factor: Callable[[int], float],
    base_lr: float,
    warmup_steps: int,
    seed: int,
    evaluate: Callable[[Detector], dict[str, Any]],
    save: Callable[[Training, str, dict[str, Any]], None],
    reporter: Any,
    accumulate: int = 1,
    clip_norm: float | None = None,
    autocast: torch.dtype | None = None,
    evaluate_every: int = 1,
    log_every: int = 50,
    checkpoint_every: int = 1000,
) -> None:
    """Train to the last epoch, from wherever `training` stands.

    Args:
        loader: batches of an epoch; `loader.batch_sampler.set_epoch(epoch, start)` chooses them.
        factor: step -> share of `base_lr`.
        warmup_steps: of the distillation terms.
        evaluate: detector -> metrics with `AP`.
        save: writes a checkpoint of `training` under a name in the run folder, with metrics where it was evaluated.
        reporter: shows progress; see `console.Reporter`.

    Raises:
        Interrupted: asked to stop by SIGINT or SIGTERM; the state is saved.
    """
    steps_per_epoch = math.ceil(loader.batch_sampler.batches_per_epoch / accumulate)
    clock = _Clock(training)
    reporter.begin(training.step, steps_per_epoch * epochs, epochs)
    metrics: dict[str, Any] = {}
    with stop_requested() as stop:
        for epoch in range(training.epochs, epochs):
            training.distiller.train()
            loader.batch_sampler.set_epoch(epoch, start=(training.step - epoch * steps_per_epoch) * accumulate)
            for batches in _groups(loader, accumulate):
                lr = base_lr * factor(training.step)
                warm = distillation_warmth(training.step, warmup_steps)
                terms = train_step(
                    training, batches, seed=seed, lr=lr, warm=warm, clip_norm=clip_norm, autocast=autocast
                )
                _add(training, terms)
                clock.tick(sum(len(images) for images, _, _ in batches))
                if training.step % log_every == 0:
                    entry = {"kind": "train", "step": training.step, "epoch": epoch + 1, "lr": lr, "warm": warm}
                    entry |= _averages(training) | clock.speed()
                    run.log(entry)
                    reporter.logged(entry)
                reporter.stepped(training.step)
                if stop():
                    save(training, LAST, metrics)
                    raise Interrupted(f"{run.path}: step {training.step} is saved; --resume goes on from there")
                if training.step % checkpoint_every == 0:
                    save(training, LAST, metrics)
            training.epochs = epoch + 1
            if training.epochs % evaluate_every == 0 or training.epochs == epochs:
                with clock.paused():
                    metrics = evaluate(training.evaluated)
                run.log({"kind": "eval", "step": training.step, "epoch": epoch + 1, **metrics})
                reporter.evaluated(epoch + 1, metrics)
                if metrics["AP"] > training.best_ap:
                    training.best_ap = metrics["AP"]
                    save(training, BEST, metrics)
            save(training, LAST, metrics)


def _groups(loader: Iterable[TrainingBatch], size: int) -> Iterator[list[TrainingBatch]]:
    batches = iter(loader)
    while group := list(islice(batches, size)):
        yield group


def _add(training: Training, terms: Terms) -> None:
    """Add a step's values to the running sums, without waiting for the device."""
    for kind, values in (("weighted", terms.weighted), ("raw", terms.raw)):
        for name, value in values.items():
            key = f"{kind}/{name}"
            value = value.detach().double()
            training.sums[key] = training.sums[key] + value if key in training.sums else value
    training.count += 1


def _averages(training: Training) -> dict[str, Any]:
    """Averages since the last log line, which start anew."""
    sums = torch.stack(list(training.sums.values())) / training.count
    averages: dict[str, Any] = {"weighted": {}, "raw": {}}
    for key, value in zip(training.sums, sums.tolist(), strict=True):
        kind, _, name = key.partition("/")
        averages[kind][name] = value
    averages["loss"] = sum(averages["weighted"].values())
    training.sums, training.count = {}, 0
    return averages


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
