"""Every key the project adds to detectron2's config, and the loading of yaml files.

The comments after the defaults state unit and source; docs/CONFIG.md is generated from this file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import reduce
from operator import getitem
from pathlib import Path

from detectron2 import model_zoo
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg

from .config_values import check_entries, check_yaml, decode, nearest, valid_keys

# Keys of earlier versions and what they are called now.
RENAMED = {"DISTILL.READING": "DISTILL.WEIGHTING", "SOLVER.SCALE_TO_BATCH": "SOLVER.REFERENCE_BATCH_SIZE"}


def add_msad_config(cfg: CN) -> CN:
    """Add the project's keys to a detectron2 config, in place, and return it."""
    # --- data sets declared in yaml ------------------------------------------------------------------------------
    # Entries {NAME, TYPE, ...}. TYPE "coco" (default) has JSON and IMAGES, and if wanted CLASSES, KEYPOINT_FLIP_PAIRS,
    # KEYPOINT_SIGMAS, LOW_RES_IMAGES (the student's own images); CLASSES are the names that the file must have, by
    # ascending id. "visdrone" has IMAGES and ANNOTATIONS (folders) and PATCHES, "argoverse_hd" JSON and IMAGES,
    # "sem_seg" IMAGES and LABELS (folders) and CLASSES. Paths are relative to $DETECTRON2_DATASETS. See docs/DATA.md.
    cfg.DATASETS.REGISTER = []
    # Image files of a data set that are looked into before training (size, pixels, whether they are whole), taken at
    # equal distances; 0: all of them.
    cfg.DATASETS.CHECK_IMAGES = 5000
    # Read LOW_RES_IMAGES of the data sets in place of IMAGES. Students (with DISTILL.TEACHERS) do so anyway; this is
    # for detectors that are trained on these files without a teacher.
    cfg.DATASETS.LOW_RES = False

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

    # --- PSPHead (MODEL.SEM_SEG_HEAD.NAME), beside detectron2's keys of MODEL.SEM_SEG_HEAD ------------------------
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
    # Focal loss: exponent that plays down easy cells.
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
    # With SCALES: "relu_stride" (distances are ReLU(x) strides) or "exp" (exp(x) pixels, the first version).
    cfg.MODEL.FCOS.BOXES = "relu_stride"
    # With SCALES: tower that predicts centerness, "reg" or "cls" (the first version).
    cfg.MODEL.FCOS.CENTERNESS_ON = "reg"

    # --- LightFCOS (FCOS with the keys of MODEL.FCOS and a lighter head) ------------------------------------------
    cfg.MODEL.LIGHTFCOS = CN()
    # Depthwise-separable convolutions in the towers.
    cfg.MODEL.LIGHTFCOS.SEPARABLE = True
    # One tower for classes and boxes.
    cfg.MODEL.LIGHTFCOS.SHARED = False
    # Channels of every layer of the finest level, which then has layers of its own; 0: it shares those of the others.
    cfg.MODEL.LIGHTFCOS.FINEST_WIDTH = 0

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
    # Largest distance from a cell to a box side, in strides; a side is a distribution over REG_MAX + 1 bins.
    cfg.MODEL.GFL.REG_MAX = 16
    # Sides of the anchors that ATSS assigns, in strides.
    cfg.MODEL.GFL.ANCHOR_SIZE = 8.0
    # ATSS: candidates a box takes from each level.
    cfg.MODEL.GFL.ATSS_TOPK = 9
    # Quality focal loss: exponent that plays down easy cells.
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
    # Where in a cell its centre lies, in strides. Weights of mmdetection: 0.
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
    # Focal loss: exponent that plays down easy cells.
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

    # --- the multi-resolution teacher (MODEL.META_ARCHITECTURE: MultiScaleTeacher) -------------------------------
    cfg.MSAD = CN()
    # Meta-architecture of the detector inside the teacher, configured by its usual keys in the H frame.
    cfg.MSAD.DETECTOR = "FCOS"
    # Branches, H first: H, L (1/2), EL (1/4).
    cfg.MSAD.RESOLUTIONS = ["H", "L"]
    # What the teacher's inference uses: "fused" or one of RESOLUTIONS.
    cfg.MSAD.EVAL_BRANCH = "fused"
    # How low-resolution inputs are made from H: "antialias", or "nearest" as in the released code.
    cfg.MSAD.DOWNSAMPLE = "antialias"
    # Weight of the fused branch's detection losses (released JOINT_WEIGHT). DISTILL.WEIGHTING sets it.
    cfg.MSAD.W_FUSE = 0.4
    cfg.MSAD.FUSION = CN()
    # Hidden width of the gate: branches * channels / REDUCTION.
    cfg.MSAD.FUSION.REDUCTION = 16
    # Pool the gate's input over the image without its padding. False: as in the released code.
    cfg.MSAD.FUSION.MASK_PADDING = True

    # --- multi-scale fusion students (MODEL.META_ARCHITECTURE: FusionStudent) -------------------------------------
    cfg.MSAD.FUSION_STUDENT = CN()
    # Entries {RESOLUTION, WEIGHTS, MODEL: {...}}, H first: the branches, each a backbone of its own. MODEL has what
    # differs from the yaml's MODEL, which describes MSAD.DETECTOR in the H frame; MODEL.FPN.LEVELS follow by
    # themselves. WEIGHTS (optional) is a pretrained network or a detector whose backbone the branch takes over; it is
    # read where training begins, unless MODEL.WEIGHTS has a checkpoint for the whole student.
    cfg.MSAD.FUSION_STUDENT.BRANCHES = []
    # Run the branches behind the first on CUDA streams of their own, beside it; not yet run on a GPU. Without
    # effect on a CPU.
    cfg.MSAD.FUSION_STUDENT.STREAMS = False

    # --- distillation --------------------------------------------------------------------------------------------
    cfg.DISTILL = CN()
    # Entries {NAME, CONFIG: yaml of the teacher, WEIGHTS: its checkpoint, SCALE: size of its input relative to H}; the
    # first one initialises the student. NAME is "teacher" (the i-th of several: "teacher_i") and SCALE 1.0 by default.
    # An entry {NAME, MEAN_OF: [names], WEIGHTS_OF: [numbers]} is the mean of other teachers' features. Empty: ordinary
    # training.
    cfg.DISTILL.TEACHERS = []
    # Entries {NAME: registered loss, WEIGHT: float, SOURCE: name of a teacher or assistant (default: every teacher that
    # is in no mean), TAP: where features are read, LEVELS: H-frame levels, ...}; see docs/CONFIG.md. Empty: the student
    # is only initialised from the teacher (the no-KD baseline of every comparison).
    cfg.DISTILL.LOSSES = []
    # Entries {NAME: registered assistant, OPTIMIZER, BASE_LR, WEIGHT_DECAY, SCHEDULE, HEAD_LEARNS, ...}: sources that
    # are trained beside the student, each with its own optimizer.
    cfg.DISTILL.ASSISTANTS = []
    # Entries {TEACHERS: [names], and any sections of the config with what differs, as SOLVER: {MAX_ITER: 1000}}: the
    # student is trained in one run a stage, each from the student of the one before, in OUTPUT_DIR/stage1, stage2, ...
    cfg.DISTILL.STAGES = []
    # Resolution of the student: H, L (1/2) or EL (1/4); the loader's images are H and are reduced to it on the device.
    # Pyramid levels align at halvings only, so another ratio is an error. For a student with a short side of S pixels,
    # scale H: INPUT.MIN_SIZE_TRAIN 2 S (L) or 4 S (EL), for the teacher too.
    cfg.DISTILL.STUDENT_RESOLUTION = "L"
    # What the student copies from the teacher before training: "full", "neck_and_head" or "none". Tensors are matched
    # by name and shape; a part of a head is copied whole or not at all, and only from a head of the same class.
    cfg.DISTILL.INIT_STUDENT = "full"
    # BatchNorm of the teacher: "eval" (running statistics) or "batch" (batch statistics, as in the released code;
    # its buffers do not change either way).
    cfg.DISTILL.TEACHER_BN = "eval"
    # Weight of the student's detection losses (gamma of the paper).
    cfg.DISTILL.W_DET = 1.0
    # Iterations without distillation losses at the beginning, in which assistants learn already (ScaleKD: 30000 of
    # 90000).
    cfg.DISTILL.START_ITER = 0
    # Iterations after START_ITER over which the distillation weight rises linearly from 0 (released: 500).
    cfg.DISTILL.WARMUP_ITERS = 500
    # End of distillation: from DECAY_FROM to DECAY_TO (fractions of SOLVER.MAX_ITER) the weight falls linearly to 0.
    # [1.0, 1.0] keeps it to the end, as the paper and the released code do.
    cfg.DISTILL.DECAY_FROM = 1.0
    # See DECAY_FROM.
    cfg.DISTILL.DECAY_TO = 1.0
    # Weights from the paper's lambda and gamma: "" (W_DET, LOSSES as written), "convex" (gamma L_det + (1 - gamma)
    # L_KD, fused branch lambda) or "additive" (gamma L_det + lambda L_KD, fused branch 0.4); see docs/CONFIG.md. Gamma
    # as the weight of distillation is not offered: the paper lowers gamma for the 3x schedule so that distillation
    # counts more, and there it would count less.
    cfg.DISTILL.WEIGHTING = ""
    # Lambda of the paper, used by WEIGHTING only (3x schedule: 0.4).
    cfg.DISTILL.LAMBDA = 0.4
    # Gamma of the paper, used by WEIGHTING only (3x schedule: 0.8).
    cfg.DISTILL.GAMMA = 0.8
    cfg.DISTILL.BALANCE = CN()
    # Replaces the WEIGHT of every loss: its gradient at the student's neck gets RATIO times the norm of the detection
    # losses' (before warm-up and decay). 0: weights as written.
    cfg.DISTILL.BALANCE.RATIO = 0.0
    # Iterations, from the first, over which the norms are measured; the weights follow them and then stay.
    cfg.DISTILL.BALANCE.ITERS = 100
    # Every so many iterations, write m, n, mn/N and the angle of raw features (WACV 2024, figure 8) to
    # OUTPUT_DIR/features.jsonl, for tools/plot_features.py. 0: never.
    cfg.DISTILL.ANALYSIS_PERIOD = 0

    # --- evaluation and speed ------------------------------------------------------------------------------------
    # "SGD" (detectron2's) or "AdamW", which trains small networks from scratch in far fewer iterations.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # LR_SCHEDULER_NAME WarmupPolyLR: exponent of the fall from BASE_LR over MAX_ITER.
    cfg.SOLVER.POLY_LR_POWER = 0.9
    # Learning rate at its end.
    cfg.SOLVER.POLY_LR_END = 0.0
    # Batch size that BASE_LR and all numbers of iterations were chosen for. If IMS_PER_BATCH is another one, both are
    # scaled linearly and the log says how (old -> new). 0: nothing is scaled. detectron2's SOLVER.REFERENCE_WORLD_SIZE,
    # the number of GPUs that a yaml was written for, scales IMS_PER_BATCH and the same numbers to those there are; with
    # both, this comes first.
    cfg.SOLVER.REFERENCE_BATCH_SIZE = 0
    # Memory format torch.channels_last for the convolutions.
    cfg.SOLVER.CHANNELS_LAST = False
    # torch.compile the backbones of student and teacher.
    cfg.SOLVER.COMPILE = False
    for old, new in RENAMED.items():
        cfg.register_renamed_key(old, new)
    return cfg


