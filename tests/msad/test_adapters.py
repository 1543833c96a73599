"""One interface for any subclass of detectron2's DenseDetector and GeneralizedRCNN, also for those written here."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, GeneralizedRCNN, build_model
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from msad import cli
from msad.distill.teachers import FrozenTeacher
from msad.export.graph import detection_graph
from msad.modeling.adapters import DenseAdapter, RCNNAdapter, UnfitDetector, adapt, num_classes_key
from msad.modeling.fusion import CrossFeatureLevelFusion
from msad.modeling.teacher import MultiScaleTeacher
from msad.resolution import RESOLUTIONS


class MyRetinaNet(RetinaNet):
    """As a user writes one: another name, nothing else."""


class MyRCNN(GeneralizedRCNN):
    pass


class Pyramid(Backbone):
    """P2 to P4 by strided convolutions."""

    size_divisibility = 16

    def __init__(self, channels=4):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, channels, 3, stride=s, padding=1) for s in (4, 8, 16))

    def output_shape(self):
        return {f"p{i}": ShapeSpec(channels=4, stride=2**i) for i in (2, 3, 4)}

    def forward(self, x):
        return {f"p{i}": layer(x) for i, layer in zip((2, 3, 4), self.layers)}


class BrightSpots(DenseDetector):
    """A dense detector with nothing but what DenseDetector asks for: no anchors, no classes, no assignment."""

    def __init__(self, levels=("p3", "p4")):
        head = nn.Conv2d(4, 1, 1)
        super().__init__(
            Pyramid(), _Each(head), list(levels), pixel_mean=[0.0, 0.0, 0.0], pixel_std=[255.0, 255.0, 255.0]
        )

    def forward_training(self, images, features, predictions, gt_instances):
        return {"loss_bright": sum(x.square().mean() for x in predictions)}

    def forward_inference(self, images, features, predictions):
        found = []
        for size in images.image_sizes:
            found.append(Instances(size, pred_boxes=Boxes(torch.tensor([[0.0, 0.0, 8.0, 8.0]]))))
            found[-1].scores, found[-1].pred_classes = torch.ones(1), torch.zeros(1, dtype=torch.long)
        return found


class _Each(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, features):
        return [self.layer(x) for x in features]


@pytest.fixture
def registered(monkeypatch):
    for cls in (MyRetinaNet, MyRCNN):
        monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, cls.__name__, cls)


@pytest.mark.parametrize("losses", [[{"NAME": "AlignedL1"}], [{"NAME": "Chen"}]])
def test_a_subclass_is_student_and_teacher(registered, tiny_cfg, tiny_model, make_distiller, make_batch, losses):
    teacher = tiny_model("MyRetinaNet", resolutions=["H", "L"])
    student = tiny_model("MyRetinaNet", levels=range(2, 7), seed=1)
    assert type(student) is MyRetinaNet and type(adapt(student)) is DenseAdapter
    with EventStorage(0):
        found = make_distiller(teacher=teacher, student=student, losses=losses)(make_batch([(64, 96)] * 2))
    assert any("distill" in name for name in found) and all(value.isfinite() for value in found.values())
    assert num_classes_key(tiny_cfg("MyRetinaNet")) == "MODEL.RETINANET.NUM_CLASSES"


def test_a_subclass_of_generalized_rcnn(registered, tiny_cfg, tiny_model, make_batch):
    model = tiny_model("FasterRCNN")
    model.__class__ = MyRCNN
    assert type(adapt(model)) is RCNNAdapter and adapt(model).two_stage
    cfg = tiny_cfg("FasterRCNN")
    cfg.MODEL.META_ARCHITECTURE = "MyRCNN"
    assert num_classes_key(cfg) == "MODEL.ROI_HEADS.NUM_CLASSES"


def test_a_detector_with_the_least_that_a_dense_one_has(make_distiller, make_batch):
    """It is distilled, fused and evaluated; only what it lacks, predictions to compare, is an error that says so."""
    fusion = CrossFeatureLevelFusion(4, 2)
    branches = [RESOLUTIONS["H"], RESOLUTIONS["L"]]
    teacher = MultiScaleTeacher(detector=BrightSpots(), resolutions=branches, fusion=fusion)
    batch = make_batch([(64, 96)] * 2)
    with EventStorage(0):
        assert {name.split("/")[0] for name in teacher(batch)} == {"H", "L", "fused"}
    student = BrightSpots(("p2", "p3"))
    with EventStorage(0):
        found = make_distiller(teacher=teacher, student=student)(batch)
    assert {"loss_bright", "loss_distill/AlignedL1"} == set(found)
    assert len(teacher.eval()(batch)[0]["instances"]) == 1
    with pytest.raises(TypeError, match="BrightSpots cannot be compared: it has no num_classes, label_anchors"):
        make_distiller(teacher=teacher, student=student, losses=[{"NAME": "Chen"}])


def test_what_a_kind_needs_is_named():
    detector = BrightSpots()
    detector.head_in_features = None
    with pytest.raises(TypeError, match="BrightSpots cannot be run from features: it has no head_in_features"):
        adapt(detector)


class CountingRCNN(GeneralizedRCNN):
    """With a loss more, beside those of the heads."""

    def count_loss(self, features, targets):
        found = torch.stack([features["p6"].mean() for _ in targets])
        return {"loss_count": (found - torch.tensor([float(len(t)) for t in targets])).abs().mean()}

    def forward(self, batched_inputs):
        losses = super().forward(batched_inputs)
        if not self.training:
            return losses
        features = self.backbone(self.preprocess_image(batched_inputs).tensor)
        return {**losses, **self.count_loss(features, [x["instances"] for x in batched_inputs])}


class CountingAdapter(RCNNAdapter):
    """As docs/USING.md has it."""

    def losses(self, images, features, targets):
        return {**super().losses(images, features, targets), **self.detector.count_loss(features, targets)}


class CarefulRCNN(GeneralizedRCNN):
    def inference(self, batched_inputs, detected_instances=None, do_postprocess=True):
        return super().inference(batched_inputs, detected_instances, do_postprocess)[:10]


def two_branches(detector):
    channels = detector.backbone.output_shape()["p3"].channels
    fusion, branches = CrossFeatureLevelFusion(channels, 2), [RESOLUTIONS["H"], RESOLUTIONS["L"]]
    return MultiScaleTeacher(detector=detector, resolutions=branches, fusion=fusion)


@pytest.fixture
def rcnn(tiny_cfg):
    """An R-CNN that makes the levels that a teacher at H and L needs."""
    return build_model(tiny_cfg("FasterRCNN", resolutions=["H", "L"])).detector


@pytest.mark.parametrize(("kind", "method"), [(CountingRCNN, "forward"), (CarefulRCNN, "inference")])
def test_a_teacher_leaves_nothing_out_that_a_subclass_does(rcnn, kind, method):
    rcnn.__class__ = kind
    with pytest.raises(TypeError, match=rf"{kind.__name__} cannot .* own {method} .* adapt\.register\({kind.__name__}"):
        two_branches(rcnn)
    assert adapt(rcnn).levels, "a student and a plain teacher keep their own"


def test_an_own_adapter_answers_for_what_a_subclass_does(rcnn, make_batch):
    rcnn.__class__ = CountingRCNN
    adapt.register(CountingRCNN, CountingAdapter)
    with EventStorage(0):
        found = two_branches(rcnn)(make_batch([(64, 96)] * 2))
    assert {name for name in found if "count" in name} == {"H/loss_count", "L/loss_count", "fused/loss_count"}
    rcnn.__class__ = type("Heir", (CountingRCNN,), {"forward": GeneralizedRCNN.forward})
    with pytest.raises(TypeError, match=r"Heir cannot .* own forward"):
        two_branches(rcnn)


def test_htc_teaches_at_several_resolutions_without_its_semantic_branch(tiny_cfg):
    """Its maps come with the inputs, and not with targets."""
    options = {"MODEL__HTC__SEMANTIC_ON": True, "MODEL__HTC__SEMANTIC_CLASSES": 4, "MSAD__DETECTOR": "HTC"}
    with pytest.raises(TypeError, match=r"with its semantic branch: set MODEL\.HTC\.SEMANTIC_ON False"):
        build_model(tiny_cfg("HTC", resolutions=["H", "L"], **options))
    assert build_model(tiny_cfg("HTC", resolutions=["H", "L"], **{**options, "MODEL__HTC__SEMANTIC_ON": False}))


def test_a_detector_that_does_not_fit_is_bad_input(capsys):
    assert cli.run("tool", lambda: adapt(torch.nn.Linear(1, 1))) == 2
    assert "tool: error: Linear cannot be run from features" in capsys.readouterr().err


class LogRCNN(GeneralizedRCNN):
    """With intensities of its own."""

    def preprocess_image(self, batched_inputs):
        images = super().preprocess_image(batched_inputs)
        return ImageList(images.tensor.abs().log1p(), images.image_sizes)


def squared(detector):
    """``detector`` with a backbone that pads to a square, as ViTDet's."""
    kind = type(detector.backbone)
    constraints = property(lambda self: {"square_size": 128})
    detector.backbone.__class__ = type("Squared", (kind,), {"padding_constraints": constraints})
    return detector


def logarithmic(detector):
    detector.__class__ = LogRCNN
    return detector


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(logarithmic, "a LogRCNN has its own preprocess_image"), (squared, "Squared of a GeneralizedRCNN pads .* square")],
)
def test_images_that_only_the_detector_makes_are_refused(rcnn, tiny_model, make_distiller, spoil, message):
    """A student runs as a whole; teachers at one and at several resolutions and exported graphs do not."""
    make_distiller(student=spoil(tiny_model("FasterRCNN")), teacher=tiny_model("FasterRCNN"))
    for make in (two_branches, detection_graph):
        with pytest.raises(UnfitDetector, match=f"^(a|the) .*{message[2:]}"):
            make(spoil(rcnn))
    with pytest.raises(UnfitDetector, match=f"DISTILL.TEACHERS: far: .*{message}"):
        FrozenTeacher(rcnn, name="far")
