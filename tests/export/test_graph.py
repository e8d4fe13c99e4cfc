"""Exported graphs against torchvision's own forward: every family, backbone, convention and input, free sizes."""

import io
import os
import warnings

import pytest
import torch
from export.random_detectors import random_detector, small

from defeat_cli.config.architecture import BACKBONES, DETECTOR_FAMILIES
from defeat_cli.errors import DefeatError
from defeat_cli.export.graph import Card, Graph, TracedTransform, to_onnx, to_torchscript
from defeat_cli.export.parity import compare
from defeat_cli.export.runtime import OnnxDetector

CLASSES = ["cat", "dög"]
NAMES = ("boxes", "scores", "labels")
SIZES = [(70, 80), (48, 115), (120, 50), (33, 41)]
"""Height and width. At a long side of 96, single precision resizes some of them to a pixel less."""

FOREIGN = {
    "faster_rcnn": {"roi_align_aligned": True, "rounded_anchors": False, "nominal_strides": True},
    "retinanet": {"rounded_anchors": False, "nominal_strides": True, "p6_from": "c5", "clip_after_nms": True},
}


def image(size):
    return torch.rand(3, *size, generator=torch.Generator().manual_seed(sum(size)))


def assert_same_on_all_sizes(detector, theirs, least=1):
    """`theirs` detects what `model.forward` of torchvision detects, at least so many things in each image."""
    selection = getattr(detector.model, "roi_heads", detector.model)
    for size in SIZES:
        with torch.no_grad():
            (ours,) = detector.model([image(size)])
        comparison = compare(ours, theirs(image(size)), selection.score_thresh, selection.detections_per_img)
        assert min(comparison.counts) >= least, size
        assert comparison.agrees, (size, comparison)


def onnx_of(graph):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    detector = OnnxDetector(to_onnx(graph), "the file")
    return lambda pixels: detector.detect([pixels])[0]


def random_on(family, backbone):
    keys = {} if backbone == "regnet" else {"widths": None, "norm": "frozen"}
    return random_detector(CLASSES, small(detector=family, backbone=backbone, **keys))


LIGHT = [(family, "regnet") for family in DETECTOR_FAMILIES]
LIGHT += [("faster_rcnn", name) for name in ("resnet18", "mobilenet_v2", "mobilenet_v3_small")]
REST = [(family, name) for family in DETECTOR_FAMILIES for name in BACKBONES if (family, name) not in LIGHT]
MINUTES = pytest.mark.skipif("DEFEAT_ALL_BACKBONES" not in os.environ, reason="minutes; set DEFEAT_ALL_BACKBONES=1")


@pytest.mark.parametrize(("family", "backbone"), [*LIGHT, *(pytest.param(*pair, marks=MINUTES) for pair in REST)])
def test_onnx_of_every_family_and_backbone(family, backbone):
    """The pairs that CI leaves out are of the same operators as those it runs."""
    detector = random_on(family, backbone)
    assert_same_on_all_sizes(detector, onnx_of(Graph(detector)))


@pytest.mark.parametrize("library", ["mmdetection", "detectron2"])
@pytest.mark.parametrize("family", FOREIGN)
def test_other_libraries_conventions_are_exported(family, library):
    order = "sizes-first" if library == "detectron2" else "ratios-first"
    conventions = {**FOREIGN[family], "edge_cases": library, "anchor_order": order, "p7_relu": library == "detectron2"}
    detector = random_detector(CLASSES, small(detector=family, conventions=conventions))
    assert_same_on_all_sizes(detector, onnx_of(Graph(detector)))


THINNING = {"clip_proposals": False, "clip_detections": False, "smallest_box": 1.0, "suppression_across_classes": True}


@pytest.mark.parametrize("conventions", [THINNING, {"keep_ratio": False}])
def test_conventions_that_configurations_can_state_are_exported(conventions):
    detector = random_detector(CLASSES, small(conventions=conventions))
    assert_same_on_all_sizes(detector, onnx_of(Graph(detector)))


@pytest.mark.parametrize("kind", ["linear", "gaussian"])
def test_soft_suppression_is_refused_by_name(kind):
    detector = random_detector(CLASSES, small(conventions={"suppression": kind}))
    with pytest.raises(DefeatError, match=f"conventions.suppression: {kind}"):
        Graph(detector)


