"""Gradient maps against torchvision's own forward, against finite differences, and against formulas by hand."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tiny import build
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from defeat_cli.config.schema import Distillation
from defeat_cli.detectors.contract import Batch, Detector
from defeat_cli.distillation.terms import TERMS, Loss, View
from defeat_cli.distillation.terms.imitation import Neck
from defeat_cli.distillation.terms.levels import LevelTerm
from defeat_cli.errors import CheckpointError, DefeatError
from defeat_cli.gradients.maps import (
    PARTS,
    detection_maps,
    loss_maps,
    losses_in_eval_mode,
    neck_features,
    part_of,
    term_loss,
)
from defeat_cli.gradients.numbers import cells_of_boxes
from defeat_cli.gradients.panels import panel_terms

CLASSES = ["circle", "square"]
CHANNELS = {"faster_rcnn": 8, "retinanet": 8, "fcos": 64}
TARGET = {
    "boxes": torch.tensor([[10.0, 12.0, 50.0, 60.0], [64.0, 30.0, 120.0, 90.0]], dtype=torch.float64),
    "labels": torch.tensor([1, 2]),
}


def tiny_detector(family: str, channels: int | None = None) -> Detector:
    """Double precision, trained BatchNorm, and images of 96 x 128 pixels that need neither resizing nor padding."""
    detector = build(
        family, 3, CLASSES, short_side=96, long_side=128, fpn_channels=channels or CHANNELS[family], head_channels=16,
        anchor_sizes=None, proposals=1000, proposals_train=50, regions_per_image=16,
    )  # fmt: skip
    for module in detector.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
    return detector.double().eval()


@pytest.fixture(scope="module", params=CHANNELS)
def detector(request: pytest.FixtureRequest) -> Detector:
    return tiny_detector(request.param)


@pytest.fixture(scope="module")
def two_stage() -> Detector:
    return tiny_detector("faster_rcnn")


def image(height: int = 96, width: int = 128) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def prepared(detector: Detector, pixels: Tensor | None = None) -> Batch:
    return detector.prepare([image() if pixels is None else pixels], [TARGET])


def torchvision_gradients(detector: Detector, state: Tensor) -> list[Tensor]:
    """Gradients of torchvision's training forward with respect to what its backbone hands to its heads, with the random
    generator in a given state from there on: the transform has drawn an image size before."""
    model = detector.model
    leaves: dict[str, Tensor] = {}

    def cut(_module: nn.Module, _inputs: tuple, features: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
        leaves.update({name: feature.detach().requires_grad_() for name, feature in features.items()})
        torch.set_rng_state(state)
        return OrderedDict(leaves)

    hook = model.backbone.register_forward_hook(cut)
    modes = {module: module.training for module in model.modules()}
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    try:
        sum(model([image()], [TARGET]).values()).backward()
    finally:
        hook.remove()
        for module, training in modes.items():
            module.training = training
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves.values()]


def seeded(seed: int) -> Tensor:
    return torch.Generator().manual_seed(seed).get_state()


@pytest.mark.parametrize(
    ("reduce", "magnitude"),
    [("l2", lambda g: g.square().sum(dim=1).sqrt()[0]), ("mean-abs", lambda g: g.abs().mean(dim=1)[0])],
)
def test_maps_are_the_gradients_of_torchvisions_own_forward(
    detector: Detector, reduce: str, magnitude: Callable[[Tensor], Tensor]
):
    maps = detection_maps(detector, prepared(detector), samples=1, seed=4, reduce=reduce)
    expected = [magnitude(gradient) for gradient in torchvision_gradients(detector, seeded(4))]
    assert len(maps) == 5
    assert [tuple(m.shape) for m in maps] == [tuple(e.shape) for e in expected]
    for actual, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-14)
    assert sum(m.sum() for m in maps) > 0


def test_magnitudes_are_averaged_over_successive_draws(two_stage: Detector):
    maps = detection_maps(two_stage, prepared(two_stage), samples=2, seed=4)
    first = torchvision_gradients(two_stage, seeded(4))
    second = torchvision_gradients(two_stage, torch.get_rng_state())  # goes on where the first left the generator
    for actual, one, two in zip(maps, first, second, strict=True):
        torch.testing.assert_close(actual, (one.norm(dim=1)[0] + two.norm(dim=1)[0]) / 2, rtol=1e-9, atol=1e-14)
    assert any(not torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize(("family", "part"), [("faster_rcnn", "classification"), ("retinanet", "total")])
def test_maps_are_what_finite_differences_find(family: str, part: str):
    """On the strongest cells of two levels.

    Proposals are held, for torchvision lets no gradient through where they lie; and the RPN's loss is left out, for
    torchvision computes it in float32, where small steps drown.
    """
    detector = tiny_detector(family)
    batch = prepared(detector)
    if family == "faster_rcnn":
        with losses_in_eval_mode(detector):
            proposals, _ = detector.model.rpn(
                ImageList(batch.pixels, batch.sizes), dict(enumerate(detector.features(batch))), batch.targets
            )
        detector.model.rpn.filter_proposals = lambda *_: (list(proposals), [])
    maps = detection_maps(detector, batch, part, samples=1, seed=0)
    features = [feature.detach() for feature in detector.features(batch)]
    step = 1e-5

    def loss(level: int, place: tuple[int, ...], change: float) -> float:
        moved = [feature.clone() for feature in features]
        moved[level][place] += change
        torch.manual_seed(0)
        return float(part_of(detector.losses(moved, batch), part))

    strongest = sorted(range(5), key=lambda level: float(maps[level].max()))[-2:]
    with losses_in_eval_mode(detector), torch.no_grad():
        for level in strongest:
            row, column = np.unravel_index(int(maps[level].argmax()), maps[level].shape)
            places = [(0, channel, row, column) for channel in range(8)]
            slopes = [(loss(level, p, step) - loss(level, p, -step)) / (2 * step) for p in places]
            assert float(np.linalg.norm(slopes)) == pytest.approx(float(maps[level][row, column]), rel=1e-5)


def test_parts_of_the_loss_name_all_of_it(detector: Detector):
    batch = prepared(detector)
    detector.train()
    names = set(detector.losses(detector.features(batch), batch))
    detector.eval()
    parts = [set(terms) & names for terms in PARTS.values()]
    assert set().union(*parts) == names
    assert sum(map(len, parts)) == len(names)


def test_a_part_pulls_less_cells_than_the_whole(two_stage: Detector):
    """The RPN's loss reaches P6; the box head, which pools P2 to P5 only, does not."""
    batch = prepared(two_stage)
    assert detection_maps(two_stage, batch, "rpn")[4].any()
    assert not detection_maps(two_stage, batch, "classification")[4].any()
    assert detection_maps(two_stage, batch, "classification")[0].any()


