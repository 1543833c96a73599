"""Default values, the zoo's configurations, and which arguments ``@configurable`` makes of a config."""

import textwrap

from detectron2 import model_zoo
from detectron2.config import configurable, get_cfg

TOLERANCE = 0.0

ZOO = [
    f"{folder}/{name}.yaml"
    for folder, names in {
        "COCO-Detection": (
            "faster_rcnn_R_50_FPN_1x faster_rcnn_R_50_FPN_3x faster_rcnn_R_101_FPN_3x "
            "faster_rcnn_X_101_32x8d_FPN_3x retinanet_R_50_FPN_1x retinanet_R_50_FPN_3x retinanet_R_101_FPN_3x "
            "faster_rcnn_R_50_C4_1x faster_rcnn_R_50_C4_3x rpn_R_50_FPN_1x"
        ),
        "COCO-InstanceSegmentation": (
            "mask_rcnn_R_50_FPN_1x mask_rcnn_R_50_FPN_3x mask_rcnn_R_101_FPN_3x mask_rcnn_X_101_32x8d_FPN_3x "
            "mask_rcnn_R_50_C4_1x mask_rcnn_R_50_C4_3x"
        ),
        "COCO-Keypoints": (
            "keypoint_rcnn_R_50_FPN_1x keypoint_rcnn_R_50_FPN_3x keypoint_rcnn_R_101_FPN_3x "
            "keypoint_rcnn_X_101_32x8d_FPN_3x"
        ),
        "Misc": "cascade_mask_rcnn_R_50_FPN_1x cascade_mask_rcnn_R_50_FPN_3x",
    }.items()
    for name in names.split()
]
BASES = ["Base-RCNN-FPN.yaml", "Base-RCNN-C4.yaml", "Base-RetinaNet.yaml", "COCO-Keypoints/Base-Keypoint-RCNN-FPN.yaml"]


def leaves(node, prefix=""):
    """{"A.B": repr of the value}, sorted; repr tells a tuple from a list and 1 from 1.0."""
    found = {}
    for key in sorted(node):
        value = node[key]
        if isinstance(value, dict):
            found.update(leaves(value, f"{prefix}{key}."))
        else:
            found[prefix + key] = repr(value)
    return found


def merged(workdir):
    """A file of a user with a base, tuples in strings, and unquoted numbers; then command-line options."""
    base, leaf = workdir / "base.yaml", workdir / "leaf.yaml"
    base.write_text(
        textwrap.dedent(
            """
            VERSION: 2
            MODEL: {WEIGHTS: "a.pth", RESNETS: {DEPTH: 101}, ANCHOR_GENERATOR: {SIZES: [[16], [32]]}}
            SOLVER: {STEPS: "(10, 20)", BASE_LR: 0.5}
            """
        )
    )
    leaf.write_text(
        textwrap.dedent(
            """
            _BASE_: base.yaml
            MODEL: {WEIGHTS: "b.pth", ROI_BOX_HEAD: {BBOX_REG_WEIGHTS: [1.0, 2.0, 3.0, 4.0]}}
            INPUT: {MIN_SIZE_TRAIN: [1, 2]}
            DATASETS:
              TRAIN: ("x",)
            """
        )
    )
    cfg = get_cfg()
    cfg.merge_from_file(str(leaf))
    cfg.merge_from_list(["SOLVER.MAX_ITER", "7", "MODEL.DEVICE", "cpu", "SOLVER.STEPS", "(3,)"])
    return leaves(cfg)


class Example:
    @configurable
    def __init__(self, a, b=2, *, c=3):
        self.values = [a, b, c]

    @classmethod
    def from_config(cls, cfg, b=5):
        return {"a": cfg.SOLVER.MAX_ITER, "b": b}


class Child(Example):
    @configurable
    def __init__(self, d, **kwargs):
        super().__init__(**kwargs)
        self.values.append(d)

    @classmethod
    def from_config(cls, cfg, **kwargs):
        return {**super().from_config(cfg, **kwargs), "d": 8}


@configurable(from_config=lambda cfg, a=3: {"a": a, "b": cfg.SOLVER.MAX_ITER})
def example(a, b, c=0):
    return [a, b, c]


def configured():
    cfg = get_cfg()
    return {
        "positional": Example(cfg).values,
        "keyword": Example(cfg=cfg).values,
        "to from_config": Example(cfg, b=7).values,
        "positional to from_config": Example(cfg, 7).values,
        "replaced": Example(cfg, c=9, a=1).values,
        "no config": Example(1, b=4).values,
        "variadic": Child(cfg, b=1).values,
        "child without config": Child(1, a=2).values,
        "function": example(cfg, a=9, c=8),
        "function cfg=": example(cfg=cfg, b=1),
        "plain function": example(1, 2),
    }


def probe(workdir):
    values = {"defaults": leaves(get_cfg()), "merged": merged(workdir), "configurable": configured()}
    for name in ZOO + BASES:
        values[name] = leaves(model_zoo.get_config(name))
    for name in ZOO:
        values[f"{name} trained"] = model_zoo.get_config(name, trained=True).MODEL.WEIGHTS
    return values
