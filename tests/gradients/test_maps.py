"""Gradient maps against torchvision's own forward, against finite differences, and against formulas by hand."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from defeat_cli.config.architecture import Architecture
from defeat_cli.detectors.contract import Batch, Detector, image_list
from defeat_cli.detectors.zoo import build_detector
from defeat_cli.distillation.adapters import Adapter
from defeat_cli.errors import CheckpointError, DefeatError
from defeat_cli.gradients.maps import (
    LOSSES,
    distillation_maps,
    gradient_maps,
    losses_in_eval_mode,
    neck_adapters,
    part_of,
)
from defeat_cli.gradients.numbers import boxes_by_level, foreground_cells, map_numbers, summarize

CLASSES = ["circle", "square"]
CHANNELS = {"faster_rcnn": 8, "retinanet": 8, "fcos": 64}
"""Width of each family's neck; FCOS normalises groups of channels and needs many."""
TARGET = {
    "boxes": torch.tensor([[10.0, 12.0, 50.0, 60.0], [64.0, 30.0, 120.0, 90.0]], dtype=torch.float64),
    "labels": torch.tensor([1, 2]),
}


def tiny_detector(family: str, channels: int | None = None) -> Detector:
    """Double precision, trained BatchNorm, and images of 96 x 128 pixels that need neither resizing nor padding."""
    torch.manual_seed(3)
    architecture = Architecture(
        detector=family,
        backbone="regnet",
        widths=[8, 8, 16, 16],
        fpn_channels=channels or CHANNELS[family],
        head_channels=16,
        norm="batch",
        proposals_train=50,
        regions_per_image=16,
    )
    detector = build_detector(architecture, CLASSES, short_side=[96], long_side=128)
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


def torchvision_gradients(detector: Detector, seed: int | None) -> list[Tensor]:
    """Gradients of torchvision's training forward with respect to what its backbone hands to its heads."""
    model = detector.model
    leaves: dict[str, Tensor] = {}

    def cut(_module: nn.Module, _inputs: tuple, features: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
        leaves.update({name: feature.detach().requires_grad_() for name, feature in features.items()})
        if seed is not None:
            torch.manual_seed(seed)  # the transform has drawn an image size before this point
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


@pytest.mark.parametrize(
    ("reduce", "magnitude"),
    [("l2", lambda g: g.square().sum(dim=1).sqrt()[0]), ("mean-abs", lambda g: g.abs().mean(dim=1)[0])],
)
def test_maps_are_the_gradients_of_torchvisions_own_forward(
    detector: Detector, reduce: str, magnitude: Callable[[Tensor], Tensor]
):
    maps = gradient_maps(detector, prepared(detector), samples=1, seed=4, reduce=reduce)
    expected = [magnitude(gradient) for gradient in torchvision_gradients(detector, seed=4)]
    assert len(maps) == 5
    assert [tuple(m.shape) for m in maps] == [tuple(e.shape) for e in expected]
    for actual, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-14)
    assert sum(m.sum() for m in maps) > 0


def test_magnitudes_are_averaged_over_successive_draws(two_stage: Detector):
    maps = gradient_maps(two_stage, prepared(two_stage), samples=2, seed=4)
    first = torchvision_gradients(two_stage, seed=4)
    state = torch.get_rng_state()  # the second draw goes on where the first left the generator
    model_draw = torchvision_gradients_from(two_stage, state)
    for actual, one, two in zip(maps, first, model_draw, strict=True):
        torch.testing.assert_close(actual, (one.norm(dim=1)[0] + two.norm(dim=1)[0]) / 2, rtol=1e-9, atol=1e-14)
    assert any(not torch.equal(one, two) for one, two in zip(first, model_draw, strict=True))


def torchvision_gradients_from(detector: Detector, state: Tensor) -> list[Tensor]:
    """As above, with the generator in a given state when the heads begin."""
    hook = detector.model.backbone.register_forward_hook(lambda *_: torch.set_rng_state(state))
    try:
        return torchvision_gradients(detector, seed=None)
    finally:
        hook.remove()


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
                image_list(batch), dict(enumerate(detector.features(batch))), batch.targets
            )
        detector.model.rpn.filter_proposals = lambda *_: (list(proposals), [])
    maps = gradient_maps(detector, batch, part, samples=1, seed=0)
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
    parts = [set(terms) & names for terms in LOSSES.values()]
    assert set().union(*parts) == names
    assert sum(map(len, parts)) == len(names)


