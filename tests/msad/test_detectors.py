"""FCOS from yaml: detectron2's class, and the frames of H and L."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.meta_arch import fcos as d2_fcos
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage

from msad import load_config
from msad.modeling.detectors.fcos import FCOS

H_LEVELS, L_LEVELS = range(3, 8), range(2, 7)
CLASSES = 3


def test_yaml_builds_detectron2s_own_class(tiny_cfg, make_batch, same_detections):
    cfg = tiny_cfg(MODEL__FCOS__CONV_DIMS=[8, 12], MODEL__FCOS__CENTER_SAMPLING_RADIUS=1.25)
    ours = build_model(cfg)
    assert type(ours) is FCOS and isinstance(ours, d2_fcos.FCOS)
    backbone = build_backbone(cfg)
    names = cfg.MODEL.FCOS.IN_FEATURES
    plain = d2_fcos.FCOS(
        backbone=backbone,
        head=d2_fcos.FCOSHead(
            input_shape=[backbone.output_shape()[n] for n in names], num_classes=CLASSES, conv_dims=[8, 12], norm=""
        ),
        head_in_features=names,
        num_classes=CLASSES,
        center_sampling_radius=1.25,
        test_score_thresh=0.05,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    )
    plain.load_state_dict(ours.state_dict(), strict=True)
    batch = make_batch([(96, 64), (50, 96)])
    with EventStorage(0):
        expected, found = plain.train()(batch), ours.train()(batch)
    assert list(found) == ["loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"]
    for name, value in expected.items():
        assert value > 0 and torch.equal(found[name], value), name
    same_detections(ours.eval()(batch), plain.eval()(batch), tolerance=0)


def test_every_option_arrives(tiny_cfg):
    cfg = tiny_cfg()
    options = {
        "NUM_CLASSES": 7, "CENTER_SAMPLING_RADIUS": 2.5, "FOCAL_LOSS_ALPHA": 0.5, "FOCAL_LOSS_GAMMA": 1.0,
        "SCORE_THRESH_TEST": 0.3, "TOPK_CANDIDATES_TEST": 11, "NMS_THRESH_TEST": 0.4,
    }  # fmt: skip
    for key, value in options.items():
        cfg.MODEL.FCOS[key] = value
    cfg.MODEL.FCOS.NORM, cfg.MODEL.FCOS.CONV_DIMS = "GN", [32, 64]
    cfg.MODEL.FCOS.PRIOR_PROB, cfg.MODEL.FCOS.PRIOR_DISTANCE = 0.2, 0.75
    cfg.TEST.DETECTIONS_PER_IMAGE = 5
    model = build_model(cfg)
    found = [
        model.num_classes, model.center_sampling_radius, model.focal_loss_alpha, model.focal_loss_gamma,
        model.test_score_thresh, model.test_topk_candidates, model.test_nms_thresh,
    ]  # fmt: skip
    assert found == list(options.values())
    assert model.max_detections_per_image == 5
    assert model.pixel_mean.flatten().tolist() == [100.0, 110.0, 120.0]
    assert model.pixel_std.flatten().tolist() == [50.0, 60.0, 70.0]
    weights = {k: tuple(v.shape) for k, v in model.head.named_parameters() if v.dim() == 4}
    assert weights["cls_score.weight"] == (7, 64, 3, 3)
    assert [shape for name, shape in weights.items() if "cls_subnet" in name] == [(32, 8, 3, 3), (64, 32, 3, 3)]
    assert sum(isinstance(m, torch.nn.GroupNorm) for m in model.head.modules()) > 0
    torch.testing.assert_close(model.head.cls_score.bias.sigmoid(), torch.full((7,), 0.2))
    assert model.head.bbox_pred.bias.tolist() == [0.75] * 4


def test_defaults_are_those_of_the_paper():
    options = load_config("").MODEL.FCOS
    assert (options.CONV_DIMS, options.NORM, options.NUM_CLASSES) == ([256] * 4, "GN", 80)
    assert (options.CENTER_SAMPLING_RADIUS, options.FOCAL_LOSS_ALPHA, options.FOCAL_LOSS_GAMMA) == (1.5, 0.25, 2.0)
    assert (options.SCORE_THRESH_TEST, options.TOPK_CANDIDATES_TEST, options.NMS_THRESH_TEST) == (0.05, 1000, 0.6)


def test_missing_level_names_the_key(tiny_cfg):
    cfg = tiny_cfg()
    cfg.MODEL.FCOS.IN_FEATURES = ["p2", "p3", "p9"]
    with pytest.raises(ValueError, match=r"MODEL\.FCOS\.IN_FEATURES: \['p2', 'p9'\]"):
        build_model(cfg)


# --- the same detector in two frames ----------------------------------------------------------------------------------


@pytest.fixture
def two_frames(tiny_model):
    """An H-frame and an L-frame detector with one head's weights."""
    in_h, in_l = tiny_model(levels=H_LEVELS), tiny_model(levels=L_LEVELS, seed=1)
    in_l.head.load_state_dict(in_h.head.state_dict(), strict=True)
    return in_h, in_l


