"""Faster, Cascade Mask, and Mask and Keypoint R-CNN R50-FPN with the same random weights: features, losses, gradients,
detections."""

import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage

GRADIENTS_OF = ["backbone.fpn_lateral4.weight", "backbone.fpn_output2.bias", "backbone.bottom_up.res4.2.conv2.weight"]
NAMES = {
    "faster": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "cascade": "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
    "mask and keypoint": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
}


def make_cfg(kind):
    cfg = model_zoo.get_config(NAMES[kind])
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.KEYPOINT_ON = "keypoint" in kind
    cfg.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS = (32,) * 3
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 7
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.3
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 64  # the 1024 of the original are 13 million random numbers for nothing
    cfg.MODEL.PIXEL_STD = [57.0, 57.0, 57.0]
    # So many that nothing is left to chance.
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 100000
    cfg.MODEL.RPN.POSITIVE_FRACTION = 1.0
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 100000
    cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION = 1.0
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 300
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 80
    cfg.TEST.DETECTIONS_PER_IMAGE = 40
    return cfg


def randomize(model):
    """Weights with which activations stay of order 1, proposals differ and some classes get high scores."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, x in model.state_dict().items():
            if name.endswith("running_var"):
                x.uniform_(0.8, 1.5, generator=g)
            elif name.endswith(("running_mean", "norm.bias")):
                x.normal_(0, 0.1, generator=g)
            elif name.endswith("norm.weight"):
                x.uniform_(0.5, 0.9, generator=g)
        for part in (model.proposal_generator, model.roi_heads):
            for name, weight in part.named_parameters():
                gain = 8.0 if "cls_score" in name else 0.3 if "deltas" in name or "bbox_pred" in name else 1.6
                if weight.dim() > 1:
                    weight.normal_(0, gain / weight[0].numel() ** 0.5, generator=g)


def make_inputs():
    g = torch.Generator().manual_seed(5)
    inputs = []
    for (h, w), boxes, classes in [
        ((150, 201), [[10.0, 20, 60, 90], [100, 30, 190, 140], [5, 5, 25, 21]], [1, 6, 0]),
        ((133, 170), [[40.0, 33, 160, 129]], [2]),
    ]:
        gt = Instances((h, w), gt_boxes=Boxes(torch.tensor(boxes)), gt_classes=torch.tensor(classes))
        gt.gt_masks = PolygonMasks([[[x0, y0, x1, y0, (x0 + x1) / 2, y1]] for x0, y0, x1, y1 in boxes])
        corner, far = gt.gt_boxes.tensor[:, None].split(2, dim=2)
        inside = corner + (far - corner) * torch.rand(len(gt), 17, 2, generator=g)
        seen = torch.randint(0, 3, (len(gt), 17, 1), generator=g)
        gt.gt_keypoints = Keypoints(torch.cat((inside, seen), dim=2))
        image = torch.randint(0, 256, (3, h, w), generator=g).to(torch.uint8)
        inputs.append({"image": image, "instances": gt, "height": 2 * h, "width": w})
    return inputs


def plain(found):
    """Copies of all fields; detectron2's postprocessing rescales in place."""
    return [{k: field_of(v) for k, v in sorted(x.get_fields().items())} for x in found]


def field_of(value):
    if hasattr(value, "polygons"):
        value = value.get_bounding_boxes()
    value = getattr(value, "tensor", value)
    if value.dtype == torch.bool:
        return value.float().mean(dim=(1, 2))  # a pixel on the threshold may fall either way, so areas are compared
    return value.clone()


def head_gradients(model, images, features, gt, path, out):
    """Gradients behind the backbone, on the very features of the first engine: a difference of 1e-6 in a feature can
    lead a unit over the kink of its ReLU, and its gradient is gone."""
    if path.exists():
        features = torch.load(path, weights_only=True)
    else:
        torch.save({name: x.detach() for name, x in features.items()}, path)
    with EventStorage():
        proposals, losses = model.proposal_generator(images, features, gt)
        losses.update(model.roi_heads(images, features, proposals, gt)[1])
    heads = {n: p for n, p in model.named_parameters() if not n.startswith("backbone")}
    for name, gradient in zip(heads, torch.autograd.grad(sum(losses.values()), list(heads.values()))):
        size = gradient.abs().max()
        out[f"grad.{name}"] = gradient / size
        out[f"grad_log_size.{name}"] = float(size.log())


def forget_ground_truth(item):
    item["instances"] = item["instances"][torch.zeros(len(item["instances"]), dtype=torch.bool)]


