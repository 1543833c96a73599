"""Every configuration key with its default value.

The tree equals detectron2's, also for parts that are not in this distribution (the panoptic model,
rotated anchors), so that any yaml file written for detectron2 can be merged.
A tuple here is a tuple there: the type of a default is the type that a yaml file must give.
"""

from typing import Any

CONFIG_VERSION = 2


def default_tree() -> dict[str, Any]:
    """A fresh nested dict of all defaults, without ``VERSION``."""
    return {
        "MODEL": _model(),
        "INPUT": _input(),
        "DATASETS": _datasets(),
        "DATALOADER": _dataloader(),
        "SOLVER": _solver(),
        "TEST": _test(),
        "OUTPUT_DIR": "./output",
        "SEED": -1,  # negative: a random one
        "CUDNN_BENCHMARK": False,
        "FLOAT32_PRECISION": "",
        "VIS_PERIOD": 0,
        "GLOBAL": {"HACK": 1.0},
    }


def _input() -> dict[str, Any]:
    return {
        "FORMAT": "BGR",
        "MASK_FORMAT": "polygon",
        "RANDOM_FLIP": "horizontal",
        # short sides in pixels; the long side is capped by MAX_SIZE_*
        "MIN_SIZE_TRAIN": (800,),
        "MIN_SIZE_TRAIN_SAMPLING": "choice",
        "MAX_SIZE_TRAIN": 1333,
        "MIN_SIZE_TEST": 800,
        "MAX_SIZE_TEST": 1333,
        "CROP": {"ENABLED": False, "TYPE": "relative_range", "SIZE": [0.9, 0.9]},
    }


def _datasets() -> dict[str, Any]:
    return {
        "TRAIN": (),
        "TEST": (),
        "PROPOSAL_FILES_TRAIN": (),
        "PROPOSAL_FILES_TEST": (),
        "PRECOMPUTED_PROPOSAL_TOPK_TRAIN": 2000,
        "PRECOMPUTED_PROPOSAL_TOPK_TEST": 1000,
    }


def _dataloader() -> dict[str, Any]:
    return {
        "NUM_WORKERS": 4,
        "ASPECT_RATIO_GROUPING": True,
        "FILTER_EMPTY_ANNOTATIONS": True,
        "SAMPLER_TRAIN": "TrainingSampler",
        "REPEAT_THRESHOLD": 0.0,
        "REPEAT_SQRT": True,
    }


def _solver() -> dict[str, Any]:
    schedule = {
        "LR_SCHEDULER_NAME": "WarmupMultiStepLR",
        "MAX_ITER": 40000,
        "STEPS": (30000,),
        "GAMMA": 0.1,
        "NUM_DECAYS": 3,
        "BASE_LR": 0.001,
        "BASE_LR_END": 0.0,
        "WARMUP_METHOD": "linear",
        "WARMUP_ITERS": 1000,
        "WARMUP_FACTOR": 1.0 / 1000,
        "RESCALE_INTERVAL": False,
    }
    sgd = {
        "MOMENTUM": 0.9,
        "NESTEROV": False,
        "BIAS_LR_FACTOR": 1.0,
        "WEIGHT_DECAY": 0.0001,
        "WEIGHT_DECAY_NORM": 0.0,
        "WEIGHT_DECAY_BIAS": None,  # None: as WEIGHT_DECAY
        "CLIP_GRADIENTS": {"ENABLED": False, "CLIP_TYPE": "value", "CLIP_VALUE": 1.0, "NORM_TYPE": 2.0},
    }
    run = {
        "IMS_PER_BATCH": 16,  # over all GPUs
        "REFERENCE_WORLD_SIZE": 0,
        "CHECKPOINT_PERIOD": 5000,
        "AMP": {"ENABLED": False},
    }
    return {**schedule, **sgd, **run}


