"""What needs a GPU: a run on it, in half precision too, and the step's freedom from needless synchronisation."""

import pytest
import torch
from runs import metrics

from defeat_cli.engine.runs import RunFolder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_distilled_run_on_a_gpu(defeat, tiny, teacher, tmp_path, precision):
    defeat(
        "train", "-r", tiny, "-t", teacher, "-o", tmp_path / "run", "--device", "cuda",
        "--set", f"run.precision={precision}",
    )  # fmt: skip
    steps = [line for line in RunFolder(tmp_path / "run").metrics() if line["kind"] == "train"]
    assert all(line["memory_gib"] > 0 for line in steps)
    assert {"neck_fg", "neck_bg", "head_fg", "head_bg"} <= set(steps[-1]["weighted"])


def test_the_first_step_equals_the_cpus(defeat, tiny, teacher, tmp_path):
    values = {}
    for device in ("cpu", "cuda"):
        defeat(
            "train", "-r", tiny, "-t", teacher, "-o", tmp_path / device, "--device", device,
            "--set", "run.log_every=1", "--set", "schedule.epochs=1", "--variant", "neck",
        )  # fmt: skip
        values[device] = metrics(tmp_path / device)[0]["raw"]
    assert values["cuda"]["neck_bg"] == pytest.approx(values["cpu"]["neck_bg"], rel=1e-3)
