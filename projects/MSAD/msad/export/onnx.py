"""ONNX files: from pixels to detections in one graph, with what its user must know in the file's metadata.

The trace is taken by torch's TorchScript exporter. Detection is full of sizes that depend on data, and it has a loop
(keypoints); this exporter turns both into ONNX and needs no further package.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import shlex
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from ..data.names import class_names, dataset_names, read_names, skeleton
from ..files import atomic_write
from .graph import DetectionGraph, detection_graph
from .plain import load_by_itself
from .verify import checked, example_images, verify

OPSET = 17
FLOAT, INT8, RUNNER = "model.onnx", "model_int8.onnx", "run.py"


def export_onnx(cfg: CfgNode, weights: str, output: str | os.PathLike) -> str:
    """Write ``output``/model.onnx and beside it run.py, which runs it without torch and detectron2.

    Inputs, outputs and their units are those of :class:`DetectionGraph`; number and size of the images are free. The
    metadata entry "msad" of the file is the JSON of :func:`describe`. Before it is written, the graph is run once by
    onnxruntime, on images of other sizes and number than the traced ones, and compared with the model.

    Args:
        cfg: of the model; for a student the one it was trained with.
        weights: a checkpoint of it.

    Returns:
        one sentence: how the file is run.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: the checkpoint does not have all tensors of the model, this kind of detector or INPUT.FORMAT cannot
            be exported, or a package is not installed; says which.
        RuntimeError: onnxruntime finds something else than the model, or there is nothing to compare.
    """
    require("onnx", "onnxruntime")
    graph, about = described_graph(cfg, weights)
    content = checked(lambda: trace(graph, about), check, graph.detector)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    with atomic_write(output / FLOAT) as file:
        file.write(content)
    (output / INT8).unlink(missing_ok=True)  # of earlier weights
    shutil.copyfile(Path(__file__).with_name("runner.py"), output / RUNNER)
    command = shlex.join(["python", str(output / RUNNER), str(output / FLOAT)])
    return f"{command} --input PATH --output DIR runs this model."


def described_graph(cfg: CfgNode, weights: str) -> tuple[DetectionGraph, dict[str, Any]]:
    """The graph of a trained model, and what :func:`describe` says of it; errors as of :func:`export_onnx`."""
    if cfg.INPUT.FORMAT not in ("BGR", "RGB"):
        raise ValueError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}; an exported model reads BGR or RGB images")
    cfg, model = load_by_itself(cfg, weights)
    try:
        graph = detection_graph(model)
    except TypeError as error:
        raise ValueError(str(error)) from None
    return graph, describe(cfg, graph, dataset_names(cfg) or read_names(weights))


def require(*names: str) -> None:
    """Raise ValueError with the way to install it if an optional package is absent."""
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            raise ValueError(f"{name} is not installed: pip install 'msad[onnx]'") from None


def describe(cfg: CfgNode, graph: DetectionGraph, names: dict[str, list]) -> dict[str, Any]:
    """What a user of the file must know, as JSON values.

    - format: channel order of ``images``, "BGR" or "RGB";
    - min_size, max_size: pixels of the short side, and at most of the long one, that images are resized to as
      detectron2's ResizeShortestEdge does; 0 for not at all;
    - classes: names by their number in ``classes``; keypoints: names of the keypoints; skeleton: pairs of their
      numbers. Where ``names`` does not have them, classes are named by their numbers;
    - detector, score_threshold, nms_threshold, max_detections: what is built in.

    ``names`` is detectron2's metadata, see :func:`dataset_names`.
    """
    classes = class_names(names)
    if len(classes) != graph.num_classes:
        classes = [str(number) for number in range(graph.num_classes)]
    about = {
        "detector": type(graph.detector).__name__, "format": cfg.INPUT.FORMAT, "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST, "classes": classes, **graph.limits(),
    }  # fmt: skip
    if "keypoints" in graph.outputs:
        about["keypoints"] = list(names.get("keypoint_names") or [])
        about["skeleton"] = skeleton(names)
    return about


def trace(graph: DetectionGraph, about: dict[str, Any]) -> bytes:
    """The ONNX file of ``graph`` with the metadata entry "msad"; ValueError for what opset OPSET has not."""
    import onnx

    axes = {"images": {0: "batch", 1: "height", 2: "width"}, "sizes": {0: "batch"}}
    axes.update(graph.axes())
    file = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        # Python's decisions that a trace freezes are asserts of detectron2's layers; check() compares other sizes.
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                graph, example_images([(128, 160), (96, 120)]), file, input_names=["images", "sizes"],
                output_names=graph.outputs, dynamic_axes=axes, opset_version=OPSET, dynamo=False,
            )  # fmt: skip
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error).split(". ")[0].splitlines()[0]
            raise ValueError(f"this model cannot be exported to ONNX, TorchScript may take it: {reason}") from None
    model = onnx.load_from_string(file.getvalue())
    model.producer_name = "msad"
    onnx.helper.set_model_props(model, {"msad": json.dumps(about)})
    onnx.checker.check_model(model)
    return model.SerializeToString()


def check(content: bytes, detector: nn.Module, may_be_empty: bool = False) -> None:
    """:func:`verify` of an ONNX file in onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    verify(
        lambda images, sizes: session.run(None, {"images": images.numpy(), "sizes": sizes.numpy()}),
        detector, may_be_empty,
    )  # fmt: skip