def run(kind, path, out):
    model = build_model(make_cfg(kind))
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True), strict=True)
    else:
        randomize(model)
        torch.save(model.state_dict(), path)
    out["state_dict"] = list(model.state_dict())
    out["frozen"] = [name for name, p in model.named_parameters() if not p.requires_grad]

    inputs = make_inputs()
    images = model.preprocess_image(inputs)
    out["images"] = [images.tensor, [list(size) for size in images.image_sizes]]
    features = model.backbone(images.tensor)
    out["features"] = dict(features)
    maps = [features[name] for name in model.proposal_generator.in_features]
    out["rpn_head"] = [list(x) for x in model.proposal_generator.rpn_head(maps)]
    gt = [x["instances"] for x in inputs]
    model.train()
    with EventStorage(), torch.no_grad():
        anchors = model.proposal_generator.anchor_generator(maps)
        labels, _ = model.proposal_generator.label_and_sample_anchors(anchors, gt)
        out["anchor_labels"] = list(labels)
        proposals, _ = model.proposal_generator(images, features, gt)
        out["proposals"] = plain(proposals)
        out["sampled"] = plain(model.roi_heads.label_and_sample_proposals(proposals, gt))
    head_gradients(model, images, features, gt, path.with_suffix(".features"), out)

    with EventStorage() as storage:
        losses = model(inputs)
        out["losses"] = {name: float(x.detach()) for name, x in losses.items()}
        sum(losses.values()).backward()
        parameters = dict(model.named_parameters())
        for name in GRADIENTS_OF:
            gradient = parameters[name].grad
            out[f"grad.{name}"] = gradient / gradient.abs().max()
            out[f"grad_log_size.{name}"] = float(gradient.abs().max().log())
        out["logged"] = {k: v[0] for k, v in sorted(storage.latest().items())}
        for case, index in (("empty_image", 1), ("empty_batch", 0)):
            forget_ground_truth(inputs[index])
            losses = model(inputs)
            out[case] = {name: float(x.detach()) for name, x in losses.items()}
        model.zero_grad()
        sum(losses.values()).backward()
        # Without objects no parameter may be left out: it would stop distributed training.
        out["empty_batch.has_gradient"] = [name for name, p in parameters.items() if p.grad is not None]
        out["empty_batch.moves"] = [name for name, p in parameters.items() if p.grad is not None and p.grad.any()]

    model.eval()
    with torch.no_grad():
        results = [x["instances"] for x in model(make_inputs())]
        out["detections"] = plain(results)
        out["detections.size"] = [list(x.image_size) for x in results]
        unscaled = model.inference(make_inputs(), do_postprocess=False)
        out["without postprocessing"] = plain(unscaled)
        again = model.inference(make_inputs(), detected_instances=unscaled)
        out["given boxes"] = plain([x["instances"] for x in again])
    assert all(len(x) > 3 for x in results)


def proposal_network(out):
    cfg = make_cfg("faster")
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    torch.manual_seed(1)
    model = build_model(cfg)
    with torch.no_grad():
        for weight in model.proposal_generator.parameters():
            weight.mul_(30)
    out["proposals only.state_dict"] = [list(model.state_dict())[-1], len(model.state_dict())]
    with EventStorage():
        losses = model(make_inputs())
    out["proposals only.losses"] = {name: float(x.detach()) for name, x in losses.items()}
    model.eval()
    with torch.no_grad():
        out["proposals only"] = plain([x["proposals"] for x in model(make_inputs())])


def seeded(out):
    """The same seed gives the same weights."""
    for kind in NAMES:
        torch.manual_seed(2)
        model = build_model(make_cfg(kind))
        out[f"seeded.{kind}"] = [float(x.double().sum()) for x in model.state_dict().values()]
    # C4 drops the last stages of its ResNet.
    proposals = {"META_ARCHITECTURE": "ProposalNetwork", "RESNETS.DEPTH": 18, "RESNETS.RES2_OUT_CHANNELS": 64}
    for name, settings in (("default config", {}), ("proposals of ResNet-18", proposals)):
        cfg = get_cfg()
        cfg.merge_from_list([x for key, value in settings.items() for x in (f"MODEL.{key}", value)])
        cfg.MODEL.DEVICE = "cpu"
        torch.manual_seed(0)
        model = build_model(cfg)
        out[f"seeded.{name}"] = [float(x.double().sum()) for x in model.state_dict().values()]
        out[f"seeded.{name}.next random number"] = torch.rand(1)


def probe(workdir):
    out = {}
    for kind in NAMES:
        found = {}
        run(kind, workdir / f"{kind}.pth", found)
        out.update({f"{kind}.{key}": value for key, value in found.items()})
    proposal_network(out)
    seeded(out)
    return out
