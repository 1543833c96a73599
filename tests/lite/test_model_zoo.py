"""The zoo's names. Passes on detectron2 and on detectron2-lite."""

import os
import pickle

import numpy as np
import pytest
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg

RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"


def test_config_file_exists_and_can_be_a_base(tmp_path):
    path = model_zoo.get_config_file(RETINANET)
    assert os.path.isfile(path)
    leaf = tmp_path / "mine.yaml"
    leaf.write_text(f"_BASE_: {path}\nMODEL: {{RETINANET: {{NUM_CLASSES: 3}}}}\n")
    cfg = get_cfg()
    cfg.merge_from_file(str(leaf))
    assert (cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.RETINANET.NUM_CLASSES) == ("RetinaNet", 3)


def test_get_config():
    cfg = model_zoo.get_config(RETINANET)
    assert cfg.MODEL.WEIGHTS == "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.SOLVER.STEPS) == (90000, 0.01, (60000, 80000))
    trained = model_zoo.get_config(RETINANET, trained=True)
    assert model_zoo.get_checkpoint_url(RETINANET) == trained.MODEL.WEIGHTS
    long = model_zoo.get_config("COCO-Keypoints/keypoint_rcnn_X_101_32x8d_FPN_3x.yaml")
    assert (long.SOLVER.MAX_ITER, long.MODEL.KEYPOINT_ON, long.MODEL.RESNETS.NUM_GROUPS) == (270000, True, 32)


def test_checkpoint_url():
    expected = (
        "https://dl.fbaipublicfiles.com/detectron2/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x/"
        "137849600/model_final_f10217.pkl"
    )
    assert model_zoo.get_checkpoint_url("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml") == expected


def test_unknown_names_are_errors():
    for function in (model_zoo.get_config_file, model_zoo.get_config, model_zoo.get_checkpoint_url):
        with pytest.raises(RuntimeError, match="retinanet_R_50_FPN_2x"):
            function("COCO-Detection/retinanet_R_50_FPN_2x.yaml")


def test_get_loads_a_cached_backbone(tmp_path, monkeypatch):
    """Weights that were downloaded for either engine are found in the cache, without a network."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    folder = tmp_path / "detectron2" / "ImageNetPretrained" / "MSRA"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    weights = {
        "conv1_w": rng.standard_normal((64, 3, 7, 7)).astype(np.float32),
        "res_conv1_bn_s": rng.standard_normal(64).astype(np.float32),
        "res_conv1_bn_b": rng.standard_normal(64).astype(np.float32),
        "fc1000_w": np.zeros((10, 4), np.float32),
    }
    with open(folder / "R-50.pkl", "wb") as file:
        pickle.dump(weights, file)
    model = model_zoo.get(RETINANET, device="cpu")
    assert model.device.type == "cpu" and model.training
    stem = model.backbone.bottom_up.stem.conv1
    assert np.array_equal(stem.weight.detach().numpy(), weights["conv1_w"])
    assert np.array_equal(stem.norm.weight.numpy(), weights["res_conv1_bn_s"])
    assert DetectionCheckpointer(model).load("detectron2://ImageNetPretrained/MSRA/R-50.pkl")["__author__"] == "Caffe2"
