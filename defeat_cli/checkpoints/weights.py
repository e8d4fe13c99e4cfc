"""What every checkpoint becomes: a torchvision state dict and what is known of its detector. And its strict loading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from defeat_cli.config.architecture import Architecture
from defeat_cli.errors import CheckpointError

StateDict = dict[str, Tensor]

SHOWN = 3
"""Keys named per group in an error; the rest is counted."""


@dataclass
class Weights:
    """A detector as read from a checkpoint of any format.

    format: name of the format it came in, a key of `loading.FORMATS`.
    state_dict: tensors by torchvision's names and in torchvision's layout.
    architecture: what to build for them; None where neither the file nor the caller says.
    num_classes: K, without background.
    classes: K names, label `i + 1` is `classes[i]`; None where the file does not tell.
    short_side, long_side: resizing the detector was trained with; None where unknown.
    notes: one line each on what was recognised, converted or dropped.
    assumptions: one line each on what was taken for granted, which a user should know.
    stated: whether thresholds and anchors are what the file says; False where they are only usual ones.
    recipe: what it was trained by, as it was written then; None where that is not known.
    origin: names the weights, for messages.
    folder: where paths in `recipe` start from; None where that is not known.
    """

    format: str
    state_dict: StateDict
    architecture: Architecture | None
    num_classes: int
    classes: list[str] | None = None
    short_side: int | None = None
    long_side: int | None = None
    notes: list[str] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)
    stated: bool = True
    recipe: dict[str, Any] | None = None
    origin: str = ""
    folder: Path | None = None


def is_state_dict(content: Any) -> bool:
    """True for a non-empty mapping of names to tensors only."""
    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    )


def load_strict(model: nn.Module, state_dict: Mapping[str, Tensor], origin: str) -> None:
    """Load every tensor of `state_dict` into `model`, or none of them.

    Floats are cast to the model's dtype. `num_batches_tracked` is a counter of trained BatchNorm that frozen BatchNorm
    does not have: it may be missing (set to 0) or left over (dropped).

    Args:
        origin: names the weights in an error, e.g. the file.

    Raises:
        CheckpointError: lists missing, unexpected and wrongly shaped keys in groups, or names tensors that hold NaN or
            infinity. The model is then unchanged.
    """
    expected = model.state_dict()
    given = _with_counters_of(expected, state_dict)
    missing = [key for key in expected if key not in given]
    unexpected = [key for key in given if key not in expected]
    reshaped = [key for key in expected if key in given and given[key].shape != expected[key].shape]
    if missing or unexpected or reshaped:
        problems = [
            *_listed("missing", missing),
            *_listed("unexpected", unexpected),
            *_listed_shapes(reshaped, given, expected),
        ]
        raise CheckpointError(
            "\n  ".join([f"{origin}: the weights do not fit the detector they are meant for:", *problems])
        )
    broken = [key for key, value in given.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if broken:
        raise CheckpointError("\n  ".join([f"{origin}: weights hold NaN or infinity:", *_listed("not finite", broken)]))
    model.load_state_dict({key: _cast(value, expected[key], key, origin) for key, value in given.items()}, strict=True)


def _with_counters_of(expected: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> StateDict:
    """A copy of `state_dict` with exactly the `num_batches_tracked` that the model has."""
    counter = ".num_batches_tracked"
    given = {}
    for key, value in state_dict.items():
        frozen_here = key.endswith(counter) and key not in expected
        if not (frozen_here and key.removesuffix(counter) + ".running_mean" in expected):
            given[key] = value
    for key, value in expected.items():
        if key.endswith(counter) and key.removesuffix(counter) + ".running_mean" in given:
            given.setdefault(key, torch.zeros_like(value))
    return given


def _cast(value: Tensor, target: Tensor, key: str, origin: str) -> Tensor:
    if value.is_floating_point() != target.is_floating_point() or value.is_complex():
        raise CheckpointError(f"{origin}: {key} is {value.dtype}, expected {target.dtype}")
    return value.to(target.dtype)


def _listed(kind: str, keys: list[str]) -> list[str]:
    """One line per group of keys that share their first three name parts: how many, and the first few."""
    lines = [f"{len(keys)} {kind}:"] if keys else []
    for prefix, group in _grouped(keys).items():
        more = ", …" if len(group) > SHOWN else ""
        lines.append(f"  {prefix} ({len(group)}): {', '.join(group[:SHOWN])}{more}")
    return lines


def _listed_shapes(keys: list[str], given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    lines = [f"{len(keys)} of another shape:"] if keys else []
    for prefix, group in _grouped(keys).items():
        shapes = [f"{key} is {_shape(given[key])}, expected {_shape(expected[key])}" for key in group[:SHOWN]]
        more = "; …" if len(group) > SHOWN else ""
        lines.append(f"  {prefix} ({len(group)}): {'; '.join(shapes)}{more}")
    return lines


def _grouped(keys: list[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for key in keys:
        parts = key.split(".")
        groups.setdefault(".".join(parts[: min(3, len(parts) - 1)]) or key, []).append(key)
    return groups


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "a scalar"