def _test() -> dict[str, Any]:
    return {
        "EVAL_PERIOD": 0,
        "DETECTIONS_PER_IMAGE": 100,
        "EXPECTED_RESULTS": [],
        "KEYPOINT_OKS_SIGMAS": [],
        "AUG": {"ENABLED": False, "MIN_SIZES": tuple(range(400, 1201, 100)), "MAX_SIZE": 4000, "FLIP": True},
        "PRECISE_BN": {"ENABLED": False, "NUM_ITER": 200},
    }


def _model() -> dict[str, Any]:
    return {
        "META_ARCHITECTURE": "GeneralizedRCNN",
        "DEVICE": "cuda",
        "WEIGHTS": "",
        "MASK_ON": False,
        "KEYPOINT_ON": False,
        "LOAD_PROPOSALS": False,
        # channels in the order of INPUT.FORMAT
        "PIXEL_MEAN": [103.530, 116.280, 123.675],
        "PIXEL_STD": [1.0, 1.0, 1.0],
        **_backbones(),
        **_proposals(),
        **_roi_heads(),
        "RETINANET": _retinanet(),
        **_segmentation(),
    }


def _backbones() -> dict[str, Any]:
    resnets = {
        "DEPTH": 50,
        "OUT_FEATURES": ["res4"],
        "NORM": "FrozenBN",
        "STEM_OUT_CHANNELS": 64,
        "RES2_OUT_CHANNELS": 256,
        "NUM_GROUPS": 1,
        "WIDTH_PER_GROUP": 64,
        "STRIDE_IN_1X1": True,
        "RES5_DILATION": 1,
        "DEFORM_ON_PER_STAGE": [False] * 4,
        "DEFORM_MODULATED": False,
        "DEFORM_NUM_GROUPS": 1,
    }
    return {
        "BACKBONE": {"NAME": "build_resnet_backbone", "FREEZE_AT": 2},
        "RESNETS": resnets,
        "FPN": {"IN_FEATURES": [], "OUT_CHANNELS": 256, "NORM": "", "FUSE_TYPE": "sum"},
    }


def _proposals() -> dict[str, Any]:
    anchors = {
        "NAME": "DefaultAnchorGenerator",
        "SIZES": [[32, 64, 128, 256, 512]],
        "ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
        "ANGLES": [[-90, 0, 90]],
        "OFFSET": 0.0,
    }
    rpn = {
        "HEAD_NAME": "StandardRPNHead",
        "IN_FEATURES": ["res4"],
        "CONV_DIMS": [-1],
        "BOUNDARY_THRESH": -1,
        "IOU_THRESHOLDS": [0.3, 0.7],
        "IOU_LABELS": [0, -1, 1],
        "BATCH_SIZE_PER_IMAGE": 256,
        "POSITIVE_FRACTION": 0.5,
        "BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0),
        "BBOX_REG_LOSS_TYPE": "smooth_l1",
        "BBOX_REG_LOSS_WEIGHT": 1.0,
        "SMOOTH_L1_BETA": 0.0,
        "LOSS_WEIGHT": 1.0,
        "NMS_THRESH": 0.7,
        "PRE_NMS_TOPK_TRAIN": 12000,
        "PRE_NMS_TOPK_TEST": 6000,
        "POST_NMS_TOPK_TRAIN": 2000,
        "POST_NMS_TOPK_TEST": 1000,
    }
    return {
        "ANCHOR_GENERATOR": anchors,
        "PROPOSAL_GENERATOR": {"NAME": "RPN", "MIN_SIZE": 0},
        "RPN": rpn,
    }


def _pooler() -> dict[str, Any]:
    return {"POOLER_TYPE": "ROIAlignV2", "POOLER_RESOLUTION": 14, "POOLER_SAMPLING_RATIO": 0}