def test_a_loss_that_the_family_has_not_is_refused():
    detector = tiny_detector("retinanet")
    with pytest.raises(DefeatError, match=r"--loss rpn.*it has total, classification, regression"):
        detection_maps(detector, prepared(detector), "rpn")


def test_equal_seeds_give_equal_maps_and_the_global_generator_is_left_alone(two_stage: Detector):
    batch = prepared(two_stage)
    before = torch.get_rng_state()
    first, again, other = (torch.stack([m.sum() for m in detection_maps(two_stage, batch, seed=s)]) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_loss_is_asked_again_only_where_it_draws(two_stage: Detector):
    features, asked = neck_features(two_stage, prepared(two_stage)), []

    def loss(leaves: list[Tensor], draws: bool) -> Tensor:
        asked.append(draws)
        return leaves[0].sum() * (torch.rand(()) if draws else 1)

    steady = loss_maps(lambda leaves: loss(leaves, draws=False), features, samples=3)
    drawn = loss_maps(lambda leaves: loss(leaves, draws=True), features, samples=3, seed=5)
    assert asked == [False, True, True, True]
    mean = torch.rand(3, generator=torch.Generator().manual_seed(5)).mean()
    torch.testing.assert_close(drawn[0], mean.double() * steady[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_the_detector_is_changed(detector: Detector, training: bool):
    detector.train(training)
    state = {name: value.clone() for name, value in detector.state_dict().items()}
    detection_maps(detector, prepared(detector), samples=2)
    with pytest.raises(KeyError):  # an error between switching modes and switching them back
        detection_maps(detector, Batch(image()[None], [(96, 128)], [{"labels": torch.tensor([1])}]))
    assert all(module.training == training for module in detector.modules())
    assert all(torch.equal(value, state[name]) for name, value in detector.state_dict().items())
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in detector.model.backbone.parameters())
    detector.eval()


def test_an_image_without_boxes_has_maps(detector: Detector):
    empty = {"boxes": torch.zeros(0, 4, dtype=torch.float64), "labels": torch.zeros(0, dtype=torch.int64)}
    maps = detection_maps(detector, detector.prepare([image()], [empty]))
    assert all(values.isfinite().all() for values in maps)
    assert any(values.any() for values in maps)


def test_distillation_maps_are_the_formulas():
    """With no adapter d/dS of alpha / (2 C n) sum M (S - T)^2, averaged over L levels, is alpha / (C n L) M (S - T)."""
    student, teacher = tiny_detector("faster_rcnn"), tiny_detector("faster_rcnn")
    with torch.no_grad():
        for parameter in teacher.model.backbone.parameters():
            parameter += 0.01
    pixels = image(80, 128)  # 16 rows of padding
    batch = prepared(student, pixels)
    settings = Distillation(neck={"alpha_fg": 3.0, "alpha_bg": 5.0, "finest_scale": 25.0})
    terms = panel_terms(settings, student, teacher, {}, "student.pth")
    features = neck_features(student, batch)
    views = View(student, batch), View(teacher, batch, frozen=True)
    maps = {name: loss_maps(term_loss(term, *views), features) for name, term in terms.items()}
    with torch.no_grad():
        gaps = [(s - t)[0].norm(dim=0) for s, t in zip(student.features(batch), teacher.features(batch), strict=True)]
    shapes = [tuple(gap.shape) for gap in gaps]
    cells = cells_of_boxes(batch.targets[0]["boxes"], shapes, student.strides, finest_scale=25.0)
    inside = [of_level.any(dim=0) for of_level in cells]
    for level, (gap, mask, stride) in enumerate(zip(gaps, inside, student.strides, strict=True)):
        own = torch.zeros_like(mask)
        own[: -(-80 // stride)] = True
        fg, bg = mask & own, ~mask & own

        def pull(cells: Tensor, alpha: float, gap: Tensor = gap) -> Tensor:
            return alpha / (8 * max(int(cells.sum()), 1) * 5) * gap * cells

        expected = {
            "full": pull(own, 3.0),
            "fg-only": pull(fg, 3.0),
            "bg-only": pull(bg, 5.0),
            "neck": pull(fg, 3.0) + pull(bg, 5.0),
        }
        assert list(maps) == list(expected)
        for variant, wanted in expected.items():
            torch.testing.assert_close(maps[variant][level], wanted, rtol=1e-9, atol=1e-15)
    assert inside[0].any()
    assert inside[1].any()


def test_terms_come_from_training_or_need_none_or_are_missed():
    student, wide = tiny_detector("faster_rcnn"), tiny_detector("faster_rcnn", channels=48)
    learned = Neck(student, wide).state_dict(prefix="neck.")
    terms = panel_terms(Distillation(), student, wide, learned, "best.pt")
    assert list(terms) == ["full", "fg-only", "bg-only", "neck"]
    assert all(torch.equal(t.adapters[3].conv.weight, learned["neck.adapters.3.conv.weight"]) for t in terms.values())
    untrained = panel_terms(Distillation(), student, student, {}, "student.pth")["neck"]
    assert not list(untrained.parameters())
    with pytest.raises(CheckpointError, match=r"student\.pth: its neck term holds no adapters"):
        panel_terms(Distillation(), student, wide, {}, "student.pth")
    with pytest.raises(CheckpointError, match=r"best\.pt: its neck term was trained with another teacher"):
        panel_terms(Distillation(), student, student, learned, "best.pt")
    with pytest.raises(CheckpointError, match=r"student\.pth: its mgd term holds no generators;"):
        panel_terms(Distillation(mgd={}), student, student, {}, "student.pth")


def test_other_terms_on_the_neck_have_rows_too(monkeypatch: pytest.MonkeyPatch):
    class Gap(LevelTerm):
        """Half the squared difference, on the finest level."""

        def forward(self, student: View, teacher: View) -> dict[str, Loss]:
            finest = next(self.compared(student, teacher))
            return {"": Loss((finest.student - finest.teacher).square().sum() / 2, 3.0)}

    monkeypatch.setitem(TERMS, "gap", Gap)
    student, teacher = tiny_detector("faster_rcnn"), tiny_detector("faster_rcnn")
    with torch.no_grad():
        teacher.model.backbone.fpn.layer_blocks[0][0].bias += 1
    batch = prepared(student)
    only = panel_terms(Distillation(neck=None, gap={}), student, teacher, {}, "student.pth")
    assert list(only) == ["gap"]
    assert list(panel_terms(Distillation(gap={}), student, teacher, {}, "student.pth"))[3:] == ["neck", "gap"]
    loss = term_loss(only["gap"], View(student, batch), View(teacher, batch, frozen=True))
    maps = loss_maps(loss, neck_features(student, batch))
    # Three times a difference of 1 in each of the channels.
    torch.testing.assert_close(maps[0], torch.full_like(maps[0], 3 * 8**0.5))
    assert not any(level.any() for level in maps[1:])
