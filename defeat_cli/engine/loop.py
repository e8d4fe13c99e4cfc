"""The training loop: `fit` alone logs, evaluates and saves; `step.train_step` makes one step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch

from defeat_cli.config.schema import Recipe
from defeat_cli.data.sharing import Share
from defeat_cli.detectors.contract import Detector
from defeat_cli.engine.checkpoint import Training
from defeat_cli.engine.distributed import ALONE, World
from defeat_cli.engine.judge import Judge
from defeat_cli.engine.monitor import Clock, Pace, Proportion, add, averages, seen
from defeat_cli.engine.optimization import learning_rate_text, lr_factor
from defeat_cli.engine.runs import RunFolder
from defeat_cli.engine.saving import Saver
from defeat_cli.engine.step import Step, TrainingBatch, train_step
from defeat_cli.engine.stopping import stop_requested
from defeat_cli.engine.watch import LOADING, REST
from defeat_cli.errors import Interrupted


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
    world: World = ALONE,
) -> None:
    """Train to the recipe's last epoch, or until its patience is at an end, from wherever `training` stands.

    Args:
        loader: this process's parts of the steps of an epoch; its batch sampler is a `StepOrder`.
        evaluate: detector -> metrics with `AP`.
        save: writes a checkpoint of `training` under a name in the run folder, with metrics where it was evaluated.
        reporter: shows progress; see `console.Reporter`.
        until: epoch after whose evaluation to stop, where that is not the last.
        world: the processes that train together; all of them call this, and `evaluate` and `save` with it.

    Raises:
        Interrupted: asked to stop by a signal, or at `until`; the state is saved.
        Exception: whatever a step, the data or the system raise; the state after the last whole step is saved.
    """
    epochs, order = recipe.schedule.epochs, loader.batch_sampler
    steps_per_epoch = order.steps_per_epoch
    steps = steps_per_epoch * epochs
    clock, proportion, pace = Clock(training, world), Proportion(reporter), Pace(training, steps)
    saver = Saver(training, run, recipe.run.save_every, save, reporter, world)
    judge = Judge(training, saver, recipe.run, steps_per_epoch, evaluate, reporter, clock.paused)
    if judge.impatient:  # it stopped early, and only then was cut short
        return
    reporter.begin(training.step, steps, epochs, learning_rate_text(recipe.optimizer, recipe.schedule))
    with stop_requested() as stop, saver.ending(stop):
        for epoch in range(training.epochs, epochs):
            training.distiller.train()
            order.set_epoch(epoch, start=training.step - epoch * steps_per_epoch)
            for share, batches in _steps(loader, world, training.step + 1):
                if judge.is_due():
                    judge.judge()
                    world.watch.at(LOADING)
                    if judge.impatient:
                        saver.last()
                        return
                asked = _asked(training, recipe, steps_per_epoch, steps)
                with saver.step():
                    made = train_step(training, batches, **asked, autocast=autocast, share=share, world=world)
                    if made.left_out is None and made.losses:
                        for losses in made.losses:
                            add(training, losses)
                        training.health.look(made.losses[-1], made.raw, steps, training.step - 1)
                    batches = batches[: len(made.losses)]
                    clock.tick(sum(len(images) for images, _, _ in batches))
                    distilled = any(factor is not None for factor in asked["strength"].values())
                    _count(training, batches, distilled=distilled)
                world.watch.at(REST)
                if made.left_out is not None:
                    saver.log({"kind": "left out", "step": training.step, "epoch": epoch + 1, "reason": made.left_out})
                    reporter.left_out(training.step - 1, made.left_out)
                if not asked["measure"] and (seconds := pace.known()) is not None:
                    reporter.paced(seconds, steps - training.step)
                if training.step % recipe.run.log_every == 0 and any(world.most(bool(training.sums))):
                    entry = {"kind": "train", "step": training.step, "epoch": epoch + 1}
                    entry |= {"lr": asked["lr"], "strength": asked["strength"]}
                    entry |= _figures(training, made, world, clock)
                    if recipe.data.unlabelled is not None:
                        entry["seen"] = seen(training, world)
                    if world.is_main:
                        saver.log(entry)
                        reporter.logged(entry)
                        proportion.look(entry["pull"])
                reporter.stepped(training.step)
                # A signal may have reached one process only, and clocks differ.
                number, due = world.most(stop.number or 0, saver.due)
                if number:
                    stop.number = number
                    saver.last()
                    raise stop.interrupted(saver.standing)
                if due:
                    saver.last()
            if judge.is_due_after_epoch(epoch + 1) or epoch + 1 in (until, epochs):
                judge.judge()
            training.epochs = epoch + 1
            saver.last()
            if judge.impatient:
                return
            if training.epochs == until and until < epochs:
                raise Interrupted(f"{run.path}: epoch {until} of {epochs} is saved; --resume goes on from there")


def _asked(training: Training, recipe: Recipe, steps_per_epoch: int, steps: int) -> dict[str, Any]:
    """What the recipe asks of the next step, as `train_step` takes it."""
    step, distillation = training.step, recipe.distillation
    schedule = recipe.schedule.model_dump()
    due = bool(recipe.run.pull_every) and step % recipe.run.pull_every == 0
    return {
        "seed": recipe.run.seed,
        "lr": recipe.optimizer.lr * lr_factor(step, steps_per_epoch=steps_per_epoch, **schedule),
        "strength": {
            name: settings.strength(step, steps, distillation.warmup_steps)
            for name, settings in distillation.terms.items()
        },
        "clip_norm": recipe.optimizer.clip_norm,
        "measure": due or training.distiller.balancing(step, distillation.warmup_steps),
        "skip_nonfinite": recipe.optimizer.skip_nonfinite,
    }


def _figures(training: Training, made: Step, world: World, clock: Clock) -> dict[str, Any]:
    """What a log line tells of the steps since the last one, and of this step's gradients."""
    figures = averages(training, world) | clock.speed()
    if made.left_out is None:
        figures["gradient"] = made.gradients.largest(training.distiller)
    if training.health.left_out:
        figures["left_out"] = training.health.left_out
    return figures


def _steps(loader: Any, world: World, first: int) -> Iterator[tuple[Share, list[TrainingBatch]]]:
    """What this process is to do in each step that is left of the epoch."""
    batches = iter(loader)
    for step, share in enumerate(loader.batch_sampler.shares, start=first):
        world.watch.at(LOADING, step)
        yield share, list(islice(batches, len(share.parts)))


def _count(training: Training, batches: list[TrainingBatch], *, distilled: bool) -> None:
    """Count a step's images; where no term is on, unlabelled ones are of no use and not looked at."""
    for _, targets, _ in batches:
        labelled = sum(target is not None for target in targets)
        training.seen["labelled"] += labelled
        training.seen["unlabelled"] += distilled * (len(targets) - labelled)
