"""An exported ONNX file in fewer bits: its networks in half precision, or in integers of 8 bits.

Only what is dense is changed: convolutions, linear layers and what lies between them. Boxes, scores and suppression
stay in float32: float16 tells pixels apart only up to 2048.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from defeat_cli.export.graph import missing_package

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

Precision = Literal["float", "half", "int8"]

DENSE = {"Conv", "Gemm", "Relu"}
"""Operators that are taken wherever they are."""

IN_BACKBONE = DENSE | {"Add", "Clip", "GlobalAveragePool", "HardSigmoid", "HardSwish", "MaxPool", "Mul", "Sigmoid"}
"""Those that are taken in the backbone and its FPN, whose values are feature maps; elsewhere they are boxes, scores."""

BACKBONE = "/model/backbone/"
"""How the exporter begins the names of operators there."""

PREDICTORS = ("cls_logits", "bbox_pred", "bbox_reg", "bbox_ctrness", "cls_score")
"""Last layers: their outputs are scores and boxes, for which 256 steps are few. Integers stop before them."""


def to_half(content: bytes) -> bytes:
    """A file whose dense operators compute in float16, and whose inputs and outputs are as they were.

    Raises:
        DefeatError: `onnx` is not installed.
    """
    onnx = _onnx()
    model = onnx.load_from_string(content)
    graph = model.graph
    chosen = {node.name for node in graph.node if _is_dense(node)}
    halved = {name for node in graph.node if node.name in chosen for name in node.output}
    needed = _needed_in_float(graph, chosen)
    weights = {weight.name: weight for weight in graph.initializer}
    elsewhere = {name for node in graph.node if node.name not in chosen for name in _inputs(node)}
    nodes, cast = [], {}
    for node in graph.node:
        if node.name not in chosen:
            nodes.append(node)
            continue
        for place, name in enumerate(node.input):
            if name and name not in halved and name not in cast:
                cast[name] = f"{name}:half"
                if name in weights:
                    graph.initializer.append(_half_weight(weights[name], cast[name]))
                else:
                    nodes.append(_cast(name, cast[name], onnx.TensorProto.FLOAT16))
            if name:
                node.input[place] = cast.get(name, f"{name}:half")
        outputs = list(node.output)
        node.output[:] = [f"{name}:half" for name in outputs]
        nodes.append(node)
        nodes += [_cast(f"{name}:half", name, onnx.TensorProto.FLOAT) for name in outputs if name in needed]
    del graph.node[:]
    graph.node.extend(nodes)
    kept = [weight for weight in graph.initializer if weight.name not in cast or weight.name in elsewhere]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    del graph.value_info[:]  # it told types, some of which are others now
    onnx.checker.check_model(model)
    return model.SerializeToString()


def to_int8(content: bytes, images: Iterable[np.ndarray]) -> bytes:
    """A file whose dense operators compute in integers of 8 bits, a scale for each output channel of a weight.

    Args:
        images: as the file takes them; the range of each feature map is the one that they span.

    Raises:
        DefeatError: `onnx` or `onnxruntime` is not installed.
    """
    onnx = _onnx()
    try:
        from onnxruntime import quantization
    except ImportError:
        raise missing_package("onnxruntime", "writing integers") from None
    model = onnx.load_from_string(content)
    chosen = [node.name for node in model.graph.node if _is_dense(node) and not _predicts(node)]
    with tempfile.TemporaryDirectory() as folder, _without_advice():
        target = Path(folder) / "int8.onnx"
        quantization.quantize_static(
            model,
            target,
            _Images(images),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,  # of signed ones onnxruntime leaves half unfused on x86
            per_channel=True,
            op_types_to_quantize=sorted(IN_BACKBONE),
            nodes_to_quantize=chosen,
        )
        return target.read_bytes()


class _Images:
    """Images in the form that onnxruntime's calibration asks for them."""

    def __init__(self, images: Iterable[np.ndarray]) -> None:
        self.images: Iterator[np.ndarray] = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.images, None)
        return None if image is None else {"image": image}


@contextmanager
def _without_advice() -> Iterator[None]:
    """Hides onnxruntime's advice to infer shapes first, which graphs with suppression do not allow."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _is_dense(node: NodeProto) -> bool:
    return node.op_type in (IN_BACKBONE if node.name.startswith(BACKBONE) else DENSE)


def _predicts(node: NodeProto) -> bool:
    return any(f"/{layer}" in node.name for layer in PREDICTORS)


def _needed_in_float(graph: GraphProto, chosen: set[str]) -> set[str]:
    """Values that something else than the chosen operators takes."""
    taken = {name for node in graph.node if node.name not in chosen for name in _inputs(node)}
    return taken | {output.name for output in graph.output}


def _inputs(node: NodeProto) -> Iterator[str]:
    """Values that a node takes, those that its branches take from outside included."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _inputs(inner)
        yield from (output.name for output in attribute.g.output)


def _half_weight(weight: TensorProto, name: str) -> TensorProto:
    from onnx import numpy_helper

    values = numpy_helper.to_array(weight)
    limits = np.finfo(np.float16)
    return numpy_helper.from_array(values.clip(limits.min, limits.max).astype(np.float16), name)


def _cast(source: str, target: str, kind: int) -> NodeProto:
    from onnx import helper

    return helper.make_node("Cast", [source], [target], name=f"{target}:cast", to=kind)


def _onnx():
    try:
        import onnx
    except ImportError:
        raise missing_package("onnx", "writing ONNX") from None
    return onnx
