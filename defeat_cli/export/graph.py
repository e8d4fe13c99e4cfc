"""A detector as one graph, from an image to its detections, written as ONNX or TorchScript.

Both come of one trace, in which torchvision's models keep height and width free. Resizing, normalisation and
non-maximum suppression are inside.
"""

from __future__ import annotations

import copy
import io
import json
import warnings
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d

from defeat_cli.detectors.contract import Detector
from defeat_cli.detectors.modes import evaluating
from defeat_cli.errors import DefeatError

Input = Literal["float", "uint8"]
INPUTS = ("float", "uint8")

OPSET = 17
"""ONNX operators; 16 brought the RoIAlign that shifts boxes by half a pixel."""

OUTPUTS = ("boxes", "scores", "labels")

METADATA, VERSION = "defeat", 1
"""Under this name a file holds its card, as JSON, in a form of this version."""

EXTRA = "defeat-cli[export]"


@dataclass(frozen=True)
class Card:
    """What an exported file says of itself.

    classes: names; label `i + 1` is `classes[i]`.
    input: `float` is an RGB image [3, H, W] float32 in [0, 1], `uint8` one [H, W, 3] as Pillow and OpenCV hold them.
    short_side, long_side: what the graph resizes images to, pixels.
    score_threshold: lowest score that it gives.
    detections_per_image: most that it gives.
    """

    classes: list[str]
    input: Input
    short_side: int
    long_side: int
    score_threshold: float
    detections_per_image: int

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Card:
        """Raises KeyError, ValueError or TypeError where it is not what `to_json` writes."""
        content = json.loads(text)
        if content["version"] != VERSION:
            raise ValueError(f"of version {content['version']}; this defeat reads version {VERSION}")
        return cls(**{name: content[name] for name in cls.__dataclass_fields__})


class TracedTransform(GeneralizedRCNNTransform):
    """torchvision's preparation of images, whose trace rounds as it rounds itself.

    While it is traced, torchvision computes the resized size in single precision, where 115 · (128 / 115) falls short
    of 128 and a pixel is lost: enough for other detections.
    """

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        if not torch.jit.is_tracing() or self.fixed_size is not None:
            return super().resize(image, target)
        sides = torch._shape_as_tensor(image)[-2:].double()
        # Of one element each: the exporter takes scalars for numbers in single precision. And a number over a tensor
        # would be its reciprocal times the number, which rounds twice.
        short, long = (torch.tensor([side], dtype=torch.float64) for side in (self.min_size[-1], self.max_size))
        scale = torch.minimum(short / sides.amin(0, keepdim=True), long / sides.amax(0, keepdim=True))
        height, width = (sides * scale).floor().long().unbind()
        return F.interpolate(image[None], size=(height, width), mode="bilinear", align_corners=False)[0], target


class Graph(nn.Module):
    """A torchvision detector with one image as input: (boxes [M, 4] xyxy in its pixels, scores [M], labels [M])."""

    def __init__(self, detector: Detector, kind: Input = "float") -> None:
        """Raises DefeatError: a part of the detector cannot be in a graph."""
        super().__init__()
        self.kind = kind
        _refuse_soft_suppression(detector)
        self.model = _with_plain_norms(copy.deepcopy(detector.model).requires_grad_(False))
        transform, selection = self.model.transform, getattr(self.model, "roi_heads", self.model)
        self.model.transform = TracedTransform(
            transform.min_size,
            transform.max_size,
            transform.image_mean,
            transform.image_std,
            transform.size_divisible,
            transform.fixed_size,
        )
        self.model.transform.training = self.model.training
        self.card = Card(
            classes=detector.classes,
            input=kind,
            short_side=transform.min_size[-1],
            long_side=transform.max_size,
            score_threshold=selection.score_thresh,
            detections_per_image=selection.detections_per_img,
        )

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.kind == "uint8":
            image = image.permute(2, 0, 1).float() / 255
        (found,) = self.model([image])
        return tuple(found[name] for name in OUTPUTS)

    def example(self) -> Tensor:
        """An image to trace with. What is in it does not matter."""
        if self.kind == "uint8":
            return torch.full((70, 90, 3), 127, dtype=torch.uint8)
        return torch.full((3, 70, 90), 0.5)


def _with_plain_norms(model: nn.Module) -> nn.Module:
    """The model with ordinary norms in place of frozen ones, which the exporter cannot put into convolutions."""
    for parent in list(model.modules()):
        for name, frozen in parent.named_children():
            if isinstance(frozen, FrozenBatchNorm2d):
                plain = nn.BatchNorm2d(len(frozen.weight), eps=frozen.eps).requires_grad_(False)
                plain.load_state_dict({**frozen.state_dict(), "num_batches_tracked": plain.num_batches_tracked})
                setattr(parent, name, plain.train(frozen.training))
    return model


def _refuse_soft_suppression(detector: Detector) -> None:
    suppress = getattr(getattr(detector.model, "roi_heads", detector.model), "suppress", None)
    if suppress is not None and suppress.kind != "hard":
        raise DefeatError(
            f"conventions.suppression: {suppress.kind} lowers scores one detection after another, which a graph cannot "
            "hold; export with --set student.conventions.suppression=hard"
        )


def to_onnx(graph: Graph) -> bytes:
    """The graph as an ONNX file with free height and width, and its card in the metadata.

    Raises:
        DefeatError: `onnx` is not installed, or ONNX has no operator for a part of the detector.
    """
    try:
        import onnx
    except ImportError:
        raise missing_package("onnx", "writing ONNX") from None
    buffer = io.BytesIO()
    rows = {name: {0: "detections"} for name in OUTPUTS}
    sides = {"float": {1: "height", 2: "width"}, "uint8": {0: "height", 1: "width"}}[graph.kind]
    with evaluating(graph), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: whether it holds for other sizes, the comparison shows
        try:
            torch.onnx.export(
                graph,
                (graph.example(),),
                buffer,
                dynamo=False,  # the newer exporter refuses suppression, whose output depends on the data
                opset_version=OPSET,
                input_names=["image"],
                output_names=list(OUTPUTS),
                dynamic_axes={"image": sides, **rows},
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error).partition("\n")[0]
            raise DefeatError(f"this detector cannot be written as ONNX: {reason} (--format torchscript may)") from None
    model = onnx.load_from_string(buffer.getvalue())
    model.metadata_props.add(key=METADATA, value=graph.card.to_json())
    onnx.checker.check_model(model)
    return model.SerializeToString()


def to_torchscript(graph: Graph) -> bytes:
    """The graph as a TorchScript file, and its card as the extra file `defeat`."""
    buffer = io.BytesIO()
    with evaluating(graph), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above; and torch means to replace TorchScript by torch.export
        traced = torch.jit.trace(graph, (graph.example(),), check_trace=False)
        torch.jit.save(traced, buffer, _extra_files={METADATA: graph.card.to_json()})
    return buffer.getvalue()


FORMATS = {"onnx": to_onnx, "torchscript": to_torchscript}
"""Formats by name, and what writes each."""

SUFFIXES = {"onnx": (".onnx",), "torchscript": (".torchscript", ".pt")}


def missing_package(name: str, purpose: str) -> DefeatError:
    """The error for an optional package that is not installed."""
    return DefeatError(f"{purpose} needs the package {name}: pip install '{EXTRA}'")
