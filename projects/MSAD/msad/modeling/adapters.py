"""The one place that knows how each kind of detector is run from given features.

detectron2's detectors go from image to output in one ``forward``. A teacher needs the half after the neck (for several
sets of features); distillation needs levels, heads and targets. :func:`adapt` gives any supported detector one
interface for all of that, without editing it:

>>> adapt(detector).losses(images, features, targets)

Another kind of detector is one subclass of :class:`DetectorAdapter` and one ``adapt.register(ItsClass, ItsAdapter)``.
So is a subclass of a known kind whose ``forward`` or ``inference`` do more; docs/USING.md has a recipe.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import singledispatch
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from ..config import detector_architecture
from ..resolution import level_of
from .head_outputs import DENSE, ROI, RPN, Head, first_result

Features = dict[str, torch.Tensor]


def detector_of(model: nn.Module) -> nn.Module:
    """The detector that a multi-resolution teacher wraps; any other model itself."""
    return getattr(model, "detector", model)


class UnfitDetector(TypeError, ValueError):
    """A detector of a kind, or with a part, that what was asked for does not work with; bad input, as a ValueError."""


class DetectorAdapter(ABC):
    """A kind of detector as the rest of the package sees it.

    ``features`` are maps (N, C, h, w) by level name. Predictions and losses are in the pixels of the ``images`` that
    are passed, whose tensor is not read: only ``image_sizes`` count.

    Args:
        detector: of the kind.

    Raises:
        UnfitDetector: the detector lacks what the kind needs; names it.
    """

    needs: tuple[str, ...] = ("backbone", "pixel_mean", "pixel_std")

    def __init__(self, detector: nn.Module) -> None:
        absent = [name for name in self.needs if getattr(detector, name, None) is None]
        if absent:
            raise UnfitDetector(f"{type(detector).__name__} cannot be run from features: it has no {', '.join(absent)}")
        self.detector = detector

    @property
    @abstractmethod
    def levels(self) -> list[str]:
        """Names of the levels that the detector's heads read, finest first."""

    @property
    def two_stage(self) -> bool:
        """Whether the heads see proposals."""
        return False

    def targets(self, inputs: list[dict]) -> list[Any]:
        """What :meth:`losses` needs of detectron2's input dicts, on the detector's device."""
        return [item["instances"].to(self.detector.pixel_mean.device) for item in inputs]

    def check_whole(self) -> None:
        """UnfitDetector if :meth:`losses` and :meth:`predict` would leave out a part of the detector; names it.

        What a subclass of that which the adapter is registered for does in ``forward`` and ``inference`` is not known.
        """
        own, (kind, *_) = type(self.detector), _kinds(self.detector)
        for method in ("forward", "inference"):
            if getattr(own, method, None) is not getattr(kind, method, None):
                raise UnfitDetector(
                    f"a {own.__name__} cannot be run from features: what its own {method} does would be left out; do "
                    f"it in an adapter, adapt.register({own.__name__}, MyAdapter), see msad.modeling.adapters"
                )

    def check_preprocessing(self) -> None:
        """UnfitDetector if its images are not normalised by ``pixel_mean`` and ``pixel_std`` and padded as usual.

        Where a detector is not run as a whole, as that of a teacher or in an exported graph, its batch is made there.
        """
        own, backbone = type(self.detector), self.detector.backbone
        if getattr(own, "preprocess_image", None) is not getattr(_kinds(self.detector)[-1], "preprocess_image", None):
            raise UnfitDetector(
                f"a {own.__name__} has its own preprocess_image, which would be passed over: images of teachers and of "
                "exported models are normalised by MODEL.PIXEL_MEAN and PIXEL_STD alone"
            )
        if (getattr(backbone, "padding_constraints", None) or {}).get("square_size", 0) > 0:
            raise UnfitDetector(
                f"the {type(backbone).__name__} of a {own.__name__} pads images to a square (square_size), which those "
                "of teachers and of exported models are not: set its size to 0"
            )

    @abstractmethod
    def losses(self, images: ImageList, features: Features, targets: list[Any]) -> dict[str, torch.Tensor]:
        """Detection losses of the detector (in training mode)."""

    @abstractmethod
    def predict(self, images: ImageList, features: Features) -> list[Any]:
        """Results of the detector (in evaluation mode), one an image."""

    def postprocess(self, results: list[Any], inputs: list[dict], images: ImageList) -> list[dict]:
        """Results in pixels of the network's input -> detectron2's output dicts in pixels of the original images."""
        output = []
        for result, item, size in zip(results, inputs, images.image_sizes):
            height, width = item.get("height", size[0]), item.get("width", size[1])
            output.append({"instances": detector_postprocess(result, height, width)})
        return output

    def heads(self) -> dict[str, Head]:
        """Heads whose predictions can be compared, by name; UnfitDetector with the reason if there are none."""
        raise UnfitDetector(f"the head predictions of a {type(self.detector).__name__} cannot be compared")

    def run_head(self, name: str, features: Features, boxes: list[Boxes]) -> tuple:
        """Output of head ``name``; ``boxes`` of each image, in the detector's pixels, are read by "roi" alone."""
        head = self.heads()[name]
        return head.module([features[level] for level in head.levels])

    @abstractmethod
    def head_modules(self) -> list[nn.Module]:
        """The modules behind the neck, each of which runs as a whole: what costs are counted by."""

    @contextmanager
    def assign_once(self) -> Iterator[None]:
        """Inside, ground truth is assigned once, and what counts it is updated once.

        For several calls of :meth:`losses` in one step with one grid and one ground truth, as those of the aligned
        branches of a multi-resolution teacher. Kinds that cannot share anything do nothing here.
        """
        yield

    @classmethod
    def num_classes_key(cls, cfg: CfgNode) -> str:
        """Config key of the number of classes of the detector of ``cfg``; KeyError if its class has none."""
        known = META_ARCH_REGISTRY.get(detector_architecture(cfg))
        for parent in known.__mro__:
            node = parent.__name__.upper()
            if "NUM_CLASSES" in cfg.MODEL.get(node, {}):
                return f"MODEL.{node}.NUM_CLASSES"
        raise KeyError(f"the config has no number of classes for a {known.__name__}")


