"""FCOS-R50-FPN from features to losses, gradients and detections, with the same random weights."""

import importlib.util
from pathlib import Path

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import FCOS, build_backbone
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

spec = importlib.util.spec_from_file_location("dense", Path(__file__).with_name("modeling_retinanet.py"))
dense = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dense)


def make_model():
    cfg = dense.make_cfg()
    backbone = build_backbone(cfg)
    shapes = [backbone.output_shape()[name] for name in ("p3", "p4", "p5", "p6", "p7")]
    head = FCOSHead(input_shape=shapes, num_classes=7, conv_dims=[256] * 4)
    return FCOS(
        backbone=backbone, head=head, num_classes=7, test_topk_candidates=40, test_score_thresh=0.3,
        pixel_mean=cfg.MODEL.PIXEL_MEAN, pixel_std=cfg.MODEL.PIXEL_STD,
    )


def probe(workdir):
    model = make_model()
    out = {"state_dict": dense.load_or_save(model, workdir / "weights.pth")}
    dense.run(model, dense.make_inputs(), out)
    assert len(out["detections.0"][1]) > 3

    # Matching on its own, with many boxes and ties.
    g = torch.Generator().manual_seed(11)
    anchors = model.anchor_generator([torch.zeros(1, 1, 256 // s, 320 // s) for s in (8, 16, 32, 64, 128)])
    corner = torch.randint(0, 200, (60, 2), generator=g).float()
    size = torch.randint(1, 300, (60, 2), generator=g).float()
    boxes = torch.cat((corner, corner + size), dim=1)
    boxes[5] = boxes[4]
    for radius in (1.5, 0.0, 1.0, 3.0):
        model.center_sampling_radius = radius
        out[f"quality.{radius}"] = model._match_anchors(Boxes(boxes), anchors)
    nearest = [boxes[torch.arange(sum(len(a) for a in anchors)) % 60]]
    out["centerness"] = model.compute_ctrness_targets(anchors, nearest)
    for norm in ("", "BN", "SyncBN", "nnSyncBN", "naiveSyncBN", "FrozenBN", "GN", "LN"):
        head = FCOSHead(input_shape=[ShapeSpec(channels=32)] * 2, num_classes=3, conv_dims=[32, 64], norm=norm)
        out[f"head_state_dict.{norm}"] = list(head.state_dict())
        if norm not in ("SyncBN", "nnSyncBN"):  # They need a GPU.
            torch.manual_seed(0)
            torch.nn.init.normal_(head.cls_score.weight)
            features = [torch.linspace(-1, 3, 32 * k * k).view(1, 32, k, k) for k in (4, 2)]
            out[f"head_output.{norm}"] = [list(x) for x in head(features)][:1]
    torch.manual_seed(2)
    out["seeded"] = [float(x.double().sum()) for x in make_model().state_dict().values()]

    # The losses must go through a label_anchors that replaces the method on the instance.
    original = model.label_anchors
    model.label_anchors = lambda anchors, gt: original(anchors, [x[:1] for x in gt])
    model.train()
    with EventStorage():
        out["wrapped"] = {name: float(x) for name, x in model(dense.make_inputs()).items()}
    return out
