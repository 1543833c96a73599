"""What an export says of its pair is true, and the pair needs nothing but itself: no folder, no other file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from test_mask_code import shapes
from test_plain_student import detections

from msad import load_config
from msad.data.names import read_names
from msad.engine.setup import load_model
from msad.export.plain import export, plain_file
from msad.modeling.detectors.mask_code import MaskStatistics

PLAIN_FILES = Path(__file__).parents[2] / "projects/MSAD/plain"
CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = {"INPUT__MIN_SIZE_TEST": 64, "INPUT__MAX_SIZE_TEST": 64}
WIDTHS = {"STEM_OUT_CHANNELS": 8, "RES2_OUT_CHANNELS": 8, "WIDTH_PER_GROUP": 2}
RESNET = {f"MODEL__RESNETS__{key}": value for key, value in WIDTHS.items()}
WITHOUT_C1 = {**RESNET, "MODEL__FPN__BOTTOM_UP": "build_resnet_backbone"}
WITH_C1 = {**RESNET, "MODEL__FPN__BOTTOM_UP": "build_resnet_c1_backbone"}
MOBILENET = {**RESNET, "MODEL__FPN__BOTTOM_UP": "build_mobilenetv2_backbone", "MODEL__MOBILENETV2__WIDTH": 0.35}
EFFICIENTNET = {**RESNET, "MODEL__FPN__BOTTOM_UP": "build_efficientnet_lite_backbone"}
# detectron2's own backbones; of the tiny ResNet, which the config still names, nobody hears.
OWN = {arch: {**RESNET, "MODEL__BACKBONE__NAME": name} for arch, name in
       (("dense", "build_retinanet_resnet_fpn_backbone"), ("R-CNN", "build_resnet_fpn_backbone"))}  # fmt: skip
YAML, FCOS, RCNN, MSAD = "", "plain_fcos.py", "plain_rcnn.py", "msad"
KINDS = {  # name: (architecture, first and last level, options, what is needed)
    "retinanet_L": ("RetinaNet", (2, 6), OWN["dense"], YAML),
    "faster_H": ("FasterRCNN", (2, 6), OWN["R-CNN"], YAML),
    "retinanet_L_level_fpn": ("RetinaNet", (2, 6), WITHOUT_C1, RCNN),
    "retinanet_EL": ("RetinaNet", (1, 5), WITH_C1, RCNN),
    "faster_L": ("FasterRCNN", (1, 5), WITH_C1, RCNN),
    "faster_H_level_fpn": ("FasterRCNN", (2, 6), WITH_C1, RCNN),
    "mask_L": ("MaskRCNN", (1, 5), WITH_C1, RCNN),
    "keypoint_L": ("KeypointRCNN", (1, 5), WITH_C1, RCNN),
    "cascade_L": ("CascadeRCNN", (1, 5), WITH_C1, RCNN),
    "fcos_H": ("FCOS", (3, 7), WITHOUT_C1, FCOS),
    "fcos_L": ("FCOS", (2, 6), WITHOUT_C1, FCOS),
    "fcos_L_own": ("FCOS", (3, 7), OWN["dense"], FCOS),
    "fcos_EL": ("FCOS", (1, 5), WITH_C1, FCOS),
    "faster_tiny": ("FasterRCNN", (1, 5), {"MODEL__RESNETS__WIDTH_PER_GROUP": 2}, MSAD),
    "fcos_tiny": ("FCOS", (2, 6), {"MODEL__RESNETS__WIDTH_PER_GROUP": 2}, MSAD),
    "fcos_mobilenet": ("FCOS", (2, 6), MOBILENET, MSAD),
    "fcos_efficientnet_lite": ("FCOS", (2, 6), EFFICIENTNET, MSAD),
    "fcos_gap": ("FCOS", (3, 7), {**WITHOUT_C1, "MODEL__FPN__LEVELS": ["p3", "p5"],
                                  "MODEL__FCOS__IN_FEATURES": ["p3", "p5"]}, MSAD),
    "gfl": ("GFL", (2, 6), WITHOUT_C1, MSAD),
}  # fmt: skip
UNFIT = (
    r"^ValueError: {}/model\.pth does not fit .*; tensors: \d+ not in the file \(backbone\.[a-z0-9_.]+(, .+)?\)"
    r".*\. To build this model, import msad\.$"
)

# Detections, or the error, of each folder of the job, by the file that is to build it.
PLAIN = """
import runpy, sys
sys.modules["msad"] = None  # import msad raises an error
docs, job, out = sys.argv[1:]
sys.path.insert(0, docs)
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.engine import DefaultPredictor
torch.set_num_threads(1)
job = torch.load(job, weights_only=True)
images = [image.numpy() for image in job["images"]]

