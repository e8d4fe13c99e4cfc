"""Every detector of the zoo keeps the contract: its parts in turn give what torchvision's own forward gives."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou, sigmoid_focal_loss

from defeat_cli.config.architecture import BACKBONES, DETECTOR_FAMILIES, TORCHVISION_BUILDERS, Architecture
from defeat_cli.detectors.contract import Anchored, Batch, Detector
from defeat_cli.detectors.fcos import FCOSDetector
from defeat_cli.detectors.zoo import DETECTORS, build_detector

CLASSES = ["circle", "square", "star"]
TINY = {"backbone": "regnet", "widths": [8, 16, 24, 32], "fpn_channels": 64, "head_channels": 64, "norm": "batch"}
SMALL = {"fpn_channels": 64, "head_channels": 64}

ARCHITECTURES = {
    **{family: {"detector": family, **TINY} for family in DETECTOR_FAMILIES},
    "faster_rcnn-resnet18": {"detector": "faster_rcnn", "backbone": "resnet18", "frozen_stages": 2, **SMALL},
    "retinanet-mobilenet_v3_small": {"detector": "retinanet", "backbone": "mobilenet_v3_small", **SMALL},
    "fcos-mobilenet_v2": {"detector": "fcos", "backbone": "mobilenet_v2", "norm": "batch", **SMALL},
    **{name: {"detector": name} for name in TORCHVISION_BUILDERS},
}

TWO_STAGE = [name for name, keys in ARCHITECTURES.items() if keys["detector"].startswith("faster")]
ONE_STAGE = [name for name in ARCHITECTURES if name not in TWO_STAGE]
OURS = [name for name in ARCHITECTURES if name not in TORCHVISION_BUILDERS]
RETINANETS = [name for name in ONE_STAGE if name.startswith("retinanet")]


def images_and_targets() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """A batch of two sizes; the second image has no boxes."""
    generator = torch.Generator().manual_seed(1)
    images = [
        torch.randint(0, 256, (3, h, w), generator=generator, dtype=torch.uint8) for h, w in ((110, 150), (100, 90))
    ]
    boxes = torch.tensor([[10.0, 12.0, 62.0, 70.0], [30.0, 5.0, 61.0, 36.0], [100.0, 60.0, 149.0, 109.0]])
    return images, [
        {"boxes": boxes, "labels": torch.tensor([1, 3, 2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def detector(request: pytest.FixtureRequest) -> Detector:
    torch.manual_seed(0)
    detector = build_detector(Architecture(**ARCHITECTURES[request.param]), CLASSES, short_side=[96], long_side=160)
    # Freshly made heads tell nothing apart; spread their outputs so that scores, matches and detections differ.
    for module in detector.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.std() < 0.02:
            nn.init.normal_(module.weight, std=0.03)
    if detector.softmax:
        # Torchvision's own builders sample 512 proposals an image; fewer are quicker and prove the same.
        detector.model.roi_heads.fg_bg_sampler.batch_size_per_image = 32
    else:
        nn.init.zeros_(detector.model.head.classification_head.cls_logits.bias)
    return detector


@pytest.fixture
def batch(detector: Detector) -> Batch:
    return detector.eval().prepare(*images_and_targets())


def own_losses(detector: Detector, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """torchvision's training forward, its transform replaced by one that gives what was prepared."""
    prepared = ImageList(detector.normalized(batch), batch.sizes)
    monkeypatch.setattr(detector.model.transform, "forward", lambda images, targets: (prepared, targets))
    torch.manual_seed(7)
    losses = detector.model(list(batch.pixels), batch.targets)
    monkeypatch.undo()
    return losses


def test_covers_the_whole_zoo():
    assert {a["detector"] for a in ARCHITECTURES.values()} == set(DETECTORS)
    assert set(DETECTORS) == {*DETECTOR_FAMILIES, *TORCHVISION_BUILDERS}


