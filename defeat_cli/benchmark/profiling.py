"""torch's profiler over a piece of work: a trace to look at, and on a GPU how often the host launches and waits."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from defeat_cli.benchmark.timing import synchronize
from defeat_cli.files import replacing

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")
"""The CUDA runtime's names. A copy to the host is followed by a wait for its stream, and counted by that; waits for the
whole device are the profiler's own."""


def profiled(work: Callable[[], object], device: torch.device, trace: Path | None = None) -> dict[str, int] | None:
    """Run some work once under the profiler.

    Args:
        trace: file for the trace, which chrome://tracing and Perfetto open; a name that ends in `.gz` is compressed.

    Returns:
        `launches` and `waits` on a GPU; None elsewhere.
    """
    on_gpu = device.type == "cuda"
    if not on_gpu and trace is None:
        return None
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it prints that it starts and stops
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    synchronize(device)
    with profile(activities=activities) as profiler:
        work()
        synchronize(device)
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        with replacing(trace) as temporary:
            profiler.export_chrome_trace(str(temporary))
    if not on_gpu:
        return None
    counts = {event.key: event.count for event in profiler.key_averages()}
    return {
        "launches": sum(counts.get(name, 0) for name in LAUNCHES),
        "waits": sum(counts.get(name, 0) for name in WAITS),
    }
