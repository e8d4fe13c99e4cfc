"""A recipe chosen from what is there: the device, the data and the teacher. Every choice comes with its reason.

The rules are those of the recipes `finetune_small` and `finetune_cpu`, made to follow sizes. What a user says comes
first, and choices that depend on it follow what was said.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from defeat_cli.config.architecture import DETECTOR_FAMILIES, Architecture, backbone_name, family
from defeat_cli.config.given import given_settings
from defeat_cli.config.schema import ONLY, Recipe, merged, validate
from defeat_cli.text import counted

SMALLER = {
    **dict.fromkeys(("resnext101_64x4d", "resnext101_32x8d", "resnext101_32x4d", "resnet152", "resnet101"), "resnet50"),
    **dict.fromkeys(("resnext50_32x4d", "resnet50"), "resnet18"),
    **dict.fromkeys(("resnet34", "resnet18"), "mobilenet_v2"),
    **dict.fromkeys(("mobilenet_v3_large", "mobilenet_v2", "mobilenet_v3_small"), "mobilenet_v3_small"),
    "regnet": "regnet",
}
"""Teacher's backbone -> the student's, which has about half the parameters or fewer, while there is such a one."""
SMALL_ON_CPU = ("mobilenet_v2", "mobilenet_v3_small", "regnet")
SIDE_ON_GPU, SIDE_ON_CPU, SIDE_STEP = 800, 192, 32
"""Short side of the images, pixels, at most, and what it is a multiple of."""
CACHE_ON_CPU = 2.0
"""GiB for the teacher's features, which are most of a distilled step on a CPU."""
LEAST_EPOCHS_FOR_CACHE = 5
"""Fewer gain nothing by it: the teacher looks at an image twice, as it is and mirrored, and alone, which takes 1.3 to
2.3 times as long as in a batch."""
SIDE_OF_LARGE = 640
"""Above this short side fewer images go into a step."""
LONGEST = 2.5
"""Long over short side, at most."""
SMALLEST_BOX = 8
"""Side that all but the smallest tenth of the boxes are to keep, pixels: two cells of the finest level."""
OCTAVES = {"faster_rcnn": 1, "retinanet": 3}
"""Anchors sizes a level of the families that have any."""
FINEST_ANCHORS = (4, 6, 8, 12, 16, 24, 32)
"""Of the finest level, pixels; the last is the families' own."""
MANY_IMAGES = 20_000
LEAST_STEPS = 300
"""A detector learns hardly anything in fewer: from ImageNet's ResNet-50, 12 epochs of 30 images of BCCD are 48 steps,
and ended at 7 AP."""
LEAST_WARMUP = 15
"""Steps, where a training is long enough: after 2 that one's first losses were a hundred times too large."""
LEAST_STEPS_FOR_THE_HEAD = 10_000
"""Below this many steps the head term has not paid beside the neck's (recipes/RESULTS.md)."""


class AnchorFit(Protocol):
    """How well anchors fit the boxes, as `audit.anchors.Fit` tells it."""

    mean: float
    bad: bool
    sizes: list[list[float]] | None


@dataclass(frozen=True)
class Facts:
    """What there is.

    device: `cpu` or `cuda`. cores: of the CPU.
    data: name of the data set. images: training images. size: median (height, width) of them, pixels.
    small_box, usual_box: sqrt(width * height) of the boxes at the 10th and 50th percentile, in the images' own pixels.
    teacher: what it is made of; None where there is none. teacher_side: short side that it was trained with.
    pretrained: whether torchvision's ImageNet weights of a backbone are here, or can be downloaded.
    anchor_fit: how well a recipe's anchors fit the boxes; None where it has none, or nobody knows.
    """

    device: str
    cores: int
    data: str
    images: int
    size: tuple[int, int]
    small_box: float
    usual_box: float
    teacher: Architecture | None = None
    teacher_side: int | None = None
    pretrained: Callable[[str], bool] = lambda backbone: False
    anchor_fit: Callable[[Recipe], AnchorFit | None] = lambda recipe: None

    def __str__(self) -> str:
        height, width = self.size
        supervised = f", teacher {family(self.teacher)} on {backbone_name(self.teacher)}" if self.teacher else ""
        return (
            f"{'a GPU' if self.device == 'cuda' else 'a CPU'}, {counted(self.images, 'training image')} of "
            f"{width} x {height} pixels, half of the boxes up to {self.usual_box:.0f} pixels{supervised}"
        )


