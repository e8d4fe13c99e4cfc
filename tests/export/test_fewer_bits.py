"""Files in fewer bits: what computes in them, and that they detect about the same."""

import pytest
import torch
from export.random_detectors import random_detector, small

from defeat_cli.config.architecture import DETECTOR_FAMILIES
from defeat_cli.export.graph import Graph, to_onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from defeat_cli.export.fewer_bits import to_half, to_int8  # noqa: E402
from defeat_cli.export.runtime import OnnxDetector, as_input  # noqa: E402

CLASSES = ["cat", "dog"]
IMAGES = [torch.rand(3, *size, generator=torch.Generator().manual_seed(sum(size))) for size in ((70, 80), (48, 115))]


@pytest.fixture(scope="module", params=DETECTOR_FAMILIES)
def content(request):
    return to_onnx(Graph(random_detector(CLASSES, small(detector=request.param, norm="frozen"))))


@pytest.fixture(scope="module")
def halved(content):
    return to_half(content)


@pytest.fixture(scope="module")
def integers(content):
    return to_int8(content, [as_input(image, "float") for image in IMAGES])


def found(content, image):
    return OnnxDetector(content, "the file").detect([image])[0]


def assert_near(ours, theirs, box, score):
    """Each of our surest detections is among theirs, with the same label, to these tolerances."""
    assert len(ours["scores"]) > 5
    for one, confidence, label in list(zip(ours["boxes"], ours["scores"], ours["labels"], strict=True))[:3]:
        near = (theirs["boxes"] - one).abs().amax(dim=1) <= box
        near &= ((theirs["scores"] - confidence).abs() <= score) & (theirs["labels"] == label)
        assert near.any()


def test_half_detects_the_same_to_its_precision(content, halved):
    """float16 has 11 bits: a relative rounding of 2^-11 a layer."""
    for image in IMAGES:
        assert_near(found(content, image), found(halved, image), box=0.5, score=5e-3)


def types(content):
    """Element types of each convolution's and linear layer's weight."""
    model = onnx.load_from_string(content)
    weights = {weight.name: weight for weight in model.graph.initializer}
    made = {name: node for node in model.graph.node for name in node.output}
    kinds = {}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            name = node.input[1]
            name = name if name in weights else made[name].input[0]
            kinds[node.name] = weights[name].data_type
    return kinds


def test_all_weights_of_half_are_half_and_inputs_and_outputs_are_not(halved):
    graph = onnx.load_from_string(halved).graph
    assert set(types(halved).values()) == {onnx.TensorProto.FLOAT16}
    (image,), (boxes, scores, _) = graph.input, graph.output
    assert {value.type.tensor_type.elem_type for value in (image, boxes, scores)} == {onnx.TensorProto.FLOAT}
    large = [weight for weight in graph.initializer if len(weight.raw_data) > 1000]
    assert large
    assert all(weight.data_type == onnx.TensorProto.FLOAT16 for weight in large)


def test_integers_are_everywhere_but_in_the_last_layers(integers):
    kinds = types(integers)
    last = {name for name in kinds if any(f"/{layer}" in name for layer in ("cls_", "bbox_"))}
    assert {kinds[name] for name in last} == {onnx.TensorProto.FLOAT}
    assert {kinds[name] for name in kinds.keys() - last} == {onnx.TensorProto.INT8}


def test_a_frozen_norm_is_put_into_the_convolution_before_it(content):
    """What is between a convolution and the next is not computed in integers otherwise."""
    model = onnx.load_from_string(content)
    body = [node.op_type for node in model.graph.node if node.name.startswith("/model/backbone/body/")]
    assert "Mul" not in body
    assert "BatchNormalization" not in body
    assert body.count("Conv") == 17  # the stem, and four blocks of three with a projection each


def test_a_file_in_fewer_bits_keeps_its_card(content, halved, integers):
    card = OnnxDetector(content, "the file").card
    assert [OnnxDetector(fewer, "the file").card for fewer in (halved, integers)] == [card, card]


def test_integers_detect_about_the_same(content, integers):
    """8 bits over the range of a feature map: rounding of 1 / 510 of it, in each layer."""
    for image in IMAGES:
        ours, theirs = found(content, image), found(integers, image)
        assert_near(ours, theirs, box=8, score=0.1)
        assert not torch.equal(ours["scores"][:3], theirs["scores"][:3])
