"""What the rivals' terms compute, against plain torchvision, loops and numbers by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracles import rivals as oracle
from tiny import batch as make_batch
from tiny import build, distil
from torchvision.ops import generalized_box_iou_loss

from defeat_cli.detectors.contract import FeatureDetector
from defeat_cli.distillation import losses
from defeat_cli.distillation.masks import valid_masks
from defeat_cli.distillation.terms import TERMS
from defeat_cli.distillation.terms.fgd import Relation
from defeat_cli.distillation.terms.mgd import Generator
from defeat_cli.distillation.terms.pyramid import at_published_size
from defeat_cli.distillation.terms.scores import teacher_scores

batch = pytest.fixture(make_batch)


def views(distiller, batch):
    """The looks of student and teacher at a batch; the detection losses are left out."""
    return distiller.views(*batch)


def valid_of(view):
    return valid_masks(view.batch.valid, [f.shape[-2:] for f in view.features], view.detector.strides)


class TestPublishedSize:
    def test_the_published_image_and_channels_change_nothing(self):
        # 800 x 1333 pixels are 100 x 167 cells of 8 pixels, in a batch that is padded to 1344.
        valid = torch.zeros(2, 100, 168, dtype=torch.bool)
        valid[:, :, :167] = True
        assert at_published_size(torch.tensor(3.0), channels=256, stride=8, valid=valid) == 3

    def test_by_hand(self):
        # Images of 4 and 2 cells average 3; P7 of the published image has 7 x 11 = 77. 64 channels are a quarter.
        valid = torch.tensor([[[True, True], [True, True]], [[True, True], [False, False]]])
        assert at_published_size(torch.tensor(3.0), stride=128, valid=valid).item() == 77
        assert at_published_size(torch.tensor(3.0), channels=64).item() == 12
        assert at_published_size(torch.tensor(3.0), channels=64, stride=128, valid=valid).item() == 4 * 77


class Blocks(torch.nn.Module):
    """Features of two levels that see one cell each, so that an image of larger blocks has the same ones, repeated."""

    def __init__(self, seed, channels, copies=1):
        super().__init__()
        torch.manual_seed(seed)
        self.convs = torch.nn.ModuleList(torch.nn.Conv2d(3, channels, stride, stride=stride) for stride in (8, 16))
        for conv in self.convs:
            # Every pixel of a cell alike: blocks of any size have the same features.
            conv.weight.data = torch.randn(channels, 3, 1, 1).expand_as(conv.weight).clone() / conv.weight[0, 0].numel()
        self.copies = copies

    def forward(self, pixels):
        return [conv(pixels).repeat(1, self.copies, 1, 1) for conv in self.convs]


def blocky(seed, channels=6, copies=1):
    return FeatureDetector(
        Blocks(seed, channels, copies), ["a"], lambda model, batch: model(batch.pixels), lambda *_: {}
    )


def pull(name, images, boxes, copies=1, **settings):
    """Each loss of a term, and the sum of its gradient in the student's weights."""
    student, teacher = blocky(1, copies=copies), blocky(2, copies=copies)
    distiller = distil(student, teacher, [name], **settings)
    # Layers that look beyond a cell see the repeated features at the edges differently.
    term = distiller.terms[name]
    term.adapters = torch.nn.ModuleList(torch.nn.Identity() for _ in term.pairs)
    if name == "mgd":
        term.generators = term.adapters
    targets = [{"boxes": torch.tensor(b), "labels": torch.ones(len(b), dtype=torch.int64)} for b in boxes]
    found = {}
    for key, loss in distiller(images, targets).weighted.items():
        gradients = torch.autograd.grad(loss, student.model.parameters(), retain_graph=True, allow_unused=True)
        found[key] = loss.item(), sum(gradient.sum().item() for gradient in gradients if gradient is not None)
    return found


@pytest.mark.parametrize(
    ("name", "settings", "tolerance"),
    [
        ("mgd", {"hidden": 0.0}, 1e-4),
        ("fgd", {}, 1e-4),
        ("cwd", {}, 1e-4),
        ("fitnets", {}, 1e-4),
        # n - 1 cells in its deviations instead of n: 1 / 24 of the few cells of the coarser level.
        ("pkd", {}, 2e-2),
    ],
)
def test_the_same_image_at_half_the_side_pulls_as_strongly(name, settings, tolerance):
    # Blocks of 32 pixels, then of 16: the student's levels have 4 times the cells, each four of them alike.
    colours = torch.rand(2, 3, 4, 3, generator=torch.Generator().manual_seed(0))
    large = list(F.interpolate(colours, scale_factor=32))
    small = list(F.interpolate(colours, scale_factor=16))
    boxes = [[[0.0, 0, 64, 32], [32, 64, 96, 128]], [[32.0, 32, 96, 96]]]
    at_large = pull(name, large, boxes, **settings)
    at_small = pull(name, small, [[[x / 2 for x in box] for box in of_image] for of_image in boxes], **settings)
    for key, values in at_large.items():
        assert at_small[key] == pytest.approx(values, rel=tolerance), key


