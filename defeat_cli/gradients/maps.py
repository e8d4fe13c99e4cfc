"""How strongly a loss pulls on each cell of the neck's features: what DeFeat starts from (its figure 1).

The pull on a cell is the size of the loss's gradient with respect to that cell's features. Every FPN level counts as an
input of its own, as it does in distillation: what P6 passes back to the P5 that it was pooled from is not part of P5's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from defeat_cli.detectors.contract import Batch, Detector
from defeat_cli.detectors.modes import evaluating, modes_kept
from defeat_cli.distillation.terms import Term, View
from defeat_cli.errors import DefeatError

Reduce = Literal["l2", "mean-abs"]

NeckLoss = Callable[[list[Tensor]], Tensor]
"""A scalar from a detector's FPN features of one image, finest first, each [1, C_l, h_l, w_l]."""

PARTS = {
    "rpn": ("loss_objectness", "loss_rpn_box_reg"),
    "classification": ("loss_classifier", "classification"),
    "regression": ("loss_box_reg", "bbox_regression", "bbox_ctrness"),
}
"""Parts of the detection loss, by torchvision's names in Faster R-CNN, RetinaNet and FCOS; they add up to the whole."""

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "l2": lambda gradient: gradient.norm(dim=1),
    "mean-abs": lambda gradient: gradient.abs().mean(dim=1),
}
"""[N, C, h, w] gradients to [N, h, w] magnitudes."""


def detection_maps(
    detector: Detector, batch: Batch, part: str = "total", samples: int = 8, seed: int = 0, reduce: Reduce = "l2"
) -> list[Tensor]:
    """Magnitude of the detection loss's gradient with respect to each FPN level.

    Two-stage detectors draw the anchors and proposals that they are trained on. The loss is that of training, with
    every normalization in eval mode; no weight, buffer or mode is changed.

    Args:
        batch: one image with its target.
        part: `total`, or a part of the loss, a key of `PARTS`.
        samples, seed, reduce: as in `loss_maps`.

    Returns:
        One [h, w] map a level, finest first.

    Raises:
        DefeatError: the detector's loss has no such part.
    """
    features = neck_features(detector, batch)
    with losses_in_eval_mode(detector):
        return loss_maps(lambda leaves: part_of(detector.losses(leaves, batch), part), features, samples, seed, reduce)


def part_of(losses: Mapping[str, Tensor], part: str) -> Tensor:
    """The sum of the named losses that a part of the detection loss consists of.

    Raises:
        DefeatError: none of them is there.
    """
    if part == "total":
        return sum(losses.values())
    chosen = [value for name, value in losses.items() if name in PARTS[part]]
    if not chosen:
        has = [name for name, terms in PARTS.items() if any(term in losses for term in terms)]
        raise DefeatError(f"--loss {part}: this detector has no such loss; it has total, {', '.join(has)}")
    return sum(chosen)


def neck_features(detector: Detector, batch: Batch) -> list[Tensor]:
    """FPN features in eval mode, finest first, as leaves that want a gradient: the backbone keeps no activations."""
    with evaluating(detector):
        features = detector.features(batch)
    return [feature.detach().requires_grad_() for feature in features]


def loss_maps(
    loss: NeckLoss, features: list[Tensor], samples: int = 1, seed: int = 0, reduce: Reduce = "l2"
) -> list[Tensor]:
    """Magnitude of any loss's gradient with respect to each FPN level.

    Magnitudes, not gradients, are averaged over the draws: that is the pull of an average training step, and more draws
    make it steadier without making it smaller.

    Args:
        features: as `neck_features` gives them.
        samples: how often the loss is asked; a loss that draws nothing is asked once.
        seed: fixes the draws. The global random state is left as it was.
        reduce: L2 norm or mean absolute value over channels.

    Returns:
        One [h, w] map a level, finest first; zeros where the loss does not depend on a level.
    """
    totals = [feature.new_zeros(feature.shape[-2:]) for feature in features]
    device, draws = features[0].device, 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(seed)
        while draws < samples:
            before = _random_state(device)
            value = loss(features)
            if value.requires_grad:
                gradients = torch.autograd.grad(value, features, allow_unused=True, materialize_grads=True)
                for total, gradient in zip(totals, gradients, strict=True):
                    total += REDUCTIONS[reduce](gradient)[0]
            draws += 1
            if torch.equal(before, _random_state(device)):
                break
    return [total / draws for total in totals]


def _random_state(device: torch.device) -> Tensor:
    """Of the generators that a loss on a device may draw from."""
    on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return torch.cat([torch.get_rng_state(), *on_device])


def term_loss(term: Term, student: View, teacher: View) -> NeckLoss:
    """A distillation term's losses at their full weights, as a function of the student's features."""

    def loss(features: list[Tensor]) -> Tensor:
        losses = term(View.of_features(student.detector, student.batch, features), teacher)
        return sum(part.weight * part.value for part in losses.values())

    return loss


@contextmanager
def losses_in_eval_mode(detector: Detector) -> Iterator[None]:
    """Everything in eval mode, so that no normalization statistics move, but for the parts that compute losses.

    torchvision's model, RPN and RoI heads choose between losses and detections by their own `training`; what they are
    made of stays in eval mode. All modes are as they were afterwards.
    """
    model = detector.model
    with modes_kept(detector):
        detector.eval()
        for part in (model, getattr(model, "rpn", None), getattr(model, "roi_heads", None)):
            if part is not None:
                part.training = True
        yield
