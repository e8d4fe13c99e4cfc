"""Our distillation step beside torchdistill's, of one pair on one batch, in turn in one run, on one CPU thread.

    pip install torchdistill==1.1.5      # beside this package, in an environment of its own
    OMP_NUM_THREADS=1 python tests/benchmarks/torchdistill_step.py --rounds 5

Faster R-CNN, R50-FPN from R101-FPN, random weights, batch 2 of 320 pixels, SGD with clipping. torchdistill's step is
that of its own training loop: mean squared error between the four FPN outputs of both, nothing else. Ours takes the
decoupled neck term with its adapters and masks, alone and with the head; and as in all epochs but the first where
`teacher.cache_gib` keeps the teacher's features, which torchdistill computes anew each time. CPU seconds; not a test.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torchdistill.core.distillation import get_distillation_box
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from defeat_cli.benchmark.timing import machine
from defeat_cli.building import build_student, build_terms
from defeat_cli.config import schema as recipes
from defeat_cli.detectors.zoo import build_detector
from defeat_cli.distillation.distiller import Distiller
from defeat_cli.engine.checkpoint import begin
from defeat_cli.engine.step import train_step
from defeat_cli.precision import AUTOCAST

CPU = torch.device("cpu")
CLASSES = [f"class {number}" for number in range(80)]
SIZE, IMAGES, BOXES = 320, 2, 8
LR, MOMENTUM, DECAY, CLIP = 1e-4, 0.9, 1e-4, 35.0


def batch() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Noise with boxes in it."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, SIZE, SIZE, generator=generator) for _ in range(IMAGES)]
    corners = [torch.rand(BOXES, 2, generator=generator) * SIZE / 2 for _ in range(IMAGES)]
    sides = [torch.rand(BOXES, 2, generator=generator) * SIZE / 3 + 16 for _ in range(IMAGES)]
    boxes = [
        torch.cat([start, start + side], dim=1).clamp(max=SIZE) for start, side in zip(corners, sides, strict=True)
    ]
    labels = [torch.randint(1, len(CLASSES) + 1, (BOXES,), generator=generator) for _ in range(IMAGES)]
    return images, [{"boxes": b, "labels": c} for b, c in zip(boxes, labels, strict=True)]


def ours(variant: str, precision: str, cache_bytes: int | None = None) -> Callable[[], object]:
    """Our step, by the shipped recipe of this pair."""
    changes = {"student.backbone_weights": None, "data.short_side": [SIZE], "data.long_side": SIZE}
    changes |= {"run.device": "cpu", "run.precision": precision, "optimizer.accumulate": 1}
    changes |= {"distillation.head": None} if variant == "neck" else {}
    recipe = recipes.load("faster_rcnn_r50_from_r101_coco", changes)
    larger = replace(recipe.student, backbone="resnet101")
    student, teacher = build_student(recipe, CLASSES), build_detector(larger, CLASSES, [SIZE], SIZE)
    terms, _ = build_terms(recipe.distillation.terms, student, teacher)
    training = begin(recipe, Distiller(student, teacher, terms, cache_bytes=cache_bytes), CPU)
    training.distiller.train()
    images, targets = batch()
    settings = {"seed": 0, "lr": LR, "strength": 1.0, "clip_norm": CLIP, "autocast": AUTOCAST[precision]}
    return lambda: train_step(training, [(images, targets, [1, 2])], **settings)


def plain_torchvision(backbone: str) -> FasterRCNN:
    """torchvision's own detector, with norms and stages frozen as in our recipe."""
    body = resnet_fpn_backbone(backbone_name=backbone, weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3)
    return FasterRCNN(body, num_classes=len(CLASSES) + 1, min_size=SIZE, max_size=SIZE)


def theirs() -> Callable[[], object]:
    """torchdistill's step: `DistillationBox` as its examples for object detection call it."""
    levels = [f"backbone.fpn.layer_blocks.{number}" for number in range(4)]
    hooks = {"forward_hook": {"output": levels}}
    terms = {
        level: {
            "criterion": {"key": "MSELoss", "kwargs": {}},
            "criterion_wrapper": {
                "key": "SimpleLossWrapper",
                "kwargs": {
                    "input": {"is_from_teacher": False, "module_path": level, "io": "output"},
                    "target": {"is_from_teacher": True, "module_path": level, "io": "output"},
                },
            },
            "weight": 1.0,
        }
        for level in levels
    }
    settings = {
        "num_epochs": 1,
        "teacher": {**hooks, "forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {**hooks, "forward_proc": "forward_batch_target"},
        "criterion": {
            "key": "WeightedSumLoss",
            "func2extract_model_loss": "extract_model_loss_dict",
            "kwargs": {"model_term": {"weight": 1.0}, "sub_terms": terms},
        },
        "optimizer": {
            "key": "SGD",
            "kwargs": {"lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY},
            "max_grad_norm": CLIP,
        },
    }
    torch.manual_seed(0)
    student, teacher = plain_torchvision("resnet50"), plain_torchvision("resnet101").eval()
    box = get_distillation_box(teacher, student, {}, settings, CPU, None, False, 1)
    box.student_model.train()
    images, targets = batch()

    def step() -> None:
        loss = box.forward_process(images, targets, supp_dict={})
        box.post_forward_process(loss=loss)

    return step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(CPU))
    steps = {"torchdistill, neck, fp32": theirs()}
    for precision in ("fp32", "bf16"):
        for variant in ("neck", "neck and head"):
            steps[f"ours, {variant}, {precision}"] = ours(variant, precision)
            steps[f"ours, {variant}, {precision}, features kept"] = ours(variant, precision, cache_bytes=2**30)
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(1 + arguments.rounds):
        for name, step in steps.items():
            began = time.process_time()
            step()
            if number:  # the first one warms up
                taken[name].append(time.process_time() - began)
    first = min(next(iter(taken.values())))
    for name, seconds in taken.items():
        print(f"{name:28} {min(seconds):6.2f} s   {first / min(seconds):.2f} times as fast as torchdistill")


if __name__ == "__main__":
    main()
