"""In which number format networks compute: what a device has, and where the shorter one is fast."""

from __future__ import annotations

import torch

from defeat_cli.errors import RunError

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtype of autocast for each `run.precision` but `auto`; None is full precision."""

TENSOR_CORES = (8, 0)
"""CUDA compute capability from which on bfloat16 has units of its own: older GPUs only emulate it."""


def choose_precision(name: str, device: torch.device) -> str:
    """What `run.precision` means on a device: `fp32`, `bf16` or `fp16`.

    `auto` is bf16 where the device has instructions for it, else fp32. On a CPU that pays from networks of the usual
    width on (ResNet-50: half the time); on very narrow ones the casts cost what the shorter numbers save.

    Raises:
        RunError: a format that the device does not have.
    """
    if name == "auto":
        return "bf16" if _has_bf16(device) else "fp32"
    if device.type == "cpu" and name == "fp16":
        raise RunError("run.precision: fp16 needs a CUDA device; use auto, bf16 or fp32 on a CPU")
    if device.type == "cpu" and name == "bf16" and not _has_bf16(device):
        raise RunError(
            "run.precision: bf16 needs a CPU with AVX512-BF16 or AMX instructions, and this one "
            f"({torch.backends.cpu.get_cpu_capability()}) has neither; use auto or fp32"
        )
    return name


def _has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= TENSOR_CORES
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False