@dataclass(frozen=True)
class Reason:
    """settings: what was chosen, by dotted name; why: in words; minor: too small a matter for the terminal."""

    settings: dict[str, Any]
    why: str
    minor: bool = False

    def __str__(self) -> str:
        shown = ", ".join(f"{key.partition('.')[2]} {_shown(value)}" for key, value in self.settings.items())
        return f"{shown}: {self.why}"


@dataclass
class Choice:
    """said: the user's settings by dotted name. settings: those chosen beside them. reasons: why, in order."""

    said: dict[str, Any]
    name: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    reasons: list[Reason] = field(default_factory=list)

    def take(self, wanted: Mapping[str, Any], why: str, *, minor: bool = False) -> None:
        """Choose those of some settings, by dotted name, that the user did not say."""
        chosen = {key: value for key, value in wanted.items() if not self.is_said(key)}
        if chosen:
            self.settings |= chosen
            self.reasons.append(Reason(chosen, why, minor))

    def is_said(self, key: str) -> bool:
        """Whether the user said a setting, the section that it is in, or one of the section that it is."""
        return any(key == name or key.startswith(f"{name}.") or name.startswith(f"{key}.") for name in self.said)

    def get(self, key: str) -> Any:
        """A setting as it was said, else as it was chosen; None where neither."""
        return self.said.get(key, self.settings.get(key))

    def recipe(self) -> Recipe:
        """The recipe as far as it is chosen, with what was said in it.

        Raises:
            RecipeError: what was said cannot be used.
        """
        recipe = validate(merged(merged({}, self.settings), self.said), "the command line")
        recipe.run.name = recipe.run.name or self.name
        return recipe

    def steps_per_epoch(self, images: int) -> int:
        """Optimizer steps that so many training images give."""
        recipe = self.recipe()
        return math.ceil(math.ceil(images / recipe.data.batch_size) / recipe.optimizer.accumulate)

    def steps(self, images: int) -> int:
        """Optimizer steps of the whole recipe on so many training images."""
        return self.recipe().schedule.epochs * self.steps_per_epoch(images)


def choose(facts: Facts, said: Mapping[str, Any]) -> Choice:
    """A recipe for what there is.

    Args:
        said: dotted settings of the user's; they come first, and choices that depend on them follow them.

    Raises:
        RecipeError: what was said cannot be used.
    """
    choice = Choice({key: value for key, (value, _) in given_settings(said, "").items()})
    _student(choice, facts)
    _weights(choice, facts)
    _images(choice, facts)
    _anchors(choice, facts)
    _schedule(choice, facts)
    if facts.teacher is not None:
        _terms(choice, facts)
    student = choice.recipe().student
    parts = [family(student), backbone_name(student)]
    parts += ["from", backbone_name(facts.teacher)] if facts.teacher is not None else []
    choice.name = re.sub(r"[^A-Za-z0-9._-]", "_", "_".join([*parts, facts.data]))
    return choice


