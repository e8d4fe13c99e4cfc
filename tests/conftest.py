"""A drawn data set, a recipe and a teacher small enough for tests that go through the real command."""

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import simulated_device
import torch
import yaml
from typer.testing import CliRunner

# Read when the console is made, that is at the next import: tables are not to be folded in what tests read.
os.environ["COLUMNS"] = "200"

from tiny import COMMON, OWN

from defeat_cli.commands.app import app

# `nohup` has SIGHUP ignored, which a run respects; tests of what it does otherwise are to pass there too.
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# One thread: tiny detectors gain nothing from more, and parallel loops crawl when the cores are busy elsewhere.
torch.set_num_threads(1)

# What is remembered of images is not to outlive the tests, nor to come from the user's own runs.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="defeat-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

simulated_device.register()

TINY = {
    "student": {"detector": "faster_rcnn", **COMMON, **OWN["faster_rcnn"], "score_threshold": 0.0},
    "data": {"short_side": [64], "long_side": 64, "batch_size": 4, "workers": 0, "format": "coco"},
    "distillation": {"warmup_steps": 2},
    "optimizer": {"lr": 0.01, "clip_norm": 10.0},
    "schedule": {"epochs": 2, "warmup_steps": 2, "milestones": [1]},
    "run": {"device": "cpu", "precision": "fp32", "log_every": 2},
}


class Command:
    """`defeat ...` in this process: the real entry point, with what it printed and its exit code."""

    def __call__(self, *arguments: object, code: int = 0):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result.output


@pytest.fixture(scope="session")
def defeat():
    return Command()


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """Twelve training and six validation images of 64 pixels, in the simple COCO layout."""
    from defeat_cli.data.formats.shapes import draw_shapes

    return draw_shapes(tmp_path_factory.mktemp("data") / "shapes", train_images=12, val_images=6, size=64, seed=0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, shapes) -> Path:
    """A recipe for the drawn data: a student of a few thousand parameters, two epochs of three steps."""
    path = tmp_path_factory.mktemp("recipes") / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "data": {**TINY["data"], "path": str(shapes)}}))
    return path


@pytest.fixture(scope="session")
def teacher(tmp_path_factory, defeat, tiny) -> Path:
    """A trained teacher, wider than the student."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    defeat("train", "-r", tiny, "-o", folder, "--set", "student.fpn_channels=16", "--seed", 7)
    return folder / "best.pt"