def _roi_heads() -> dict[str, Any]:
    common = {
        "NAME": "Res5ROIHeads",
        "NUM_CLASSES": 80,
        "IN_FEATURES": ["res4"],
        "IOU_THRESHOLDS": [0.5],
        "IOU_LABELS": [0, 1],
        "BATCH_SIZE_PER_IMAGE": 512,
        "POSITIVE_FRACTION": 0.25,
        "PROPOSAL_APPEND_GT": True,
        "SCORE_THRESH_TEST": 0.05,
        "NMS_THRESH_TEST": 0.5,
    }
    box = {
        **_pooler(),
        "NAME": "",
        "NUM_FC": 0,
        "FC_DIM": 1024,
        "NUM_CONV": 0,
        "CONV_DIM": 256,
        "NORM": "",
        "CLS_AGNOSTIC_BBOX_REG": False,
        "TRAIN_ON_PRED_BOXES": False,
        "BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0),
        "BBOX_REG_LOSS_TYPE": "smooth_l1",
        "BBOX_REG_LOSS_WEIGHT": 1.0,
        "SMOOTH_L1_BETA": 0.0,
        "USE_SIGMOID_CE": False,
        "USE_FED_LOSS": False,
        "FED_LOSS_FREQ_WEIGHT_POWER": 0.5,
        "FED_LOSS_NUM_CLASSES": 50,
    }
    cascade = {
        "IOUS": (0.5, 0.6, 0.7),
        "BBOX_REG_WEIGHTS": tuple((10.0 * k, 10.0 * k, 5.0 * k, 5.0 * k) for k in (1, 2, 3)),
    }
    mask = {
        **_pooler(),
        "NAME": "MaskRCNNConvUpsampleHead",
        "NUM_CONV": 0,
        "CONV_DIM": 256,
        "NORM": "",
        "CLS_AGNOSTIC_MASK": False,
    }
    keypoint = {
        **_pooler(),
        "NAME": "KRCNNConvDeconvUpsampleHead",
        "CONV_DIMS": (512,) * 8,
        "NUM_KEYPOINTS": 17,
        "MIN_KEYPOINTS_PER_IMAGE": 1,
        "NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS": True,
        "LOSS_WEIGHT": 1.0,
    }
    return {
        "ROI_HEADS": common,
        "ROI_BOX_HEAD": box,
        "ROI_BOX_CASCADE_HEAD": cascade,
        "ROI_MASK_HEAD": mask,
        "ROI_KEYPOINT_HEAD": keypoint,
    }


def _retinanet() -> dict[str, Any]:
    return {
        "NUM_CLASSES": 80,
        "IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],
        "NUM_CONVS": 4,
        "NORM": "",
        "PRIOR_PROB": 0.01,
        "IOU_THRESHOLDS": [0.4, 0.5],
        "IOU_LABELS": [0, -1, 1],
        "FOCAL_LOSS_ALPHA": 0.25,
        "FOCAL_LOSS_GAMMA": 2.0,
        "BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0),
        "BBOX_REG_LOSS_TYPE": "smooth_l1",
        "SMOOTH_L1_LOSS_BETA": 0.1,
        "SCORE_THRESH_TEST": 0.05,
        "TOPK_CANDIDATES_TEST": 1000,
        "NMS_THRESH_TEST": 0.5,
    }


def _segmentation() -> dict[str, Any]:
    """The semantic head; the panoptic model is not in this distribution, its keys are there for yaml files."""
    semantic = {
        "NAME": "SemSegFPNHead",
        "NUM_CLASSES": 54,
        "IN_FEATURES": ["p2", "p3", "p4", "p5"],
        "COMMON_STRIDE": 4,
        "CONVS_DIM": 128,
        "NORM": "GN",
        "IGNORE_VALUE": 255,
        "LOSS_WEIGHT": 1.0,
    }
    combine = {
        "ENABLED": True,
        "OVERLAP_THRESH": 0.5,
        "STUFF_AREA_LIMIT": 4096,
        "INSTANCES_CONFIDENCE_THRESH": 0.5,
    }
    return {
        "SEM_SEG_HEAD": semantic,
        "PANOPTIC_FPN": {"INSTANCE_LOSS_WEIGHT": 1.0, "COMBINE": combine},
    }
