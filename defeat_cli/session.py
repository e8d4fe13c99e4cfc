"""From a recipe to objects: the only module that knows both sides."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from defeat_cli.checkpoints.loading import load_weights
from defeat_cli.checkpoints.weights import load_strict
from defeat_cli.config.schema import Data, Distillation, Optimizer, Recipe, Schedule
from defeat_cli.data.dataset import CocoDataset, open_split
from defeat_cli.data.formats.shapes import draw_shapes
from defeat_cli.detectors.backbones import load_backbone_weights
from defeat_cli.detectors.contract import Detector
from defeat_cli.detectors.zoo import build_detector
from defeat_cli.distillation.distiller import Distiller
from defeat_cli.distillation.pairing import match_classes
from defeat_cli.engine.loop import Training, lr_factor, make_ema
from defeat_cli.errors import CheckpointError, DataError, RecipeError, RunError

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str, precision: str = "fp32") -> torch.device:
    """The device of a name; `auto` takes CUDA where there is one.

    Raises:
        RunError: CUDA asked for where there is none, or a precision that the device has not.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RunError(f"run.device: no device {name!r}; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise RunError(f"run.device: {name} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise RunError(f"run.device: {name} was asked for, but this machine has {found} CUDA devices; use auto or cpu")
    if precision != "fp32" and device.type != "cuda":
        raise RunError(f"run.precision: {precision} needs a CUDA device; use fp32 on {device.type}")
    return device


def loader_processes(workers: int) -> int:
    """`data.workers`, but no more than there are CPU cores."""
    return min(workers, os.cpu_count() or 1)


def open_data(data: Data, split: str, *, train: bool, seed: int = 0) -> CocoDataset:
    """One split of the recipe's data; draws the embedded data set first where that is asked for.

    Raises:
        DataError: no data, or data that cannot be used.
    """
    if data.path is None:
        raise DataError("no data: give a folder with --data, or data.path in the recipe")
    if data.format == "shapes":
        draw_shapes(Path(data.path), **data.shapes.model_dump())
    return open_split(
        Path(data.path),
        split,
        format="coco" if data.format == "shapes" else data.format,
        annotations=data.train_annotations if split == "train" else data.val_annotations,
        images=data.train_images if split == "train" else data.val_images,
        train=train,
        flip=data.flip if train else 0.0,
        seed=seed,
    )


def build_student(recipe: Recipe, classes: list[str]) -> Detector:
    """The student with its starting weights. Its random weights depend on `run.seed` alone.

    Raises:
        CheckpointError: `backbone_weights` or `weights` do not fit.
    """
    torch.manual_seed(recipe.run.seed)
    student = build_detector(
        recipe.student, classes, short_side=recipe.data.short_side, long_side=recipe.data.long_side
    )
    if recipe.student.backbone_weights is not None:
        load_backbone_weights(student.model, recipe.student.backbone_weights, recipe.student)
    if recipe.student.weights is not None:
        load_strict(
            student.model, load_weights(recipe.student.weights, recipe.student).state_dict, recipe.student.weights
        )
    return student


def build_distiller(
    distillation: Distillation, student: Detector, teacher: Detector | None, say: Callable[[str], None]
) -> Distiller:
    """The step's module. Terms that this pair of detectors cannot have are switched off, and `say` is told why.

    Raises:
        RecipeError: a mask that the student cannot have.
        CheckpointError: the pair has nothing at all to distil.
    """
    settings = distillation.model_dump(exclude={"warmup_steps", "class_map"})
    if teacher is None or not distillation.active:
        return Distiller(student, None)
    if settings["neck"] and settings["mask"] == "fine-grained" and not student.has_anchors:
        raise RecipeError(
            "distillation.mask: fine-grained masks compare anchors with boxes, and the student's detector has no "
            "anchors; use boxes or gaussian"
        )
    pairs = None
    if settings["head"]:
        pairs = match_classes(student.classes, teacher.classes, distillation.class_map)
        reason = head_obstacle(student, teacher, pairs)
        if reason:
            settings["head"] = False
            say(f"head distillation is off: {reason}")
        elif len(pairs) < max(len(student.classes), len(teacher.classes)):
            shared = ", ".join(student.classes[s] for s, _ in pairs[:8])
            say(f"head distillation runs over {len(pairs)} shared classes ({shared}{', …' if len(pairs) > 8 else ''})")
        if pairs == [(i, i) for i in range(len(student.classes))] and len(student.classes) == len(teacher.classes):
            pairs = None
    distiller = Distiller(student, teacher, class_pairs=pairs or None, **settings)
    if distiller.neck and not distiller.neck_pairs:
        raise CheckpointError(
            f"no FPN level of the teacher (strides {teacher.strides}) has the stride of one of the student's "
            f"({student.strides}): the neck cannot be distilled"
        )
    if not distiller.active:
        raise CheckpointError("nothing is left to distil; switch distillation.neck on, or train without a teacher")
    left_out = [s for i, s in enumerate(student.strides) if i not in {pair[0] for pair in distiller.neck_pairs}]
    if distiller.neck and left_out:
        say(f"student levels of strides {left_out} have no partner in the teacher and are not distilled")
    return distiller


def head_obstacle(student: Detector, teacher: Detector, pairs: list[tuple[int, int]]) -> str | None:
    """Why the head term cannot be had for a pair of detectors, or None."""
    if student.softmax != teacher.softmax:
        return "one detector classifies proposals, the other anchors; there are no regions that both heads take"
    if not student.softmax and (type(student) is not type(teacher) or student.strides != teacher.strides):
        return "one-stage detectors of different kinds or strides classify different anchors"
    if not student.softmax and not _same_anchors(student, teacher):
        return "the detectors have different anchors; their heads do not classify the same boxes"
    if not pairs:
        return "teacher and student share no class; distillation.class_map can name pairs"
    return None


def _same_anchors(student: Detector, teacher: Detector) -> bool:
    """Whether each cell has the same anchors in the same order, to a pixel or a tenth of their side."""
    pairs = zip(student.anchor_generator.cell_anchors, teacher.anchor_generator.cell_anchors, strict=True)
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=0.1, atol=1.0) for a, b in pairs)