@pytest.mark.parametrize(("name", "settings"), [("mgd", {"hidden": 0.0}), ("fgd", {}), ("cwd", {}), ("pkd", {})])
def test_the_same_features_in_twice_the_channels_pull_as_strongly(name, settings):
    images = list(torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(0)))
    boxes = [[[0.0, 0, 64, 32]], [[32.0, 32, 96, 96]]]
    once = pull(name, images, boxes, **settings)
    twice = pull(name, images, boxes, copies=2, **settings)
    for key, values in once.items():
        assert twice[key] == pytest.approx(values, rel=1e-4), key


@pytest.mark.parametrize("name", ["pkd", "cwd", "fgd", "mgd", "frs", "fitnets"])
def test_what_features_are_in_the_padding_does_not_matter(name, batch):
    distiller = distil(
        build("retinanet"), build("retinanet", seed=1), [name], **({"hidden": 0.0} if name == "mgd" else {})
    )
    term = distiller.terms[name]
    # Layers that look beyond a cell bring padding into the image, as the neck's own convolutions do.
    for convolutions in {
        "fitnets": [term.adapters],
        "frs": [term.adapters],
        "mgd": [getattr(term, "generators", None)],
    }.get(name, []):
        for i in range(len(convolutions)):
            convolutions[i] = torch.nn.Identity()
    found = []
    for garbage in (0.0, 1000.0):
        student, teacher = views(distiller, batch)
        if name == "frs":
            teacher.cell_logits, student.cell_logits  # noqa: B018 - made of the features before these change
        for view in (student, teacher):
            for feature, valid in zip(view.features, valid_of(view), strict=True):
                with torch.no_grad():
                    feature += garbage * ~valid[:, None]
        found.append({key: loss.value.item() for key, loss in term(student, teacher).items()})
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def double_parameters(module):
    """Random parameters, so that each has its part in the output."""
    module.double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("case", ["random", "padding", "one cell", "constant"])
def test_relations_equal_loops(case):
    torch.manual_seed(0)
    shape = (2, 4, 1, 1) if case == "one cell" else (2, 4, 3, 4)
    features = torch.full(shape, 0.5).double() if case == "constant" else torch.randn(shape, dtype=torch.float64)
    valid = None
    if case == "padding":
        valid = torch.ones(2, 3, 4, dtype=torch.bool)
        valid[1, :, 2:] = False
    module = double_parameters(Relation(4))
    _, norm, _, up = module.transform
    down = module.transform[0]
    parameters = {
        "context": (module.context.weight.flatten().tolist(), module.context.bias.item()),
        "down": (down.weight.flatten(1).tolist(), down.bias.tolist()),
        "norm": (norm.weight.flatten().tolist(), norm.bias.flatten().tolist()),
        "up": (up.weight.flatten(1).tolist(), up.bias.tolist()),
    }
    expected = oracle.relation(features.tolist(), parameters, None if valid is None else valid.tolist())
    expected = torch.tensor(expected, dtype=torch.complex128).real
    torch.testing.assert_close(module(features, valid).detach(), expected, rtol=1e-10, atol=1e-10)


def test_relations_start_as_the_identity():
    features = torch.randn(2, 6, 3, 3)
    assert torch.equal(Relation(6)(features), features)


def test_generation_equals_loops():
    torch.manual_seed(0)
    generator, features = double_parameters(Generator(3)), torch.randn(2, 3, 3, 4, dtype=torch.float64)
    first, _, second = generator
    hidden = oracle.conv3(features.tolist(), first.weight.tolist(), first.bias.tolist())
    hidden = torch.tensor(hidden, dtype=torch.float64).clamp(min=0)
    expected = oracle.conv3(hidden.tolist(), second.weight.tolist(), second.bias.tolist())
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(generator(features).detach(), expected, rtol=1e-10, atol=1e-10)