class DenseAdapter(DetectorAdapter):
    """Subclasses of detectron2's DenseDetector: RetinaNet, FCOS, GFL, ..."""

    needs = (*DetectorAdapter.needs, "head", "head_in_features")
    comparable = ("num_classes", "label_anchors", "anchor_generator", "box2box_transform")

    @property
    def levels(self) -> list[str]:
        return list(self.detector.head_in_features)

    def _predictions(self, features: Features) -> tuple[list[torch.Tensor], Any]:
        maps = [features[name] for name in self.detector.head_in_features]
        return maps, self.detector.head(maps)

    def losses(self, images: ImageList, features: Features, targets: list[Instances]) -> dict[str, torch.Tensor]:
        return self.detector.forward_training(images, *self._predictions(features), targets)

    def predict(self, images: ImageList, features: Features) -> list[Instances]:
        return self.detector.forward_inference(images, *self._predictions(features))

    def heads(self) -> dict[str, Head]:
        detector = self.detector
        absent = [name for name in self.comparable if not hasattr(detector, name)]
        if absent:
            raise UnfitDetector(
                f"the head predictions of a {type(detector).__name__} cannot be compared: it has no {', '.join(absent)}"
            )
        return {DENSE: Head(detector.head, detector, detector, "label_anchors", self.levels, detector.num_classes)}

    def head_modules(self) -> list[nn.Module]:
        return [self.detector.head]

    @contextmanager
    def assign_once(self) -> Iterator[None]:
        # detectron2 divides losses by a running mean of the number of positives, by name of the mean.
        with (
            first_result(self.detector, "label_anchors"),
            first_result(self.detector, "_ema_update", lambda name, *args: name),
        ):
            yield


