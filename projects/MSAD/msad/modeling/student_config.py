"""From the config of a detector to that of its student at lower resolution: the same detector in the L frame.

What has a place in the pyramid moves ``shift`` levels down, what is measured in pixels is divided by ``2**shift``, and
everything else stays, so that the student can start from the teacher's tensors.
"""

from __future__ import annotations

from collections.abc import Iterable

from detectron2.config import CfgNode

from ..config import default_config, detector_architecture
from ..config_values import set_value, value_at
from ..resolution import downsampled_size, get_resolution, level_of

# Detectors, and the keys that name the levels that they read.
LEVEL_KEYS = {
    "RetinaNet": ("RETINANET.IN_FEATURES",),
    "RetinaNetClippedFirst": ("RETINANET.IN_FEATURES",),
    "FCOS": ("FCOS.IN_FEATURES",),
    "MEInst": ("FCOS.IN_FEATURES",),
    "GFL": ("GFL.IN_FEATURES",),
    "GeneralizedRCNN": ("RPN.IN_FEATURES", "ROI_HEADS.IN_FEATURES"),
}
TWO_STAGE = ("GeneralizedRCNN",)
WITH_ANCHORS = ("RetinaNet", "RetinaNetClippedFirst", "GeneralizedRCNN")
# Sections with the OUT_FEATURES of bottom-up networks; maps of strides 2, 4, ..., 32 have the same names in all.
BOTTOM_UPS = {
    "build_resnet_backbone": "RESNETS",
    "build_resnet_c1_backbone": "RESNETS",
    "build_tiny_resnet_backbone": "RESNETS",
    "build_mobilenetv2_backbone": "MOBILENETV2",
    "build_efficientnet_lite_backbone": "EFFICIENTNET_LITE",
}
MAPS = ("c1", "res2", "res3", "res4", "res5")
# detectron2's pyramids on its ResNet, and how they make P6.
STOCK_RETINANET = "build_retinanet_resnet_fpn_backbone"
STOCK = {STOCK_RETINANET: "conv", "build_resnet_fpn_backbone": "maxpool"}


def student_config(teacher: CfgNode, resolution: str) -> CfgNode:
    """The student of a teacher at ``resolution``, without DISTILL.TEACHERS, data and folder.

    Args:
        teacher: a detector of LEVEL_KEYS on a feature pyramid, or a MultiScaleTeacher around one.
        resolution: "L" (1/2) or "EL" (1/4).

    Returns:
        a copy: levels moved, anchors and test sizes divided, a backbone that makes the finer levels, no weights of its
        own. INPUT.MIN_SIZE_TRAIN stays that of H: a student's images are loaded as H and downsampled in training.

    Raises:
        ValueError: it cannot be made for this detector, backbone or resolution; says why.
    """
    shift = get_resolution(resolution).shift
    detector = detector_architecture(teacher)
    if detector not in LEVEL_KEYS:
        raise ValueError(f"MODEL.META_ARCHITECTURE {detector}: students are made of {', '.join(LEVEL_KEYS)}")
    if not shift:
        raise ValueError("a student at H is the teacher's own config with DISTILL.TEACHERS: choose L or EL")
    if not teacher.INPUT.MIN_SIZE_TEST:
        raise ValueError(f"INPUT.MIN_SIZE_TEST is 0, the size of the files, of which no 1/{2**shift} can be taken")
    cfg = teacher.clone()
    cfg.defrost()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.WEIGHTS = detector, ""
    levels: set[int] = set()
    for key in LEVEL_KEYS[detector]:
        names = [f"p{level}" for level in _moved(f"MODEL.{key}", value_at(cfg.MODEL, key), shift)]
        set_value(cfg.MODEL, key, names)
        levels.update(map(level_of, names))
    if detector in WITH_ANCHORS:  # those of the others are in strides
        sizes = cfg.MODEL.ANCHOR_GENERATOR.SIZES
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[size / 2**shift for size in level] for level in sizes]
        cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE = round(cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE / 2**shift)
    if cfg.MODEL.FCOS.BOXES == "exp":
        cfg.MODEL.FCOS.EXP_UNIT /= 2**shift
    for key in ("MIN_SIZE_TEST", "MAX_SIZE_TEST"):
        cfg.INPUT[key] = downsampled_size((cfg.INPUT[key],) * 2, shift)[0]
    _make_levels(cfg, sorted(levels))
    if detector == "RetinaNet":
        _take_stock_neck(cfg, sorted(levels))
    cfg.DISTILL.STUDENT_RESOLUTION = resolution
    return cfg


