"""How much memory something takes, and what a user is told where there is not as much."""

from __future__ import annotations

import os
from contextlib import suppress

import torch
from torch import Tensor, nn

from defeat_cli.config.schema import Recipe
from defeat_cli.distillation.distiller import Distiller
from defeat_cli.memory import shortage
from defeat_cli.session import Session
from defeat_cli.text import counted, spoken_size


def images_a_batch(session: Session) -> int:
    """Images of a batch, those that have no labels too."""
    data = session.recipe.data
    return data.batch_size + (data.unlabelled_a_batch if session.unlabelled is not None else 0)


def training_bytes(
    distiller: Distiller, images: list[Tensor], targets: list[dict[str, Tensor]], recipe: Recipe, a_batch: int
) -> float:
    """Estimated bytes of a training step: weights, gradients, optimizer state, and activations kept for backward.

    The activations are those that autograd keeps for one image, times `a_batch`, the images of a batch with those that
    have no labels; what is only in use for a moment is not counted, so the peak is somewhat above this.
    """
    weights = {id(p): p.numel() * p.element_size() for p in distiller.parameters()}
    trained = sum(weights[id(p)] for p in distiller.parameters() if p.requires_grad)
    states = 1 if recipe.optimizer.name == "sgd" else 2
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        terms = distiller(images, targets)
        activations = sum(kept.values())
        del terms
    halved = 0.6 if recipe.run.precision != "fp32" else 1.0  # about what autocast saves: norms and losses stay fp32
    return sum(weights.values()) + trained * (1 + states) + activations * a_batch * halved


def of_training(session: Session) -> str:
    """For a training that ran out of memory: what a step takes, by the estimate of `check`, and what makes it less."""
    recipe, images = session.recipe, images_a_batch(session)
    beside = ""
    if (cache := session.distiller.cache) is not None:
        beside = f", beside {spoken_size(cache.bytes)} of the teacher's features"
        cache.clear()  # it would stand in the way of the estimate
    try:
        image, target, _ = session.training_data[0]
        needed = training_bytes(
            session.distiller.to(session.device).train(),
            [image.to(session.device)],
            [{key: value.to(session.device) for key, value in target.items()}],
            recipe,
            images,
        )
        estimate = f"needs about {needed / 2**30:.2f} GiB by the estimate of `defeat check`{beside}"
    except Exception as error:
        if shortage(error) is None:
            raise
        estimate = f"needs more than there is even for one image{beside}"
    lower = ["data.batch_size (optimizer.accumulate makes up for it)"] if recipe.data.batch_size > 1 else []
    lower += ["data.unlabelled_batch"] if session.unlabelled is not None else []
    lower += ["teacher.cache_gib"] if beside else []
    lower += ["data.short_side and data.long_side"]
    halved = ", or set run.precision: bf16" if session.device.type == "cuda" and recipe.run.precision == "fp32" else ""
    return (
        f"a training step on {counted(images, 'image')} ({_size(recipe.data.short_side, recipe.data.long_side)}) in "
        f"{recipe.run.precision} {estimate}; {_capacity(session.device)}. Lower {', '.join(lower)}{halved}"
    )


def of_detecting(detector: object, device: torch.device, what: str = "detecting") -> str:
    """For detection, or gradients of it, that ran out of memory on images that come one at a time.

    Args:
        what: what was done, for people.
    """
    resize = getattr(getattr(detector, "model", None), "transform", None)  # an exported file has its sizes inside
    size = f" ({_size(resize.min_size, resize.max_size)})" if resize is not None else ""
    turns = ["lower data.short_side and data.long_side"] if resize is not None else ["take a smaller image"]
    turns += ["take --device cpu"] if device.type == "cuda" else []
    return f"{what}, one image at a time{size}, does not fit; {_capacity(device)}. To mend it, {' or '.join(turns)}"


def _size(short_sides: list[int] | tuple[int, ...], long_side: int) -> str:
    return f"short side {max(short_sides)}, long side up to {long_side} pixels"


def _capacity(device: torch.device) -> str:
    """How much memory a device has."""
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        return f"{torch.cuda.get_device_name(device)} has {whole / 2**30:.1f} GiB, {free / 2**30:.1f} of them free"
    with suppress(AttributeError, ValueError, OSError):  # Windows does not tell
        return f"this machine has {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
    return f"on {device.type}"
