"""Tiny detectors of each family for tests of terms, and a batch with padding and an image without boxes."""

import torch

from defeat_cli import session
from defeat_cli.config import schema as recipes
from defeat_cli.distillation.distiller import Distiller
from defeat_cli.distillation.terms import TERMS

CLASSES = ["a", "b", "c"]
OWN = {
    "faster_rcnn": {
        "fpn_channels": 8, "head_channels": 16, "anchor_sizes": [[8], [16], [32], [64], [96]],
        "proposals": 32, "proposals_train": 32, "regions_per_image": 16,
    },
    "retinanet": {"fpn_channels": 16, "anchor_sizes": [[8, 11], [16, 22], [32, 45], [64, 90], [96, 120]]},
    "fcos": {"fpn_channels": 64},
}  # fmt: skip


def build(family, seed=0, classes=CLASSES, short_side=64, **architecture):
    """A detector of a family with random weights."""
    content = {"detector": family, "backbone": "regnet", "widths": [8, 8, 16, 16], "norm": "batch", **OWN[family]}
    overrides = {f"student.{key}": value for key, value in {**content, **architecture}.items()}
    sizes = {"data.short_side": [short_side], "data.long_side": short_side * 3 // 2}
    return session.build_student(recipes.load(None, {**overrides, **sizes, "run.seed": seed}), classes)


def distil(student, teacher, names, own_size=False, **settings):
    """A distiller with terms by name, each with these settings; its parameters depend on nothing else."""
    torch.manual_seed(0)
    terms = {name: TERMS[name](student, teacher, **settings) for name in names}
    return Distiller(student, teacher, terms, own_size=own_size).train()


def batch():
    """Images and targets."""
    generator = torch.Generator().manual_seed(3)
    images = [torch.rand(3, *size, generator=generator) for size in ((64, 64), (64, 90), (64, 70))]
    boxes = [[[4.0, 5, 30, 40], [20, 20, 60, 62]], [[50.0, 10, 88, 50]], []]
    targets = [{"boxes": torch.tensor(b).reshape(-1, 4), "labels": torch.arange(1, len(b) + 1)} for b in boxes]
    return images, targets
