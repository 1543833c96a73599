"""R-CNNs on a pyramid of one layer, and batches for them."""

import torch
from detectron2.config import get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage

STRIDES = {"p2": 4, "p3": 8, "p4": 16}
NUM_CLASSES = 3


@BACKBONE_REGISTRY.register()
class PyramidOfOneLayer(Backbone):
    """p2, p3 and p4 of 8 channels, each from one convolution."""

    size_divisibility = 16

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.convs = torch.nn.ModuleDict({name: torch.nn.Conv2d(3, 8, s, stride=s) for name, s in STRIDES.items()})
        self._out_features = list(STRIDES)
        self._out_feature_channels = dict.fromkeys(STRIDES, 8)
        self._out_feature_strides = STRIDES

    def forward(self, x):
        return {name: conv(x).tanh() for name, conv in self.convs.items()}


def make_cfg(**changes):
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "PyramidOfOneLayer"
    cfg.MODEL.PIXEL_STD = [57.0, 57.0, 57.0]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64]]
    cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = list(STRIDES)
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 50
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 1, 8
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 3
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM, cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 4, 4
    cfg.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS = (4,)
    cfg.MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION, cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 4, 2
    cfg.TEST.DETECTIONS_PER_IMAGE = 7
    for key, value in changes.items():
        cfg.merge_from_list([f"MODEL.{key.replace('__', '.')}", value])
    return cfg


KINDS = {
    "faster": {},
    "mask": {"MASK_ON": True},
    "keypoint": {"KEYPOINT_ON": True},
    "both": {"MASK_ON": True, "KEYPOINT_ON": True},
    "cascade": {"ROI_HEADS__NAME": "CascadeROIHeads", "ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG": True, "MASK_ON": True},
}


def make_model(kind="faster", **changes):
    torch.manual_seed(0)
    model = build_model(make_cfg(**KINDS[kind], **changes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "backbone" not in name and weight.dim() > 1:
                weight.mul_(10)
    return model


def instances(size, boxes, classes):
    tensor = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    gt = Instances(size, gt_boxes=Boxes(tensor), gt_classes=torch.tensor(classes, dtype=torch.int64))
    gt.gt_masks = PolygonMasks([[[x0, y0, x1, y0, x1, y1, x0, y1]] for x0, y0, x1, y1 in tensor.tolist()])
    centers = (tensor[:, None, :2] + tensor[:, None, 2:]) / 2
    points = torch.cat((centers, torch.full_like(centers[..., :1], 2)), dim=2)
    gt.gt_keypoints = Keypoints(points.repeat(1, 2, 1))
    return gt


def batch(*ground_truths, size=(64, 80)):
    g = torch.Generator().manual_seed(1)
    return [
        {
            "image": torch.randint(0, 256, (3, *size), generator=g).to(torch.uint8),
            "instances": instances(size, boxes, classes),
        }
        for boxes, classes in ground_truths
    ]


ONE = ([[8, 8, 40, 40]], [1])
TWO = ([[8, 8, 40, 40], [30, 2, 78, 60]], [1, 2])
NONE = ([], [])


def train(model, inputs):
    with EventStorage() as storage:
        losses = model(inputs)
    return losses, {name: value for name, (value, _) in storage.latest().items()}