def detector_architecture(cfg: CN) -> str:
    """Meta-architecture of the detector: of a teacher or fusion student, that of the one inside."""
    name = cfg.MODEL.META_ARCHITECTURE
    return cfg.MSAD.DETECTOR if name in ("MultiScaleTeacher", "FusionStudent") else name


def _unknown_key(error: KeyError, cfg: CN, source: str) -> KeyError:
    name = str(error.args[0]).rsplit(":", 1)[-1].strip().strip("'\"")
    return KeyError(f"{source}: unknown config key {name}{nearest(name, valid_keys(cfg))}")


def find_config(config_file: str | os.PathLike) -> str:
    """The path of a yaml file; one that does not exist is looked for among those that the project and detectron2 ship.

    Raises:
        FileNotFoundError: there is none.
    """
    name = os.fspath(config_file)
    if os.path.isfile(name) or "://" in name:
        return name
    installed, checkout = Path(__file__).parent / "configs", Path(__file__).parents[3] / "configs"
    shipped = (installed if installed.is_dir() else checkout) / name.removeprefix("configs/")
    if shipped.is_file():
        return str(shipped)
    with contextlib.suppress(RuntimeError):
        return model_zoo.get_config_file(name)
    raise FileNotFoundError(f"no config file {name}")


def load_config(config_file: str | os.PathLike, opts: list | tuple = ()) -> CN:
    """detectron2's defaults, the project's, a yaml file and ``KEY VALUE`` overrides, in this order.

    Relative paths in the yaml file, MODEL.WEIGHTS and the CONFIG and WEIGHTS of DISTILL.TEACHERS, are looked up beside
    it, as ``_BASE_`` is, and then in the working directory; for those of overrides it is the other way round. A
    config.yaml that :func:`msad.export.export` wrote is completed by the msad.yaml beside it.

    Raises:
        FileNotFoundError: no such yaml file, or none that it is based on.
        ValueError: not a yaml file, wrong entries of a list, or overrides that are not pairs or of the wrong type.
        KeyError: an unknown key; names the file and the nearest valid key.
    """
    cfg = add_msad_config(get_cfg())
    config_file = os.fspath(config_file)
    if config_file:
        config_file = find_config(config_file)
        exported = os.path.join(os.path.dirname(config_file), "msad.yaml")
        more = [exported] if os.path.basename(config_file) == "config.yaml" and os.path.isfile(exported) else []
        for file in [config_file, *more]:
            check_yaml(file, cfg)
            try:
                cfg.merge_from_file(file)
            except KeyError as error:
                raise _unknown_key(error, cfg, file) from None
        check_entries(cfg)
        _look_beside(cfg, os.path.dirname(config_file))
    if len(opts) % 2:
        raise ValueError(f"overrides must be KEY VALUE pairs, got {list(opts)}")
    for key, value in zip(opts[::2], opts[1::2]):
        if key not in valid_keys(cfg):
            raise _unknown_key(KeyError(key), cfg, "command line")
        value = decode(value, reduce(getitem, key.split("."), cfg))
        cfg.merge_from_list([key, repr(value) if isinstance(value, str) else value])  # or texts are decoded again
    check_entries(cfg)
    _look_beside(cfg, os.path.dirname(config_file), os.path.exists)
    return cfg


def _look_beside(cfg: CN, folder: str, settled: Callable[[str], bool] = lambda path: False) -> None:
    """Let relative paths of files that are in ``folder`` say so, but for those that are ``settled``."""
    holders = [(cfg.MODEL, ("WEIGHTS",)), *((teacher, ("CONFIG", "WEIGHTS")) for teacher in cfg.DISTILL.TEACHERS)]
    for holder, keys in holders:
        for key in keys:
            path = holder.get(key) or ""
            if not settled(path) and os.path.isfile(os.path.join(folder, path)):
                holder[key] = os.path.join(folder, path)
