"""Class order, background columns and channel order, by hand; and that no key is passed over in silence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from defeat_cli.checkpoints.conversion import (
    Tables,
    background_to_front,
    deltas_with_background,
    fold_bgr,
    fold_deltas,
    renamed,
    unit_range,
    with_background_first,
    with_unused_column,
)
from defeat_cli.errors import CheckpointError


def test_the_background_comes_first():
    rows = torch.tensor([[1.0], [2.0], [9.0]])  # two classes, then the background
    assert background_to_front(rows).flatten().tolist() == [9, 1, 2]


def test_the_background_gets_deltas_of_zero():
    rows = torch.arange(1.0, 9.0)  # four for class 1, four for class 2
    assert deltas_with_background(rows, 2).tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_deltas_for_all_classes_alike_are_repeated():
    rows = torch.tensor([[1.0], [2], [3], [4]])
    assert deltas_with_background(rows, 2).flatten().tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 1, 2, 3, 4]


def test_each_anchor_gets_an_unused_column():
    rows = torch.tensor([11.0, 12, 21, 22])  # anchor 1: classes 1 and 2; anchor 2: classes 1 and 2
    assert with_unused_column(rows, 2, -100.0).tolist() == [-100, 11, 12, -100, 21, 22]


def test_box_deltas_that_do_not_fit_the_classes_are_refused():
    head = "roi_heads.box_predictor"
    rows = {"cls_score.weight": 3, "cls_score.bias": 3, "bbox_pred.weight": 12, "bbox_pred.bias": 12}
    with pytest.raises(CheckpointError, match="12 box deltas for 3 class scores"):
        with_background_first({f"{head}.{key}": torch.zeros(count, 2)[:, 0] for key, count in rows.items()}, "x")


def test_a_convolution_trained_on_bgr_takes_rgb():
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 7, 7, dtype=torch.float64)
    rgb = torch.rand(1, 3, 20, 20, dtype=torch.float64)
    mean, std = [103.53, 116.28, 123.675], [1.0, 2.0, 3.0]  # in the order BGR, pixels in 0-255

    bgr = rgb.flip(1) * 255
    theirs = F.conv2d((bgr - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1), weight)

    state_dict = {"backbone.body.conv1.weight": weight}
    fold_bgr(state_dict)
    ours_mean = torch.tensor(unit_range(mean[::-1]), dtype=torch.float64).view(3, 1, 1)
    ours_std = torch.tensor(unit_range(std[::-1]), dtype=torch.float64).view(3, 1, 1)
    ours = F.conv2d((rgb - ours_mean) / ours_std, state_dict["backbone.body.conv1.weight"])
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-4)


def test_box_deltas_of_another_coder_become_those_of_torchvisions():
    """Torchvision takes the box head's deltas times 0.1 0.1 0.2 0.2. Times 0.2 0.1 0.2 0.4 plus 0.3 0 0 0.1 elsewhere:
    rows twice, once, once and twice as large, and biases 3 and 0.5 larger on top."""
    layer = "roi_heads.box_predictor.bbox_pred"
    state_dict = {f"{layer}.weight": torch.ones(8, 2), f"{layer}.bias": torch.arange(8.0)}
    fold_deltas(state_dict, layer, [0.3, 0.0, 0.0, 0.1], [0.2, 0.1, 0.2, 0.4])
    assert state_dict[f"{layer}.weight"].tolist() == [[2.0] * 2, [1.0] * 2, [1.0] * 2, [2.0] * 2] * 2
    expected = [0 * 2 + 3, 1, 2, 3 * 2 + 0.5, 4 * 2 + 3, 5, 6, 7 * 2 + 0.5]
    assert state_dict[f"{layer}.bias"].tolist() == pytest.approx(expected)


def test_box_deltas_of_torchvisions_coder_stay_to_the_bit():
    layer = "head.regression_head.bbox_reg"
    state_dict = {f"{layer}.weight": torch.randn(36, 4, 3, 3), f"{layer}.bias": torch.randn(36)}
    before = dict(state_dict)
    fold_deltas(state_dict, layer, [0.0] * 4, [1.0] * 4)
    assert all(state_dict[key] is before[key] for key in before)


TABLES = Tables([(r"a\.(\w+)", r"b.\1")], [(r"ema_.+", "averages")], [(r"mask\..+", "a mask head")])


def test_keys_are_renamed_or_dropped_with_a_note():
    weights = {"a.weight": torch.ones(1), "ema_a": torch.ones(1), "ema_b": torch.ones(1)}
    converted, notes = renamed(weights, TABLES, "x")
    assert list(converted) == ["b.weight"]
    assert notes == ["dropped: averages (2)"]


def test_an_unknown_key_is_refused_by_name():
    with pytest.raises(
        CheckpointError, match=r"teacher\.pth.*cannot be represented[\s\S]*an unknown part: new\.weight"
    ):
        renamed({"a.weight": torch.ones(1), "new.weight": torch.ones(1)}, TABLES, "teacher.pth")


def test_a_part_that_is_not_here_is_refused_by_name():
    weights = {"mask.conv.weight": torch.ones(1), "mask.conv.bias": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"a mask head: mask\.conv\.weight and 1 more"):
        renamed(weights, TABLES, "x")