def test_mgd_hides_cells_in_all_channels_anew_in_every_step():
    student, teacher = blocky(1), blocky(2)
    distiller = distil(student, teacher, ["mgd"], hidden=0.3)
    seen = []
    distiller.terms["mgd"].generators[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = [torch.rand(3, 512, 512)]
    targets = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]
    for _ in range(2):
        distiller(images, targets)
    hidden = [(features == 0) for features in seen]
    for of_step in hidden:
        assert torch.equal(of_step.any(dim=1), of_step.all(dim=1))
        # 4096 cells: three standard deviations of the share are 0.021.
        assert of_step.float().mean().item() == pytest.approx(0.3, abs=0.022)
    assert not torch.equal(*hidden)


def test_fgd_equals_its_parts(batch):
    student, teacher = build("retinanet"), build("retinanet", seed=1)
    distiller = distil(student, teacher, ["fgd"], temperature=0.7)
    for parameter in distiller.terms["fgd"].parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ours, theirs = views(distiller, batch)
    found = distiller.terms["fgd"](ours, theirs)
    expected = dict.fromkeys(("fg", "bg", "attention", "relation"), 0.0)
    term = distiller.terms["fgd"]
    for i, (s, t, valid, stride) in enumerate(
        zip(ours.features, theirs.features, valid_of(ours), student.strides, strict=True)
    ):
        channels = 256 / 16
        cells = math.ceil(800 / stride) * math.ceil(1333 / stride) / (valid.sum().item() / 3)
        masks = [
            oracle.focal_masks(
                [[int(x) for x in box] for box in target["boxes"].tolist()], *valid.shape[1:], stride, ok
            )
            for target, ok in zip(ours.batch.targets, valid.tolist(), strict=True)
        ]
        fg, bg = (torch.tensor([mask[k] for mask in masks]) * valid for k in (0, 1))
        for name, value in zip(("fg", "bg"), losses.fgd_focal(s, t, fg, bg, 0.7, valid), strict=True):
            expected[name] += channels * value.item()
        (space, channel), (their_space, their_channel) = (losses.attention(x, 0.7, valid) for x in (s, t))
        expected["attention"] += cells * (space - their_space).abs().sum().item() / 3
        expected["attention"] += channels * (channel - their_channel).abs().sum().item() / 3
        apart = term.student_relations[i](s, valid) - term.teacher_relations[i](t, valid)
        expected["relation"] += channels * cells * (apart.square() * valid[:, None]).sum().item() / 3
    assert {name: loss.value.item() for name, loss in found.items()} == pytest.approx(expected, rel=1e-4)


class TestScores:
    def test_of_one_stage_teachers_are_the_best_class(self, batch):
        for family in ("retinanet", "fcos"):
            detector = build(family)
            prepared = detector.prepare(*batch)
            features = detector.features(prepared)
            logits = detector.model.head.classification_head(features)[..., 1:]
            start = 0
            for found, feature in zip(detector.cell_logits(features), features, strict=True):
                images, anchors, classes, height, width = found.shape
                assert (images, classes, height, width) == (3, 3, *feature.shape[-2:])
                of_level = logits[:, start : start + anchors * height * width]
                start += anchors * height * width
                torch.testing.assert_close(found.permute(0, 3, 4, 1, 2).flatten(1, 3), of_level)
            assert start == logits.shape[1]

    def test_of_two_stage_teachers_are_the_objectness(self, batch):
        detector = build("faster_rcnn")
        features = detector.features(detector.prepare(*batch))
        objectness, _ = detector.model.rpn.head(features)
        for found, expected in zip(detector.cell_logits(features), objectness, strict=True):
            assert torch.equal(found[:, :, 0], expected)

    def test_are_within_0_and_1_on_the_students_cells(self, batch):
        student, teacher = build("faster_rcnn"), build("retinanet", seed=1, short_side=96)
        distiller = distil(student, teacher, ["frs"], own_size=True)
        ours, theirs = views(distiller, batch)
        scores = teacher_scores(ours, theirs, distiller.terms["frs"].pairs)
        assert scores[0] is None
        for score, feature in zip(scores[1:], ours.features[1:], strict=True):
            assert score.shape == (3, *feature.shape[-2:])
            assert ((score > 0) & (score < 1)).all()

    def test_weigh_frs(self, batch):
        student, teacher = build("retinanet"), build("retinanet", seed=1)
        distiller = distil(student, teacher, ["frs"])
        ours, theirs = views(distiller, batch)
        found = distiller.terms["frs"](ours, theirs)
        features, classes = 0.0, 0.0
        start = 0
        logits, their_logits = (
            view.detector.model.head.classification_head(view.features)[..., 1:] for view in (ours, theirs)
        )
        for i, (s, t, valid) in enumerate(zip(ours.features, theirs.features, valid_of(ours), strict=True)):
            number = 6 * valid[0].numel()
            cut = slice(start, start + number)
            start += number
            # [N, cells, anchors * classes]
            by_cell = [x[:, cut].unflatten(1, (-1, 6)).flatten(2) for x in (logits, their_logits)]
            m = by_cell[1].sigmoid().amax(dim=2) * valid.flatten(1)
            apart = (distiller.terms["frs"].adapters[i](s) - t).square().sum(dim=1).flatten(1)
            features += 16 * ((m * apart).sum() / m.sum()).item()
            entropy = F.binary_cross_entropy_with_logits(by_cell[0], by_cell[1].sigmoid(), reduction="none").sum(dim=2)
            classes += ((m * entropy).sum() / m.sum()).item()
        assert found["features"].value.item() == pytest.approx(features, rel=1e-4)
        assert found["classes"].value.item() == pytest.approx(classes, rel=1e-4)

    def test_are_a_mask_for_the_neck_too(self, batch):
        student, teacher = build("faster_rcnn"), build("faster_rcnn", seed=1)
        distiller = distil(student, teacher, ["neck"], mask="teacher")
        ours, theirs = views(distiller, batch)
        found = distiller.terms["neck"](ours, theirs)
        objectness, _ = teacher.model.rpn.head(theirs.features)
        expected = [
            losses.imitation_loss(adapter(s), t, logits.sigmoid().amax(dim=1), 1.0, 1.0, valid)
            for adapter, s, t, logits, valid in zip(
                distiller.terms["neck"].adapters,
                ours.features,
                theirs.features,
                objectness,
                valid_of(ours),
                strict=True,
            )
        ]
        for name, values in zip(("fg", "bg"), zip(*expected, strict=True), strict=True):
            torch.testing.assert_close(found[name].value, torch.stack(values).mean())
        # No box is asked for.
        unlabelled = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}] * 3
        again = distiller.terms["neck"](*views(distiller, (batch[0], unlabelled)))
        assert again["fg"].value == found["fg"].value


