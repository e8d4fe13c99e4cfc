"""When a run is evaluated, which evaluation is its best, and when it has been without a better one for too long."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from defeat_cli.config.schema import Run
from defeat_cli.detectors.contract import Detector
from defeat_cli.engine.checkpoint import Training
from defeat_cli.engine.saving import Saver
from defeat_cli.engine.stopping import stoppable
from defeat_cli.text import counted


class Judge:
    """Evaluates the student of a training, and has its best saved.

    Args:
        settings: the recipe's `run`: how often, and with what patience.
        evaluate: detector -> metrics with `AP`.
        reporter: shows them; see `console.Reporter`.
        paused: within, the clock of the training stands.
    """

    def __init__(
        self,
        training: Training,
        saver: Saver,
        settings: Run,
        steps_per_epoch: int,
        evaluate: Callable[[Detector], dict[str, Any]],
        reporter: Any,
        paused: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.training, self.saver, self.settings, self.steps_per_epoch = training, saver, settings, steps_per_epoch
        self.evaluate, self.reporter, self.paused = evaluate, reporter, paused

    @property
    def impatient(self) -> bool:
        """Whether so many evaluations in a row were no better that the run is to stop."""
        return self.settings.patience is not None and self.training.stale >= self.settings.patience

    def is_due(self) -> bool:
        """Whether the steps taken ask for an evaluation that has not been made."""
        every, step = self.settings.evaluate_steps, self.training.step
        return every is not None and step > self.training.judged_at and step % every == 0

    def is_due_after_epoch(self, epoch: int) -> bool:
        """Whether the end of an epoch asks for one."""
        if self.settings.evaluate_steps is not None:
            return self.is_due()
        return epoch % self.settings.evaluate_every == 0

    def judge(self) -> None:
        """Evaluate, log (in the midst of an epoch that is a fraction), and save a student that is better than ever."""
        training, saver = self.training, self.saver
        if saver.saved_step != training.step:
            saver.last()  # an evaluation can take long; one that is stopped is begun anew
        with self.paused(), stoppable(lambda: saver.standing):
            metrics = saver.metrics = self.evaluate(training.evaluated)
        epochs, steps = divmod(training.step, self.steps_per_epoch)
        epoch = epochs + round(steps / self.steps_per_epoch, 3) if steps else epochs
        saver.log({"kind": "eval", "step": training.step, "epoch": epoch, **metrics})
        self.reporter.evaluated(epoch, metrics)
        training.judged_at = training.step
        better = metrics["AP"] > training.best_ap
        training.stale = 0 if better else training.stale + 1
        if better and saver.best():
            training.best_ap = metrics["AP"]
        if self.impatient:
            evaluations = counted(training.stale, "evaluation")
            self.reporter.note(f"stopped early: {evaluations} without a better AP (run.patience)")
