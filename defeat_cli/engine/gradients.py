"""The gradients of a step by their norms: in all, by parameter and by part of what trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from defeat_cli.distillation.distiller import Distiller


@dataclass(frozen=True)
class Gradients:
    """The gradients that are there after a backward pass.

    parameters: those that have one, in the optimizer's order.
    norms: [P] the norm of each gradient; total: scalar, the norm of all together. Both are on the device.
    """

    parameters: list[nn.Parameter]
    norms: Tensor
    total: Tensor

    def clip(self, norm: float) -> None:
        """Scale all gradients down so that their norm is at most `norm`, as `nn.utils.clip_grad_norm_` does it."""
        nn.utils.clip_grads_with_norm_(self.parameters, norm, self.total)

    def largest(self, distiller: Distiller) -> dict[str, Any]:
        """The norm, the parameter with the largest share in its square, and that share. Waits for the device."""
        shares = self.norms.double().square()
        values = torch.stack([self.total.double(), shares.max(), shares.sum(), shares.argmax().double()]).tolist()
        total, most, of_all, index = values
        name = _names(distiller)[id(self.parameters[int(index)])]
        return {"norm": total, "largest": name, "share": most / of_all if of_all > 0 else 0.0}

    def by_part(self, distiller: Distiller) -> dict[str, float]:
        """The norm over each part of what trains: `backbone.fpn`, `roi_heads`, `terms.neck`. Waits for the device."""
        names, squares = _names(distiller), {}
        for parameter, norm in zip(self.parameters, self.norms.double().tolist(), strict=True):
            part = part_of(names[id(parameter)])
            squares[part] = squares.get(part, 0.0) + norm * norm
        return {part: square**0.5 for part, square in squares.items()}


def gradients_of(optimizer: torch.optim.Optimizer) -> Gradients:
    """The gradients of all that an optimizer moves, without waiting for the device."""
    held = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norms = torch.stack(torch._foreach_norm([p.grad for p in held]))
    return Gradients(held, norms, torch.linalg.vector_norm(norms))


def part_of(parameter: str) -> str:
    """The part that a parameter of a distiller belongs to, by its name."""
    first, *more = parameter.removeprefix("student.").removeprefix("model.").split(".")
    return f"{first}.{more[0]}" if first in ("backbone", "terms") and more else first


def _names(distiller: Distiller) -> dict[int, str]:
    return {id(parameter): name.removeprefix("student.model.") for name, parameter in distiller.named_parameters()}
