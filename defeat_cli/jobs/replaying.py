"""`defeat train --replay`: a step that was not finite, made again, alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from defeat_cli import session
from defeat_cli.building import build_distiller
from defeat_cli.checkpoints.weights import load_strict
from defeat_cli.config.schema import validate
from defeat_cli.console import new_table
from defeat_cli.detectors.zoo import build_detector
from defeat_cli.engine.checkpoint import begin
from defeat_cli.engine.step import backward, whole
from defeat_cli.errors import CheckpointError
from defeat_cli.jobs.bad_step import Content, Values, load, values_of
from defeat_cli.precision import AUTOCAST


@dataclass(frozen=True)
class Replay:
    """A step that was made again: what the file has of it, and what came out now."""

    content: Content
    values: Values

    @property
    def same(self) -> bool:
        """Whether all values are those of the run, to the last bit; not a number is the same as not a number."""
        return repr(self.values) == repr(self.content.values)

    @property
    def lines(self) -> list[str]:
        """Step, learning rate and image files."""
        step, batches = self.content.state.step, self.content.batches
        lines = [f"step {step}, learning rate {self.content.arguments.lr:g}, seed {self.content.arguments.seed}"]
        for number, batch in enumerate(batches, start=1):
            title = f"batch {number} of {len(batches)}" if len(batches) > 1 else "images"
            lines += [f"{title}: {file}" for file in batch.files]
        return lines

    def tables(self) -> list[Table]:
        """Every loss, and the norm of the gradient by part, in the run and now."""
        before, now = self.content.values, self.values
        tables = []
        for number, losses in enumerate(now.losses, start=1):
            title = "Weighted losses" + (f" of batch {number}" if len(now.losses) > 1 else "")
            recorded = before.losses[number - 1] if number <= len(before.losses) else {}
            tables.append(_compared(title, recorded, losses))
        gradients = [{**values.gradients, "all": values.norm} for values in (before, now)]
        return [*tables, _compared("Norms of the gradient", *gradients)]


def _compared(title: str, before: dict[str, float], now: dict[str, float]) -> Table:
    rows = [
        [name, *(f"{of[name]:.9g}" if name in of else "-" for of in (before, now))]
        for name in dict.fromkeys([*before, *now])
    ]
    return new_table(title, ["", "in the run", "now"], rows)


def replay(path: Path, device: str | None = None, teacher: str | None = None) -> Replay:
    """Make the step of a bad_step.pt again: losses and gradients, nothing else. Nothing is written.

    Args:
        device: in place of the recipe's.
        teacher: checkpoint in place of the one that the run had, where that is elsewhere now.

    Raises:
        DefeatError: the file, the teacher or the device cannot be used.
    """
    content = load(path)
    recipe = validate(content.recipe, f"{path}: the recipe in it")
    needs_teacher = content.teacher is not None and (recipe.distillation.terms or recipe.student.inherit)
    if teacher is not None and not needs_teacher:
        raise CheckpointError(f"--teacher: without effect, as the step of {path} has no teacher; leave it out")
    if device is not None:
        recipe.run.device = device
    chosen = session.choose_device(recipe.run.device, recipe.run.precision)
    student = build_detector(recipe.student, content.classes, recipe.data.short_side, recipe.data.long_side)
    unlabelled = any(target is None for batch in content.batches for target in batch.targets)
    distiller, _ = build_distiller(recipe, student, teacher or content.teacher, unlabelled=unlabelled)
    training = begin(recipe, distiller.train(), chosen)
    state, origin = content.state, f"{path}: its state"
    load_strict(distiller.student.model, state.student, origin)
    load_strict(distiller.terms, state.terms, origin)
    if (distiller.balance is None) is not (state.balance is None):
        raise CheckpointError(f"{path}: the factors of distillation.balance do not go with its recipe")
    if distiller.balance is not None:
        load_strict(distiller.balance, state.balance, origin)
    if training.scaler.is_enabled():
        training.scaler.load_state_dict(state.scaler)
    training.step = state.step
    arguments = content.arguments
    losses, gradients = backward(
        training,
        [(batch.images, batch.targets, []) for batch in content.batches],
        seed=arguments.seed,
        strength=arguments.strength,
        measure=arguments.measure,
        autocast=AUTOCAST[recipe.run.precision],
        share=whole(len(content.batches), arguments.parts),
    )
    return Replay(content, values_of(losses, gradients, distiller))
