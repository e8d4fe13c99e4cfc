"""What is computed for a whole batch equals what torchvision computes image by image, to the last bit."""

import copy

import pytest
import torch
from tiny import CLASSES, build
from tiny import batch as images_and_targets
from torchvision.models.detection import FCOS, MaskRCNN
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import box_iou

from defeat_cli.detectors import batched
from defeat_cli.detectors.zoo import wrap
from defeat_cli.engine.transfer import to_device


def boxes_of(counts, seed, side=100.0):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for count in counts:
        corners = torch.rand(count, 2, generator=generator) * side
        found.append(torch.cat([corners, corners + 1 + torch.rand(count, 2, generator=generator) * side / 2], dim=1))
    return found


def torchvisions_match(matcher, boxes, candidates):
    found = []
    for of_image, among in zip(boxes, candidates, strict=True):
        nothing = torch.full((len(among),), -1)
        found.append(matcher(box_iou(of_image, among)) if len(of_image) else nothing)
    return torch.cat(found)


@pytest.mark.parametrize("at_once", [batched.MAX_ELEMENTS, 3000, 1])
@pytest.mark.parametrize("matcher", [Matcher(0.7, 0.3, True), Matcher(0.5, 0.4, True), Matcher(0.5, 0.5, False)])
@pytest.mark.parametrize("shared", [True, False])
def test_matching(matcher, shared, at_once, monkeypatch):
    monkeypatch.setattr(batched, "MAX_ELEMENTS", at_once)
    for seed, counts in enumerate([(3, 0, 7, 1), (0, 0), (5,), (0, 2), (9, 4, 0)]):
        boxes = boxes_of(counts, seed)
        anchors = boxes_of([200] * len(counts), seed + 50)
        anchors = [anchors[0]] * len(counts) if shared else [a[: 150 + 10 * i] for i, a in enumerate(anchors)]
        # Candidates that are the boxes themselves, and twice the same one: ties.
        if not shared:
            anchors = [torch.cat([a, b, b]) for a, b in zip(anchors, boxes, strict=True)]
        assert torch.equal(batched.match(matcher, boxes, anchors), torchvisions_match(matcher, boxes, anchors))


def test_matching_by_hand():
    """One box, IoU 1, 1/2, 1/3 and 0 with four candidates; the thresholds are 0.6 and 0.4."""
    box = torch.tensor([[0.0, 0, 10, 10]])
    candidates = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 20], [5, 0, 15, 10], [50, 50, 60, 60]])
    assert batched.match(Matcher(0.6, 0.4), [box], [candidates]).tolist() == [0, -2, -1, -1]
    # The box's best candidate is its own however little they overlap, where that is asked for.
    assert batched.match(Matcher(0.6, 0.4, True), [box], [candidates[2:]]).tolist() == [0, -1]


def test_points():
    """Against `FCOS.compute_loss` up to where it hands the matching to its head."""
    detector = build("fcos").eval()
    prepared = detector.prepare(*images_and_targets())
    with torch.no_grad():
        features = detector.features(prepared)
    anchors = detector.anchors_of_image(features, prepared)
    counts = [feature.shape[-2] * feature.shape[-1] for feature in features]
    model = copy.copy(detector.model)
    caught = {}
    model.__dict__["_modules"] = {**model._modules, "head": None}
    model.head = type(
        "Head", (torch.nn.Module,), {"compute_loss": lambda self, t, o, a, matched: caught.update(m=matched)}
    )()
    for seed, numbers in enumerate([(3, 0, 7), (0, 0, 0), (1, 12, 5)]):
        boxes = boxes_of(numbers, seed, side=64.0)
        FCOS.compute_loss(model, [{"boxes": b} for b in boxes], {}, [anchors] * 3, counts)
        found = batched.match_points(model.center_sampling_radius, boxes, anchors, counts)
        assert torch.equal(found, torch.stack(caught["m"]))
        assert bool((found >= 0).any()) == any(numbers)


