"""The state in which a network computes: training or evaluation, compiled or not, and how its weights lie in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Every module's own mode comes back, after an error too."""
    modes = {part: part.training for part in module.modules()}
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; modes are kept."""
    with modes_kept(module), torch.no_grad():
        module.eval()
        yield


def uncompiled() -> AbstractContextManager[None]:
    """Inside, what is compiled runs plainly: scoring is of the network that users take home, one image at a time."""
    return torch.compiler.set_stance("force_eager")


def lay_out(module: nn.Module, autocast: torch.dtype | None) -> None:
    """Let the weights of convolutions lie as their kernels want them: in half precision with the channels side by side.

    In fp32 that gains nothing on a CPU. Sums are rounded otherwise in another layout, so all that is computed in one
    precision has one.

    Args:
        autocast: dtype of autocast, None for full precision.
    """
    if autocast is not None:
        module.to(memory_format=torch.channels_last)


@contextmanager
def detecting(detector: nn.Module, autocast: torch.dtype | None = None) -> Iterator[None]:
    """As a detector is used: evaluating, uncompiled, in the layout and under the autocast of its precision."""
    lay_out(detector, autocast)
    device = next(detector.parameters()).device
    with uncompiled(), evaluating(detector), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        yield
