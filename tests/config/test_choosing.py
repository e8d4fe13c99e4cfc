"""The recipe that is chosen for what there is, on facts alone."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml

from defeat_cli.config import schema as recipes
from defeat_cli.config.architecture import BACKBONES, Architecture
from defeat_cli.config.choosing import SMALLER, Facts, choose
from defeat_cli.config.commenting import commented
from defeat_cli.config.variants import VARIANTS

CELLS = Facts(
    device="cpu", cores=2, data="bccd", images=292, size=(480, 640), small_box=40.0, usual_box=102.0,
    teacher=Architecture(backbone="resnet50"), teacher_side=800, pretrained=lambda backbone: True,
)  # fmt: skip
"""BCCD with a ResNet-50 teacher, on a CPU."""
STREETS = replace(
    CELLS, device="cuda", cores=8, data="streets", images=118_000, size=(480, 640), usual_box=128.0,
    teacher=Architecture(backbone="resnet101"),
)  # fmt: skip


def chosen(facts, **said):
    said = {key.replace("__", "."): value for key, value in said.items()}
    return choose(facts, said).recipe()


def told(facts, **said):
    said = {key.replace("__", "."): value for key, value in said.items()}
    return "\n".join(str(reason) for reason in choose(facts, said).reasons)


def test_a_cpu_gets_a_small_student_on_small_images():
    recipe = chosen(CELLS)
    assert (recipe.student.detector, recipe.student.backbone) == ("faster_rcnn", "mobilenet_v2")
    assert recipe.student.backbone_weights == "imagenet"
    assert (recipe.student.norm, recipe.student.frozen_stages) == ("frozen", 2)
    # 192 of 480 pixels; 640 * 192 / 480 = 256. The small boxes are 40 * 192 / 480 = 16 pixels, which is enough.
    assert (recipe.data.short_side, recipe.data.long_side) == ([192], 256)
    # The median box has 102 * 192 / 480 = 40.8 pixels there, a quarter of it is 10.2: by ratio nearer to 12 than to 8.
    assert recipe.student.anchor_sizes == [[12], [24], [48], [96], [192]]
    # 56 * 12 / 32 = 21.
    assert recipe.distillation.neck.finest_scale == 21
    # 4000 / 292 = 13.7, at most 12; 37 batches of 8 an epoch.
    assert recipe.schedule.epochs == 12
    assert recipe.schedule.warmup_steps == 12 * 37 // 20
    assert recipe.distillation.warmup_steps == 12 * 37 // 10
    assert recipe.distillation.head is None
    assert recipe.run.name == "faster_rcnn_mobilenet_v2_from_resnet50_bccd"


def test_the_teachers_features_are_kept_on_a_cpu_where_it_has_less_to_do_then():
    assert chosen(CELLS).teacher.cache_gib == 2
    # 4000 / 800 is 5 epochs, 4000 / 1000 is 4: as many as two looks alone cost.
    assert chosen(replace(CELLS, images=800)).teacher.cache_gib == 2
    assert chosen(replace(CELLS, images=1000)).teacher.cache_gib is None
    assert chosen(CELLS, **{"teacher.cache_gib": 0.5}).teacher.cache_gib == 0.5
    assert chosen(replace(CELLS, device="cuda")).teacher.cache_gib is None
    assert chosen(replace(CELLS, teacher=None)).teacher.cache_gib is None


def test_a_gpu_and_many_images_get_the_usual_schedule_and_both_terms():
    recipe = chosen(STREETS)
    assert recipe.student.backbone == "resnet50"
    assert recipe.student.anchor_sizes is None  # 128 pixels are the middle level's own
    assert recipe.distillation.neck.finest_scale == 56
    assert (recipe.data.short_side, recipe.data.batch_size) == ([480], 8)
    assert (recipe.schedule.epochs, recipe.optimizer.name, recipe.optimizer.lr) == (12, "sgd", 0.01)
    assert recipe.distillation.head is not None
    assert recipe.data.workers == 4


def test_few_images_get_steps_enough_and_a_warm_up():
    few = replace(CELLS, images=30)  # 4 batches of 8 an epoch
    recipe = chosen(few)
    assert recipe.schedule.epochs == 75  # 300 / 4
    assert "epochs 75: few images, so that this is 300 steps" in told(few)
    assert (recipe.schedule.warmup_steps, recipe.distillation.warmup_steps, recipe.run.pull_every) == (15, 30, 30)
    # From scratch too, and on a GPU; twice 12 epochs of 13 batches are more than 300 steps.
    assert chosen(replace(few, pretrained=lambda backbone: False)).schedule.epochs == 75
    assert chosen(replace(few, device="cuda")).schedule.epochs == 75
    assert chosen(replace(few, images=100, pretrained=lambda backbone: False)).schedule.epochs == 24
    # A quarter of the 12 steps of 3 epochs, and no twentieth of them, which is none.
    assert chosen(few, schedule__epochs=3).schedule.warmup_steps == 3
    assert chosen(few, schedule__epochs=3).run.pull_every == 1


def test_small_boxes_ask_for_larger_images_up_to_twice():
    # The smallest tenth has 16 pixels of 480: to keep 8 the short side must be 240, which is 256 in steps of 32
    # (240 / 32 = 7.5, and Python rounds that to the even 8).
    assert chosen(replace(CELLS, small_box=16.0)).data.short_side == [256]
    assert chosen(replace(CELLS, small_box=2.0)).data.short_side == [384]
    assert chosen(replace(CELLS, small_box=2.0, teacher_side=320)).data.short_side == [320]


def test_the_teacher_decides_family_and_size():
    for builder, family, backbone in [
        ("retinanet_resnet50_fpn", "retinanet", "resnet18"),
        ("fcos_resnet50_fpn", "fcos", "resnet18"),
        ("fasterrcnn_mobilenet_v3_large_fpn", "faster_rcnn", "mobilenet_v3_small"),
    ]:
        student = chosen(replace(STREETS, teacher=Architecture(detector=builder))).student
        assert (student.detector, student.backbone) == (family, backbone)
    toy = Architecture(backbone="regnet", widths=[32, 64, 128, 192], fpn_channels=48)
    student = chosen(replace(CELLS, teacher=toy)).student
    assert (student.backbone, student.widths, student.norm) == ("regnet", [16, 32, 64, 96], "batch")
    assert set(SMALLER) == set(BACKBONES)


def test_retinanets_anchors_are_three_a_level():
    student = chosen(replace(CELLS, teacher=Architecture(detector="retinanet"))).student
    # 12, and a third and two thirds of an octave above: 15.1 and 19.0.
    assert student.anchor_sizes[:2] == [[12, 15, 19], [24, 30, 38]]


def test_anchors_that_do_not_fit_give_way_to_the_nearest_that_do():
    """The median box asks for 10.2 pixels on the finest level: by ratio 12 is nearest, then 8, 16 and 6."""

    def fitting(*good, offered=None):
        def fit(recipe):
            sizes = recipe.student.anchor_sizes
            return SimpleNamespace(mean=0.5, bad=sizes is None or sizes[0][0] not in good, sizes=offered)

        return replace(CELLS, anchor_fit=fit)

    assert chosen(fitting(6, 16)).student.anchor_sizes == [[16], [32], [64], [128], [256]]
    assert chosen(fitting()).student.anchor_sizes[0] == [12]
    offered = [[5.0], [6.0], [7.0], [8.0], [9.0]]
    recipe = chosen(fitting(offered=offered))
    assert recipe.student.anchor_sizes == offered
    assert recipe.distillation.neck.finest_scale == 1.75 * 5
    assert "none fits them well" in told(fitting(offered=offered))
    assert chosen(fitting(), student__anchor_sizes=offered).student.anchor_sizes == offered


def test_without_pretrained_weights_it_is_trained_longer_and_said():
    facts = replace(CELLS, pretrained=lambda backbone: False)
    recipe = chosen(facts)
    assert (recipe.student.backbone_weights, recipe.student.norm, recipe.schedule.epochs) == (None, "batch", 24)
    assert "--set student.backbone_weights=FILE" in told(facts)
    assert chosen(replace(facts, teacher=None)).student.backbone == "resnet18"


def test_without_a_teacher_nothing_is_distilled():
    recipe = chosen(replace(CELLS, teacher=None, teacher_side=None))
    assert recipe.student.backbone == "resnet50"
    assert recipe.run.name == "faster_rcnn_resnet50_bccd"
    assert recipe.distillation == recipes.Recipe().distillation


def test_what_is_said_wins_is_followed_and_has_no_reason_given():
    said = {"student__backbone": "resnet34", "data__short_side": [96], "schedule__epochs": 3}
    recipe = chosen(CELLS, **said)
    assert (recipe.student.backbone, recipe.data.short_side, recipe.schedule.epochs) == ("resnet34", [96], 3)
    assert recipe.data.long_side == 128  # 640 * 96 / 480
    assert recipe.student.anchor_sizes[0] == [6]  # 102 * 96 / 480 / 4 = 5.1
    text = told(CELLS, **said)
    assert "detector faster_rcnn" in text
    assert not any(f"{name} " in text.replace("_", " ") for name in ("backbone resnet34", "short side", "epochs 3"))


def test_a_weights_file_is_no_weights_to_be_downloaded():
    recipe = chosen(CELLS, student__backbone_weights="mine.pth")
    assert (recipe.student.backbone_weights, recipe.student.norm) == ("mine.pth", "frozen")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_obeyed(variant):
    own = VARIANTS[variant].overrides
    recipe = choose(CELLS, own).recipe()
    wanted = own.get("distillation.only")
    assert set(recipe.distillation.terms) == set(wanted)


@pytest.mark.parametrize("facts", [CELLS, STREETS, replace(CELLS, teacher=None), replace(CELLS, images=1)])
@pytest.mark.parametrize("said", [{}, {"distillation.neck.alpha_bg": 8.0, "run.name": "mine"}])
def test_the_commented_file_is_the_chosen_recipe(facts, said, tmp_path):
    path = tmp_path / "r.yaml"
    choice = choose(facts, said)
    path.write_text(commented(choice, facts, path))
    assert recipes.load(str(path)) == choice.recipe()
    assert path.read_text().count("  # ") > 10
    assert yaml.safe_load(path.read_text())["run"]["name"] == said.get("run.name", choice.name)
