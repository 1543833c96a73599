"""Conversion of mmdetection's checkpoints reads anchors, box coders, thresholds and test size from their configs."""

from __future__ import annotations

import math

import mmdet_layout
import pytest
import torch
from detectron2.modeling import build_model

from msad import load_config
from msad.convert import convert, settings
from msad.convert.files import Checkpoint, read_checkpoint

TWO_STAGE = """
    rpn_head=dict(
        anchor_generator=dict(type='AnchorGenerator', scales=[4], ratios=[0.25, 1.0, 4.0], strides=[4, 8, 16, 32, 64]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[.0, .0, .0, .0], target_stds=[0.5, 0.5, 0.5, 0.5])),
    roi_head=dict(bbox_head=dict(bbox_coder=dict(target_stds=[0.2, 0.2, 0.4, 0.4]))),
    test_cfg=dict(
        rpn=dict(nms_pre=500, max_per_img=300, nms=dict(type='nms', iou_threshold=0.8)),
        rcnn=dict(score_thr=0.3, nms=dict(type='nms', iou_threshold=0.4), max_per_img=300))"""
DENSE = "test_cfg=dict(nms_pre=700, score_thr=0.2, nms=dict(type='nms', iou_threshold=0.45), max_per_img=30)"


def converted(case: str, said: str, after: str = "", rows: dict[str, int] | None = None) -> dict:
    """Config of a layout whose model's config also says ``said``; ``rows`` of outputs that differ from the layout."""
    tensors, text = mmdet_layout.tensors(case)
    for name, count in (rows or {}).items():
        for kind in ("weight", "bias"):
            value = tensors[f"{name}.{kind}"]
            tensors[f"{name}.{kind}"] = torch.randn(count, *value.shape[1:])
    return convert(Checkpoint(tensors, [], [], text.rstrip()[:-1] + f",{said})\n{after}")).config


def test_two_stages():
    after = "test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(640, 480), keep_ratio=True)]"
    config = converted("faster", TWO_STAGE, after)
    model = config["MODEL"]
    assert model["ANCHOR_GENERATOR"] == {"SIZES": [[16], [32], [64], [128], [256]], "ASPECT_RATIOS": [[0.25, 1, 4]]}
    rpn = {key: model["RPN"][key] for key in ("BBOX_REG_WEIGHTS", "PRE_NMS_TOPK_TEST", "POST_NMS_TOPK_TEST")}
    assert rpn == {"BBOX_REG_WEIGHTS": [2.0] * 4, "PRE_NMS_TOPK_TEST": 500, "POST_NMS_TOPK_TEST": 300}
    assert model["RPN"]["NMS_THRESH"] == 0.8 and model["ROI_BOX_HEAD"]["BBOX_REG_WEIGHTS"] == [5, 5, 2.5, 2.5]
    assert model["ROI_HEADS"]["SCORE_THRESH_TEST"] == 0.3 and model["ROI_HEADS"]["NMS_THRESH_TEST"] == 0.4
    assert config["TEST"] == {"DETECTIONS_PER_IMAGE": 300}
    assert config["INPUT"]["MIN_SIZE_TEST"] == 480 and config["INPUT"]["MAX_SIZE_TEST"] == 640


def test_a_text_that_says_nothing_gives_the_standard():
    """Numbers of mmdetection's own Faster R-CNN, with which EXPECTED of test_convert.py was made."""
    model = converted("faster", "")["MODEL"]
    assert model["ANCHOR_GENERATOR"]["SIZES"] == [[32], [64], [128], [256], [512]]
    assert model["ROI_BOX_HEAD"]["BBOX_REG_WEIGHTS"] == [10, 10, 5, 5]
    sizes = [[4.0 * 2**level * 2 ** (k / 3) for k in range(3)] for level in range(3, 8)]
    assert converted("retinanet", "")["MODEL"]["ANCHOR_GENERATOR"]["SIZES"] == sizes


@pytest.mark.parametrize(
    ("case", "node"), [("retinanet", "RETINANET"), ("fcos", "FCOS"), ("gfl", "GFL"), ("reppoints", "REPPOINTS")]
)
def test_thresholds_of_dense_detectors(case, node):
    config = converted(case, DENSE)
    own = config["MODEL"][node]
    assert (own["SCORE_THRESH_TEST"], own["NMS_THRESH_TEST"], own["TOPK_CANDIDATES_TEST"]) == (0.2, 0.45, 700)
    assert config["TEST"]["DETECTIONS_PER_IMAGE"] == 30


