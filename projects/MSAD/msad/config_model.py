"""The keys of backbones, necks and heads that the project adds to MODEL; see :mod:`msad.config`."""

from __future__ import annotations

from detectron2.config import CfgNode as CN


def add_model_config(cfg: CN) -> None:
    """Add the keys to a detectron2 config, in place."""
    # --- backbones and necks -------------------------------------------------------------------------------------
    # Basic blocks per stage of build_tiny_resnet_backbone; widths are RES2_OUT_CHANNELS * 2^stage.
    cfg.MODEL.RESNETS.BLOCKS = [1, 1, 1, 1]
    # build_sac_resnet_backbone (DetectoRS): standardise the weights of all convolutions.
    cfg.MODEL.RESNETS.CONV_AWS = True
    # In which of res2 to res5 it makes the 3x3 convolutions switchable (SAC).
    cfg.MODEL.RESNETS.SAC_ON_PER_STAGE = [False, True, True, True]
    # Whether these are deformable, as in all released models.
    cfg.MODEL.RESNETS.SAC_DEFORM = True
    # Of build_dilated_resnet_backbone: dilation of res4 and (detectron2's key RES5_DILATION) of res5, in place of their
    # strides; 2 and 4 make stride 8.
    cfg.MODEL.RESNETS.RES4_DILATION = 1
    # Whether the first block of a dilated stage has half of its dilation.
    cfg.MODEL.RESNETS.CONTRACT_DILATION = True
    # "basic" (a 7x7 convolution) or "v1c" (three of 3x3).
    cfg.MODEL.RESNETS.STEM_TYPE = "basic"
    cfg.MODEL.MOBILENETV2 = CN()
    # Factor on the channels of build_mobilenetv2_backbone, and of build_dilated_mobilenetv2_backbone, whose res3 to
    # res5 have stride 8. Slimmable weights exist for 0.35, 0.5, 0.75 and 1.0.
    cfg.MODEL.MOBILENETV2.WIDTH = 1.0
    # Maps that it returns: "c1" (stride 2), "res2" to "res5" (strides 4 to 32).
    cfg.MODEL.MOBILENETV2.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    # Its normalisation, as MODEL.RESNETS.NORM.
    cfg.MODEL.MOBILENETV2.NORM = "BN"
    cfg.MODEL.EFFICIENTNET_LITE = CN()
    # Size of build_efficientnet_lite_backbone: "lite0", "lite1" or "lite2". MODEL.WEIGHTS of lite0's ImageNet weights,
    # which want RGB, mean 127 and std 128: pretrained://efficientnet_lite0?matching_heuristics=True
    cfg.MODEL.EFFICIENTNET_LITE.VARIANT = "lite0"
    # Maps that it returns: "c1" (stride 2), "res2" to "res5" (strides 4 to 32).
    cfg.MODEL.EFFICIENTNET_LITE.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    # Its normalisation, as MODEL.RESNETS.NORM; "FrozenBN" keeps the pretrained statistics.
    cfg.MODEL.EFFICIENTNET_LITE.NORM = "BN"
    # Of build_swin_backbone, build_swin_fpn_backbone and build_retinanet_swin_fpn_backbone; defaults are Swin-T.
    # MODEL.BACKBONE.FREEZE_AT has no effect on them.
    cfg.MODEL.SWIN = CN()
    # Channels of "p0"; each later map has twice as many. Swin-T and -S: 96, -B: 128.
    cfg.MODEL.SWIN.EMBED_DIM = 96
    # Blocks a stage. Swin-S and -B: [2, 2, 18, 2].
    cfg.MODEL.SWIN.DEPTHS = [2, 2, 6, 2]
    # Attention heads a stage. Swin-B: [4, 8, 16, 32].
    cfg.MODEL.SWIN.NUM_HEADS = [3, 6, 12, 24]
    # Side of an attention window, in tokens of the stage.
    cfg.MODEL.SWIN.WINDOW_SIZE = 7
    # Hidden channels of the MLPs to those of the map.
    cfg.MODEL.SWIN.MLP_RATIO = 4.0
    # Stochastic depth of the last block, rising linearly from 0 at the first. Swin-B: 0.3.
    cfg.MODEL.SWIN.DROP_PATH_RATE = 0.2
    # Add an absolute position embedding to the patches.
    cfg.MODEL.SWIN.APE = False
    # Normalise the embedded patches.
    cfg.MODEL.SWIN.PATCH_NORM = True
    # Maps that it returns, of "p0" to "p3" (strides 4 to 32; not the levels of an FPN, whose p3 has stride 8).
    cfg.MODEL.SWIN.OUT_FEATURES = ["p0", "p1", "p2", "p3"]
    # As in detectron2: from 0 on the patch embedding is frozen, from 2 on also the first FROZEN_STAGES - 1 stages.
    cfg.MODEL.SWIN.FROZEN_STAGES = -1
    # Compute blocks again in the backward pass instead of keeping their activations.
    cfg.MODEL.SWIN.CHECKPOINT = False
    cfg.MODEL.TIMM = CN()
    # Model of timm for build_timm_backbone, as "convnext_tiny"; needs the extra "timm".
    cfg.MODEL.TIMM.NAME = ""
    # Maps that it returns: "c1" (stride 2), "res2" to "res5" (strides 4 to 32), as far as the model has them.
    cfg.MODEL.TIMM.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    # Begin with timm's pretrained weights of that name, which are downloaded.
    cfg.MODEL.TIMM.PRETRAINED = False
    # Registered backbone under build_level_fpn_backbone; under build_rfp_backbone (DetectoRS) there are two of it.
    cfg.MODEL.FPN.BOTTOM_UP = "build_resnet_backbone"
    # Levels that build_level_fpn_backbone makes: those the head reads. A teacher adds those its branches need.
    cfg.MODEL.FPN.LEVELS = []
    # How build_level_fpn_backbone makes the levels above P5: "conv" (P6, P7 by strided convolutions; dense
    # detectors) or "maxpool" (P6 is every second element of P5, no P7; R-CNNs).
    cfg.MODEL.FPN.TOP_BLOCK = "conv"
    # What TOP_BLOCK "conv" makes P6 from: "c5", or "p5" (FCOS, GFL).
    cfg.MODEL.FPN.TOP_SOURCE = "c5"
    # Whether it makes P7 from ReLU(P6) (as detectron2) or from P6 (as mmdetection's RetinaNet, GFL and RepPoints).
    cfg.MODEL.FPN.TOP_RELU = True
    # Normalisation of these convolutions; MODEL.FPN.NORM does not reach them, as in detectron2.
    cfg.MODEL.FPN.TOP_NORM = ""

    # --- PSPHead, UPerHead (MODEL.SEM_SEG_HEAD.NAME), beside detectron2's keys of MODEL.SEM_SEG_HEAD --------------
    # Sides of the grids of the pyramid pooling.
    cfg.MODEL.SEM_SEG_HEAD.POOL_SCALES = [1, 2, 3, 6]
    # Weight of the auxiliary classifier's loss, relative to the other; 0: there is none.
    cfg.MODEL.SEM_SEG_HEAD.AUX_WEIGHT = 0.4
    # Part of the channels that is dropped before a classifier.
    cfg.MODEL.SEM_SEG_HEAD.DROPOUT = 0.1
    # Segmentation with INPUT.CROP: no class may have more than this part of a crop's labelled pixels (ten tries).
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0

    # --- FCOS ----------------------------------------------------------------------------------------------------
    cfg.MODEL.FCOS = CN()
    # Classes of the data set, without background.
    cfg.MODEL.FCOS.NUM_CLASSES = 80
    # Levels the head reads, finest first. A detector in the L frame reads p2 to p6.
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Output channels of the 3x3 convolutions of each tower; fewer or narrower ones make a light head.
    cfg.MODEL.FCOS.CONV_DIMS = [256, 256, 256, 256]
    # Normalisation in the towers: "GN" (32 groups), "BN", ... or "" for none.
    cfg.MODEL.FCOS.NORM = "GN"
    # Initial score of every class (bias of the classification layer).
    cfg.MODEL.FCOS.PRIOR_PROB = 0.01
    # Initial predicted distance to each box side, in strides (bias of the regression layer; detectron2's is 0).
    cfg.MODEL.FCOS.PRIOR_DISTANCE = 1.0
    # In strides (FCOS, improved version).
    cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    # Focal loss: weight of the foreground, background gets 1 - alpha.
    cfg.MODEL.FCOS.FOCAL_LOSS_ALPHA = 0.25
    # Focal loss: exponent that plays down easy locations.
    cfg.MODEL.FCOS.FOCAL_LOSS_GAMMA = 2.0
    # On sqrt(class score * centerness).
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.05
    # Candidates per level before NMS.
    cfg.MODEL.FCOS.TOPK_CANDIDATES_TEST = 1000
    # IoU above which the lower-scored of two boxes of one class is dropped.
    cfg.MODEL.FCOS.NMS_THRESH_TEST = 0.6

    # Cut candidates to the image before NMS, as mmdetection does; detectron2 cuts the detections.
    cfg.MODEL.FCOS.CLIP_BEFORE_NMS = False
    # "sqrt_product": see SCORE_THRESH_TEST. "product_after_threshold" (mmdetection): candidates by class score alone,
    # scored by class score * centerness.
    cfg.MODEL.FCOS.SCORE_RULE = "sqrt_product"
    # A learned factor on the distances of each level, as in the original.
    cfg.MODEL.FCOS.SCALES = False
    # With SCALES: "relu_stride" (distances are ReLU(x) strides) or "exp" (exp(x) EXP_UNITs, the first version).
    cfg.MODEL.FCOS.BOXES = "relu_stride"
    # With "exp": pixels that exp(0) is. Divided by 2 for a student at L, as anchors are.
    cfg.MODEL.FCOS.EXP_UNIT = 1.0
    # With SCALES: tower that predicts centerness, "reg" or "cls" (the first version).
    cfg.MODEL.FCOS.CENTERNESS_ON = "reg"
    # With SCALES: the last convolution of each tower is deformable and modulated (mmdetection's dcn_on_last_conv).
    cfg.MODEL.FCOS.DEFORM_LAST = False

    # --- heads of LightRetinaNet, LightFCOS and LightGFL, beside the keys of the detectors without "Light" -----------
    cfg.MODEL.LIGHT_HEAD = CN()
    # Depthwise-separable convolutions in the towers.
    cfg.MODEL.LIGHT_HEAD.SEPARABLE = False
    # One tower for classes and boxes.
    cfg.MODEL.LIGHT_HEAD.SHARED = False
    # Channels of every layer of the finest level, which then has layers of its own; 0: it shares those of the others.
    cfg.MODEL.LIGHT_HEAD.FINEST_WIDTH = 0

    # --- MEInst (its boxes have the keys of MODEL.FCOS) ----------------------------------------------------------
    cfg.MODEL.MEINST = CN()
    # File of the mask code that tools/fit_mask_code.py makes from DATASETS.TRAIN; "checkpoint": MODEL.WEIGHTS have
    # it, as those of exported models do.
    cfg.MODEL.MEINST.CODE = ""
    # Numbers in a code.
    cfg.MODEL.MEINST.DIM = 60
    # Weight of the loss of the codes.
    cfg.MODEL.MEINST.CODE_LOSS_WEIGHT = 1.0

    # --- GFL -----------------------------------------------------------------------------------------------------
    cfg.MODEL.GFL = CN()
    # Classes of the data set, without background.
    cfg.MODEL.GFL.NUM_CLASSES = 80
    # Levels the head reads, finest first. A detector in the L frame reads p2 to p6.
    cfg.MODEL.GFL.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Output channels of the 3x3 convolutions of each tower; fewer or narrower ones make a light head.
    cfg.MODEL.GFL.CONV_DIMS = [256, 256, 256, 256]
    # Normalisation in the towers: "GN" (32 groups), "BN", ... or "" for none.
    cfg.MODEL.GFL.NORM = "GN"
    # Initial score of every class (bias of the classification layer).
    cfg.MODEL.GFL.PRIOR_PROB = 0.01
    # Largest distance from a location to a box side, in strides; a side is a distribution over REG_MAX + 1 bins.
    cfg.MODEL.GFL.REG_MAX = 16
    # Sides of the anchors that ATSS assigns, in strides.
    cfg.MODEL.GFL.ANCHOR_SIZE = 8.0
    # ATSS: candidates a box takes from each level.
    cfg.MODEL.GFL.ATSS_TOPK = 9
    # Quality focal loss: exponent that plays down easy locations.
    cfg.MODEL.GFL.QFL_BETA = 2.0
    # Weight of the quality focal loss.
    cfg.MODEL.GFL.QFL_WEIGHT = 1.0
    # Weight of the distribution focal loss.
    cfg.MODEL.GFL.DFL_WEIGHT = 0.25
    # Weight of the GIoU loss.
    cfg.MODEL.GFL.GIOU_WEIGHT = 2.0
    # On the class score, which estimates the IoU.
    cfg.MODEL.GFL.SCORE_THRESH_TEST = 0.05
    # Candidates per level before NMS.
    cfg.MODEL.GFL.TOPK_CANDIDATES_TEST = 1000
    # IoU above which the lower-scored of two boxes of one class is dropped.
    cfg.MODEL.GFL.NMS_THRESH_TEST = 0.6

    # Cut candidates to the image before NMS, as mmdetection does; detectron2 cuts the detections.
    cfg.MODEL.GFL.CLIP_BEFORE_NMS = False
    # Where in a square of one stride its centre lies, in strides. Weights of mmdetection: 0.
    cfg.MODEL.GFL.OFFSET = 0.5

    # --- RepPoints -----------------------------------------------------------------------------------------------
    cfg.MODEL.REPPOINTS = CN()
    # Classes of the data set, without background.
    cfg.MODEL.REPPOINTS.NUM_CLASSES = 80
    # Levels the head reads, finest first. A detector in the L frame reads p2 to p6.
    cfg.MODEL.REPPOINTS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Output channels of the 3x3 convolutions of each tower; fewer or narrower ones make a light head.
    cfg.MODEL.REPPOINTS.CONV_DIMS = [256, 256, 256]
    # Channels of the layers behind the towers, of which two are deformable.
    cfg.MODEL.REPPOINTS.POINT_DIM = 256
    # Normalisation in the towers: "GN" (32 groups), "BN", ... or "" for none.
    cfg.MODEL.REPPOINTS.NORM = "GN"
    # Initial score of every class (bias of the classification layer).
    cfg.MODEL.REPPOINTS.PRIOR_PROB = 0.01
    # The box of a set of points: "moment", "minmax" or "partial_minmax" (of the first four points).
    cfg.MODEL.REPPOINTS.TRANSFORM = "moment"
    # Sides of an object in strides of the level that learns it; also the unit of the box losses.
    cfg.MODEL.REPPOINTS.POINT_SCALE = 4.0
    # Points that each object takes in the first stage.
    cfg.MODEL.REPPOINTS.POINTS_PER_OBJECT = 1
    # Second stage: IoU below which a first-stage box is background, and from which on it is positive.
    cfg.MODEL.REPPOINTS.IOU_THRESHOLDS = [0.4, 0.5]
    # Focal loss: weight of the foreground, background gets 1 - alpha.
    cfg.MODEL.REPPOINTS.FOCAL_LOSS_ALPHA = 0.25
    # Focal loss: exponent that plays down easy locations.
    cfg.MODEL.REPPOINTS.FOCAL_LOSS_GAMMA = 2.0
    # Weight of the first stage's box loss.
    cfg.MODEL.REPPOINTS.INIT_WEIGHT = 0.5
    # Weight of the second stage's box loss.
    cfg.MODEL.REPPOINTS.REFINE_WEIGHT = 1.0
    # On the class score.
    cfg.MODEL.REPPOINTS.SCORE_THRESH_TEST = 0.05
    # Candidates per level before NMS.
    cfg.MODEL.REPPOINTS.TOPK_CANDIDATES_TEST = 1000
    # IoU above which the lower-scored of two boxes of one class is dropped.
    cfg.MODEL.REPPOINTS.NMS_THRESH_TEST = 0.5

    # --- CascadeMaskROIHeads and HTCROIHeads (MODEL.ROI_HEADS.NAME) -----------------------------------------------
    # Factors of all losses of each stage.
    cfg.MODEL.ROI_BOX_CASCADE_HEAD.STAGE_LOSS_WEIGHTS = [1.0, 0.5, 0.25]
    # What is averaged over the stages for the scores: "logits" (mmdetection) or "probs" (detectron2).
    cfg.MODEL.ROI_BOX_CASCADE_HEAD.SCORE_MEAN = "logits"
    # Masks that are averaged at inference: of "all" stages, or of the "last" alone (HTC in mmdetection 3.x).
    cfg.MODEL.ROI_BOX_CASCADE_HEAD.MASK_MEAN = "all"
    cfg.MODEL.HTC = CN()
    # HTC's semantic branch. It is trained on maps "sem_seg" (MODEL.META_ARCHITECTURE: HTC).
    cfg.MODEL.HTC.SEMANTIC_ON = False
    # Classes of things and stuff in these maps.
    cfg.MODEL.HTC.SEMANTIC_CLASSES = 183
    # Label of pixels that do not count.
    cfg.MODEL.HTC.SEMANTIC_IGNORE = 255
    # Levels that the branch reads.
    cfg.MODEL.HTC.SEMANTIC_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    # The one of them on whose grid it works.
    cfg.MODEL.HTC.SEMANTIC_LEVEL = "p3"
    # Factor of its loss.
    cfg.MODEL.HTC.SEMANTIC_WEIGHT = 0.2
