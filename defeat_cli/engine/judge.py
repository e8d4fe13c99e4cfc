"""When a run is evaluated, which evaluation is its best, and when it has been without a better one for too long."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from defeat_cli.config.schema import Run
from defeat_cli.detectors.contract import Detector
from defeat_cli.engine.checkpoint import Training
from defeat_cli.engine.runs import BEST, RunFolder


class Judge:
    """Evaluates the student of a training, and keeps its best.

    Args:
        settings: the recipe's `run`: how often, and with what patience.
        evaluate, save, reporter: as for `loop.fit`.
        paused: within, the clock of the training stands.

    Attributes:
        metrics: of the last evaluation; empty before the first.
    """

    def __init__(
        self,
        training: Training,
        run: RunFolder,
        settings: Run,
        steps_per_epoch: int,
        *,
        evaluate: Callable[[Detector], dict[str, Any]],
        save: Callable[[Training, str, dict[str, Any]], None],
        reporter: Any,
        paused: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.training, self.run, self.settings, self.steps_per_epoch = training, run, settings, steps_per_epoch
        self.evaluate, self.save, self.reporter, self.paused = evaluate, save, reporter, paused
        self.metrics: dict[str, Any] = {}

    @property
    def impatient(self) -> bool:
        """Whether so many evaluations in a row were no better that the run is to stop."""
        return self.settings.patience is not None and self.training.stale >= self.settings.patience

    def is_due(self) -> bool:
        """Whether the steps taken ask for an evaluation that has not been made."""
        every = self.settings.evaluate_steps
        step = self.training.step
        return every is not None and step > self.training.judged_at and step % every == 0

    def is_due_after_epoch(self) -> bool:
        """Whether the end of an epoch asks for one."""
        if self.settings.evaluate_steps is not None:
            return self.is_due()
        return self.training.epochs % self.settings.evaluate_every == 0

    def judge(self) -> None:
        """Evaluate, log (in the midst of an epoch that is a fraction), and save a student that is better than ever."""
        training = self.training
        with self.paused():
            self.metrics = self.evaluate(training.evaluated)
        epochs, steps = divmod(training.step, self.steps_per_epoch)
        epoch = epochs + round(steps / self.steps_per_epoch, 3) if steps else epochs
        self.run.log({"kind": "eval", "step": training.step, "epoch": epoch, **self.metrics})
        self.reporter.evaluated(epoch, self.metrics)
        training.judged_at = training.step
        better = self.metrics["AP"] > training.best_ap
        training.stale = 0 if better else training.stale + 1
        if better:
            training.best_ap = self.metrics["AP"]
            self.save(training, BEST, self.metrics)
        if self.impatient:
            self.reporter.note(f"stopped early: {training.stale} evaluations without a better AP (run.patience)")
