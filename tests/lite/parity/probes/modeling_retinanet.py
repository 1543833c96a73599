"""RetinaNet-R50-FPN from features to losses, gradients and detections, with the same random weights."""

import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

GRADIENTS_OF = [
    "backbone.fpn_lateral4.weight", "backbone.bottom_up.res4.2.conv2.weight", "backbone.top_block.p6.bias",
    "head.cls_subnet.0.weight", "head.bbox_subnet.6.bias", "head.cls_score.weight", "head.bbox_pred.bias",
]


def make_cfg():
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[x, x * 2 ** (1 / 3), x * 2 ** (2 / 3)] for x in (32, 64, 128, 256, 512)]
    cfg.MODEL.RETINANET.NUM_CLASSES = 7
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.3
    cfg.MODEL.RETINANET.TOPK_CANDIDATES_TEST = 40
    cfg.MODEL.PIXEL_STD = [57.0, 57.0, 57.0]
    return cfg


def randomize(model):
    """Weights with which activations stay of order 1 and some classes get high scores."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, x in model.state_dict().items():
            if name.endswith("running_var"):
                x.uniform_(0.8, 1.5, generator=g)
            elif name.endswith(("running_mean", "norm.bias")):
                x.normal_(0, 0.1, generator=g)
            elif name.endswith("norm.weight"):
                x.uniform_(0.5, 0.9, generator=g)
        for weight in model.head.parameters():
            if weight.dim() == 4:
                weight.normal_(0, 1.6 / weight[0].numel() ** 0.5, generator=g)
        torch.nn.init.constant_(model.head.cls_score.bias, -2.0)


def load_or_save(model, path):
    """The first engine draws the weights, the second takes them over; returns the names of all of them."""
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True), strict=True)
    else:
        randomize(model)
        torch.save(model.state_dict(), path)
    return list(model.state_dict())


def make_inputs():
    g = torch.Generator().manual_seed(5)
    inputs = []
    for (h, w), boxes, classes in [
        ((150, 201), [[10.0, 20, 60, 90], [100, 30, 190, 140], [5, 5, 25, 21]], [1, 6, 0]),
        ((133, 170), [[40.0, 33, 160, 129]], [2]),
    ]:
        gt = Instances((h, w), gt_boxes=Boxes(torch.tensor(boxes)), gt_classes=torch.tensor(classes))
        image = torch.randint(0, 256, (3, h, w), generator=g).to(torch.uint8)
        inputs.append({"image": image, "instances": gt, "height": 2 * h, "width": w})
    return inputs


def run(model, inputs, out):
    """Everything between images and results of a dense detector."""
    images = model.preprocess_image(inputs)
    out["images"] = images.tensor
    out["image_sizes"] = [list(size) for size in images.image_sizes]
    maps = model.backbone(images.tensor)
    out.update({f"backbone.{name}": x for name, x in maps.items()})
    features = [maps[name] for name in model.head_in_features]
    predictions = model.head(features)
    for i, prediction in enumerate(predictions):
        out[f"head.{i}"] = list(prediction)
    anchors = model.anchor_generator(features)
    out["anchors"] = [a.tensor for a in anchors]
    labels, boxes = model.label_anchors(anchors, [x["instances"] for x in inputs])
    out["labels"] = labels
    out["matched_boxes"] = [b[(c >= 0) & (c < model.num_classes)] for b, c in zip(boxes, labels)]

    model.train()
    with EventStorage() as storage:
        losses = model(inputs)
        out.update({name: float(x) for name, x in losses.items()})
        sum(losses.values()).backward()
        parameters = dict(model.named_parameters())
        for name in GRADIENTS_OF:
            gradient = parameters[name].grad
            out[f"grad.{name}"] = gradient / gradient.abs().max()
            out[f"grad_log_size.{name}"] = float(gradient.abs().max().log())
        out["num_pos_anchors"] = storage.latest()["num_pos_anchors"][0]
        inputs[1]["instances"] = inputs[1]["instances"][torch.zeros(1, dtype=torch.bool)]
        with torch.no_grad():
            out["empty_image"] = {name: float(x) for name, x in model(inputs).items()}
            inputs[0]["instances"] = inputs[0]["instances"][torch.zeros(3, dtype=torch.bool)]
            out["empty_batch"] = {name: float(x) for name, x in model(inputs).items()}
        out["loss_normalizer"] = float(model.loss_normalizer)

    model.eval()
    with torch.no_grad():
        for i, result in enumerate(model(inputs)):
            found = result["instances"]
            out[f"detections.{i}"] = [found.pred_boxes.tensor, found.scores, found.pred_classes]
            out[f"detections.{i}.size"] = [list(found.image_size), type(found).__name__]


def probe(workdir):
    cfg = make_cfg()
    model = build_model(cfg)
    out = {"state_dict": load_or_save(model, workdir / "weights.pth")}
    out["frozen"] = [name for name, p in model.named_parameters() if not p.requires_grad]
    run(model, make_inputs(), out)
    assert len(out["detections.0"][1]) > 3

    for kind in ("giou", "diou", "ciou"):
        model.box_reg_loss_type = kind
        model.train()
        with EventStorage():
            out[f"loss_box_reg.{kind}"] = float(model(make_inputs())["loss_box_reg"])
    return out