def test_a_part_pulls_less_cells_than_the_whole(two_stage: Detector):
    """The RPN's loss reaches P6; the box head, which pools P2 to P5 only, does not."""
    batch = prepared(two_stage)
    assert gradient_maps(two_stage, batch, "rpn")[4].any()
    assert not gradient_maps(two_stage, batch, "classification")[4].any()
    assert gradient_maps(two_stage, batch, "classification")[0].any()


def test_a_loss_that_the_family_has_not_is_refused():
    detector = tiny_detector("retinanet")
    with pytest.raises(DefeatError, match=r"--loss rpn.*it has total, classification, regression"):
        gradient_maps(detector, prepared(detector), "rpn")


def test_equal_seeds_give_equal_maps_and_the_global_generator_is_left_alone(two_stage: Detector):
    batch = prepared(two_stage)
    before = torch.get_rng_state()
    first, again, other = (torch.stack([m.sum() for m in gradient_maps(two_stage, batch, seed=s)]) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_the_detector_is_changed(detector: Detector, training: bool):
    detector.train(training)
    batch = prepared(detector)
    state = {name: value.clone() for name, value in detector.state_dict().items()}
    gradient_maps(detector, batch, samples=2)
    assert all(module.training == training for module in detector.modules())
    assert all(torch.equal(value, state[name]) for name, value in detector.state_dict().items())
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in detector.model.backbone.parameters())
    detector.eval()


def test_modes_come_back_after_an_error(two_stage: Detector):
    two_stage.train()
    broken = Batch(torch.rand(1, 3, 96, 128, dtype=torch.float64), [(96, 128)], [{"labels": torch.tensor([1])}])
    with pytest.raises(KeyError):
        gradient_maps(two_stage, broken)
    assert all(module.training for module in two_stage.modules())
    two_stage.eval()


def test_an_image_without_boxes_has_maps(detector: Detector):
    empty = {"boxes": torch.zeros(0, 4, dtype=torch.float64), "labels": torch.zeros(0, dtype=torch.int64)}
    maps = gradient_maps(detector, detector.prepare([image()], [empty]))
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
    maps = distillation_maps(
        student, teacher, [nn.Identity()] * 5, batch, alpha_fg=3.0, alpha_bg=5.0, finest_scale=25.0
    )
    with torch.no_grad():
        gaps = [(s - t)[0].norm(dim=0) for s, t in zip(student.features(batch), teacher.features(batch), strict=True)]
    shapes = [tuple(gap.shape) for gap in gaps]
    inside = foreground_cells(batch.targets[0]["boxes"], shapes, student.strides, finest_scale=25.0)
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


def test_adapters_come_from_training_or_are_not_needed_or_are_missed():
    student, wide = tiny_detector("faster_rcnn"), tiny_detector("faster_rcnn", channels=48)
    trained = torch.nn.ModuleList(Adapter(8, 48) for _ in range(5)).state_dict()
    adapters = neck_adapters(student, wide, trained, "best.pt")
    assert torch.equal(adapters[3].conv.weight.float(), trained["3.conv.weight"])
    assert all(isinstance(adapter, nn.Identity) for adapter in neck_adapters(student, student, {}, "student.pth"))
    with pytest.raises(CheckpointError, match=r"student\.pth: holds no adapters"):
        neck_adapters(student, wide, None, "student.pth")
    with pytest.raises(CheckpointError, match=r"best\.pt: its adapters were trained with another teacher"):
        neck_adapters(student, student, trained, "best.pt")


def test_foreground_is_on_every_level_or_on_its_own():
    boxes = torch.tensor([[8.0, 8.0, 24.0, 16.0], [0.0, 0.0, 32.0, 32.0]])
    shapes, strides = [(8, 8), (4, 4)], [4, 8]
    everywhere = foreground_cells(boxes, shapes, strides)
    assert [int(mask.sum()) for mask in everywhere] == [64, 16]
    own = foreground_cells(boxes, shapes, strides, finest_scale=16.0)
    # sqrt(16 * 8) / 16 < 1 goes to level 0, 32 / 16 = 2 to level 1.
    assert own[0].nonzero().tolist() == [[row, column] for row in (2, 3) for column in (2, 3, 4, 5)]
    assert own[1].all()
    first, second = boxes_by_level(boxes.numpy(), shapes, strides, finest_scale=16.0)
    assert first.tolist() == [boxes[0].tolist()]
    assert second.tolist() == [boxes[1].tolist()]
    assert [len(b) for b in boxes_by_level(boxes.numpy(), shapes, strides)] == [2, 2]
    assert [b.shape for b in boxes_by_level(np.zeros((0, 4), np.float32), shapes, strides, 16.0)] == [(0, 4)] * 2


