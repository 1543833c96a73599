"""8-bit integers for an exported detector, calibrated on images (static quantisation)."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..data.sampling import at_equal_distances
from .runner import IMAGES, Detector, find_inputs, network_input, read_image

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)

# What has integer kernels. Only nodes of the network's modules are taken: decoding needs all of its digits.
OPERATORS = ("Conv", "ConvTranspose", "Gemm", "Add", "MaxPool", "Relu", "Clip", "Resize")
LAYERS = ("Conv", "ConvTranspose", "Gemm")
# For calibration; ranges hardly change beyond.
MOST_IMAGES = 200


def find_images(folder: str | Path) -> list[Path]:
    """Up to MOST_IMAGES images of a folder, spread over it evenly; ValueError if there are none."""
    found = [file for file in find_inputs([str(folder)]) if file.suffix.lower() in IMAGES]
    if not found:
        raise ValueError(f"no images in {folder}")
    return at_equal_distances(found, MOST_IMAGES)


def quantize(model: str | Path, images: Sequence[Path], output: str | Path) -> int:
    """Write ``model`` (of :func:`export_onnx`) with 8-bit weights and activations to ``output``.

    Weights get a scale a channel; activations the range that they have on ``images``. The last layers, whose numbers
    are scores and box sides, stay in float32.

    Args:
        images: files; those that cannot be read are passed over with a warning.

    Returns:
        the number of layers that became integer.

    Raises:
        ValueError: none of the images can be used, or the model finds nothing in them that would calibrate the heads
            of masks and keypoints.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.inputs = calibration_inputs(detector.about, images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.inputs, None)

    detector = Detector(model)
    if {"masks", "keypoints"} & set(detector.outputs) and not _finds_any(detector, images):
        raise ValueError(
            "calibration: the model finds nothing in these images, so that its head of masks or keypoints never runs: "
            f"take images with objects, or export with a score threshold below {detector.about['score_threshold']}"
        )
    floats = onnx.load(model)
    chosen = {node.name: node.op_type for node in integer_nodes(floats.graph)}
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "int8.onnx"
        quantize_static(
            str(model), str(made), Reader(), quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, nodes_to_quantize=list(chosen),
            op_types_to_quantize=sorted(set(chosen.values())),
        )  # fmt: skip
        quantized = onnx.load(made)
    about = {**json.loads(next(p.value for p in floats.metadata_props if p.key == "msad")), "precision": "int8"}
    onnx.helper.set_model_props(quantized, {"msad": json.dumps(about)})
    onnx.save(quantized, output)
    return sum(kind in LAYERS for kind in chosen.values())


def _finds_any(detector: Detector, images: Sequence[Path]) -> bool:
    """Whether anything is found in any of the images."""
    inputs = calibration_inputs(detector.about, images)
    return any(len(detector.session.run(["scores"], one)[0]) for one in inputs)


def integer_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Nodes of OPERATORS inside the network's modules that a later layer of the network reads."""
    # torch names a node after its module, "/head/cls_score/Conv", and one of the decoding by its operator, "/Add".
    inside = [node for node in graph.node if node.name.count("/") > 1]
    read_later: set[str] = set()  # tensors that reach a layer
    chosen = []
    for node in reversed(inside):  # nodes stand in topological order
        if any(name in read_later for name in node.output):
            if node.op_type in OPERATORS:
                chosen.append(node)
            read_later.update(node.input)
        elif node.op_type in LAYERS:
            read_later.update(node.input)
    return chosen[::-1]


def calibration_inputs(about: dict, images: Sequence[Path]) -> Iterator[dict[str, np.ndarray]]:
    """Inputs of the model whose metadata are ``about``, an image at a time."""
    count = 0
    for file in images:
        image = read_image(file)
        if image is None:
            logger.warning("calibration: cannot read %s (no image, or cut off)", file)
            continue
        try:
            small = network_input(image, about)
        except ValueError as error:  # too narrow an image
            logger.warning("calibration: %s: %s", file, error)
            continue
        count += 1
        yield {"images": np.ascontiguousarray(small)[None], "sizes": np.array([small.shape[:2]], np.int64)}
    if not count:
        raise ValueError(f"calibration: none of {len(images)} files can be used")
