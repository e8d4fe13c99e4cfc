"""Tiny detectors of each family, runs and pairs of them, and a batch with padding and an image without boxes."""

import json

import torch
from runs import setting

from defeat_cli import building
from defeat_cli.checkpoints import native
from defeat_cli.config import schema as recipes
from defeat_cli.distillation.distiller import Distiller
from defeat_cli.distillation.terms import TERMS

CLASSES = ["a", "b", "c"]
COMMON = {"backbone": "regnet", "widths": [8, 8, 16, 16], "norm": "batch"}
OWN = {
    "faster_rcnn": {
        "fpn_channels": 8, "head_channels": 16, "anchor_sizes": [[8], [16], [32], [64], [96]],
        "proposals": 32, "proposals_train": 32, "regions_per_image": 16,
    },
    "retinanet": {"fpn_channels": 16, "anchor_sizes": [[8, 11], [16, 22], [32, 45], [64, 90], [96, 120]]},
    "fcos": {"fpn_channels": 64, "anchor_sizes": None},
}  # fmt: skip
"""What the families do not share; FCOS normalises groups of channels and needs many."""


def options(family):
    """`--set` options that make the student of the tiny recipe one of a family."""
    return setting(
        **{f"student.{key}": json.dumps(value) for key, value in {"detector": family, **OWN[family]}.items()}
    )


def build(family="faster_rcnn", seed=0, classes=CLASSES, short_side=64, long_side=None, **architecture):
    """A detector of a family with random weights; the long side of its images is 3 / 2 of the short one, or as said."""
    settings = {"detector": family, **COMMON, **OWN[family], **architecture}
    sides = {"short_side": [short_side], "long_side": long_side or short_side * 3 // 2}
    recipe = recipes.validate({"student": settings, "data": sides, "run": {"seed": seed}}, "tiny")
    return building.build_student(recipe, list(classes))


def save_run(folder, classes, student, data, terms=None):
    """What a run would leave, of a student with random weights: checkpoint, plain state dict and recipe.

    Args:
        student, data: these sections of the recipe.
        terms: state of the terms.

    Returns:
        The path of the checkpoint.
    """
    content = {"student": student, "data": {"workers": 0, **data}}
    recipe = recipes.validate({**content, "run": {"device": "cpu"}}, "tiny")
    state = building.build_student(recipe, list(classes)).model.state_dict()
    saved = {"recipe": content, "classes": list(classes), "student": state, "terms": terms or {}, "metrics": {}}
    path = folder / "best.pt"
    native.save(path, saved)
    native.write_atomically(folder / "student.pth", native.exported(native.load(path), str(path)))
    recipes.save(recipe, folder / "recipe.yaml")
    return path


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