def test_numbers_of_a_map_made_by_hand():
    fine = np.array([[1.0, 3.0, 0.0, 0.0], [5.0, 7.0, 2.0, 0.0]])
    inside = np.array([[True, True, False, False], [True, True, False, False]])
    coarse = np.array([[10.0, 2.0]])
    numbers = map_numbers([fine, coarse], [inside, np.array([[True, False]])], [4, 8])
    assert numbers["P2"] == {
        "foreground": {"cells": 4, "mean": 4.0, "median": 4.0},
        "background": {"cells": 4, "mean": 0.5, "median": 0.0},
        "ratio": 8.0,
        "foreground_share": 16 / 18,
        "foreground_area": 0.5,
    }
    assert numbers["P3"]["ratio"] == 5.0
    overall = numbers["overall"]
    assert overall["foreground"] == {"cells": 5, "mean": 26 / 5, "median": 5.0}
    assert overall["background"] == {"cells": 5, "mean": 4 / 5, "median": 0.0}
    assert overall["foreground_share"] == 26 / 30


def test_numbers_without_foreground_or_pull_say_so():
    (numbers, overall) = map_numbers([np.zeros((1, 3))], [np.zeros((1, 3), dtype=bool)], [8]).values()
    assert numbers == overall
    assert numbers["foreground"] == {"cells": 0, "mean": None, "median": None}
    assert numbers["ratio"] is None
    assert numbers["foreground_share"] is None


def entry(inside: float, outside: float) -> dict:
    return map_numbers([np.array([[inside, outside]])], [np.array([[True, False]])], [8])


def test_summary_over_images():
    images = [entry(4.0, 1.0), entry(2.0, 3.0), entry(6.0, 2.0)]
    images.append(map_numbers([np.ones((1, 2))], [np.zeros((1, 2), dtype=bool)], [8]))  # no box: not compared
    summary = summarize(images, seed=1)
    assert summary == summarize(images, seed=1)
    assert summary["P3"] == summary["overall"]
    level = summary["P3"]
    assert level["images"] == 3
    assert level["foreground_mean"]["mean"] == 4.0
    assert level["background_mean"]["mean"] == 2.0
    assert level["ratio"]["mean"] == 2.0
    assert level["foreground_higher"]["mean"] == pytest.approx(2 / 3)
    low, high = level["ratio"]["interval"]
    assert 2 / 3 <= low < 2.0 < high <= 4.0  # every resample lies between the lowest and the highest ratio


def test_the_seed_decides_the_interval():
    images = [entry(float(value), 1.0) for value in np.random.default_rng(0).random(20)]
    intervals = [summarize(images, seed=seed)["P3"]["ratio"]["interval"] for seed in (1, 1, 2)]
    assert intervals[0] == intervals[1] != intervals[2]


def test_the_interval_covers_what_a_resampling_by_hand_gives():
    """Of images 0 and 1 the mean of a resample is 0, 1/2 or 1 with chances 1/4, 1/2, 1/4: the middle 95% is [0, 1]."""
    level = summarize([entry(0.0, 1.0), entry(1.0, 1.0)])["P3"]
    assert level["foreground_mean"]["interval"] == [0.0, 1.0]
    assert level["background_mean"]["interval"] == [1.0, 1.0]


def test_intervals_are_left_out_where_there_is_nothing_to_resample():
    one = summarize([entry(4.0, 1.0)])["P3"]
    assert one["ratio"] == {"mean": 4.0, "interval": None}
    dark = summarize([entry(1.0, 0.0), entry(1.0, 1.0)])["P3"]
    assert dark["ratio"]["mean"] == 2.0
    assert dark["ratio"]["interval"] is None
    assert summarize([]) == {}