@pytest.mark.parametrize("counts", [(40, 40, 40), (60, 0, 13), (5,)])
@pytest.mark.parametrize(
    "sampler", [BalancedPositiveNegativeSampler(16, 0.25), BalancedPositiveNegativeSampler(8, 0.5)]
)
def test_sampling_draws_what_torchvision_draws(sampler, counts):
    for seed in range(5):
        labels = torch.randint(-1, 3, (sum(counts),), generator=torch.Generator().manual_seed(seed))
        labels[: counts[0] // 2 * (seed == 4)] = 0
        torch.manual_seed(seed)
        positive, negative, taken = batched.sample(sampler, labels, counts)
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        theirs = [torch.cat(masks).nonzero()[:, 0] for masks in sampler(list(labels.split(counts)))]
        assert torch.equal(after, torch.get_rng_state())
        assert torch.equal(positive, theirs[0])
        assert torch.equal(negative, theirs[1])
        both = torch.zeros(sum(counts)).index_fill(0, torch.cat([positive, negative]), 1)
        assert taken == [int(of_image.sum()) for of_image in both.split(counts)]


@pytest.mark.parametrize("training", [True, False])
def test_proposals(training):
    """Every step of torchvision's filter counts here: its limits of scores, of sizes and of both numbers, and images of
    unlike sizes."""
    rpn = build("faster_rcnn").model.rpn.train(training)
    rpn.score_thresh, rpn.min_size = 0.4, 8.0
    rpn._pre_nms_top_n, rpn._post_nms_top_n = {"training": 60, "testing": 60}, {"training": 9, "testing": 9}
    generator = torch.Generator().manual_seed(0)
    counts, sizes = [120, 30, 9], [(64, 60), (50, 64)]
    (anchors,) = boxes_of([sum(counts)], 3, side=80.0)
    objectness = torch.randn(2 * len(anchors), 1, generator=generator)
    deltas = torch.randn(2 * len(anchors), 4, generator=generator)
    every = rpn.box_coder.decode(deltas, [anchors] * 2).view(2, -1, 4)
    expected, _ = rpn.filter_proposals(every, objectness, sizes, counts)
    found = batched.filter_proposals(rpn, objectness, deltas, anchors, counts, sizes)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert [len(of_image) for of_image in found] == [9, 9]  # both have more, of which the best are taken


def test_regions_and_their_targets():
    heads = build("faster_rcnn").model.roi_heads
    for seed, counts in enumerate([(3, 0, 2), (0, 0, 0), (0, 4, 1)]):
        boxes, proposals = boxes_of(counts, seed), boxes_of((50, 20, 31), seed + 9)
        classes = [torch.arange(1, count + 1) for count in counts]
        torch.manual_seed(seed)
        found = batched.sample_regions(heads, proposals, boxes, classes)
        torch.manual_seed(seed)
        targets = [{"boxes": b, "labels": c} for b, c in zip(boxes, classes, strict=True)]
        theirs, _, labels, wanted = heads.select_training_samples(proposals, targets)
        for ours, other in zip(found[:2], (theirs, labels), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))
        of_objects = torch.cat(labels) > 0
        encoded = torch.cat(heads.box_coder.encode(found[2], found[0]))
        assert torch.equal(encoded[of_objects], torch.cat(wanted)[of_objects])


def test_kept_anchors_are_those_of_the_batch_at_hand():
    detector = build("retinanet").eval()
    for width in (64, 96, 64):
        prepared = detector.prepare([torch.rand(3, 64, width)])
        with torch.no_grad():
            features = detector.features(prepared)
        (expected,) = detector.anchor_generator(ImageList(prepared.pixels, prepared.sizes), features)
        assert torch.equal(detector.anchors_of_image(features, prepared), expected)