def _student(choice: Choice, facts: Facts) -> None:
    teacher, on_cpu = facts.teacher, facts.device == "cpu"
    if teacher is None:
        choice.take({"student.detector": "faster_rcnn"}, "no --teacher: a detector is trained plainly, to be one later")
    else:
        choice.take({"student.detector": family(teacher)}, "the teacher's family")
    if choice.get("student.detector") not in DETECTOR_FAMILIES:
        return  # one of torchvision's builders, which decides the rest
    smaller = SMALLER[backbone_name(teacher)] if teacher is not None else ""
    if teacher is None and on_cpu and not (choice.get("student.backbone_weights") or facts.pretrained("resnet50")):
        choice.take({"student.backbone": "resnet18"}, "what a CPU can train from scratch")
    elif teacher is None:
        choice.take({"student.backbone": "resnet50"}, "the usual teacher")
    elif smaller == "regnet":
        choice.take({"student.backbone": "regnet"}, "the teacher's, with half its widths")
    elif on_cpu and smaller not in SMALL_ON_CPU:
        choice.take({"student.backbone": "mobilenet_v2"}, "small enough to be trained on a CPU")
    elif smaller == backbone_name(teacher):
        choice.take({"student.backbone": smaller}, "none is smaller than the teacher's")
    else:
        choice.take({"student.backbone": smaller}, f"smaller than the teacher's {backbone_name(teacher)}")
    if choice.get("student.backbone") == "regnet" and smaller == "regnet":
        widths = [max(8, width // 2 // 8 * 8) for width in teacher.widths]
        choice.take({"student.widths": widths}, "half the teacher's, in eights", minor=True)
    _widths(choice, facts)
    if choice.get("student.detector") == "faster_rcnn" and on_cpu:
        few = {"proposals": 200, "proposals_train": 200, "regions_per_image": 64}
        choice.take({f"student.{key}": value for key, value in few.items()}, "few, for a CPU", minor=True)


def _widths(choice: Choice, facts: Facts) -> None:
    """Channels of the FPN and the head: narrow where the backbone is, or on a CPU."""
    backbone, channels, why = choice.get("student.backbone"), None, "narrow, as the backbone is"
    if backbone == "regnet":
        channels = 64
    elif facts.device == "cpu":
        channels, why = 96 if facts.teacher is None else 64, "narrow, for a CPU"
    elif backbone.startswith("mobilenet"):
        channels = 128
    if channels is not None:
        choice.take({"student.fpn_channels": channels}, why, minor=True)
    student = choice.recipe().student
    if student.detector == "faster_rcnn" and student.fpn_channels < 256:
        width = {"student.head_channels": max(64, 2 * student.fpn_channels)}
        choice.take(width, "in proportion to the FPN", minor=True)


def _weights(choice: Choice, facts: Facts) -> None:
    """Where the student starts from, and its norm."""
    student, why = choice.recipe().student, "nothing is pretrained"
    if not choice.is_said("student.backbone_weights") and student.weights is None and student.backbone != "regnet":
        if facts.pretrained(backbone_name(student)):
            choice.take({"student.backbone_weights": "imagenet"}, "torchvision has them for this backbone", minor=True)
        else:
            why = (
                "no ImageNet weights are here and none can be downloaded, so it learns from scratch, far slower; with "
                "a file of them: --set student.backbone_weights=FILE"
            )
    if _is_pretrained(choice):
        norm = {"student.norm": "frozen", "student.frozen_stages": 2}
        choice.take(norm, "right for pretrained weights and few images a step", minor=True)
    else:
        choice.take({"student.norm": "batch"}, why)


def _is_pretrained(choice: Choice) -> bool:
    student = choice.recipe().student
    return student.backbone_weights is not None or student.weights is not None


def _images(choice: Choice, facts: Facts) -> None:
    """Sizes, and how many a step."""
    on_gpu, own = facts.device == "cuda", min(facts.size)
    most = SIDE_ON_GPU if on_gpu else SIDE_ON_CPU
    side, why = own, "the images' own"
    if facts.teacher_side is not None and facts.teacher_side < side:
        side, why = facts.teacher_side, "the teacher's"
    if most < side:
        needed = SMALLEST_BOX / facts.small_box * own
        largest, why = side, f"what a {'GPU' if on_gpu else 'CPU'} trains on in good time"
        side = most
        if needed > most:
            side, why = min(needed, 2 * most, largest), f"{why}; more than {most}, as small boxes would vanish"
    side = max(SIDE_STEP, round(side / SIDE_STEP) * SIDE_STEP)
    choice.take({"data.short_side": [side]}, why)
    side = choice.recipe().data.short_side[-1]
    longest = SIDE_STEP * math.ceil(side * min(max(facts.size) / own, LONGEST) / SIDE_STEP)
    choice.take({"data.long_side": longest}, "keeps the shape of the images", minor=True)
    large = on_gpu and side > SIDE_OF_LARGE
    batch = {"data.batch_size": max(1, min(4 if large else 8, facts.images))}
    choice.take(batch, "what fits a common GPU" if large else "enough for steady gradients", minor=True)
    workers, why = (
        (min(4, facts.cores), "reading keeps up with a GPU") if on_gpu else (0, "the cores are busy training")
    )
    choice.take({"data.workers": workers}, why, minor=True)


def _anchors(choice: Choice, facts: Facts) -> None:
    """Anchors scaled down where boxes are small after resizing: the middle level's is to be the median box's.

    Where the boxes fit such anchors badly, the nearest that they fit; where there are none, the best that are known.
    """
    recipe = choice.recipe()
    if recipe.student.detector not in OCTAVES or choice.is_said("student.anchor_sizes"):
        return
    usual = facts.usual_box * recipe.data.short_side[-1] / min(facts.size)
    count = OCTAVES[recipe.student.detector]
    pyramids = [
        [[round(base * 2 ** (level + i / count)) for i in range(count)] for level in range(5)]
        if base != FINEST_ANCHORS[-1]
        else None  # the family's own
        for base in sorted(FINEST_ANCHORS, key=lambda size: abs(math.log(4 * size / usual)))
    ]

    def fit(sizes: list[list[float]] | None) -> AnchorFit | None:
        return facts.anchor_fit(recipe.model_copy(update={"student": replace(recipe.student, anchor_sizes=sizes)}))

    why = f"half of the boxes have up to {usual:.0f} pixels after resizing"
    for sizes in pyramids:
        found = fit(sizes)
        if found is None or not found.bad:
            break
    else:
        sizes, why = fit(pyramids[0]).sizes or pyramids[0], f"{why}, and none fits them well; these do best"
    if sizes is not None:
        choice.take({"student.anchor_sizes": sizes}, why)


def _schedule(choice: Choice, facts: Facts) -> None:
    recipe, pretrained = choice.recipe(), _is_pretrained(choice)
    if facts.device == "cuda":
        epochs, why = (12, "the usual schedule") if facts.images >= MANY_IMAGES else (30, "few images, so more passes")
    else:
        epochs, why = max(4, min(12, round(4000 / facts.images))), "what a CPU does in good time"
    if not pretrained:
        epochs, why = 2 * epochs, f"{why}, twice as long from scratch"
    least = math.ceil(LEAST_STEPS / choice.steps_per_epoch(facts.images))
    if epochs < least:
        epochs, why = least, f"few images, so that this is {LEAST_STEPS} steps"
    choice.take({"schedule.epochs": epochs}, why)
    steps, epochs = choice.steps(facts.images), choice.recipe().schedule.epochs
    if facts.device == "cpu" or not pretrained:
        choice.take({"optimizer.name": "adamw"}, "settles quickly in short trainings", minor=True)
    else:
        choice.take({"optimizer.name": "sgd"}, "the usual optimizer of detectors", minor=True)
    if choice.recipe().optimizer.name == "adamw":
        choice.take({"optimizer.lr": 1e-3, "optimizer.weight_decay": 0.05}, "usual with adamw", minor=True)
    else:
        base = 0.02 if recipe.student.detector.startswith("faster") else 0.01
        lr = float(f"{base * recipe.data.batch_size * recipe.optimizer.accumulate / 16:.2g}")
        choice.take({"optimizer.lr": lr}, f"{base} for 16 images a step, in proportion", minor=True)
    choice.take({"optimizer.clip_norm": 10.0}, "keeps first steps of new heads small", minor=True)
    choice.take({"schedule.decay": "cosine"}, "has no milestones to be placed", minor=True)
    warmup = min(500, max(steps // 20, min(LEAST_WARMUP, steps // 4)))
    choice.take({"schedule.warmup_steps": warmup}, f"of {counted(steps, 'step')}; keeps new heads steady", minor=True)
    choice.take({"run.evaluate_every": max(1, epochs // 6)}, "about six evaluations", minor=True)
    choice.take({"run.log_every": max(1, min(50, steps // 100))}, "about a hundred lines", minor=True)


def _terms(choice: Choice, facts: Facts) -> None:
    recipe, steps = choice.recipe(), choice.steps(facts.images)
    if facts.device == "cpu" and recipe.schedule.epochs >= LEAST_EPOCHS_FOR_CACHE:
        why = "the teacher looks at an image once, and once mirrored, where the features of all fit"
        choice.take({"teacher.cache_gib": CACHE_ON_CPU}, why, minor=True)
    if steps < LEAST_STEPS_FOR_THE_HEAD and ONLY not in choice.said:
        length = counted(steps, "step")
        why = f"the neck alone; beside it the head has not paid in short trainings, and this one has {length}"
        choice.take({"distillation.head": None}, why)
    if recipe.distillation.neck is not None and recipe.student.anchor_sizes:
        scale = 1.75 * recipe.student.anchor_sizes[0][0]  # 56 for the usual 32
        choice.take({"distillation.neck.finest_scale": scale}, "in proportion to the anchors", minor=True)
    choice.take({"distillation.warmup_steps": min(2000, steps // 10)}, "a tenth of the steps", minor=True)
    choice.take({"run.pull_every": max(1, min(100, steps // 10))}, "ten points of its curve, or more", minor=True)


def _shown(value: Any) -> str:
    if value is None:
        return "off"
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
