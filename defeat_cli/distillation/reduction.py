"""What all losses share: one shape, one precision, and means in which nothing counts as 0."""

from __future__ import annotations

import torch
from torch import Tensor


def require_same(what: str, student: Tensor, teacher: Tensor, **maps: Tensor | None) -> None:
    """Refuse tensors of unlike shapes; a map has the student's shape without its dimension of channels or classes."""
    shape = (len(student), *student.shape[2:])
    maps = {name: tensor for name, tensor in maps.items() if tensor is not None}
    if student.shape != teacher.shape or any(tensor.shape != shape for tensor in maps.values()):
        shapes = {"student": student, "teacher": teacher, **maps}
        listed = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in shapes.items())
        raise ValueError(f"{listed} do not describe the same {what}")


def in_full_precision(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype, float32 at least, the teacher without gradient."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over all elements; where the weights sum to 0, an exact 0 connected to the values."""
    total = weights.sum()
    return (weights * values).sum() / torch.where(total > 0, total, 1)


def as_weights(features: Tensor, valid: Tensor | None) -> Tensor:
    """`valid` as 0 and 1 in the dtype of the features, all 1 where it is None: [N, C, ...] -> [N, ...]."""
    return torch.ones_like(features[:, 0]) if valid is None else valid.to(features.dtype)
