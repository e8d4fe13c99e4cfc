"""The rivals' losses: numbers derived by hand, loops over single numbers with their gradient, and the edges."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import rivals as oracle
from torch._subclasses.fake_tensor import FakeTensorMode

from defeat_cli.distillation import losses
from defeat_cli.distillation.masks import focal_masks

HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def corner(images, height, width):
    """Cells of images of unlike sizes, each in the top left corner."""
    valid = torch.zeros(images, height, width, dtype=torch.bool)
    for n in range(images):
        valid[n, : max(1, height - n), : max(1, width - 2 * n)] = True
    return valid


def listed(argument):
    return argument.tolist() if isinstance(argument, torch.Tensor) else argument


def assert_equals_loops(fast, slow, student, *arguments, **keywords):
    """Value and gradient of every number that `fast` gives, to 1e-10."""
    student = student.clone().requires_grad_()
    found = fast(student, *arguments, **keywords)
    expected = oracle.value_and_gradient(
        lambda x: slow(x, *map(listed, arguments), **{name: listed(value) for name, value in keywords.items()}),
        student.tolist(),
    )
    found = found if isinstance(found, tuple) else (found,)
    for value, (expected_value, expected_gradient) in zip(found, expected, strict=True):
        (gradient,) = torch.autograd.grad(value, student, retain_graph=True)
        torch.testing.assert_close(value.detach(), double(expected_value), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradient, double(expected_gradient), rtol=1e-10, atol=1e-10)


# Each case: student, teacher, and the cells that count. Channel 1 is constant in `constant channels`, on either side or
# both; 0.5 and its sums are exact, so that the deviations are exactly 0.
def constant(features, channel, value=0.5):
    features = features.clone()
    features[:, channel] = value
    return features


FEATURES = {
    "random": (normal(2, 3, 4, 5, seed=1), normal(2, 3, 4, 5, seed=2), None),
    "large": (normal(2, 3, 4, 5, seed=1, scale=30), normal(2, 3, 4, 5, seed=2, scale=30), None),
    "padding": (normal(2, 3, 4, 5, seed=1), normal(2, 3, 4, 5, seed=2), corner(2, 4, 5)),
    "one cell": (normal(2, 3, 1, 1, seed=1), normal(2, 3, 1, 1, seed=2), None),
    "one cell of one image": (normal(1, 3, 1, 1, seed=1), normal(1, 3, 1, 1, seed=2), None),
    "one channel": (normal(2, 1, 2, 3, seed=1), normal(2, 1, 2, 3, seed=2), None),
    "constant channels": (
        constant(constant(normal(2, 4, 2, 4, seed=1), 1), 2),
        constant(constant(normal(2, 4, 2, 4, seed=2), 2), 3),
        None,
    ),
}
FEATURE_CASES = pytest.mark.parametrize("case", FEATURES)


class TestPkd:
    def test_by_hand(self):
        # Means 2.75 and 2.5; squared deviations sum to 8.75 and 5, over 3 that is a deviation of 1.7078 and 1.2910.
        student, teacher = double([[[[1, 2], [3, 5]]]]), double([[[[2, 1], [4, 3]]]])
        assert losses.pkd_loss(student, teacher).item() == pytest.approx(0.35314, abs=5e-6)

    def test_scale_and_offset_of_a_channel_do_not_matter(self):
        features = normal(2, 3, 4, 4)
        assert losses.pkd_loss(features * double([2.0, 1, 5])[:, None, None] - 7, features).item() < 1e-10

    @FEATURE_CASES
    def test_equals_loops(self, case):
        student, teacher, valid = FEATURES[case]
        assert_equals_loops(losses.pkd_loss, oracle.pkd, student, teacher, valid=valid)

    @pytest.mark.parametrize("size", [(2, 3), (7, 4)])
    def test_a_student_of_another_size_is_resized(self, size):
        student, teacher = normal(1, 2, *size, seed=1), normal(1, 2, 4, 6, seed=2)
        assert_equals_loops(losses.pkd_loss, lambda s, t: oracle.pkd(oracle.resized(s, 4, 6), t), student, teacher)


class TestCwd:
    def test_by_hand(self):
        # Teacher (log 3, 0): 3/4, 1/4 of the cells' weight, student 1/2 each: a KL of 3/4 log 3/2 + 1/4 log 1/2 in one
        # of two channels, the other being equal. Twice the logits at temperature 2 are the same, times 4.
        teacher = double([[[[math.log(3), 0.0]], [[1.0, 1.0]]]])
        expected = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
        assert losses.cwd_loss(torch.zeros_like(teacher), teacher).item() == pytest.approx(expected, rel=1e-12)
        doubled = losses.cwd_loss(torch.zeros_like(teacher), 2 * teacher, temperature=2.0)
        assert doubled.item() == pytest.approx(4 * expected, rel=1e-12)

    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    @FEATURE_CASES
    def test_equals_loops(self, case, temperature):
        student, teacher, valid = FEATURES[case]
        assert_equals_loops(losses.cwd_loss, oracle.cwd, student, teacher, temperature, valid=valid)


class TestAttention:
    def test_by_hand(self):
        # Magnitudes (2 log 3, 0) and (0, 0), T = 1/2. Over channels they average (log 3, 0), over T (2 log 3, 0): cells
        # share 9/10, 1/10, times 2. Over cells they average (log 3, 0): channels likewise.
        spatial, channel = losses.attention(double([[[[-2 * math.log(3), 0.0]], [[0.0, 0.0]]]]), 0.5)
        torch.testing.assert_close(spatial, double([[[1.8, 0.2]]]))
        torch.testing.assert_close(channel, double([[1.8, 0.2]]))

    @FEATURE_CASES
    def test_equals_loops(self, case):
        features, _, valid = FEATURES[case]
        spatial, channel = losses.attention(features, 0.7, valid)
        slow_spatial, slow_channel = oracle.attention(features.tolist(), 0.7, listed(valid))
        expected = torch.zeros_like(spatial)
        for place, value in slow_spatial.items():
            expected[place] = value.real
        torch.testing.assert_close(spatial, expected, rtol=1e-10, atol=1e-10)
        for place, value in slow_channel.items():
            assert channel[place].item() == pytest.approx(value.real, rel=1e-10)


class TestFgd:
    def test_focal_by_hand(self):
        # Attention of 2 log 3 and 0 as above: spatial 1.8 and 0.2, channel 1.8 and 0.2. Differences of 1 in the first
        # channel, 2 in the second: 1.8 + 0.8 = 2.6 a cell before the spatial part. fg (1/2, 0), bg (0, 3).
        teacher = double([[[[-2 * math.log(3), 0.0]], [[0.0, 0.0]]]])
        student = teacher + double([1.0, 2.0])[:, None, None]
        fg, bg = losses.fgd_focal(student, teacher, double([[[0.5, 0.0]]]), double([[[0.0, 3.0]]]))
        assert fg.item() == pytest.approx(0.5 * 1.8 * 2.6, rel=1e-12)
        assert bg.item() == pytest.approx(3 * 0.2 * 2.6, rel=1e-12)

    def test_attention_by_hand(self):
        # A student of zeros attends to all alike: |1.8 - 1| + |0.2 - 1| over cells, and the same over channels.
        teacher = double([[[[2 * math.log(3), 0.0]], [[0.0, 0.0]]]])
        assert losses.fgd_attention_loss(torch.zeros_like(teacher), teacher).item() == pytest.approx(3.2, rel=1e-12)

    @pytest.mark.parametrize("boxes", ["some", "none in one image", "none at all"])
    @FEATURE_CASES
    def test_focal_equals_loops(self, case, boxes):
        student, teacher, valid = FEATURES[case]
        images, _, height, width = teacher.shape
        of_images = [torch.tensor([[0, 0, 9, 9], [5, 4, 17, 12]]), torch.tensor([[-4, 3, 9, 30]])][:images]
        if boxes != "some":
            of_images[0] = torch.zeros(0, 4)
        if boxes == "none at all":
            of_images = [torch.zeros(0, 4)] * images
        of_images = [of_image.double() for of_image in of_images]
        masks = focal_masks(of_images, [(height, width)], [4], None if valid is None else [valid])[0]
        assert_equals_loops(losses.fgd_focal, oracle.fgd_focal, student, teacher, *masks, 0.5, valid=valid)

    @FEATURE_CASES
    def test_attention_equals_loops(self, case):
        student, teacher, valid = FEATURES[case]
        assert_equals_loops(losses.fgd_attention_loss, oracle.fgd_attention, student, teacher, 0.5, valid=valid)
        parts = losses.fgd_attention_parts(student, teacher, 0.5, valid)
        assert sum(parts) == losses.fgd_attention_loss(student, teacher, 0.5, valid)


class TestMgd:
    def test_by_hand(self):
        # Two images: 1 + 4 and 9 + 0, halved.
        generated = double([[[[1.0, 2.0]]], [[[3.0, 0.0]]]])
        assert losses.mgd_loss(generated, torch.zeros_like(generated)).item() == 7.0

    @FEATURE_CASES
    def test_equals_loops(self, case):
        student, teacher, valid = FEATURES[case]
        assert_equals_loops(losses.mgd_loss, oracle.mgd, student, teacher, valid=valid)


SCORES = pytest.mark.parametrize("score", ["random", "nowhere", "one cell"])


def scores(kind, like):
    if kind == "random":
        return uniform(len(like), *like.shape[2:], seed=5)
    score = torch.zeros(len(like), *like.shape[2:], dtype=torch.float64)
    if kind == "one cell":
        score[-1, -1, 0] = 0.3
    return score


class TestFrs:
    def test_by_hand(self):
        # Squares summed over channels 5 and 9, scores 1 and 1/2: (5 + 4.5) / 1.5.
        student = double([[[[1.0, 3.0]], [[2.0, 0.0]]]])
        loss = losses.frs_loss(student, torch.zeros_like(student), double([[[1.0, 0.5]]]))
        assert loss.item() == pytest.approx(9.5 / 1.5, rel=1e-12)

    def test_classes_by_hand(self):
        # Student logits 0, so every cross-entropy is log 2: two a cell, whatever the scores.
        logits = torch.zeros(1, 2, 1, 2, dtype=torch.float64)
        loss = losses.frs_class_loss(logits, logits + 1, double([[[1.0, 0.25]]]))
        assert loss.item() == pytest.approx(2 * math.log(2), rel=1e-12)

    @SCORES
    @FEATURE_CASES
    def test_equals_loops(self, case, score):
        student, teacher, _ = FEATURES[case]
        assert_equals_loops(losses.frs_loss, oracle.frs, student, teacher, scores(score, teacher))

    @SCORES
    @FEATURE_CASES
    def test_classes_equal_loops(self, case, score):
        student, teacher, _ = FEATURES[case]
        assert_equals_loops(losses.frs_class_loss, oracle.frs_class, student, teacher, scores(score, teacher))


PROBABILITIES = {
    "random": (normal(6, 4, seed=1).softmax(1), normal(6, 4, seed=2).softmax(1), None),
    "sigmoid": (normal(5, 3, seed=1).sigmoid(), normal(5, 3, seed=2).sigmoid(), None),
    "some ignored": (
        normal(6, 4, seed=1).softmax(1),
        normal(6, 4, seed=2).softmax(1),
        torch.tensor([True, False, True, True, False, True]),
    ),
    "one region": (normal(1, 4, seed=1).softmax(1), normal(1, 4, seed=2).softmax(1), None),
    "one class": (normal(5, 1, seed=1).sigmoid(), normal(5, 1, seed=2).sigmoid(), None),
    "a constant region": (
        normal(3, 4, seed=1).softmax(1),
        double([[0.25] * 4, [0.5, 0.25, 0.25, 0], [0, 1, 0, 0]]),
        None,
    ),
}


class TestDist:
    def test_by_hand(self):
        # Deviations from 1/3: r = 0.96830; a single region correlates nothing in its columns.
        rows, columns = losses.dist_loss(double([[0.7, 0.2, 0.1]]), double([[0.6, 0.3, 0.1]]))
        assert 1 - rows.item() == pytest.approx(0.96830, abs=5e-6)
        assert columns.item() == 1.0

    def test_linear_in_the_teacher_is_as_good(self):
        teacher = uniform(6, 4, seed=1)
        # To 1e-5: the 1e-8 that keeps constant rows finite is left in every other row.
        assert losses.dist_loss(0.3 * teacher + 0.1, teacher) == pytest.approx((0, 0), abs=1e-5)
        assert losses.dist_loss(1 - teacher, teacher) == pytest.approx((2, 2), abs=1e-5)

    @pytest.mark.parametrize("case", PROBABILITIES)
    def test_equals_loops(self, case):
        student, teacher, valid = PROBABILITIES[case]
        assert_equals_loops(losses.dist_loss, oracle.dist, student, teacher, valid=valid)

    @pytest.mark.parametrize("regions", [0, 3])
    def test_no_region_is_zero_and_keeps_its_gradient(self, regions):
        student = uniform(regions, 4).requires_grad_()
        parts = losses.dist_loss(student, uniform(regions, 4, seed=1), torch.zeros(regions, dtype=torch.bool))
        assert [part.item() for part in parts] == [0.0, 0.0]
        for part in parts:
            (gradient,) = torch.autograd.grad(part, student, retain_graph=True)
            assert gradient.shape == student.shape
            assert not gradient.any()


def some_boxes(count, seed):
    low, sides = 20 * uniform(count, 2, seed=seed), 1 + 15 * uniform(count, 2, seed=seed + 1)
    return torch.cat([low, low + sides], dim=1)


class TestCrossKd:
    def test_class_by_hand(self):
        # x = 0 is 1/2, t = log 3 is 3/4: a cross-entropy of log 2, times |1/2 - 3/4|, times the weight 3, over 2.
        loss = losses.crosskd_class(double([[0.0]]), double([[math.log(3)]]), double([3.0]), 2)
        assert loss.item() == pytest.approx(3 * math.log(2) * 0.25 / 2, rel=1e-12)
        squared = losses.crosskd_class(double([[0.0]]), double([[math.log(3)]]), double([3.0]), 2, beta=2.0)
        assert squared.item() == pytest.approx(3 * math.log(2) * 0.0625 / 2, rel=1e-12)

    def test_box_by_hand(self):
        # Two squares of side 2, one cell in common: IoU 1/7, and 2 of the 9 cells around both are in neither.
        loss = losses.crosskd_box(double([[0, 0, 2, 2]]), double([[1, 1, 3, 3]]), double([0.5]), 2)
        assert loss.item() == pytest.approx(0.5 * (1 - 1 / 7 + 2 / 9) / 2, rel=1e-12)

    @pytest.mark.parametrize("beta", [1.0, 2.0])
    @pytest.mark.parametrize("positives", [0, 3, 0.5])
    def test_class_equals_loops(self, positives, beta):
        student, teacher, weights = normal(6, 4, seed=1, scale=3), normal(6, 4, seed=2, scale=3), uniform(6)
        assert_equals_loops(losses.crosskd_class, oracle.crosskd_class, student, teacher, weights, positives, beta)

    @pytest.mark.parametrize("positives", [0, 3])
    def test_box_equals_loops(self, positives):
        # Boxes that overlap, that do not (moved by 50), that hold one another, and none of any area.
        student, teacher, weights = some_boxes(8, 1), some_boxes(8, 5), uniform(8)
        teacher[2:4] += 50
        teacher[4] = torch.cat([student[4, :2] - 1, student[4, 2:] + 1])
        teacher[5] = torch.cat([student[5, :2] + 0.1, student[5, :2] + 0.2])
        teacher[6] = double([3, 3, 3, 3])
        assert_equals_loops(losses.crosskd_box, oracle.crosskd_box, student, teacher, weights, positives)

    def test_boxes_without_area(self):
        same = double([[3, 3, 3, 3]]).requires_grad_()
        loss = losses.crosskd_box(same, same.detach(), double([1.0]), 1)
        loss.backward()
        assert loss.item() == 1.0
        assert same.grad.isfinite().all()

    @pytest.mark.parametrize("loss", [losses.crosskd_class, losses.crosskd_box])
    @pytest.mark.parametrize("regions", [0, 3])
    def test_no_weight_is_zero_and_keeps_its_gradient(self, loss, regions):
        student = some_boxes(regions, 1).requires_grad_()
        value = loss(student, some_boxes(regions, 3), torch.zeros(regions), torch.tensor(0))
        value.backward()
        assert value.item() == 0.0
        assert student.grad.shape == student.shape
        assert not student.grad.any()


def every_loss(student, teacher, cell=0.5):
    """Each loss of features [N, C, h, w], of their cells as regions, and of their four channels as boxes.

    cell: what every cell and region counts; at 0 none is valid.
    """
    cells = torch.full((len(student), *student.shape[2:]), cell)
    ours, theirs = (x.permute(0, 2, 3, 1).flatten(0, 2) for x in (student, teacher))
    weights, valid = cells.flatten(), cells > 0
    return {
        "pkd": losses.pkd_loss(student, teacher, valid),
        "cwd": losses.cwd_loss(student, teacher, 2.0, valid),
        "fgd focal": sum(losses.fgd_focal(student, teacher, cells, cells, 0.5, valid)),
        "fgd attention": losses.fgd_attention_loss(student, teacher, 0.5, valid),
        "mgd": losses.mgd_loss(student, teacher, valid),
        "frs": losses.frs_loss(student, teacher, cells),
        "frs class": losses.frs_class_loss(student, teacher, cells),
        "dist": sum(losses.dist_loss(ours.sigmoid(), theirs.sigmoid(), valid.flatten())),
        "crosskd class": losses.crosskd_class(ours, theirs, weights, weights.sum()),
        "crosskd box": losses.crosskd_box(ours, theirs, weights, weights.sum()),
    }


LOSSES = list(every_loss(normal(2, 4, 3, 3), normal(2, 4, 3, 3)))


@HALF
def test_half_features_are_computed_in_float32(dtype):
    # At 300 times the usual scale squares overflow float16; sums over cells lose most of themselves in bfloat16.
    student, teacher = (normal(2, 4, 16, 16, seed=seed, scale=300).to(dtype) for seed in (1, 2))
    with torch.autocast("cpu", torch.bfloat16):
        found = every_loss(student.requires_grad_(), teacher)
    expected = every_loss(student.float(), teacher.float())
    # Probabilities are made by the caller, in half precision here.
    for name in set(LOSSES) - {"dist"}:
        assert found[name].dtype == torch.float32, name
        assert found[name].isfinite(), name
        torch.testing.assert_close(found[name], expected[name], msg=name)
    sum(found.values()).backward()
    assert student.grad.dtype == dtype


@pytest.mark.parametrize("name", LOSSES)
def test_the_teacher_gets_no_gradient(name):
    student, teacher = normal(2, 4, 3, 3, seed=1).requires_grad_(), normal(2, 4, 3, 3, seed=2).requires_grad_()
    every_loss(student, teacher)[name].backward()
    assert student.grad.any()
    assert teacher.grad is None


@pytest.mark.parametrize("name", LOSSES)
def test_no_valid_cell_is_zero_and_keeps_its_gradient(name):
    student, teacher = normal(2, 4, 3, 3, seed=1).requires_grad_(), normal(2, 4, 3, 3, seed=2)
    value = every_loss(student, teacher, cell=0.0)[name]
    value.backward()
    assert value.item() == 0.0
    assert not student.grad.any()


def test_shapes_that_do_not_fit_are_refused():
    features, cells = torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5)
    for loss in (losses.pkd_loss, losses.cwd_loss, losses.fgd_attention_loss, losses.mgd_loss):
        with pytest.raises(ValueError, match=r"teacher \(2, 1, 4, 5\) do not describe the same cells"):
            loss(features, features[:, :1])
        with pytest.raises(ValueError, match=r"valid \(2, 4, 1\) do not describe the same cells"):
            loss(features, features, valid=cells[..., :1])
    with pytest.raises(ValueError, match=r"bg \(1, 4, 5\) do not describe the same cells"):
        losses.fgd_focal(features, features, cells, cells[:1])
    for loss in (losses.frs_loss, losses.frs_class_loss):
        with pytest.raises(ValueError, match=r"score \(1, 4, 5\)"):
            loss(features, features, cells[:1])
    rows = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="do not describe the same regions"):
        losses.dist_loss(rows, rows[:, :1])
    for loss in (losses.crosskd_class, losses.crosskd_box):
        with pytest.raises(ValueError, match=r"weights \(1,\) do not describe the same regions"):
            loss(rows, rows, torch.ones(1), 1)


def test_nothing_waits_for_the_device():
    # Fake tensors have no values: reading one, as `.item()` or a boolean index does, raises.
    with FakeTensorMode(allow_non_fake_inputs=False):
        sum(every_loss(torch.zeros(2, 4, 3, 3, requires_grad=True), torch.zeros(2, 4, 3, 3)).values()).backward()
        focal_masks([torch.zeros(2, 4), torch.zeros(0, 4)], [(4, 4)], [8], [torch.ones(2, 4, 4, dtype=torch.bool)])


class TestFocalMasks:
    def test_drawn(self):
        # Stride 8 on 4 x 5 cells. The wide box covers 2 x 4 cells, the small one 1 x 1 inside it; 12 cells are left.
        boxes = [torch.tensor([[0.0, 8, 32, 24], [8, 8, 16, 16]])]
        ((fg, bg),) = focal_masks(boxes, [(4, 5)], [8])
        e, o, b = 1 / 8, 1.0, 1 / 12
        assert fg[0].tolist() == [[0, 0, 0, 0, 0], [e, o, e, e, 0], [e, e, e, e, 0], [0, 0, 0, 0, 0]]
        torch.testing.assert_close(bg[0], torch.where(fg[0] == 0, b, 0.0))

    def test_area_is_counted_on_the_map(self):
        # Two thirds of the box are beside the map: its weights on the map sum to 1 all the same.
        ((fg, _),) = focal_masks([torch.tensor([[-32.0, 0, 16, 16]])], [(4, 4)], [8])
        assert fg[0, :2, :2].tolist() == [[0.25, 0.25], [0.25, 0.25]]
        assert fg.sum() == 1

    def test_an_image_without_boxes_is_all_background(self):
        (fg, bg), _ = focal_masks([torch.zeros(0, 4)], [(2, 4), (1, 2)], [8, 16])
        assert not fg.any()
        assert (bg == 1 / 8).all()

    def test_an_image_full_of_one_object_has_no_background(self):
        ((fg, bg),) = focal_masks([torch.tensor([[0.0, 0, 32, 32]])], [(4, 4)], [8])
        assert (fg == 1 / 16).all()
        assert not bg.any()

    @pytest.mark.parametrize("seed", range(5))
    def test_equals_loops(self, seed):
        generator = torch.Generator().manual_seed(seed)
        sizes, strides = [(8, 10), (4, 5), (2, 3), (1, 2)], [8, 16, 32, 64]
        valid = [corner(3, *size) for size in sizes]
        corners = torch.randint(-20, 70, (3, 6, 2), generator=generator)
        boxes = torch.cat([corners, corners + torch.randint(1, 40, (3, 6, 2), generator=generator)], dim=-1)
        # Nothing lies beside the map: where a box does, it marks nothing, which the loop does not know of.
        boxes = boxes.clamp(min=-9, max=63)
        found = focal_masks(list(boxes.double()), sizes, strides, valid)
        for (fg, bg), (height, width), stride, ok in zip(found, sizes, strides, valid, strict=True):
            for n in range(3):
                inside = [box for box in boxes[n].tolist() if box[2] // stride >= 0 and box[3] // stride >= 0]
                slow_fg, slow_bg = oracle.focal_masks(
                    [[max(x1, 0), max(y1, 0), x2, y2] for x1, y1, x2, y2 in inside],
                    height,
                    width,
                    stride,
                    listed(ok[n]),
                )
                torch.testing.assert_close(fg[n], double(slow_fg) * ok[n], rtol=1e-12, atol=0)
                torch.testing.assert_close(bg[n], double(slow_bg), rtol=1e-12, atol=0)
