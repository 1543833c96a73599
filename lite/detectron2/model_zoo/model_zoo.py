"""Configurations, trained weights and models by name, such as "COCO-Detection/retinanet_R_50_FPN_1x.yaml"."""

import difflib
from pathlib import Path

import torch
from torch import nn

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg

_CONFIGS = Path(__file__).resolve().parent / "configs"
_WEIGHTS_URL = "https://dl.fbaipublicfiles.com/detectron2/{folder}/{name}/{run}/model_final_{digest}.pkl"

# number of the training run and beginning of the file's hash
_RUNS = {
    "COCO-Detection": """
        faster_rcnn_R_50_C4_1x 137257644 721ade,   faster_rcnn_R_50_C4_3x          137849393 f97cb7
        rpn_R_50_FPN_1x 137258492 02ce48
        faster_rcnn_R_50_FPN_1x 137257794 b275ba,  faster_rcnn_R_50_FPN_3x         137849458 280758
        faster_rcnn_R_101_FPN_3x 137851257 f6e8b1, faster_rcnn_X_101_32x8d_FPN_3x  139173657 68b088
        retinanet_R_50_FPN_1x 190397773 bfca0b,    retinanet_R_50_FPN_3x           190397829 5bd44e
        retinanet_R_101_FPN_3x 190397697 971ab9
    """,
    "COCO-InstanceSegmentation": """
        mask_rcnn_R_50_C4_1x 137259246 9243eb,     mask_rcnn_R_50_C4_3x            137849525 4ce675
        mask_rcnn_R_50_FPN_1x 137260431 a54504,    mask_rcnn_R_50_FPN_3x           137849600 f10217
        mask_rcnn_R_101_FPN_3x 138205316 a3ec72,   mask_rcnn_X_101_32x8d_FPN_3x    139653917 2d9806
    """,
    "Misc": """
        cascade_mask_rcnn_R_50_FPN_1x 138602847 e9d89b, cascade_mask_rcnn_R_50_FPN_3x 144998488 480dd8
    """,
    "COCO-Keypoints": """
        keypoint_rcnn_R_50_FPN_1x 137261548 04e291,  keypoint_rcnn_R_50_FPN_3x        137849621 a6e10b
        keypoint_rcnn_R_101_FPN_3x 138363331 997cc7, keypoint_rcnn_X_101_32x8d_FPN_3x 139686956 5ad38f
    """,
}


def _weights_urls() -> dict[str, str]:
    urls = {}
    for folder, runs in _RUNS.items():
        for entry in runs.replace("\n", ",").split(","):
            if entry.strip():
                name, run, digest = entry.split()
                urls[f"{folder}/{name}"] = _WEIGHTS_URL.format(folder=folder, name=name, run=run, digest=digest)
    return urls


def get_checkpoint_url(config_path: str) -> str:
    """The address of the weights trained with a configuration.

    Args:
        config_path: name of the configuration, with or without ".yaml".

    Raises:
        RuntimeError: there are no weights of that name.
    """
    urls = _weights_urls()
    name = config_path.removesuffix(".yaml")
    if name not in urls:
        raise RuntimeError(f"the model zoo has no weights for {config_path!r}{_similar(name, urls)}")
    return urls[name]


def get_config_file(config_path: str) -> str:
    """The path of the yaml file of a configuration.

    Args:
        config_path: name of the configuration with ".yaml"; also a base, such as "Base-RetinaNet.yaml".

    Raises:
        RuntimeError: there is no such configuration.
    """
    file = _CONFIGS / config_path
    if not file.is_file():
        known = [path.relative_to(_CONFIGS).as_posix() for path in _CONFIGS.rglob("*.yaml")]
        raise RuntimeError(f"the model zoo has no configuration {config_path!r}{_similar(config_path, known)}")
    return str(file)


def _similar(name: str, known) -> str:
    matches = difflib.get_close_matches(name, list(known), n=3)
    return f"; similar names: {', '.join(matches)}" if matches else ""


def get_config(config_path: str, trained: bool = False) -> CfgNode:
    """A configuration by name.

    Args:
        config_path: see :func:`get_config_file`.
        trained: let MODEL.WEIGHTS be the trained detector instead of the pretrained backbone.
    """
    options = ["MODEL.WEIGHTS", get_checkpoint_url(config_path)] if trained else []
    cfg = get_cfg()
    cfg.merge_from_file(get_config_file(config_path))
    cfg.merge_from_list(options)
    return cfg


def get(config_path: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """A model by name, with its weights (see :func:`get_config`) loaded.

    Args:
        config_path: see :func:`get_config_file`.
        trained: load the trained detector instead of the pretrained backbone.
        device: where to build it; default: the configuration's, or the CPU where there is no GPU.

    Raises:
        FileNotFoundError: the weights are not on this machine and cannot be downloaded.
    """
    from detectron2.modeling import build_model  # modeling needs much more than configurations do

    cfg = get_config(config_path, trained)
    if device is not None:
        cfg.MODEL.DEVICE = device
    elif not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model
