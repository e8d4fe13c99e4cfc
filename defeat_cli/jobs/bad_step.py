"""bad_step.pt: a step that is not finite, with all that it takes to make it again, alone.

The state is that before the step. The teacher's weights are not in the file: they are read from its checkpoint again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor

from defeat_cli.checkpoints.native import write_atomically
from defeat_cli.checkpoints.reading import read
from defeat_cli.distillation.distiller import Distiller, StepLosses
from defeat_cli.engine.checkpoint import Training
from defeat_cli.engine.faults import BadStepError
from defeat_cli.engine.gradients import Gradients
from defeat_cli.errors import CheckpointError


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)


class Arguments(_Part):
    """What `backward` takes besides the batches, and the learning rate; `strength` by term.

    parts: places of the batches among those of the step; several processes share them, and this one had these.
    """

    seed: int
    strength: dict[str, float | None]
    measure: bool
    lr: float
    parts: list[int] = []


class State(_Part):
    """What of a training's state the losses and gradients of a step depend on."""

    student: dict[str, Tensor]
    terms: dict[str, Tensor]
    balance: dict[str, Tensor] | None
    scaler: dict[str, Any]
    step: int = Field(ge=0)


class Batch(_Part):
    """Images [3, H, W] as they were trained on, targets (None for unlabelled images), and the images' files."""

    images: list[Tensor] = Field(min_length=1)
    targets: list[dict[str, Tensor] | None]
    files: list[str]

    @field_validator("images")
    @classmethod
    def _are_images(cls, images: list[Tensor]) -> list[Tensor]:
        kinds = (torch.uint8, torch.float32)
        if not all(image.ndim == 3 and len(image) == 3 and image.numel() and image.dtype in kinds for image in images):
            raise ValueError("an image is not [3, H, W] of uint8 or float32")
        return images

    @field_validator("targets")
    @classmethod
    def _are_targets(cls, targets: list[dict[str, Tensor] | None]) -> list[dict[str, Tensor] | None]:
        for target in targets:
            if target is None:
                continue
            if target.keys() != {"boxes", "labels"} or target["boxes"].shape != (*target["labels"].shape, 4):
                raise ValueError("a target has not as many boxes as labels")
            if target["boxes"].dtype != torch.float32 or target["labels"].dtype != torch.int64:
                raise ValueError("a target's numbers are of another kind")
        return targets


class Values(_Part):
    """losses: weighted, by name, of each batch; gradients: norms by part of what trains; norm: of all together."""

    losses: list[dict[str, float]]
    gradients: dict[str, float]
    norm: float


class Content(_Part):
    """The file."""

    format: Literal["defeat bad step"] = "defeat bad step"
    version: Literal[1] = 1
    recipe: dict[str, Any]
    classes: list[str]
    teacher: str | None
    arguments: Arguments
    state: State
    batches: list[Batch] = Field(min_length=1)
    values: Values


def values_of(losses: Sequence[StepLosses], gradients: Gradients, distiller: Distiller) -> Values:
    """A step's numbers."""
    return Values(
        losses=[{name: value.item() for name, value in of_batch.weighted.items()} for of_batch in losses],
        gradients=gradients.by_part(distiller),
        norm=gradients.total.item(),
    )


def write(
    path: Path,
    bad: BadStepError,
    training: Training,
    files: Sequence[Sequence[str]],
    *,
    recipe: dict[str, Any],
    classes: list[str],
    teacher: str | None,
) -> None:
    """Write a step that went wrong, whole.

    Args:
        files: the image files of each batch.
    """
    state = training.state_dict()
    content = Content(
        recipe=recipe,
        classes=classes,
        teacher=teacher,
        arguments=Arguments(**bad.arguments),
        state=State(**{name: state[name] for name in State.model_fields}),
        batches=[
            Batch(images=images, targets=targets, files=list(names))
            for (images, targets, _), names in zip(bad.batches, files, strict=True)
        ],
        values=values_of(bad.losses, bad.gradients, training.distiller),
    )
    write_atomically(path, content.model_dump())


def load(path: Path) -> Content:
    """The content of a file of `write`. No code in it is run.

    Raises:
        CheckpointError: it cannot be read, is something else, or was changed.
    """
    content = read(path)
    if not isinstance(content, dict) or content.get("format") != Content.model_fields["format"].default:
        raise CheckpointError(f"{path}: not a bad_step.pt, which a run leaves where a step is not finite")
    try:
        return Content.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise CheckpointError(f"{path}: cannot be used: {place}: {problem['msg']}") from None