class RCNNAdapter(DetectorAdapter):
    """Subclasses of detectron2's GeneralizedRCNN with a proposal generator."""

    needs = (*DetectorAdapter.needs, "proposal_generator", "roi_heads")

    @property
    def levels(self) -> list[str]:
        readers = [self.detector.proposal_generator.in_features]
        tasks = ("", "box_", "mask_", "keypoint_")
        readers += [getattr(self.detector.roi_heads, f"{task}in_features", None) or [] for task in tasks]
        return sorted({name for names in readers for name in names}, key=level_of)

    @property
    def two_stage(self) -> bool:
        return True

    def losses(self, images: ImageList, features: Features, targets: list[Instances]) -> dict[str, torch.Tensor]:
        proposals, rpn_losses = self.detector.proposal_generator(images, features, targets)
        _, roi_losses = self.detector.roi_heads(images, features, proposals, targets)
        return {**roi_losses, **rpn_losses}

    def predict(self, images: ImageList, features: Features) -> list[Instances]:
        proposals, _ = self.detector.proposal_generator(images, features)
        return self.detector.roi_heads(images, features, proposals)[0]

    def heads(self) -> dict[str, Head]:
        rpn, roi = self.detector.proposal_generator, self.detector.roi_heads
        predictor = getattr(roi, "box_predictor", None)
        # C4 models have no pooler of boxes by itself, and HTC adds to what is pooled.
        stages = list(predictor) if isinstance(predictor, nn.ModuleList) else [predictor]
        if (
            not hasattr(rpn, "rpn_head") or not hasattr(roi, "box_pooler")
            or any(not hasattr(x, "box2box_transform") or getattr(x, "use_sigmoid_ce", False) for x in stages)
            or getattr(roi, "semantic_head", None) is not None
        ):  # fmt: skip
            raise UnfitDetector(
                f"the head predictions of a {type(self.detector).__name__} with {type(roi).__name__} cannot be "
                "compared: only those of dense detectors and of R-CNNs and cascades with an RPN and a softmax can"
            )
        levels = list(roi.box_in_features)
        regions = [Head(stage, stage, stage, "losses", levels, roi.num_classes) for stage in stages]
        names = [ROI] if stages == [predictor] else [f"{ROI}{k}" for k in range(len(stages))]
        first = Head(rpn.rpn_head, rpn, rpn, "label_and_sample_anchors", list(rpn.in_features), 1)
        return {RPN: first, **dict(zip(names, regions))}

    def run_head(self, name: str, features: Features, boxes: list[Boxes]) -> tuple:
        if name == RPN:
            return super().run_head(name, features, boxes)
        head, roi = self.heads()[name], self.detector.roi_heads
        box_head = roi.box_head if name == ROI else roi.box_head[int(name.removeprefix(ROI))]
        return head.module(box_head(roi.box_pooler([features[level] for level in head.levels], boxes)))

    def head_modules(self) -> list[nn.Module]:
        regions = self.detector.roi_heads.children()
        stages = [list(module) if isinstance(module, nn.ModuleList) else [module] for module in regions]
        return [self.detector.proposal_generator.rpn_head, *(module for stage in stages for module in stage)]

    @contextmanager
    def assign_once(self) -> Iterator[None]:
        # The targets of the second stage depend on each branch's own proposals and are not shared.
        with first_result(self.detector.proposal_generator, "label_and_sample_anchors"):
            yield

    @classmethod
    def num_classes_key(cls, cfg: CfgNode) -> str:
        return "MODEL.ROI_HEADS.NUM_CLASSES"


@singledispatch
def adapt(detector: nn.Module) -> DetectorAdapter:
    """The adapter of ``detector``.

    Raises:
        UnfitDetector: of no known kind, or without something that its kind needs.
    """
    raise UnfitDetector(
        f"{type(detector).__name__} cannot be run from features: only detectron2's dense detectors (RetinaNet, FCOS, "
        "...), R-CNNs with a proposal generator and SemanticSegmentor are supported"
    )


adapt.register(DenseDetector, DenseAdapter)
adapt.register(GeneralizedRCNN, RCNNAdapter)


def _kinds(detector: nn.Module) -> list[type]:
    """The classes of a detector that have an adapter, its own kind first and detectron2's last."""
    return [kind for kind in type(detector).__mro__ if kind in adapt.registry and kind is not object]


def num_classes_key(cfg: CfgNode) -> str:
    """Config key of the number of classes of the model of ``cfg``, as "MODEL.RETINANET.NUM_CLASSES".

    Raises:
        KeyError: the architecture is not registered, of no known kind, or has no such key; says which.
    """
    name = detector_architecture(cfg)
    known = META_ARCH_REGISTRY.get(name)
    kind = adapt.dispatch(known) if isinstance(known, type) else None
    if not (isinstance(kind, type) and issubclass(kind, DetectorAdapter)):
        raise KeyError(f"MODEL.META_ARCHITECTURE {name}: no adapter knows this kind of detector")
    return kind.num_classes_key(cfg)
