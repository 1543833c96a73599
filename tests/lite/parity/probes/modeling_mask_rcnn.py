"""Whole Mask and Keypoint R-CNNs with equal random weights: losses by term, gradients of the branches, soft masks,
keypoints, and what is left of them in the image."""

import copy

import numpy as np
import torch
from detectron2 import model_zoo
from detectron2.modeling import build_model, detector_postprocess
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage

CONFIGS = {
    "mask": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "keypoint": "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
    "cascade": "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
    "c4": "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml",
}
NUM_CLASSES = {"mask": 4, "keypoint": 1, "cascade": 4, "c4": 4}
BRANCHES = ("mask_head", "keypoint_head")


def make_cfg(kind):
    cfg = model_zoo.get_config(CONFIGS[kind])
    model = cfg.MODEL
    model.DEVICE = "cpu"
    model.PIXEL_STD = [57.0, 57.0, 57.0]
    model.ROI_HEADS.NUM_CLASSES = NUM_CLASSES[kind]
    model.ROI_HEADS.SCORE_THRESH_TEST = 0.02
    model.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK = kind == "cascade"
    # Fewer channels where they would only cost time.
    model.ROI_BOX_HEAD.FC_DIM, model.ROI_MASK_HEAD.CONV_DIM = 64, 32
    model.ROI_KEYPOINT_HEAD.CONV_DIMS = (32,) * 8
    # So many samples that nothing is left to chance.
    for node in (model.RPN, model.ROI_HEADS):
        node.BATCH_SIZE_PER_IMAGE, node.POSITIVE_FRACTION = 100000, 1.0
    model.RPN.PRE_NMS_TOPK_TRAIN = model.RPN.PRE_NMS_TOPK_TEST = 200
    model.RPN.POST_NMS_TOPK_TRAIN = model.RPN.POST_NMS_TOPK_TEST = 10 if kind == "c4" else 30
    cfg.TEST.DETECTIONS_PER_IMAGE = 12
    return cfg


def fill(model):
    """Weights of which activations stay of order 1 and several detections pass the threshold."""
    g = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, x in model.named_buffers():
            if name.endswith("running_var"):
                x.uniform_(0.8, 1.5, generator=g)
        for name, x in model.named_parameters():
            if x.dim() == 1 and "norm" not in name:
                x.normal_(0, 0.05, generator=g)
            elif not name.startswith("backbone") and x.dim() > 1:
                fan = x[0].numel() if "deconv" not in name and "score_lowres" not in name else len(x)
                gain = 6.0 if "cls_score" in name else 0.3 if "deltas" in name or "bbox_pred" in name else 1.5
                x.normal_(0, gain / fan**0.5, generator=g)
        for name, x in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("norm.weight"):
                x.uniform_(0.5, 0.9, generator=g)


def make_inputs(kind, bitmasks=False):
    g = torch.Generator().manual_seed(2)
    inputs = []
    for (h, w), rows in [
        ((100, 126), [[8.0, 15, 55, 80], [50, 12, 118, 94], [5, 5, 30, 28]]), ((90, 110), [[25.0, 15, 96, 80]]),
    ]:
        boxes = torch.tensor(rows)
        middle, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
        angle = torch.arange(12) * (np.pi / 6)
        rays = torch.stack((angle.cos(), angle.sin()), dim=1) * (0.3 + 0.7 * torch.rand(12, 1, generator=g))
        outlines = (middle[:, None] + half[:, None] * rays).flatten(1)
        masks = PolygonMasks([[outline.double().numpy()] for outline in outlines])
        points = boxes[:, None, :2] + torch.rand(len(boxes), 17, 2, generator=g) * 2 * half[:, None]
        visible = torch.randint(0, 3, (len(boxes), 17, 1), generator=g).float()
        gt = Instances((h, w), gt_boxes=Boxes(boxes), gt_classes=torch.arange(len(boxes)) % NUM_CLASSES[kind])
        gt.gt_masks = BitMasks.from_polygon_masks(masks, h, w) if bitmasks else masks
        gt.gt_keypoints = Keypoints(torch.cat((points, visible), dim=2))
        image = torch.randint(0, 256, (3, h, w), generator=g).to(torch.uint8)
        inputs.append({"image": image, "instances": gt, "height": 2 * h, "width": w})
    return inputs


def without_objects(inputs, *indices):
    """As the data loader gives images without annotations: Instances that lack masks and keypoints."""
    for index in indices:
        none = torch.zeros(0, dtype=torch.int64)
        size = inputs[index]["instances"].image_size
        inputs[index]["instances"] = Instances(size, gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=none)
    return inputs


def hidden(inputs):
    for item in inputs:
        item["instances"].gt_keypoints.tensor[..., 2] = 0
    return inputs