def train_at(cfg: CfgNode, shift: int, *, low_res_files: bool = False) -> None:
    """Let a config that tests at a student's size train without a teacher on what the student sees; in place.

    A student's trainer loads images of H, the sizes of INPUT, and downsamples them; detectron2's does not. So sizes are
    divided by ``2**shift``, and crops where they are cut out of the resized image, as a segmentor's are
    (:func:`msad.data.sem_seg.crop_mapper`). Crops that detectron2 cuts out of the file stay. For a size of 0, the
    files' own, half of an absolute crop stands, else the size of tests.

    Args:
        low_res_files: the files are those of the student, which the crops fit no more, and their own size does.
    """

    def divided(side: float) -> int:
        return downsampled_size((int(side),) * 2, shift)[0]

    size, crop = cfg.INPUT, cfg.INPUT.CROP
    absolute = crop.ENABLED and crop.TYPE.startswith("absolute")
    cropped_last = detector_architecture(cfg) == "SemanticSegmentor"
    own = 0 if low_res_files else size.MIN_SIZE_TEST
    if absolute and not (cropped_last or low_res_files):
        own = divided(min(crop.SIZE))
    size.MIN_SIZE_TRAIN = tuple(divided(side) or own for side in size.MIN_SIZE_TRAIN)
    size.MAX_SIZE_TRAIN = divided(size.MAX_SIZE_TRAIN)
    if absolute and (cropped_last or low_res_files):
        crop.SIZE = [divided(side) for side in crop.SIZE]


def _moved(key: str, names: Iterable[str], shift: int) -> list[int]:
    try:
        levels = [level_of(name) - shift for name in names]
    except ValueError:
        raise ValueError(
            f"{key} is {list(names)}: only levels of a feature pyramid (p2, p3, ...) can be moved, so the detector "
            "needs a backbone with FPN"
        ) from None
    if min(levels) < 1:
        raise ValueError(
            f"{key} is {list(names)}: at 1/{2**shift} of the input it would read p{min(levels)}, and no network makes "
            "a map finer than p1; choose a higher resolution"
        )
    return levels


def _take_stock_neck(cfg: CfgNode, levels: list[int]) -> None:
    """Let detectron2's own builder make the neck where it makes the same, so that plain detectron2 knows the student.

    That is RetinaNet's on detectron2's ResNet from P2 on; other detectors read other levels than a builder makes.
    """
    neck, known = cfg.MODEL.FPN, default_config().MODEL.FPN
    same = all(neck[key] == known[key] for key in ("TOP_SOURCE", "TOP_RELU", "TOP_NORM", "TOP_BLOCK"))
    resnet = neck.BOTTOM_UP in ("build_resnet_backbone", "build_resnet_c1_backbone")
    if cfg.MODEL.BACKBONE.NAME == "build_level_fpn_backbone" and same and resnet and 2 <= levels[0] <= levels[-1] <= 7:
        cfg.MODEL.BACKBONE.NAME, neck.BOTTOM_UP, neck.LEVELS = STOCK_RETINANET, known.BOTTOM_UP, known.LEVELS
        cfg.MODEL.RESNETS.OUT_FEATURES = neck.IN_FEATURES = list(MAPS[levels[0] - 1 :]) if levels[0] < 5 else ["res5"]


def _make_levels(cfg: CfgNode, levels: list[int]) -> None:
    """Let the backbone make ``levels``; detectron2's own FPN stays where it can."""
    builder, model = cfg.MODEL.BACKBONE.NAME, cfg.MODEL
    if builder in STOCK and levels[0] < 2:  # P1 is made of the stem's map, to which no yaml of detectron2 leads
        model.BACKBONE.NAME = "build_level_fpn_backbone"
        model.FPN.BOTTOM_UP, model.FPN.TOP_BLOCK = "build_resnet_backbone", STOCK[builder]
    elif builder not in STOCK and builder != "build_level_fpn_backbone":
        made = sorted(map(level_of, model.FPN.LEVELS)) if model.FPN.LEVELS else []
        if not set(levels) <= set(made):
            raise ValueError(
                f"MODEL.BACKBONE.NAME {builder}: it is not known how to let it make p{levels[0]}; known are "
                f"{', '.join([*STOCK, 'build_level_fpn_backbone'])}"
            )
        return
    if model.BACKBONE.NAME == "build_level_fpn_backbone":
        model.FPN.LEVELS = [f"p{level}" for level in levels]
    bottom_up = "build_resnet_backbone" if model.BACKBONE.NAME in STOCK else model.FPN.BOTTOM_UP
    if levels[0] == 1 and bottom_up == "build_resnet_backbone":
        bottom_up = model.FPN.BOTTOM_UP = "build_resnet_c1_backbone"
    if bottom_up not in BOTTOM_UPS:
        raise ValueError(f"MODEL.FPN.BOTTOM_UP {bottom_up}: known are {', '.join(BOTTOM_UPS)}")
    section = model[BOTTOM_UPS[bottom_up]]
    maps = list(MAPS[levels[0] - 1 :]) if levels[0] < 5 else [MAPS[-1]]
    section.OUT_FEATURES = [name for name in MAPS if name in {*maps, *section.OUT_FEATURES}]
    model.FPN.IN_FEATURES = [name for name in MAPS if name in {*maps, *model.FPN.IN_FEATURES}]
