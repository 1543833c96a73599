"""Faster and Mask R-CNN, Cascade R-CNN and HTC."""

from __future__ import annotations

import re
from functools import partial

from . import settings
from .rules import Rule, Tensors, anchor_order, reorder

STRIDES = [4, 8, 16, 32, 64]
STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))


def _stage(match: re.Match) -> str:
    """The ".1" of a cascade's stage 1, "" where there is one head."""
    return match["stage"] or ""


def rcnn(tensors: Tensors, said: dict) -> tuple[list[Rule], dict]:
    """Rules and config of an R-CNN, whichever it is."""
    rpn = settings.part(said, "model", "rpn_head")
    anchors = settings.anchors(rpn, "rpn_head", STRIDES, [8], [0.5, 1, 2])
    order = reorder(partial(anchor_order, sizes=len(anchors.sizes[0]), shapes=len(anchors.ratios)))
    stage = r"(?P<stage>\.\d|)"
    mask = r"roi_head\.mask_head" + stage + r"\."
    rules = [
        Rule(r"rpn_head\.rpn_conv\.(weight|bias)", r"proposal_generator.rpn_head.conv.\1"),
        Rule(r"rpn_head\.rpn_cls\.(weight|bias)", r"proposal_generator.rpn_head.objectness_logits.\1", order),
        Rule(r"rpn_head\.rpn_reg\.(weight|bias)", r"proposal_generator.rpn_head.anchor_deltas.\1", order),
        Rule(
            rf"roi_head\.bbox_head{stage}\.shared_fcs\.(?P<k>\d)\.(?P<end>weight|bias)",
            lambda m: f"roi_heads.box_head{_stage(m)}.fc{int(m['k']) + 1}.{m['end']}",
        ),
        Rule(
            rf"roi_head\.bbox_head{stage}\.fc_cls\.(?P<end>weight|bias)",
            lambda m: f"roi_heads.box_predictor{_stage(m)}.cls_score.{m['end']}",
        ),
        Rule(
            rf"roi_head\.bbox_head{stage}\.fc_reg\.(?P<end>weight|bias)",
            lambda m: f"roi_heads.box_predictor{_stage(m)}.bbox_pred.{m['end']}",
        ),
        Rule(
            mask + r"convs\.(?P<k>\d)\.conv\.(?P<end>weight|bias)",
            lambda m: f"roi_heads.mask_head{_stage(m)}.mask_fcn{int(m['k']) + 1}.{m['end']}",
        ),
        Rule(
            mask + r"(?P<layer>upsample|conv_logits|conv_res\.conv)\.(?P<end>weight|bias)",
            lambda m: f"roi_heads.mask_head{_stage(m)}.{_MASK_LAYERS[m['layer']]}.{m['end']}",
        ),
        Rule(
            r"roi_head\.semantic_head\.(lateral_convs\.\d|convs\.\d|conv_embedding)\.conv\.(weight|bias)",
            r"roi_heads.semantic_head.\1.\2",
        ),
        Rule(r"roi_head\.semantic_head\.conv_logits\.(weight|bias)", r"roi_heads.semantic_head.conv_logits.\1"),
    ]
    config = settings.merge(_config(tensors, said), settings.detections(said, "ROI_HEADS", "rcnn"))
    proposals = {
        "ANCHOR_GENERATOR": anchors.config(),
        "RPN": {"BBOX_REG_WEIGHTS": settings.box_weights(rpn, "rpn_head", (1.0,) * 4), **settings.proposals(said)},
    }
    return rules, settings.merge(config, {"MODEL": proposals})


_MASK_LAYERS = {"upsample": "deconv", "conv_logits": "predictor", "conv_res.conv": "conv_res"}