def build_optimizer(optimizer: Optimizer, distiller: Distiller) -> torch.optim.Optimizer:
    """SGD or AdamW over the student's trainable parameters and the adapters'."""
    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    norm_parameters = {
        id(parameter)
        for module in distiller.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, norms) or name == "bias"
    }
    trained = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    norm_decay = optimizer.weight_decay if optimizer.norm_weight_decay is None else optimizer.norm_weight_decay
    groups = [
        {"params": [p for p in trained if id(p) not in norm_parameters], "weight_decay": optimizer.weight_decay},
        {"params": [p for p in trained if id(p) in norm_parameters], "weight_decay": norm_decay},
    ]
    groups = [group for group in groups if group["params"]]
    if optimizer.name == "sgd":
        return torch.optim.SGD(groups, lr=optimizer.lr, momentum=optimizer.momentum)
    return torch.optim.AdamW(groups, lr=optimizer.lr, betas=tuple(optimizer.betas))


def build_training(recipe: Recipe, distiller: Distiller, device: torch.device) -> Training:
    """The distiller on its device, with optimizer, loss scaler and, where asked for, an average of the student."""
    distiller.to(device)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.run.precision == "fp16")
    ema = make_ema(distiller.student, recipe.optimizer.ema) if recipe.optimizer.ema is not None else None
    return Training(distiller, build_optimizer(recipe.optimizer, distiller), scaler, ema)


def build_lr_factor(schedule: Schedule, steps_per_epoch: int) -> Callable[[int], float]:
    """Step -> share of the learning rate."""
    settings = schedule.model_dump()
    return lambda step: lr_factor(step, steps_per_epoch=steps_per_epoch, **settings)