def test_anchors_of_retinanet():
    """Two sizes and one shape: rows change places accordingly."""
    said = """bbox_head=dict(anchor_generator=dict(octave_base_scale=3, scales_per_octave=2, ratios=[2.0],
        strides=[8, 16, 32, 64, 128]), bbox_coder=dict(target_stds=[0.1, 0.1, 0.2, 0.2]))"""
    config = converted("retinanet", said, rows={"bbox_head.retina_cls": 4, "bbox_head.retina_reg": 8})
    root = 24 * math.sqrt(2)
    assert config["MODEL"]["ANCHOR_GENERATOR"]["SIZES"][0] == pytest.approx([24, root])
    assert config["MODEL"]["ANCHOR_GENERATOR"]["ASPECT_RATIOS"] == [[2.0]]
    assert config["MODEL"]["RETINANET"]["BBOX_REG_WEIGHTS"] == [10, 10, 5, 5]
    assert config["MODEL"]["RETINANET"]["NUM_CLASSES"] == 2


def test_proposals_of_several_sizes_change_places():
    """mmdetection has the sizes of a shape beside each other, detectron2 the shapes of a size."""
    tensors, text = mmdet_layout.tensors("faster")
    scores, boxes = torch.arange(6.0), torch.arange(24.0)
    tensors |= {
        "rpn_head.rpn_cls.weight": torch.zeros(6, mmdet_layout.C, 1, 1), "rpn_head.rpn_cls.bias": scores,
        "rpn_head.rpn_reg.weight": torch.zeros(24, mmdet_layout.C, 1, 1), "rpn_head.rpn_reg.bias": boxes,
    }  # fmt: skip
    said = ", rpn_head=dict(anchor_generator=dict(scales=[2, 8], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64])))"
    found = convert(Checkpoint(tensors, [], [], text.rstrip()[:-1] + said))
    head = "proposal_generator.rpn_head."
    assert found.tensors[f"{head}objectness_logits.bias"].tolist() == [0, 2, 4, 1, 3, 5]
    assert found.tensors[f"{head}anchor_deltas.bias"][::4].tolist() == [0, 8, 16, 4, 12, 20]
    assert found.config["MODEL"]["ANCHOR_GENERATOR"]["SIZES"][1] == [16, 64]


def test_boxes_of_a_cascades_stages():
    stds = ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.04, 0.04, 0.08, 0.08])
    heads = ", ".join(f"dict(bbox_coder=dict(target_stds={std}))" for std in stds)
    model = converted("cascade", f"roi_head=dict(bbox_head=[{heads}])")["MODEL"]
    assert model["ROI_BOX_CASCADE_HEAD"]["BBOX_REG_WEIGHTS"][2] == [25, 25, 12.5, 12.5]
    with pytest.raises(ValueError, match="2 bbox_heads"):
        converted("cascade", "roi_head=dict(bbox_head=[dict(), dict()])")


def test_anchor_of_gfl_and_the_model_that_is_built(tmp_path):
    said = "bbox_head=dict(anchor_generator=dict(octave_base_scale=6, scales_per_octave=1, ratios=[1.0]))," + DENSE
    config = converted("gfl", said)
    assert config["MODEL"]["GFL"]["ANCHOR_SIZE"] == 6
    cfg = load_config("", ["MODEL.DEVICE", "cpu"])
    cfg.merge_from_other_cfg(type(cfg)(config))
    model = build_model(cfg)
    assert (model.test_score_thresh, model.max_detections_per_image, model.anchor_size) == (0.2, 30, 6)