def _config(tensors: Tensors, said: dict) -> dict:
    cascade = "roi_head.bbox_head.0.fc_cls.weight" in tensors
    box, mask = (f"roi_head.{kind}_head.{'0.' if cascade else ''}" for kind in ("bbox", "mask"))
    if f"{box}fc_cls.weight" not in tensors:
        raise ValueError(f"the file has an RPN but no {box}fc_cls.weight: of R-CNNs, only those with boxes are known")
    classes = tensors[f"{box}fc_cls.weight"].shape[0] - 1
    masks = f"{mask}conv_logits.weight" in tensors
    agnostic = tensors[f"{box}fc_reg.weight"].shape[0] == 4
    if cascade and not agnostic:
        raise ValueError(f"{box}fc_reg predicts a box for each class; cascades of detectron2 have one for all")
    htc = "roi_head.mask_head.1.conv_res.conv.weight" in tensors
    semantic = "roi_head.semantic_head.conv_logits.weight" in tensors
    weights = _box_weights(said, 3 if cascade else 1)
    model = {
        "META_ARCHITECTURE": "HTC" if semantic else "GeneralizedRCNN",
        "MASK_ON": masks,
        "RPN": {
            "IN_FEATURES": [f"p{level}" for level in range(2, 7)],
            "PRE_NMS_TOPK_TRAIN": 2000, "PRE_NMS_TOPK_TEST": 1000, "POST_NMS_TOPK_TRAIN": 2000 if cascade else 1000,
            "POST_NMS_TOPK_TEST": 1000, "SMOOTH_L1_BETA": 1 / 9 if cascade else 0.0,
        },
        "ROI_HEADS": {
            "NAME": "StandardROIHeads", "IN_FEATURES": [f"p{level}" for level in range(2, 6)], "NUM_CLASSES": classes,
        },
        "ROI_BOX_HEAD": {
            "NAME": "FastRCNNConvFCHead", "NUM_FC": sum(f"{box}shared_fcs.{k}.weight" in tensors for k in range(5)),
            "FC_DIM": tensors[f"{box}shared_fcs.0.weight"].shape[0], **settings.pooler(_roi_head(said), "bbox", 7),
            "CLS_AGNOSTIC_BBOX_REG": agnostic, "SMOOTH_L1_BETA": 1.0 if cascade else 0.0,
            "BBOX_REG_WEIGHTS": weights[0],
        },
    }  # fmt: skip
    if masks:
        model["ROI_MASK_HEAD"] = {
            "NAME": "HTCMaskHead" if htc else "MaskRCNNConvUpsampleHead",
            **settings.pooler(_roi_head(said), "mask", 14),
            "NUM_CONV": sum(f"{mask}convs.{k}.conv.weight" in tensors for k in range(9)),
            "CONV_DIM": tensors[f"{mask}convs.0.conv.weight"].shape[0],
            "CLS_AGNOSTIC_MASK": tensors[f"{mask}conv_logits.weight"].shape[0] == 1 and classes > 1,
        }  # fmt: skip
    if cascade:
        model["ROI_HEADS"]["NAME"] = "HTCROIHeads" if htc else "CascadeMaskROIHeads"
        model["ROI_BOX_CASCADE_HEAD"] = {"BBOX_REG_WEIGHTS": weights}
    if htc:
        model["ROI_HEADS"]["SCORE_THRESH_TEST"] = 0.001
    if semantic:
        model["HTC"] = {
            "SEMANTIC_ON": True,
            "SEMANTIC_CLASSES": tensors["roi_head.semantic_head.conv_logits.weight"].shape[0],
        }
    return {"MODEL": model}


def _roi_head(said: dict) -> dict:
    """What the training config says of the second stage; version 1.x has it beside the first."""
    model = settings.part(said, "model")
    return settings.part(model, "roi_head") or model


def _box_weights(said: dict, stages: int) -> list[list[float]]:
    """BBOX_REG_WEIGHTS of the box head of each stage."""
    told = _roi_head(said).get("bbox_head", {})
    heads = told if isinstance(told, list) else [told] * stages
    if len(heads) != stages:
        raise ValueError(f"the training config has {len(heads)} bbox_heads, but the file's tensors are of {stages}")
    return [settings.box_weights(head, "bbox_head", stds) for head, stds in zip(heads, STDS)]
