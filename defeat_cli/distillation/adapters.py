"""Adapters: convolutions that bring student features to the teacher's channels. They stay behind after training."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from defeat_cli.detectors.contract import at_least_float32

INITIAL_STD = 1e-4
"""Standard deviation of the initial weights: the student starts by being adapted to almost nothing but the bias."""


class Adapter(nn.Module):
    """A 3x3 convolution from student to teacher channels that keeps height and width.

    Weights start from N(0, 1e-4). That is the standard deviation, as in DeFeat's published code (which also wraps
    values beyond two of them round; this does not). The bias starts as in any convolution.

    Args:
        student_channels, teacher_channels: channels in and out.
        relu: end with a ReLU, as features of a backbone stage do; the neck's have none.
    """

    def __init__(self, student_channels: int, teacher_channels: int, relu: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(student_channels, teacher_channels, kernel_size=3, padding=1)
        self.activation = nn.ReLU() if relu else nn.Identity()
        nn.init.normal_(self.conv.weight, std=INITIAL_STD)

    def forward(self, features: Tensor) -> Tensor:
        """[N, C_student, h, w] -> [N, C_teacher, h, w]."""
        return self.activation(self.conv(features))


def adapted(adapter: nn.Module, features: Tensor) -> Tensor:
    """What an adapter makes of a student's map: computed in autocast's bfloat16, float32 at least thereafter.

    Under float16 it computes in float32. Weights start below the normal numbers of that format, and so are gradients
    of a mean over many cells: a pull, which is measured without a loss scaler, would be 0.
    """
    device = features.device.type
    short = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    with torch.autocast(device, enabled=False) if short else nullcontext():
        return at_least_float32(adapter(at_least_float32(features) if short else features))