@pytest.mark.parametrize(
    ("case", "said", "named"),
    [
        ("faster", "test_cfg=dict(rcnn=dict(nms=dict(type='soft_nms')))", r"test_cfg\.rcnn\.nms\.type is 'soft_nms'"),
        ("faster", "rpn_head=dict(anchor_generator=dict(center_offset=0.5))", r"\.center_offset is 0.5"),
        ("faster", "rpn_head=dict(anchor_generator=dict(strides=[8, 16]))", r"anchor_generator\.strides is \[8, 16\]"),
        ("faster", "rpn_head=dict(bbox_coder=dict(target_means=[1, 0, 0, 0]))", r"bbox_coder\.target_means"),
        ("faster", "rpn_head=dict(bbox_coder=dict(target_stds=[1, 0, 1, 1]))", "4 positive numbers"),
        ("faster", "rpn_head=dict(anchor_generator=dict(ratios=f(1)))", r"ratios is 'f\(1\)'"),
        ("retinanet", "bbox_head=dict(bbox_coder=dict(type='TBLRBBoxCoder'))", "'TBLRBBoxCoder'"),
        ("retinanet", "bbox_head=dict(anchor_generator=dict(ratios=[1.0]))", "36 rows; 3 sizes and 1 shapes"),
        ("retinanet", "test_cfg=dict(max_per_img=-1)", "max_per_img is -1"),
        ("gfl", "bbox_head=dict(anchor_generator=dict(ratios=[2.0]))", "one square a location"),
        ("faster", "roi_head=dict(bbox_roi_extractor=dict(type='GenericRoIExtractor'))", "GenericRoIExtractor"),
        ("faster", "roi_head=dict(bbox_roi_extractor=dict(finest_scale=28))", r"_extractor\.finest_scale is 28"),
        ("cascade", "roi_head=dict(bbox_roi_extractor=[dict(), dict(finest_scale=28)])", "differs between stages"),
        ("faster", "roi_head=dict(bbox_roi_extractor=dict(roi_layer=dict(type='RoIPool')))", "RoIPool"),
        ("fcos", "bbox_head=dict(norm_on_bbox='yes')", r"bbox_head\.norm_on_bbox is 'yes'"),
        ("fcos", "bbox_head=dict(strides=[4, 8, 16, 32, 64])", r"bbox_head\.strides"),
        ("gfl", "neck=dict(type='FPN', add_extra_convs='on_lateral')", r"neck\.add_extra_convs is 'on_lateral'"),
        ("mask", "neck=dict(type='FPN', upsample_cfg=dict(mode='bilinear'))", r"upsample_cfg\.mode is 'bilinear'"),
        ("mask", "neck=dict(type='PAFPN')", r"neck\.type is 'PAFPN'"),
        ("mask", "backbone=dict(type='ResNet', style='pytorch', strides=(1, 2, 2, 1))", r"backbone\.strides is"),
        ("mask", "backbone=dict(style='pytorch', conv_cfg=dict(type='ConvWS'))", r"conv_cfg\.type is 'ConvWS'"),
        ("reppoints", "bbox_head=dict(point_strides=[4, 8, 16, 32, 64])", r"bbox_head\.point_strides"),
    ],
)
def test_what_cannot_be_expressed_is_named(case, said, named):
    with pytest.raises(ValueError, match=named):
        converted(case, said)


@pytest.mark.parametrize(
    ("case", "said", "relu"),
    [
        ("fcos", "", True), ("retinanet", "", False),  # no neck is described: those of mmdetection's zoo
        ("fcos", "neck=dict(type='FPN', start_level=1)", False),
        ("fcos", "neck=dict(type='FPN', relu_before_extra_convs=True)", True),
        ("gfl", "neck=dict(type='FPN', relu_before_extra_convs=True)", True),
    ],
)  # fmt: skip
def test_whether_p7_reads_negative_numbers(case, said, relu):
    assert converted(case, said)["MODEL"]["FPN"]["TOP_RELU"] is relu


PIPELINE = "[dict(type='MultiScaleFlipAug', img_scale={}, flip={}, transforms=[dict(type='Resize', keep_ratio={})])]"


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (((1333, 800), True, True), r"flip is True"),
        (((1333, 800), False, False), r"keep_ratio is False"),
        (([(1333, 800), (666, 400)], False, True), "2 positive numbers"),
    ],
)
def test_other_ways_of_testing_are_refused(values, named):
    with pytest.raises(ValueError, match=named):
        settings.test_size(settings.read(f"test_pipeline = {PIPELINE.format(*values)}"))


def test_where_the_test_size_stands():
    """That of the data that is tested goes before the variable that it may have been made of."""
    pipeline = PIPELINE.format((500, 300), False, True)
    for text in (
        f"data = dict(test=dict(pipeline={pipeline}))\ntest_pipeline = []", f"test_pipeline = {pipeline}",
        f"steps = {pipeline}\ntest_dataloader = dict(dataset=dict(pipeline=steps))",
    ):  # fmt: skip
        assert settings.test_size(settings.read(text)) == {"INPUT": {"MIN_SIZE_TEST": 300, "MAX_SIZE_TEST": 500}}
    with pytest.raises(ValueError, match=r"pipeline is '_base_\.steps'"):
        settings.test_size(settings.read("test_pipeline = _base_.steps"))
    assert settings.test_size({}) == {"INPUT": {"MIN_SIZE_TEST": 800, "MAX_SIZE_TEST": 1333}}


def test_text_of_version_1_and_of_distillations():
    text = """/home/someone/configs/retinanet.py
# model settings
model = dict(type='RetinaNet', bbox_head=dict(octave_base_scale=4, scales_per_octave=3, anchor_ratios=[0.5, 1.0],
    anchor_strides=[8, 16], target_means=[.0, .0, .0, .0], target_stds=[1.0, 1.0, 1.0, 0.5]))
test_cfg = dict(nms=dict(type='nms', iou_thr=0.25))
"""
    said = settings.read(text)
    head = settings.part(said, "model", "bbox_head")
    assert settings.anchors(head, "", [8, 16], [1], [1]).ratios == [0.5, 1.0]
    assert settings.box_weights(head, "", (1.0,) * 4) == [1, 1, 1, 2]
    assert settings.detections(said, "RETINANET")["MODEL"]["RETINANET"] == {"NMS_THRESH_TEST": 0.25}
    with pytest.raises(ValueError, match=r"cannot be read as Python.*line 2"):
        settings.read("a = 1\nb = = 2")