def losses_of(model, inputs):
    """The losses, and what the branches log."""
    with EventStorage() as storage:
        losses = model(inputs)
    logged = {k: v[0] for k, v in sorted(storage.latest().items()) if not k.startswith(("rpn", "kpts_num"))}
    return losses, {"losses": {k: float(v.detach()) for k, v in sorted(losses.items())}, "logged": logged}


def branch_gradients(model, images, features, gt):
    """Gradients in the mask and keypoint branch."""
    with EventStorage():
        proposals, _ = model.proposal_generator(images, features, gt)
        losses = model.roi_heads(images, features, proposals, gt)[1]
    total = sum(value for key, value in losses.items() if key in ("loss_mask", "loss_keypoint"))
    wanted = {n: p for n, p in model.roi_heads.named_parameters() if n.startswith(BRANCHES)}
    gradients = torch.autograd.grad(total, list(wanted.values()))
    # By the largest of all: the gradients of the last biases of a softmax over cells are zero but for rounding.
    largest = max(gradient.abs().max() for gradient in gradients)
    relative = {name: gradient / largest for name, gradient in zip(wanted, gradients)}
    return {"relative": relative, "log size": largest.log()}


def plain(found):
    return {k: (v.tensor if hasattr(v, "tensor") else v).clone() for k, v in sorted(found.get_fields().items())}


def in_image(found):
    """Pasted masks by their area, a share of the image: single pixels may be on the threshold."""
    fields = plain(found)
    fields.pop("pred_keypoint_heatmaps", None)
    if "pred_masks" in fields:
        masks = fields.pop("pred_masks")
        height, width = found.image_size
        fields["mask area"] = masks.flatten(1).double().mean(dim=1)
        fields["mask rows"] = masks.any(dim=2).double().sum(dim=1) / height
        fields["mask columns"] = masks.any(dim=1).double().sum(dim=1) / width
        fields["mask type"] = [str(masks.dtype), list(masks.shape)]
    return fields


def run(kind, folder, out):
    model = build_model(make_cfg(kind))
    weights, seen = folder / f"{kind}.pth", folder / f"{kind}.features"
    if weights.exists():
        model.load_state_dict(torch.load(weights, weights_only=True), strict=True)
    else:
        fill(model)
        torch.save(model.state_dict(), weights)
    out["state_dict"] = [[k, list(v.shape)] for k, v in model.state_dict().items() if k.startswith("roi_heads")]

    model.train()
    losses, out["polygons"] = losses_of(model, make_inputs(kind))
    sum(losses.values()).backward()
    out["has gradient"] = [name for name, p in model.named_parameters() if p.grad is not None]
    with torch.no_grad():
        if kind == "keypoint":
            out["hidden"] = losses_of(model, hidden(make_inputs(kind)))[1]
        else:
            out["bitmasks"] = losses_of(model, make_inputs(kind, bitmasks=True))[1]
        out["one image empty"] = losses_of(model, without_objects(make_inputs(kind), 1))[1]
    model.zero_grad()
    losses, out["batch empty"] = losses_of(model, without_objects(make_inputs(kind), 0, 1))
    # The mean over no images, NaN in detectron2.
    out["batch empty"]["logged"].pop("keypoint_head/num_fg_samples", None)
    sum(losses.values()).backward()
    out["batch empty.has gradient"] = [name for name, p in model.named_parameters() if p.grad is not None]

    inputs = make_inputs(kind)
    images = model.preprocess_image(inputs)
    if seen.exists():
        features = torch.load(seen, weights_only=True)
    else:
        # Both engines differentiate at the same point: near the kink of a ReLU the smallest step changes a gradient.
        features = {name: x.detach() for name, x in model.backbone(images.tensor).items()}
        torch.save(features, seen)
    if kind != "c4":
        out["gradients"] = branch_gradients(model, images, features, [x["instances"] for x in inputs])

    model.eval()
    with torch.no_grad():
        unscaled = model.inference(make_inputs(kind), do_postprocess=False)
        out["detections"] = [plain(x) for x in unscaled]
        out["in image"] = [
            in_image(detector_postprocess(copy.deepcopy(x), item["height"], item["width"]))
            for x, item in zip(unscaled, inputs)
        ]
        # As test-time augmentation asks for: masks and keypoints of given boxes.
        for x in unscaled:
            for name in ("pred_masks", "pred_keypoints", "pred_keypoint_heatmaps"):
                if x.has(name):
                    x.remove(name)
        again = model.inference(make_inputs(kind), detected_instances=unscaled, do_postprocess=False)
        out["given boxes"] = [plain(x) for x in again]
    assert all(len(x) > 2 for x in unscaled), "detections are too few to compare"


def probe(workdir):
    out = {}
    for kind in NUM_CLASSES:
        found = {}
        run(kind, workdir, found)
        out.update({f"{kind}.{key}": value for key, value in found.items()})
    return out