def test_targets_of_resized_images():
    """(height, width) 40 x 80 to 20 x 120: x is multiplied by 1.5, y by 0.5."""
    targets = [
        {"boxes": torch.tensor([[10.0, 20, 30, 40]]), "labels": torch.tensor([2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    found = batched.resized_targets(targets, [(40, 80), (9, 9)], [(20, 120), (9, 9)], torch.device("cpu"))
    assert found[0]["boxes"].tolist() == [[15, 10, 45, 20]]
    assert found[0]["labels"].tolist() == [2]
    assert found[1]["boxes"].shape == (0, 4)


def test_what_else_targets_hold_stays_beside_each():
    """torchvision's own recipes give each image a number, and areas that have no entry where there is no box."""
    targets = [
        {"boxes": torch.zeros(2, 4), "image_id": torch.tensor([7]), "area": torch.tensor([1.0, 2.0])},
        {"boxes": torch.zeros(1, 4), "image_id": torch.tensor([8])},
    ]
    found = batched.resized_targets(targets, [(9, 9)] * 2, [(9, 9)] * 2, torch.device("cpu"))
    assert [target["image_id"].tolist() for target in found] == [[7], [8]]
    assert [sorted(target) for target in found] == [["area", "boxes", "image_id"], ["boxes", "image_id"]]


def test_a_model_that_learns_in_another_way_is_left_to_itself():
    class Doubled(RoIHeads):
        def forward(self, *arguments):
            result, losses = super().forward(*arguments)
            return result, {name: 2 * loss for name, loss in losses.items()}

    detector = build("faster_rcnn").train()
    prepared = detector.prepare(*images_and_targets())
    losses = []
    for heads in (RoIHeads, Doubled):
        detector.model.roi_heads.__class__ = heads
        torch.manual_seed(0)
        losses.append(detector.losses(detector.features(prepared), prepared))
    plain, doubled = losses
    assert all(torch.equal(doubled[name], 2 * plain[name]) for name in ("loss_classifier", "loss_box_reg"))
    assert torch.equal(doubled["loss_objectness"], plain["loss_objectness"])


def test_heads_that_sample_in_another_way_are_left_to_themselves():
    """Losses and regions both follow the heads' own labels."""

    class AllBackground(RoIHeads):
        def assign_targets_to_proposals(self, *arguments):
            indices, labels = super().assign_targets_to_proposals(*arguments)
            return indices, [torch.zeros_like(of_image) for of_image in labels]

    detector = build("faster_rcnn").train()
    prepared = detector.prepare(*images_and_targets())
    features = detector.features(prepared)
    assert any(bool(labels.any()) for labels in detector.regions(features, prepared).labels)
    detector.model.roi_heads.__class__ = AllBackground
    assert detector.losses(features, prepared)["loss_box_reg"] == 0
    assert not any(bool(labels.any()) for labels in detector.regions(features, prepared).labels)


def test_a_proposal_network_of_a_users_own_is_called_as_it_is():
    class Whole(RegionProposalNetwork):
        def forward(self, images, features, targets=None):
            _, losses = super().forward(images, features, targets)
            boxes = [torch.tensor([[0.0, 0, 40, 40]]) for _ in images.image_sizes]
            return boxes, losses

    detector = build("faster_rcnn").train()
    detector.model.rpn.__class__ = Whole
    prepared = detector.prepare(*images_and_targets())
    with torch.no_grad():
        features = detector.features(prepared)
        boxes = detector.regions(features, prepared).boxes
        assert [len(of_image) for of_image in boxes] == [1 + len(target["boxes"]) for target in prepared.targets]
        detector.eval()
        found = detector.detections(features, prepared)
        assert all(len(of_image["boxes"]) <= len(CLASSES) for of_image in found)


def test_a_mask_rcnn_learns_from_masks_of_the_size_of_its_images():
    """Against torchvision's own forward, on images of unlike sizes that are resized, with all that its targets hold."""
    own = build("faster_rcnn").model
    torch.manual_seed(0)
    settings = {"min_size": 96, "max_size": 144, "rpn_anchor_generator": own.rpn.anchor_generator}
    model = MaskRCNN(own.backbone, 4, **settings, rpn_batch_size_per_image=16, box_batch_size_per_image=16).eval()
    model.rpn.train(), model.roi_heads.train()
    images, targets = images_and_targets()
    for number, (image, target) in enumerate(zip(images, targets, strict=True)):
        target["masks"] = torch.zeros(len(target["boxes"]), *image.shape[1:], dtype=torch.uint8)
        target["masks"][:, 10:40, 20:50] = 1
        target["image_id"] = number
    detector = wrap(model, CLASSES)
    prepared = detector.prepare(images, targets)
    assert [target["masks"].shape[1:] for target in prepared.targets] == prepared.sizes
    assert [target["image_id"] for target in prepared.targets] == [0, 1, 2]
    torch.manual_seed(0)
    ours = detector.losses(detector.features(prepared), prepared)
    whole, resized = model.transform(images, [dict(target) for target in targets])
    features = model.backbone(whole.tensors)
    torch.manual_seed(0)
    proposals, theirs = model.rpn(whole, features, resized)
    theirs.update(model.roi_heads(features, proposals, whole.image_sizes, resized)[1])
    assert ours.keys() == theirs.keys()
    for name, loss in ours.items():
        torch.testing.assert_close(loss, theirs[name], rtol=1e-3, atol=1e-4)


def test_images_travel_as_one():
    images = [torch.arange(24, dtype=torch.uint8).view(3, 2, 4), torch.arange(9, dtype=torch.uint8).view(3, 3, 1)]
    assert to_device(images, torch.device("cpu")) is images
    travelled = to_device(images, torch.device("meta"))
    assert [image.shape for image in travelled] == [image.shape for image in images]
    assert travelled[0].untyped_storage().nbytes() == 33
