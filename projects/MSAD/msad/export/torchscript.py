"""TorchScript files: the graph of an ONNX file, for programs that have torch and torchvision, in C++ too."""

from __future__ import annotations

import io
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from ..files import atomic_write
from .graph import DetectionGraph
from .onnx import described_graph
from .verify import checked, example_images, verify

FILE, METADATA = "model.torchscript", "msad.json"


def export_torchscript(cfg: CfgNode, weights: str, output: str | os.PathLike) -> str:
    """Write ``output``/model.torchscript, whose inputs and outputs are those of :class:`DetectionGraph`.

    It holds the JSON of :func:`describe` as the extra file "msad.json". Before it is written it is run once, on images
    of other sizes and number than the traced ones, and compared with the model. Arguments and errors are those of
    :func:`export_onnx`.

    Returns:
        one sentence: how the file is loaded.
    """
    graph, about = described_graph(cfg, weights)
    content = checked(lambda: script(graph, about), check, graph.detector)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    with atomic_write(output / FILE) as file:
        file.write(content)
    return f"torch.jit.load({str(output / FILE)!r}), after 'import torchvision', gives a function of images and sizes."


def check(content: bytes, detector: nn.Module, may_be_empty: bool = False) -> None:
    """:func:`verify` of a TorchScript file."""
    loaded = torch.jit.load(io.BytesIO(content))
    verify(lambda images, sizes: [x.numpy() for x in loaded(images, sizes)], detector, may_be_empty)


def script(graph: DetectionGraph, about: dict[str, Any]) -> bytes:
    """The TorchScript file of ``graph``."""
    graph.requires_grad_(False)  # nor does the file ask for gradients
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as for ONNX: decisions that a trace freezes; and that TorchScript is old
        traced = torch.jit.trace(graph, example_images([(128, 160), (96, 120)]), check_trace=False)
        file = io.BytesIO()
        torch.jit.save(traced, file, _extra_files={METADATA: json.dumps(about)})
    return file.getvalue()