@pytest.mark.parametrize(
    ("prefix", "model"),
    [("", {"x": 2}), ("student.", {"x": 2}), ("module.teacher.", {"x": 1}), ("teacher", {"x": 1}), ("ema.", {})],
)
def test_which_model_of_a_distillation(prefix, model):
    text = "model = dict(data_preprocessor=dict(y=3), teacher=dict(x=1), student=dict(architecture=dict(x=2)))"
    said = settings.read(text, prefix)
    assert said["model"] == model and said["data_preprocessor"] == {"y": 3}


def test_a_distillations_teacher_is_described_by_its_own_dict(tmp_path):
    tensors, text = mmdet_layout.tensors("retinanet")
    teacher = text.rstrip().removeprefix("model = dict(")[:-1].replace("'pytorch'", "'caffe'")
    text = f"{text.rstrip()[:-1]}, teacher=dict({teacher}, {DENSE}))"
    path = tmp_path / "kd.pth"
    both = {f"{name}.{key}": value for name in ("teacher", "student") for key, value in tensors.items()}
    torch.save({"state_dict": both, "meta": {"config": text}}, path)
    student, teacher = (convert(read_checkpoint(str(path), prefix)).config["MODEL"] for prefix in (None, "teacher."))
    assert not student["RESNETS"]["STRIDE_IN_1X1"] and teacher["RESNETS"]["STRIDE_IN_1X1"]
    assert teacher["RETINANET"]["SCORE_THRESH_TEST"] == 0.2 and "SCORE_THRESH_TEST" not in student["RETINANET"]


NORM = "mean=[1.5, 2, 0], std=[1.0, 4, 1.0]"


@pytest.mark.parametrize(
    ("text", "order"),
    [
        (f"data_preprocessor = dict({NORM}, bgr_to_rgb=True)\nimg_norm_cfg = dict(mean=[1, 1, 1])", "RGB"),
        (f"model = dict(data_preprocessor=dict({NORM}, bgr_to_rgb=False))", "BGR"),
        (f"img_norm_cfg = dict({NORM}, to_rgb=False)", "BGR"),
        (f"test_pipeline = [dict(type='MultiScaleFlipAug', transforms=[dict(type='Normalize', {NORM}, to_rgb=True)])]\n"
         "img_norm_cfg = dict(mean=[1, 1, 1], std=[1, 1, 1], to_rgb=False)", "RGB"),
    ],
)  # fmt: skip
def test_where_the_pixels_stand(text, order):
    assert settings.pixels(settings.read(text)) == (order, [1.5, 2, 0], [1, 4, 1])


@pytest.mark.parametrize("said", ["", "x=1", f"{NORM}, to_rgb=_base_.swap", "mean=[1, 2], std=[1, 2], to_rgb=True"])
def test_pixels_that_are_not_told(said):
    assert settings.pixels(settings.read(f"img_norm_cfg = dict({said})")) is None


def test_the_extractors_of_regions():
    roi = "dict(type='SingleRoIExtractor', roi_layer=dict(type='RoIAlign', output_size={}, sampling_ratio={}{}))"
    box, mask = roi.format(7, 2, ""), roi.format(14, 0, ", aligned=False")
    model = converted("mask+dcn1", f"roi_head=dict(bbox_roi_extractor={box}, mask_roi_extractor={mask})")["MODEL"]
    expected = {"POOLER_TYPE": "ROIAlignV2", "POOLER_RESOLUTION": 7, "POOLER_SAMPLING_RATIO": 2}
    assert expected.items() <= model["ROI_BOX_HEAD"].items()
    expected = {"POOLER_TYPE": "ROIAlign", "POOLER_RESOLUTION": 14, "POOLER_SAMPLING_RATIO": 0}
    assert expected.items() <= model["ROI_MASK_HEAD"].items()
    model = converted("mask+dcn1", f"roi_head=dict(bbox_roi_extractor={box}, mask_roi_extractor=None)")["MODEL"]
    expected = {"POOLER_TYPE": "ROIAlignV2", "POOLER_RESOLUTION": 7, "POOLER_SAMPLING_RATIO": 2}
    assert expected.items() <= model["ROI_MASK_HEAD"].items()
