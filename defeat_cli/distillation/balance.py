"""How strongly each term pulls at the student, and weights that make it pull as strongly as one wants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from defeat_cli.config.terms import MEASUREMENTS

KEPT = 0.8
"""Share of the average so far that each further measurement leaves: adapters start from almost nothing, so that early
pulls say little."""


def pulls(detection: Tensor, terms: Mapping[str, Tensor], *places: Sequence[Tensor]) -> dict[str, Tensor]:
    """The pull of each term: the norm of its gradient over that of the detection loss's gradient, at the same maps.

    Args:
        detection: the detection loss, a scalar.
        terms: the terms' weighted losses, scalars; they and `detection` keep their graph.
        places: maps of the student, e.g. its FPN features, then its backbone stages. A term is measured at the first
            place that it depends on.

    Returns:
        A detached scalar for each term; 0 for a term that depends on none, and where nothing pulls at all.
    """
    norms: dict[int, Tensor] = {}
    measured = {}
    for name, loss in terms.items():
        measured[name] = torch.zeros_like(loss.detach())
        for place, maps in enumerate(places):
            pull = _norm(loss, maps)
            if pull is None:
                continue
            if place not in norms:
                norms[place] = _norm(detection, maps)
            measured[name] = torch.where(norms[place] > 0, pull / norms[place], 0)
            break
    return measured


def _norm(loss: Tensor, maps: Sequence[Tensor]) -> Tensor | None:
    """Norm over all maps of a loss's gradient; None where it depends on none of them."""
    if not loss.requires_grad:
        return None
    gradients = torch.autograd.grad(loss, list(maps), retain_graph=True, allow_unused=True)
    norms = [gradient.float().norm() for gradient in gradients if gradient is not None]
    return torch.stack(norms).norm() if norms else None


class Balance(nn.Module):
    """Factors by which each term's weight is multiplied so that its pull is `ratio`.

    They are the ratio over a moving geometric average of the first `MEASUREMENTS` pulls, taken over the term's warm-up,
    and fixed from there on. All of it is in buffers: a resumed run goes on exactly.

    Args:
        terms: names.
        ratio: the wanted norm of each term's gradient, as a share of the detection loss's.
    """

    def __init__(self, terms: Sequence[str], ratio: float) -> None:
        super().__init__()
        self.names = list(terms)
        self.ratio = ratio
        self.register_buffer("logs", torch.zeros(len(self.names), dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(len(self.names), dtype=torch.float64))

    def add(self, measured: Mapping[str, Tensor]) -> None:
        """Take in the pulls of one step, of the terms that are on and still measured. Zeros say nothing."""
        for i, name in enumerate(self.names):
            if name in measured:
                pull = measured[name].double()
                counted = (pull > 0) & (self.counts[i] < MEASUREMENTS)
                kept = torch.where(self.counts[i] > 0, KEPT, 0.0)
                average = kept * self.logs[i] + (1 - kept) * pull.clamp(min=1e-30).log()
                self.logs[i] = torch.where(counted, average, self.logs[i])
                self.counts[i] += counted

    def factors(self) -> dict[str, Tensor]:
        """The factor of each term, scalars; 1 where nothing is measured yet."""
        factors = torch.where(self.counts > 0, self.ratio / self.logs.exp(), 1).float()
        return dict(zip(self.names, factors, strict=True))
