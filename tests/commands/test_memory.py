"""Memory that runs out is told in every command: what was done, how much it takes, and what to turn."""

import re

import pytest
import torch
from runs import metrics, setting
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from defeat_cli.detectors.faster_rcnn import FasterRCNNDetector
from defeat_cli.memory import shortage, told

BATCH_IMAGES = GeneralizedRCNNTransform.batch_images
GPU = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1.00 GiB.\nmore lines"
)
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "80000000000 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.fixture
def full(monkeypatch):
    """`full(error, images)` has detectors meet an error where a batch has more images than that."""

    def apply(error, images=0):
        def batch_images(self, batch, size_divisible=32):
            if len(batch) > images:
                raise error
            return BATCH_IMAGES(self, batch, size_divisible)

        monkeypatch.setattr(GeneralizedRCNNTransform, "batch_images", batch_images)

    return apply


@pytest.mark.parametrize("error", [GPU, CPU, MemoryError()])
def test_a_training_names_batch_size_estimate_and_what_to_turn(defeat, tiny, tmp_path, full, error):
    full(error, images=1)
    size = setting(data__short_side=[256], data__long_side=256)
    output = defeat("train", "-r", tiny, *size, "-o", tmp_path / "run", code=2)
    assert "out of memory: a training step on 4 images (short side 256, long side up to 256 pixels) in fp32" in output
    estimate = re.search(r"memory at batch size 4, estimated\D+([\d.]+ GiB)", defeat("check", "-r", tiny, *size))[1]
    assert not estimate.startswith("0.00")
    assert f"needs about {estimate} by the estimate" in output
    assert "Lower data.batch_size (optimizer.accumulate makes up for it), data.short_side and data.long_side" in output
    assert "more lines" not in output
    assert "Traceback" not in output


def test_what_was_trained_is_saved_and_goes_on(defeat, tiny, tmp_path, monkeypatch):
    """The fifth step does not fit; on another machine the run goes on as if nothing had been."""
    defeat("train", "-r", tiny, "-o", tmp_path / "whole")
    count = iter(range(100))

    def losses(self, features, batch, compute=FasterRCNNDetector.losses):
        if next(count) == 4:
            raise GPU
        return compute(self, features, batch)

    monkeypatch.setattr(FasterRCNNDetector, "losses", losses)
    output = defeat("train", "-r", tiny, "-o", tmp_path / "parts", code=2)
    assert "Step 4 is saved; --resume goes on from there" in output
    defeat("train", "-r", tiny, "-o", tmp_path / "parts", "--resume")
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_one_image_that_does_not_fit_is_said(defeat, tiny, tmp_path, full):
    full(GPU)
    output = defeat("train", "-r", tiny, "-o", tmp_path / "run", code=2)
    assert "needs more than there is even for one image" in output


@pytest.mark.parametrize("command", ["eval", "check", "predict", "gradmap", "export"])
def test_every_command_says_what_does_not_fit(defeat, tiny, teacher, shapes, tmp_path, full, command, monkeypatch):
    full(CPU)
    out = tmp_path / "out"
    arguments = {
        "eval": [teacher],
        "check": ["-r", tiny],
        "predict": [teacher, shapes / "images", "-o", out],
        "gradmap": ["--checkpoint", teacher, shapes / "images", "--output", out],
        "export": [teacher, tmp_path / "out.onnx"],
    }[command]
    if command == "export":  # it traces the model itself
        monkeypatch.setattr("defeat_cli.jobs.exporting.Graph.forward", lambda *_: (_ for _ in ()).throw(CPU))
    output = defeat(command, *arguments, code=2)
    assert "out of memory: " in output
    assert "data.short_side" in output
    assert "GiB" in output
    assert "can't allocate memory: you tried to allocate 80000000000 bytes" in output
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (GPU, True), (CPU, True), (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
        (OSError(28, "No space left on device"), False),
    ],
)  # fmt: skip
def test_what_is_a_shortage(error, is_one):
    assert (shortage(error) is not None) is is_one


def test_what_filled_the_memory_is_free_before_it_is_told():
    import gc
    import weakref

    seen = []

    def fill():
        big = torch.zeros(10)
        seen.append(weakref.ref(big))
        raise MemoryError

    def doing():
        gc.collect()
        return "held" if seen[0]() is not None else "free"

    with pytest.raises(Exception, match="out of memory: free"), told(doing):
        fill()