def detector(folder, file):
    if file:
        built = runpy.run_path(f"{docs}/{file}")
        if file == "plain_rcnn.py":
            predictor = built["build"](folder)
            return lambda image: predictor(image)["instances"]
        model, cfg = built["build"](folder)
        return lambda image: built["detect"](model, cfg, image)
    cfg = get_cfg()
    cfg.merge_from_file(f"{folder}/config.yaml")
    cfg.MODEL.WEIGHTS = f"{folder}/{cfg.MODEL.WEIGHTS}"  # relative, so that the folder can be moved
    predictor = DefaultPredictor(cfg)
    predictor.model.load_state_dict(torch.load(cfg.MODEL.WEIGHTS, weights_only=True)["model"])  # strictly
    return lambda image: predictor(image)["instances"]

found = {}
for folder, file in job["files"].items():
    try:
        detect = detector(folder, file)
    except Exception as error:
        found[folder] = f"{type(error).__name__}: {error}"
        continue
    found[folder] = [(i.pred_boxes.tensor, i.scores, i.pred_classes) for i in map(detect, images)]
assert not [name for name in sys.modules if name.split(".")[0] == "msad" and sys.modules[name] is not None]
torch.save(found, out)
"""


def in_plain_detectron2(folder, files, images):
    """{folder: detections or error} where msad cannot be imported, for {folder: plain file that builds it, or ""}."""
    torch.save({"files": files, "images": [torch.from_numpy(x) for x in images]}, folder / "job.pth")
    command = [sys.executable, "-c", PLAIN, PLAIN_FILES, folder / "job.pth", folder / "found.pth"]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path))  # absolute paths
    done = subprocess.run(
        list(map(str, command)), env=environment, cwd="/", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "found.pth", weights_only=True)


@pytest.fixture
def images():
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((64, 64), (40, 64))]


@pytest.fixture
def exported(tiny_cfg, tiny_model, tmp_path):
    """``exported(folder, arch, levels, **options)``: (config, its checkpoint, what the export says)."""

    def make(folder, *args, **options):
        cfg = tiny_cfg(*args, **{**SIZES, **options})
        weights = str(tmp_path / "trained" / f"{Path(folder).name}.pth")
        Path(weights).parent.mkdir(exist_ok=True)
        torch.save({"model": tiny_model(*args, **{**SIZES, **options}).state_dict()}, weights)
        return cfg, weights, export(cfg, weights, folder)

    return make


def test_what_is_said_of_each_kind_is_true(exported, images, tmp_path, monkeypatch):
    """Exported under a relative path; where a plain file builds the model, the pair has been moved before."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moved").mkdir()
    files, expected = {}, {}
    for name, (arch, (first, last), options, needed) in KINDS.items():
        cfg, weights, note = exported(f"exported/{name}", arch, range(first, last + 1), **options)
        folder = tmp_path / "exported" / name
        if needed == YAML:
            assert note == (
                f"exported/{name}/config.yaml builds this model in plain detectron2, "
                f"with MODEL.WEIGHTS exported/{name}/model.pth."
            )
        elif needed == MSAD:
            assert note.startswith("Plain detectron2 cannot build this model: msad.load_config(")
            assert "MSAD/plain/" not in note
            again = load_config(folder / "config.yaml")
            stored = torch.load(again.MODEL.WEIGHTS, weights_only=True)["model"]
            build_model(again).load_state_dict(stored)  # strictly
        else:
            assert note.startswith("To build this model, msad.load_config("), name
            assert note.endswith(f"; projects/MSAD/plain/{needed} builds it without msad."), name
            folder = folder.rename(tmp_path / "moved" / name)
        files[str(folder)] = needed if needed != MSAD else FCOS if arch == "FCOS" else RCNN
        expected[str(folder)] = None if needed == MSAD else detections(cfg, weights, images)
    for folder, found in in_plain_detectron2(tmp_path, files, images).items():
        if expected[folder] is None:  # one clear error, and not a detector with random weights
            assert re.search(UNFIT.format(folder) if "gfl" not in folder else "KeyError: .*GFL", found), (folder, found)
            continue
        assert not isinstance(found, str), (folder, found)
        assert all(len(scores) for _, scores, _ in found), folder
        for mine, theirs in zip(expected[folder], found):
            for a, b in zip(mine, theirs):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("MSAD/fcos_R_50_S_L_1x", "projects/MSAD/plain/plain_fcos.py"),
        ("MSAD/fcos_R_50_S_EL_1x", "projects/MSAD/plain/plain_fcos.py"),
        ("MSAD/fcos_SLR050_50_S_L_1x", "projects/MSAD/plain/plain_fcos.py"),
        ("MSAD/cascade_rcnn_R_50_S_L_1x", "projects/MSAD/plain/plain_rcnn.py"),
        ("MSAD/fcos_MV2_S_L_1x", None),
        ("MSAD/meinst_R_50_S_L_1x", None),
        ("MSAD/fusion_H050_L100_1x", None),
        ("LD/gfl_R_50_S_L_1x", None),
        ("nuclei_mask/student_L", None),
        ("quickstart/student_L", None),
    ],
)
def test_file_that_builds_a_shipped_student(name, file):
    assert plain_file(load_config(CONFIGS / f"{name}.yaml")) == file