def grids(n, h, w):
    """Maps (n, 8, ., .) of P3-P7 of an H image (h, w), the grids of P2-P6 at L too."""
    return [torch.randn(n, 8, -(-h // s), -(-w // s)) for s in (8, 16, 32, 64, 128)]


def ground_truth(boxes, scale, size):
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32) * scale)
    instances.gt_classes = torch.arange(len(boxes)) % CLASSES
    return instances


def random_boxes(count, h, w):
    """Sizes from 8 pixels to the whole image; on a grid of 1/4 pixel, so that halving is exact.

    Areas differ by at least 64: detectron2 compares them with a resolution of 8 square pixels, in either frame.
    """
    extent = torch.exp(torch.rand(4 * count, 2) * torch.tensor([w / 8, h / 8]).log()) * 8
    corner = torch.rand(4 * count, 2) * (torch.tensor([w, h]) - extent)
    boxes = (torch.cat([corner, corner + extent], dim=1) * 4).round() / 4
    kept = []
    for box in boxes:
        area = Boxes(box[None]).area()
        if all((area - Boxes(other[None]).area()).abs() >= 64 for other in kept):
            kept.append(box)
    return torch.stack(kept[:count])


def targets(detector, maps, gt):
    return detector.label_anchors(detector.anchor_generator(maps), gt)


@pytest.mark.parametrize("seed", range(5))
def test_targets_of_l_are_those_of_h(two_frames, seed):
    """Levels P2-P6, strides and ranges halved, boxes / 2: labels equal, boxes scaled."""
    torch.manual_seed(seed)
    in_h, in_l = two_frames
    h, w = 256, 384
    maps = grids(2, h, w)
    boxes = [random_boxes(12, h, w), random_boxes(3, h, w)]
    h_labels, h_boxes = targets(in_h, maps, [ground_truth(b, 1.0, (h, w)) for b in boxes])
    l_labels, l_boxes = targets(in_l, maps, [ground_truth(b, 0.5, (h // 2, w // 2)) for b in boxes])
    for i in range(2):
        assert torch.equal(h_labels[i], l_labels[i])
        foreground = h_labels[i] != CLASSES
        assert foreground.sum() > 5
        assert torch.equal(h_boxes[i][foreground], 2 * l_boxes[i][foreground])


def test_ranges_halve_with_the_levels(two_frames):
    """The largest distance from cell to box edge decides the level: below 64 P3 of H, below 32 P2 of L, and so on."""
    in_h, in_l = two_frames
    maps = grids(1, 1024, 1024)
    cells = [m.shape[-1] ** 2 for m in maps]
    first_cell = [sum(cells[:i]) for i in range(6)]

    def levels_of(detector, size, scale):
        """Levels with positives for a square box of ``size`` H pixels at the centre."""
        a, b = 512 - size / 2, 512 + size / 2
        gt = ground_truth([[a, a, b, b]], scale, (int(1024 * scale),) * 2)
        (labels,), _ = targets(detector, maps, [gt])
        return [i for i in range(5) if (labels[first_cell[i] : first_cell[i + 1]] == 0).any()]

    # The cell nearest to the centre is half a stride off: size 800 is 400 + 4 from the farthest edge on P3 (above 64)
    # and 400 + 32 on P6 (between 256 and 512); size 1020 is 510 + 32 on P6, hence on P7.
    for size, expected in [(60, [0]), (100, [0]), (200, [1]), (400, [2]), (800, [3]), (1020, [4])]:
        assert levels_of(in_h, size, 1.0) == expected
        assert levels_of(in_l, size, 0.5) == expected


def test_losses_agree_in_both_frames(two_frames):
    """Targets are divided by the stride, so the same maps cost the same in either frame."""
    in_h, in_l = two_frames
    h, w = 256, 384
    maps = grids(2, h, w)
    boxes = [random_boxes(6, h, w), random_boxes(2, h, w)]
    images = ImageList(torch.zeros(2, 3, h, w), [(h, w)] * 2)
    with EventStorage(0):
        expected = in_h.forward_training(images, maps, in_h.head(maps), [ground_truth(b, 1.0, (h, w)) for b in boxes])
        found = in_l.forward_training(
            images, maps, in_l.head(maps), [ground_truth(b, 0.5, (h // 2, w // 2)) for b in boxes]
        )
    assert all(value > 0 for value in expected.values())
    torch.testing.assert_close(found, expected)


def test_decoding_agrees_in_both_frames(two_frames):
    in_h, in_l = (d.eval() for d in two_frames)
    maps = grids(2, 256, 384)
    full = in_h.forward_inference(ImageList(torch.zeros(2, 3, 256, 384), [(256, 384)] * 2), maps, in_h.head(maps))
    half = in_l.forward_inference(ImageList(torch.zeros(2, 3, 128, 192), [(128, 192)] * 2), maps, in_l.head(maps))
    for x, y in zip(full, half):
        assert len(x) == len(y) > 3
        torch.testing.assert_close(x.pred_boxes.tensor, 2 * y.pred_boxes.tensor)
        torch.testing.assert_close(x.scores, y.scores)
        assert torch.equal(x.pred_classes, y.pred_classes)


def test_strides_come_from_the_backbone(two_frames):
    for detector, levels in zip(two_frames, (H_LEVELS, L_LEVELS)):
        found = [detector.backbone.output_shape()[name] for name in detector.head_in_features]
        assert found == [ShapeSpec(channels=8, stride=2**level) for level in levels]