def test_parts_in_turn_give_torchvisions_own_losses(detector, batch, monkeypatch):
    detector.train()
    theirs = own_losses(detector, batch, monkeypatch)
    torch.manual_seed(7)
    ours = detector.losses(detector.features(batch), batch)
    assert list(ours) == list(theirs)
    for name, loss in ours.items():
        assert torch.equal(loss, theirs[name]), name
        assert loss.isfinite()


@pytest.mark.parametrize("detector", OURS, indirect=True)
def test_gradients_are_torchvisions_own(detector, batch, monkeypatch):
    detector.train()
    trained = [p for p in detector.parameters() if p.requires_grad]
    theirs = torch.autograd.grad(sum(own_losses(detector, batch, monkeypatch).values()), trained, allow_unused=True)
    torch.manual_seed(7)
    losses = detector.losses(detector.features(batch), batch)
    ours = torch.autograd.grad(sum(losses.values()), trained, allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("detector", OURS, indirect=True)
def test_a_batch_without_any_box(detector, monkeypatch):
    images, targets = images_and_targets()
    batch = detector.train().prepare(images, [targets[1], targets[1]])
    theirs = own_losses(detector, batch, monkeypatch)
    torch.manual_seed(7)
    ours = detector.losses(detector.features(batch), batch)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    regions = detector.eval().regions(detector.features(batch), batch)
    assert all(bool((labels == 0).all()) for labels in regions.labels)


@pytest.mark.parametrize("detector", OURS, indirect=True)
def test_through_preparation_to_rounding(detector):
    """In double precision and without padding: on equal cells rounding alone decides which proposals survive."""
    _, targets = images_and_targets()
    images = [torch.rand(3, 120, 160, dtype=torch.float64), torch.rand(3, 144, 192, dtype=torch.float64)]
    targets = [{**target, "boxes": target["boxes"].double()} for target in targets]
    double = copy.deepcopy(detector).double().train()
    torch.manual_seed(7)
    theirs = double.model(images, targets)
    torch.manual_seed(7)
    batch = double.prepare(images, targets)
    ours = double.losses(double.features(batch), batch)
    for name, loss in theirs.items():
        torch.testing.assert_close(ours[name], loss, rtol=1e-5, atol=0, check_dtype=False)


def test_preparation_leaves_padding_at_zero(detector, batch):
    normalized, valid = detector.normalized(batch), batch.valid
    assert batch.pixels.shape[-2] % 32 == batch.pixels.shape[-1] % 32 == 0
    for image, (height, width) in enumerate(batch.sizes):
        assert valid[image].sum() == height * width
        assert bool(valid[image, :height, :width].all())
        assert not normalized[image, :, height:].any()
        assert not normalized[image, :, :, width:].any()


@pytest.mark.parametrize("detector", OURS, indirect=True)
def test_detections_from_features_are_torchvisions_own(detector, batch, monkeypatch):
    """On images that need no resizing; and what `Detector.detections` makes of `detect` is the same."""
    images = [i[:, :height, :width] for i, (height, width) in zip(batch.pixels, batch.sizes, strict=True)]
    prepared = ImageList(detector.normalized(batch), batch.sizes)
    monkeypatch.setattr(detector.model.transform, "forward", lambda images, targets: (prepared, targets))
    with torch.no_grad():
        found = detector.detections(detector.features(batch), batch)
        for theirs in (detector.model(images), Detector.detections(detector, [], batch)):
            assert sum(len(of_image["boxes"]) for of_image in found) > 0
            for one, other in zip(found, theirs, strict=True):
                assert one.keys() == other.keys()
                assert all(torch.equal(one[key], other[key]) for key in one)


def test_levels_are_those_of_the_features(detector, batch):
    features = detector.features(batch)
    assert len(features) == len(detector.levels) == len(detector.strides)
    for feature, level in zip(features, detector.levels, strict=True):
        assert feature.shape[1] == level.channels
        assert feature.shape[-2:] == tuple(-(-side // level.stride) for side in batch.pixels.shape[-2:])
    assert detector.strides == sorted(detector.strides)


def test_anchors_are_those_of_the_generator_level_by_level(detector, batch):
    if isinstance(detector, FCOSDetector):
        assert not isinstance(detector, Anchored)
        return
    features = detector.features(batch)
    anchors = detector.anchors(features, batch)
    a_cell = detector.anchor_generator.num_anchors_per_location()[0]
    for feature, of_level in zip(features, anchors, strict=True):
        assert of_level.shape == (feature.shape[-2] * feature.shape[-1] * a_cell, 4)
    images = ImageList(batch.pixels, batch.sizes)
    for of_image in detector.anchor_generator(images, features):
        assert torch.equal(torch.cat(anchors), of_image)


def test_regions_and_logits_belong_together(detector, batch):
    with torch.no_grad():
        features = detector.features(batch)
        torch.manual_seed(3)
        regions = detector.regions(features, batch)
        logits = detector.classify(features, regions)
    assert len(regions.boxes) == len(regions.labels) == len(batch.sizes)
    assert logits.shape == (sum(map(len, regions.boxes)), len(CLASSES) + detector.softmax)
    assert [len(boxes) for boxes in regions.boxes] == [len(labels) for labels in regions.labels]
    assert set(torch.cat(regions.labels).unique().tolist()) <= {-1, 0, 1, 2, 3}
    assert bool((regions.labels[0] > 0).any())
    assert set(regions.labels[1].tolist()) == {0}
    torch.manual_seed(3)
    again = detector.regions(features, batch)
    assert all(torch.equal(one, other) for one, other in zip(regions.boxes, again.boxes, strict=True))


@pytest.mark.parametrize("detector", TWO_STAGE, indirect=True)
def test_sampled_proposals_give_torchvisions_classification_loss(detector, batch):
    """In training mode `regions` draws what the losses draw, so labels and logits must give the same loss."""
    detector.train()
    features = detector.features(batch)
    torch.manual_seed(7)
    loss = detector.losses(features, batch)["loss_classifier"]
    torch.manual_seed(7)
    regions = detector.regions(features, batch)
    assert torch.equal(F.cross_entropy(detector.classify(features, regions), torch.cat(regions.labels)), loss)


@pytest.mark.parametrize("detector", TWO_STAGE, indirect=True)
def test_proposals_are_labelled_by_overlap(detector, batch):
    regions = detector.regions(detector.features(batch), batch)
    overlap, best = box_iou(regions.boxes[0], batch.targets[0]["boxes"]).max(dim=1)
    expected = torch.where(overlap >= 0.5, batch.targets[0]["labels"][best], 0)
    assert torch.equal(regions.labels[0], expected)


@pytest.mark.parametrize("detector", ONE_STAGE, indirect=True)
def test_labelled_anchors_give_torchvisions_focal_loss(detector, batch):
    features = detector.features(batch)
    loss = detector.losses(features, batch)["classification"]
    regions = detector.regions(features, batch)
    images = len(batch.sizes)
    logits = detector.classify(features, regions).unflatten(0, (images, -1))
    unused = detector.model.head.classification_head(features)[..., 0]
    labels = torch.stack(regions.labels)
    wanted = F.one_hot(labels.clamp(min=0), len(CLASSES) + 1)[..., 1:].to(logits.dtype)
    focal = sigmoid_focal_loss(logits, wanted).sum(dim=-1) + sigmoid_focal_loss(unused, torch.zeros_like(unused))
    sums, counts = (focal * (labels >= 0)).sum(dim=1), (labels > 0).sum(dim=1)
    if isinstance(detector, FCOSDetector):
        expected = sums.sum() / counts.sum().clamp(min=1)
    else:
        expected = (sums / counts.clamp(min=1)).mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("detector", RETINANETS, indirect=True)
def test_retinanet_ignores_anchors_between_the_thresholds(detector, batch):
    regions = detector.regions(detector.features(batch), batch)
    overlap = box_iou(regions.boxes[0], batch.targets[0]["boxes"])
    of_anchor, of_box = overlap.max(dim=1).values, overlap.max(dim=0).values
    # The anchors that overlap a box best of all are foreground, however little they overlap.
    best = (overlap == of_box).any(dim=1)
    labels = regions.labels[0]
    assert bool((labels[(of_anchor >= 0.5) | best] > 0).all())
    assert bool((labels[(of_anchor < 0.4) & ~best] == 0).all())
    between = (of_anchor >= 0.4) & (of_anchor < 0.5) & ~best
    assert between.any()
    assert bool((labels[between] == -1).all())


@pytest.mark.parametrize("detector", OURS, indirect=True)
def test_detections_are_torchvisions_own(detector):
    images, _ = images_and_targets()
    with torch.no_grad():
        ours = detector.eval().detect(images)
        theirs = detector.model([image / 255 for image in images])
    for image, one, other in zip(images, ours, theirs, strict=True):
        assert one.keys() >= {"boxes", "scores", "labels"}
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert bool((one["boxes"][:, 2:] <= torch.tensor([image.shape[2], image.shape[1]])).all())
    assert sum(len(result["boxes"]) for result in ours) > 0


@pytest.mark.parametrize("detector", DETECTOR_FAMILIES, indirect=True)
def test_half_precision_leaves_boxes_alone(detector, batch):
    """Anchors and proposals have whole coordinates up to 1333: bfloat16 would move them by pixels."""
    with torch.no_grad():
        exact = detector.regions(detector.features(batch), batch)
        with torch.autocast("cpu", torch.bfloat16):
            features = detector.features(batch)
            regions = detector.regions(features, batch)
            losses = detector.losses(features, batch) if not detector.softmax else {}
    assert all(feature.dtype == torch.float32 for feature in features)
    assert all(boxes.dtype == torch.float32 for boxes in regions.boxes)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    if not detector.softmax:
        assert torch.equal(torch.cat(regions.boxes), torch.cat(exact.boxes))


@pytest.mark.parametrize("backbone", [name for name in BACKBONES if name != "regnet"])
def test_every_backbone_has_the_strides_of_its_family(backbone):
    with torch.device("meta"):
        two, one = (
            build_detector(Architecture(detector=family, backbone=backbone), CLASSES, [64], 96)
            for family in ("faster_rcnn", "retinanet")
        )
    body = two.model.backbone.body.to_empty(device="cpu")
    sides = [stage.shape[-1] for stage in body(torch.zeros(1, 3, 64, 64)).values()]
    assert sides == [16, 8, 4, 2]
    assert len(one.model.backbone.body.return_layers) == 3


@pytest.mark.parametrize("kind", ["faster_rcnn", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_a_small_first_image_does_not_spoil_all_that_follow(kind):
    """torchvision keeps the strides that it takes from its first image; one of 40 x 96 pixels is padded to 64 x 96."""
    torch.manual_seed(0)
    detector = build_detector(Architecture(detector=kind, score_threshold=0.0), CLASSES, [40], 96).eval()
    plain = copy.deepcopy(detector.model)
    plain.roi_heads.box_roi_pool.scales = plain.roi_heads.box_roi_pool.map_levels = None
    generator = torch.Generator().manual_seed(1)
    small, large = (torch.rand(3, *size, generator=generator) for size in ((40, 96), (64, 64)))
    with torch.no_grad():
        plain.transform.min_size = (64,)
        plain([large])  # not padded, so that its strides are right
        plain.transform.min_size = (40,)
        expected = [plain([image])[0] for image in (small, large)]
        found = [detector.detect([image])[0] for image in (small, large)]
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