def test_weights_are_found_from_any_folder(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exported("out", "FCOS", **RESNET)
    monkeypatch.chdir("/")
    (tmp_path / "out").rename(tmp_path / "moved")
    for file in ("config.yaml", "msad.yaml"):
        cfg = load_config(tmp_path / "moved" / file)
        assert str(tmp_path / "moved" / "model.pth") == cfg.MODEL.WEIGHTS
        load_model(cfg)  # all of its tensors


def test_the_yaml_files_have_nothing_of_other_models(exported, tmp_path):
    exported(tmp_path / "fcos", "FCOS", OUTPUT_DIR="output/training", **RESNET)
    own = yaml.safe_load((tmp_path / "fcos" / "msad.yaml").read_text())
    assert own.keys() == {"_BASE_", "MODEL"} and {"FCOS", "FPN"} <= own["MODEL"].keys() <= {"FCOS", "FPN", "RESNETS"}
    assert "NUM_CLASSES" in own["MODEL"]["FCOS"]  # a default, but plain detectron2 does not know it
    assert "output/training" not in (tmp_path / "fcos" / "config.yaml").read_text()
    exported(tmp_path / "stock", "RetinaNet", range(2, 7), **OWN["dense"])
    files = {file.name for file in (tmp_path / "stock").iterdir()}
    assert {"config.yaml", "model.pth"} <= files <= {"config.yaml", "model.pth", "msad.yaml"}


def test_names_of_classes_and_keypoints_travel(exported, tiny_cfg, tmp_path):
    cfg, weights, _ = exported(tmp_path / "out", "FCOS", **RESNET)
    assert read_names(str(tmp_path / "out" / "config.yaml")) == {}
    category = {"id": 1, "name": "mouse", "keypoints": ["nose", "left_ear", "right_ear"], "skeleton": [[1, 2]]}
    content = {"images": [], "annotations": [], "categories": [category, {"id": 2, "name": "rat"}]}
    (tmp_path / "val.json").write_text(json.dumps(content))
    name = f"names_{tmp_path.name}"
    cfg.DATASETS.REGISTER = [{"NAME": name, "JSON": str(tmp_path / "val.json"), "IMAGES": str(tmp_path)}]
    cfg.DATASETS.TEST = (name,)
    export(cfg, weights, tmp_path / "out")
    names = read_names(str(tmp_path / "out" / "config.yaml"))
    assert names["thing_classes"] == ["mouse", "rat"] and names["keypoint_names"][1] == "left_ear"
    assert names["keypoint_flip_map"] == [("left_ear", "right_ear")]
    assert [rule[:2] for rule in names["keypoint_connection_rules"]] == [("nose", "left_ear")]
    assert load_config(tmp_path / "out" / "config.yaml").DATASETS.REGISTER == cfg.DATASETS.REGISTER


def test_a_checkpoint_is_not_overwritten_by_its_own_export(exported, tmp_path):
    cfg, weights, _ = exported(tmp_path / "out", "FCOS", **RESNET)
    Path(weights).rename(tmp_path / "model.pth")
    before = (tmp_path / "model.pth").read_bytes()
    with pytest.raises(ValueError, match="would be overwritten"):
        export(cfg, str(tmp_path / "model.pth"), tmp_path)
    assert (tmp_path / "model.pth").read_bytes() == before and not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize("arch", ["student", "teacher"])
def test_mask_code_is_in_the_weights(exported, images, tmp_path, arch):
    """The file of the code is needed for training alone."""
    statistics = MaskStatistics()
    statistics.add(shapes(500, seed=5))
    code = tmp_path / "code.npz"
    statistics.fit(8)[0].save(code)
    options = {"MODEL__MEINST__CODE": str(code), "MODEL__MEINST__DIM": 8, "MODEL__MASK_ON": True}
    resolutions = ["H", "L"] if arch == "teacher" else None
    cfg, weights, _ = exported(tmp_path / "out", "MEInst", None, resolutions, **options)
    expected = detections(cfg, weights, images)
    code.unlink()
    export(cfg, weights, tmp_path / "out")  # nor is it needed for this
    (tmp_path / "out").rename(tmp_path / "moved")

    again = load_config(tmp_path / "moved" / "config.yaml")
    found = detections(again, str(tmp_path / "moved" / "model.pth"), images)
    for mine, theirs in zip(expected, found):
        assert len(mine[1])
        for a, b in zip(mine, theirs):
            assert torch.equal(a, b)
    stored = torch.load(weights, weights_only=True)["model"]
    for name, value in load_model(again, str(tmp_path / "moved" / "model.pth")).state_dict().items():
        assert torch.equal(value, stored[name])
    untrained = getattr(build_model(again), "detector", build_model(again)).mask_code
    assert untrained.decode(torch.zeros(1, 8)).isnan().all()


@pytest.mark.parametrize(
    ("resolution", "sizes"), [("H", (300, 401, 667)), ("L", (150, 201, 334)), ("EL", (75, 101, 167))]
)
def test_a_student_is_trained_on_at_its_own_size(exported, tmp_path, resolution, sizes):
    """Without its teacher nobody reduces the images; crops are cut out before the images are resized."""
    cfg, weights, _ = exported(tmp_path / "out", "FCOS")
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (300, 401), 667
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, "absolute", [256, 200]
    cfg.DISTILL.STUDENT_RESOLUTION = resolution

    def sizes_of_export():
        export(cfg, weights, tmp_path / "out")
        plain = get_cfg()
        plain.merge_from_file(str(tmp_path / "out" / "config.yaml"))
        assert (plain.INPUT.MIN_SIZE_TEST, list(plain.INPUT.CROP.SIZE)) == (64, [256, 200])
        augmentations = DatasetMapper.from_config(plain, is_train=True)["augmentations"]
        assert [type(a) for a in augmentations[:2]] == [T.RandomCrop, T.ResizeShortestEdge]
        return *plain.INPUT.MIN_SIZE_TRAIN, plain.INPUT.MAX_SIZE_TRAIN

    assert sizes_of_export() == (300, 401, 667)  # trained alone, on what the loader reads
    cfg.DISTILL.TEACHERS = [{"CONFIG": "teacher.yaml", "WEIGHTS": "teacher.pth"}]
    assert sizes_of_export() == sizes
    assert cfg.INPUT.MAX_SIZE_TRAIN == 667
    again = load_config(tmp_path / "out" / "config.yaml")
    again.merge_from_file(str(tmp_path / "out" / "msad.yaml"))
    assert again.DISTILL == load_config("").DISTILL
    assert (*again.INPUT.MIN_SIZE_TRAIN, again.INPUT.MAX_SIZE_TRAIN) == sizes
