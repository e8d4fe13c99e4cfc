"""A detector's look at a batch: computed once, and put on another view's cells where sizes differ."""

import pytest
import torch
from tiny import batch, build, distil
from torch import nn

from defeat_cli import TERMS, FeatureDetector, wrap
from defeat_cli.detectors.contract import Batch, level_names
from defeat_cli.distillation.terms import View
from defeat_cli.errors import DefeatError, TermError


def test_what_is_costly_is_computed_once(monkeypatch):
    student = build()
    calls = []
    for name in ("stages", "regions", "classify"):
        real = getattr(student, name)
        monkeypatch.setattr(student, name, lambda *a, _real=real, _name=name: calls.append(_name) or _real(*a))
    view = View(student, student.prepare(*batch()), frozen=True)
    for _ in range(2):
        view.classify(view.regions)
        assert not view.features[0].requires_grad
    assert calls == ["stages", "regions", "classify"]


def test_a_map_on_another_views_cells_has_the_values_of_the_same_points():
    # One image of 64 x 96 pixels here, 128 x 192 there, both padded to the right; the map there holds the x of its
    # cells' centres as a share of the image's width, so on the cells here it must hold the x of theirs.
    here = View(None, Batch(torch.zeros(1, 3, 64, 128), [(64, 96)]))
    there = View(None, Batch(torch.zeros(1, 3, 128, 256), [(128, 192)]))
    share = ((torch.arange(32) + 0.5) * 8 / 192).expand(1, 1, 16, 32)
    moved = there.on_grid_of(here, share, 8, (8, 16), 8)
    expected = (torch.arange(16) + 0.5) * 8 / 96
    torch.testing.assert_close(moved[0, 0, 3], expected)
    assert there.on_grid_of(there, share, 8, (16, 32), 8) is share


def test_regions_move_with_the_images():
    small, large = build(), build(short_side=128)
    here = View(small, small.prepare(*batch()))
    there = View(large, large.prepare(*batch()), frozen=True)
    moved = there.regions_in(here)
    for own, scaled in zip(there.regions.boxes, moved.boxes, strict=True):
        torch.testing.assert_close(scaled, own / 2)
    assert moved.sizes == here.batch.sizes
    assert there.regions_in(here) is moved
    assert there.regions_in(there) is there.regions


def test_a_teacher_of_its_own_size_supervises_neck_backbone_and_head():
    student, teacher = build(), build(seed=1, short_side=128, fpn_channels=16)
    distiller = distil(student, teacher, ["neck", "head", "backbone"], own_size=True)
    losses = distiller(*batch())
    for name in ("neck_fg", "neck_bg", "head_fg", "head_bg", "backbone_fg", "backbone_bg"):
        assert losses.weighted[name] > 0
    sum(losses.weighted.values()).backward()
    assert all(p.grad is not None for p in distiller.terms.parameters())


def test_own_size_equals_the_students_where_both_are_the_same():
    student, teacher = build(), build(seed=1, fpn_channels=16)
    values = [distil(student, teacher, ["neck"], own_size)(*batch()).raw for own_size in (False, True)]
    torch.testing.assert_close(values[0], values[1])


class Toy(nn.Module):
    """Three maps of strides 4, 8 and 16, and a loss: no torchvision detector at all."""

    def __init__(self, width):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=4, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(width, width, 3, stride=2, padding=1) for _ in range(2))

    def forward(self, pixels):
        maps = [self.stem(pixels)]
        for layer in self.down:
            maps.append(layer(maps[-1].relu()))
        return maps


def toy(width, **functions):
    return FeatureDetector(Toy(width), ["a", "b"], lambda model, batch: model(batch.pixels), **functions)


def test_a_toy_module_is_distilled_at_the_neck():
    torch.manual_seed(0)
    student = toy(8, losses=lambda model, features, batch: {"loss": features[0].square().mean()})
    teacher = toy(12)
    assert [(level.stride, level.channels) for level in student.levels] == [(4, 8), (8, 8), (16, 8)]
    distiller = distil(student, teacher, ["neck"])
    optimizer = torch.optim.SGD([p for p in distiller.parameters() if p.requires_grad], lr=0.05)
    images, targets = batch()
    pulls = []
    for _ in range(30):
        losses = distiller(images, targets)
        optimizer.zero_grad()
        sum(losses.weighted.values()).backward()
        optimizer.step()
        pulls.append(float(losses.raw["neck_fg"] + losses.raw["neck_bg"]))
    assert pulls[-1] < 0.7 * pulls[0]


def test_a_toy_module_and_torchvision_share_the_neck_and_not_the_head():
    student, teacher = toy(8, losses=lambda *_: {}), build()
    assert TERMS["neck"](student, teacher).pairs == [(0, 0), (1, 1), (2, 2)]
    with pytest.raises(TermError, match="the student does not classify regions"):
        TERMS["head"](student, teacher)
    with pytest.raises(TermError, match="the student's backbone stages are not known"):
        TERMS["backbone"](student, teacher)
    with pytest.raises(TermError, match="fine-grained masks compare anchors"):
        TERMS["neck"](student, teacher, mask="fine-grained")
    with pytest.raises(DefeatError, match="give it `detect`"):
        student.detect([torch.rand(3, 8, 8)])
    with pytest.raises(DefeatError, match="give it `losses`"):
        toy(8).losses([], None)


def test_a_mixed_pair_that_cannot_have_the_head_is_told_why_from_python():
    one_stage = build("retinanet")
    with pytest.raises(TermError, match="one detector classifies proposals, the other anchors"):
        TERMS["head"](one_stage, build())
    assert "classifies proposals" in TERMS["head"].obstacle(one_stage, build())
    assert TERMS["neck"].obstacle(one_stage, build()) is None


def test_a_toy_module_resizes_images_and_boxes():
    student = FeatureDetector(Toy(4), ["a"], lambda model, batch: model(batch.pixels), size=(32, 48), divisible=32)
    images, targets = batch()
    prepared = student.prepare(images, targets)
    assert prepared.pixels.shape == (3, 3, 32, 64)
    assert prepared.sizes == [(32, 48)] * 3
    # The first image was 64 x 64: half as high, 3 / 4 as wide.
    torch.testing.assert_close(prepared.targets[0]["boxes"], targets[0]["boxes"] * torch.tensor([0.75, 0.5, 0.75, 0.5]))


@pytest.mark.parametrize("family", ["fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "fcos_resnet50_fpn"])
def test_wrap_takes_torchvisions_models_as_they_are(family):
    from torchvision.models import detection

    model = detection.__dict__[family](weights=None, weights_backbone=None, num_classes=3)
    wrapped = wrap(model, ["a", "b"])
    assert wrapped.model is model
    assert wrapped.strides[0] == (4 if family.startswith("faster") else 8)
    with pytest.raises(DefeatError, match="num_classes=3, which is 2 classes and background; 1 name was given"):
        wrap(model, ["a"])


def test_wrap_refuses_what_it_does_not_know():
    with pytest.raises(DefeatError, match="FeatureDetector makes a detector of any module"):
        wrap(nn.Linear(1, 1), ["a"])


def test_levels_that_share_a_stride_have_names_of_their_own():
    assert level_names("P", [8, 16, 32, 32, 32]) == ["P3", "P4", "P5", "P5b", "P5c"]