def test_an_image_without_detections():
    detector = random_detector(CLASSES, small(score_threshold=0.999))
    run = onnx_of(Graph(detector))
    for size in SIZES:
        found = run(image(size))
        assert {name: tuple(value.shape) for name, value in found.items()} == {
            "boxes": (0, 4), "scores": (0,), "labels": (0,)
        }  # fmt: skip
    assert_same_on_all_sizes(detector, run, least=0)


def test_uint8_takes_the_image_as_pillow_holds_it():
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    detector = random_detector(CLASSES, small())
    session = onnxruntime.InferenceSession(to_onnx(Graph(detector, "uint8")), providers=["CPUExecutionProvider"])
    (pixels,) = session.get_inputs()
    assert (pixels.type, pixels.shape) == ("tensor(uint8)", ["height", "width", 3])
    rounded = (image((70, 80)) * 255).round().byte()
    outputs = session.run(list(NAMES), {"image": rounded.permute(1, 2, 0).contiguous().numpy()})
    with torch.no_grad():
        (ours,) = detector.model([rounded.float() / 255])
    theirs = {name: torch.from_numpy(found) for name, found in zip(NAMES, outputs, strict=True)}
    comparison = compare(ours, theirs, 0.01, 100)
    assert comparison.counts[0] > 0
    assert comparison.agrees, comparison


ANY_BACKBONE = [(family, name) for family in DETECTOR_FAMILIES for name in BACKBONES if name != "regnet"]


@pytest.mark.parametrize(
    ("family", "backbone"),
    [
        *((family, "regnet") for family in DETECTOR_FAMILIES),
        *(pytest.param(*pair, marks=MINUTES) for pair in ANY_BACKBONE),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_of_every_family_and_backbone(family, backbone):
    detector = random_on(family, backbone)
    extra = {"defeat": ""}
    module = torch.jit.load(io.BytesIO(to_torchscript(Graph(detector))), _extra_files=extra)
    assert Card.from_json(extra["defeat"]).classes == CLASSES
    assert_same_on_all_sizes(detector, lambda pixels: dict(zip(NAMES, module(pixels), strict=True)))


def test_a_trace_resizes_as_torchvision_does_without_one():
    """All sizes up to 60: about one in a hundred comes out a pixel less by torchvision's own trace."""
    transform = TracedTransform((40,), 64, [0.0] * 3, [1.0] * 3).eval()
    plain = super(TracedTransform, transform)
    example = torch.zeros(1, 30, 30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = torch.jit.trace(lambda pixels: transform.resize(pixels)[0], example)
        theirs = torch.jit.trace(lambda pixels: plain.resize(pixels)[0], example)
    differing = 0
    for height in range(20, 61):
        for width in range(20, 61, 3):
            pixels = torch.zeros(1, height, width)
            wanted = transform.resize(pixels)[0].shape
            assert ours(pixels).shape == wanted, (height, width)
            differing += theirs(pixels).shape != wanted
    assert differing > 0  # else this class is not needed any more


def test_the_first_image_that_a_detector_saw_does_not_decide_what_is_exported():
    """40 x 96 pixels are padded to 64 x 96, where torchvision alone would take the stride of P2 for 2, and keep it."""
    detector, fresh = (random_detector(CLASSES, small()) for _ in range(2))
    with torch.no_grad():
        detector.model([image((48, 115))])
        graph = Graph(detector).eval()
        assert graph.model.roi_heads.box_roi_pool.scales == [0.25, 0.125, 0.0625, 0.03125]
        boxes, *_ = graph(image((70, 80)))
        assert torch.equal(boxes, fresh.model([image((70, 80))])[0]["boxes"])


def test_the_card_says_what_the_file_is_and_the_detector_is_left_as_it_was():
    detector = random_detector(CLASSES, small(score_threshold=0.125, detections_per_image=9))
    transform = detector.model.transform
    detector.train()
    graph = Graph(detector, "uint8")
    to_torchscript(graph)
    assert detector.model.transform is transform
    assert detector.model.training
    card = Card.from_json(graph.card.to_json())
    assert card == Card(CLASSES, "uint8", 64, 96, 0.125, 9)


def test_what_onnx_has_no_operator_for_is_refused_by_name():
    pytest.importorskip("onnx")
    detector = random_detector(CLASSES, small())

    class Bessel(torch.nn.Module):
        def forward(self, pixels):
            return torch.special.bessel_j0(pixels)

    body = detector.model.backbone.body
    body.stem = torch.nn.Sequential(Bessel(), body.stem)
    with pytest.raises(DefeatError, match=r"cannot be written as ONNX: .*bessel_j0"):
        to_onnx(Graph(detector))