@pytest.mark.parametrize("family", ["faster_rcnn", "retinanet"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_dist_correlates_what_the_heads_say_of_the_teachers_regions(family, temperature, batch):
    student, teacher = build(family), build(family, seed=1)
    # Heads as they start hardly tell regions apart.
    for detector in (student, teacher):
        for name, parameter in detector.model.named_parameters():
            if ("class" in name or "cls" in name) and parameter.dim() > 1:
                torch.nn.init.kaiming_normal_(parameter)
    distiller = distil(student, teacher, ["dist"], temperature=temperature, beta=3.0)
    ours, theirs = views(distiller, batch)
    found = distiller.terms["dist"](ours, theirs)
    regions = theirs.regions
    logits = [view.detector.classify(view.features, regions) / temperature for view in (ours, theirs)]
    sides = [x.softmax(dim=1) if family == "faster_rcnn" else x.sigmoid() for x in logits]
    kept = torch.cat(regions.labels) >= 0
    ours, theirs = (side[kept].double().detach() for side in sides)
    rows, columns = oracle.dist(ours.tolist(), theirs.tolist())
    assert found["regions"].value.item() == pytest.approx(temperature**2 * rows, rel=1e-4)
    assert found["classes"].value.item() == pytest.approx(temperature**2 * columns, rel=1e-4)
    assert (found["regions"].weight, found["classes"].weight) == (3.0, 1.0)


class TestCrossKd:
    @pytest.mark.parametrize("family", ["retinanet", "fcos"])
    def test_towers_and_predictors_are_torchvisions_head_cut_in_two(self, family, batch):
        detector = build(family)
        prepared = detector.prepare(*batch)
        features = detector.features(prepared)
        head = detector.model.head
        predictions = detector.predict(detector.towers(features), prepared)
        assert torch.equal(
            torch.cat([logits for logits, _ in predictions], dim=1), head(features)["cls_logits"][..., 1:]
        )
        boxes = torch.cat([of_level for _, of_level in predictions], dim=1)
        anchors = torch.cat(detector.anchors(features, prepared)) if family == "retinanet" else None
        deltas = head(features)["bbox_regression"]
        for image in range(3):
            if family == "retinanet":
                expected = detector.model.box_coder.decode_single(deltas[image], anchors)
            else:
                # A prediction is a distance to each side, in strides, from a point that torchvision places by the
                # pixels of the batch over the cells of the map.
                points, strides = [], []
                for feature, stride in zip(features, detector.strides, strict=True):
                    sides = zip(prepared.pixels.shape[-2:], feature.shape[-2:], strict=True)
                    y, x = torch.meshgrid(*(torch.arange(n) * (side // n) for side, n in sides), indexing="ij")
                    points.append(torch.stack([x, y], dim=-1).reshape(-1, 2).float())
                    strides += [stride] * len(points[-1])
                left_top, right_bottom = (deltas[image] * torch.tensor(strides)[:, None]).split(2, dim=1)
                points = torch.cat(points)
                expected = torch.cat([points - left_top, points + right_bottom], dim=1)
            torch.testing.assert_close(boxes[image], expected)

    @pytest.mark.parametrize("family", ["retinanet", "fcos"])
    def test_a_student_like_its_teacher_has_nothing_to_learn(self, family, batch):
        student, teacher = build(family), build(family)
        for detector in (student, teacher):
            # No box without area, which is at a distance of 1 from itself.
            torch.nn.init.constant_(detector.model.head.regression_head.bbox_reg.bias, 1.0)
        losses_of = distil(student, teacher, ["crosskd"]).eval()(*batch).raw
        assert losses_of["crosskd_classes"].item() == pytest.approx(0, abs=1e-5)
        assert losses_of["crosskd_boxes"].item() == pytest.approx(0, abs=1e-4)

    @pytest.mark.parametrize("family", ["retinanet", "fcos"])
    def test_equals_torchvisions_modules_wired_by_hand(self, family, batch):
        student, teacher = build(family), build(family, seed=1)
        distiller = distil(student, teacher, ["crosskd"], beta=2.0)
        ours, theirs = views(distiller, batch)
        found = distiller.terms["crosskd"](ours, theirs)

        def halves(tower):
            """Blocks of a convolution and what follows it: three of RetinaNet's, nine layers of FCOS's."""
            first = 3 if family == "retinanet" else 9
            return tower[:first], tower[first:]

        def recast(s, t, valid):
            cells = valid[:, None].expand_as(s)
            result = torch.empty_like(s)
            for c in range(s.shape[1]):
                std, mean = torch.std_mean(s[:, c][cells[:, c]])
                their_std, their_mean = torch.std_mean(t[:, c][cells[:, c]])
                if not cells[:, c].sum() > 1:
                    std, their_std = torch.zeros(()), torch.zeros(())
                result[:, c] = (s[:, c] - mean) / (std + 1e-6) * their_std + their_mean
            return result

        positives = sum((labels > 0).sum() for labels in student.regions(ours.features, ours.batch).labels)
        assert positives > 0
        heads = [d.model.head for d in (student, teacher)]
        anchors = teacher.model.anchor_generator(_images(ours.batch), theirs.features)[0]
        classes, boxes = 0.0, 0.0
        for s, t, valid in zip(ours.features, theirs.features, valid_of(ours), strict=True):
            outputs = []
            for part, predictor in (("classification_head", "cls_logits"), ("regression_head", "bbox_reg")):
                (first, _), (their_first, last) = (halves(getattr(head, part).conv) for head in heads)
                their_map = their_first(t)
                for features in (recast(first(s), their_map, valid), their_map):
                    outputs.append(getattr(getattr(heads[1], part), predictor)(last(features)))
            columns = heads[1].classification_head.num_classes
            x, y = (o.unflatten(1, (-1, columns)).permute(0, 3, 4, 1, 2)[..., 1:] for o in outputs[:2])
            weight = valid[:, :, :, None].expand(x.shape[:-1])
            entropy = F.binary_cross_entropy_with_logits(x, y.sigmoid(), reduction="none")
            classes += ((entropy * (x.sigmoid() - y.sigmoid()) ** 2).sum(dim=-1) * weight).sum().item()
            deltas = [o.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(0, 3) for o in outputs[2:]]
            number = weight[0].numel()
            of_level, anchors = anchors[:number].repeat(3, 1), anchors[number:]
            if family == "retinanet":
                decoded = [teacher.model.box_coder.decode_single(d, of_level) for d in deltas]
            else:
                decoded = [teacher.model.box_coder.decode(d.relu(), of_level) for d in deltas]
            distance = generalized_box_iou_loss(*decoded, reduction="none")
            boxes += (distance * (y.sigmoid().amax(dim=-1) * weight).flatten()).sum().item()
        assert found["classes"].value.item() == pytest.approx(classes / positives.item(), rel=1e-3)
        assert found["boxes"].value.item() == pytest.approx(boxes / positives.item(), rel=1e-3)


def _images(batch):
    from torchvision.models.detection.image_list import ImageList

    return ImageList(batch.pixels, batch.sizes)


def test_every_shipped_term_has_settings_by_its_name():
    from defeat_cli.config.terms import SETTINGS

    assert {name: term.Settings for name, term in TERMS.items()} == SETTINGS
