"""Settings of the command line that other settings leave without effect are refused, in every command that trains."""

import pytest
import torch
from torch import nn

from defeat_cli.config.architecture import TORCHVISION_BUILDERS, Architecture, trains_batch_norm
from defeat_cli.config.idle import idle_in_training, refuse_idle
from defeat_cli.config.schema import Recipe, load
from defeat_cli.console import Reporter
from defeat_cli.detectors.zoo import build_detector
from defeat_cli.engine.distributed import ALONE
from defeat_cli.errors import RecipeError
from defeat_cli.jobs.training import assemble_together

IDLE = [
    ("data.split_seed", 3, {}),
    ("data.shapes.size", 64, {}),
    ("student.candidates_per_level", 3, {}),
    ("student.conventions.p7_relu", False, {}),
    ("student.conventions.channels", "bgr", {}),
    ("student.proposals", 3, {"student.detector": "retinanet"}),
    ("student.regions_per_image", 3, {"student.detector": "fcos"}),
    ("student.backbone", "resnet18", {"student.detector": "fcos_resnet50_fpn"}),
    ("optimizer.betas", [0.1, 0.2], {}),
    ("optimizer.momentum", 0.5, {"optimizer.name": "adamw"}),
    ("schedule.milestones", [3], {"schedule.decay": "cosine"}),
    ("schedule.warmup_factor", 0.5, {"schedule.warmup_steps": 0}),
    ("teacher.architecture.score_threshold", 0.5, {}),
    ("distillation.neck.alpha_fg", 3.0, {}),
    ("run.teacher_check_images", 3, {}),
    ("student.sync_bn", True, {}),
    ("student.sync_bn", True, {"student.detector": "retinanet_resnet50_fpn"}),
]


@pytest.mark.parametrize(("key", "value", "others"), IDLE)
def test_a_setting_that_others_leave_without_effect_is_refused(key, value, others):
    recipe = load(None, {**others, key: value})
    with pytest.raises(RecipeError, match=rf"{key}: without effect, as "):
        refuse_idle([*others, key], idle_in_training(recipe))
    refuse_idle(others, idle_in_training(recipe))  # a recipe may hold it


def test_the_same_settings_are_welcome_where_they_have_an_effect():
    changes = {
        "data.split_seed": 3, "data.val_fraction": 0.2, "optimizer.momentum": 0.5, "schedule.milestones": [3],
        "teacher.checkpoint": "x.pt", "teacher.architecture.score_threshold": 0.5, "distillation.neck.alpha_fg": 3.0,
        "student.proposals": 3, "student.weights": "x.pth", "student.conventions.channels": "bgr",
    }  # fmt: skip
    refuse_idle(changes, idle_in_training(load(None, changes)))
    for changes in ({"student.norm": "batch"}, {"student.detector": "fasterrcnn_resnet50_fpn_v2"}):
        changes["student.sync_bn"] = True
        refuse_idle(changes, idle_in_training(load(None, changes)))


@pytest.mark.parametrize("detector", TORCHVISION_BUILDERS)
def test_which_builders_train_batch_normalisation(detector):
    architecture = Architecture(detector=detector)
    with torch.device("meta"):
        modules = [*build_detector(architecture, ["a"], short_side=[64], long_side=64).model.modules()]
    assert trains_batch_norm(architecture) is any(isinstance(module, nn.BatchNorm2d) for module in modules)


def test_one_process_says_that_it_has_nobody_to_normalise_with(tiny):
    recipe = load(str(tiny), {"student.sync_bn": True})
    notes = assemble_together(recipe, ALONE, Reporter("", quiet=True)).notes
    assert [note.text for note in notes if note.warning and "sync_bn" in note.text] == [
        "student.sync_bn: without effect in one process; --gpus N trains in several"
    ]


def test_every_idle_setting_is_one_of_the_recipe():
    keys = set()
    for overrides in ({}, {"student.detector": "fcos"}, {"student.detector": "fcos_resnet50_fpn"}):
        keys |= idle_in_training(
            load(None, {**overrides, "optimizer.name": "adamw", "schedule.decay": "cosine"})
        ).keys()
    for key in keys:
        place = Recipe()
        for part in key.split("."):
            assert hasattr(place, part), key
            place = getattr(place, part)


@pytest.mark.parametrize("command", ["check", "train", "ablate"])
def test_commands_that_train_refuse_them(defeat, tiny, teacher, tmp_path, command):
    arguments = [command, "-r", tiny, *(["neck", "-t", teacher] if command == "ablate" else [])]
    arguments += ["-o", tmp_path / "out"] if command != "check" else []
    for setting in ("data.shapes.size=64", "data={split_seed: 3}", "optimizer.betas=[0.1, 0.2]"):
        assert "without effect" in defeat(*arguments, "--set", setting, code=2)
    if command != "ablate":
        for options in (["--variant", "fg-only"], ["--set", "teacher.size=own"]):
            assert "there is no teacher" in defeat(*arguments, *options, code=2)
    said_twice = ["--set", "data.path=x", "-d", "y"], ["--set", "optimizer.lr=1.0", "--set", "optimizer.lr=2.0"]
    assert "another option" in defeat(*arguments, *said_twice[0], code=2)
    assert "given twice" in defeat(*arguments, *said_twice[1], code=2)
    assert not (tmp_path / "out").exists()


def test_a_study_sets_some_keys_itself(defeat, tiny, teacher, tmp_path):
    output = defeat("ablate", "neck", "-r", tiny, "-t", teacher, "-o", tmp_path / "x", "--set", "run.seed=3", code=2)
    assert "--set run.seed: without effect in a study; give --seeds" in output
