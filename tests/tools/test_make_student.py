"""tools/make_student.py: from a trained detector to a student that trains."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.modeling import build_model
from load_tool import load_tool
from yolo_data import write_yolo

from msad import load_config
from msad.engine.setup import prepare, train
from msad.export.plain import foreign_parts
from msad.modeling.student_config import student_config, train_at

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    return load_tool("make_student")


def plain(value):
    """Lists of floats, so that (400,) and [400.0] are one value."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return round(float(value), 4) if isinstance(value, (int, float)) else value


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        ("MSAD/fcos_R_50_H_1x", "MSAD/fcos_R_50_S_L_1x"),
        ("MSAD/fcos_R_50_T_1x", "MSAD/fcos_R_50_S_L_1x"),
        ("MSAD/fcos_R_50_H_1x", "MSAD/fcos_R_50_S_EL_1x"),
        ("Base-RetinaNet-R50", "MSAD/retinanet_R_50_S_L_1x"),
        ("LD/gfl_R_50_H_1x", "LD/gfl_R_50_S_L_1x"),
        ("MSAD/faster_rcnn_R_50_H_1x", "MSAD/faster_rcnn_R_50_S_L_1x"),
        ("MSAD/mask_rcnn_R_50_H_1x", "MSAD/mask_rcnn_R_50_S_L_1x"),
        ("MSAD/keypoint_rcnn_R_50_H_1x", "MSAD/keypoint_rcnn_R_50_S_L_1x"),
        ("MSAD/cascade_rcnn_R_50_H_1x", "MSAD/cascade_rcnn_R_50_S_L_1x"),
    ],
)
def test_students_are_those_that_were_written_by_hand(teacher, student):
    expected = load_config(ROOT / "configs" / f"{student}.yaml")
    found = student_config(load_config(ROOT / "configs" / f"{teacher}.yaml"), expected.DISTILL.STUDENT_RESOLUTION)
    assert found.DISTILL.STUDENT_RESOLUTION == expected.DISTILL.STUDENT_RESOLUTION
    for config in (found, expected):
        config.MODEL.WEIGHTS = ""
        config.MODEL.RESNETS.OUT_FEATURES = [n for n in config.MODEL.RESNETS.OUT_FEATURES if n in needed(config)]
        config.MODEL.FPN.IN_FEATURES = [n for n in config.MODEL.FPN.IN_FEATURES if n in needed(config)]
    ours, theirs = plain(found.MODEL), plain(expected.MODEL)
    assert {k: v for k, v in ours.items() if v != theirs[k]} == {k: v for k, v in theirs.items() if v != ours[k]}
    assert plain(found.INPUT) == plain(expected.INPUT)


def needed(config):
    """Maps of the bottom-up network that its levels are made of; others cost nothing and do not matter."""
    maps = ["c1", "res2", "res3", "res4", "res5"]
    return maps[int(config.MODEL.FPN.LEVELS[0][1]) - 1 :] if config.MODEL.FPN.LEVELS else maps[1:]


def test_a_retinanet_on_a_stock_backbone_gets_a_plain_student(tool):
    """The teacher's neck is ours, the student's detectron2's own, with the tensors of ours."""
    student = student_config(load_config("MSAD/retinanet_R_50_T_1x.yaml", ["MODEL.DEVICE", "meta"]), "L")
    assert student.MODEL.BACKBONE.NAME == "build_retinanet_resnet_fpn_backbone" and not foreign_parts(student)
    assert "plain detectron2 model: its yaml alone" in tool.built_by(student)
    ours = student.clone()
    ours.MODEL.BACKBONE.NAME, ours.MODEL.FPN.BOTTOM_UP = "build_level_fpn_backbone", "build_resnet_backbone"
    ours.MODEL.FPN.LEVELS = ["p2", "p3", "p4", "p5", "p6"]
    with torch.device("meta"):
        shapes = [{k: v.shape for k, v in build_model(cfg).state_dict().items()} for cfg in (ours, student)]
    assert len(shapes[0]) > 300 and shapes[0].items() <= shapes[1].items()
    for name, said in (("MSAD/fcos_R_50_T_1x", "plain_fcos.py, without msad"),
                       ("effnet/retinanet_T_1x", "needs import msad, for MODEL.BACKBONE.NAME")):  # fmt: skip
        assert said in tool.built_by(student_config(load_config(f"{name}.yaml"), "L"))


def test_converted_detectors_get_students():
    student = student_config(load_config("Teachers/retinanet_R_50.yaml"), "L")
    assert student.MODEL.META_ARCHITECTURE == "RetinaNetClippedFirst"
    assert student.MODEL.ANCHOR_GENERATOR.SIZES[0][0] == 16 and student.MODEL.RETINANET.IN_FEATURES[0] == "p2"
    assert student.MODEL.BACKBONE.NAME == "build_level_fpn_backbone"  # its P6 is made otherwise than by detectron2's


@pytest.mark.parametrize("boxes", ["relu_stride", "exp"])
@pytest.mark.parametrize(("resolution", "factor"), [("L", 2), ("EL", 4)])
def test_an_fcos_student_begins_with_boxes_as_much_smaller_as_its_input(boxes, resolution, factor):
    opts = ["MODEL.FCOS.SCALES", True, "MODEL.FCOS.BOXES", boxes]
    teacher = build_model(given := load_config("quickstart/baseline_H.yaml", opts)).eval()
    student = build_model(student_config(given, resolution)).eval()
    student.head.load_state_dict(teacher.head.state_dict())
    features = [torch.rand(1, 32, size, size) for size in (16, 8, 4)]
    with torch.no_grad():
        of_teacher, of_student = (model.head(features)[1] for model in (teacher, student))  # in strides of the level
    for level, (ours, theirs) in enumerate(zip(of_student, of_teacher)):
        stride = 8 << level
        torch.testing.assert_close(ours * (stride / factor), theirs * stride / factor)


@pytest.mark.parametrize("name", ["faster_rcnn_R_50_FPN_1x", "mask_rcnn_R_50_FPN_3x", "keypoint_rcnn_R_50_FPN_1x"])
def test_detectron2s_own_rcnns_get_a_p1(name, tmp_path):
    folder = {"f": "COCO-Detection", "m": "COCO-InstanceSegmentation", "k": "COCO-Keypoints"}[name[0]]
    given = load_config(f"{folder}/{name}.yaml", ["MODEL.PROPOSAL_GENERATOR.MIN_SIZE", 9])  # from its model zoo
    cfg = student_config(given, "L")
    (tmp_path / "student.yaml").write_text(cfg.dump())
    assert load_config(tmp_path / "student.yaml").MODEL.PROPOSAL_GENERATOR.MIN_SIZE == 4
    assert cfg.MODEL.FPN.LEVELS == cfg.MODEL.RPN.IN_FEATURES == ["p1", "p2", "p3", "p4", "p5"]
    assert cfg.MODEL.ROI_HEADS.IN_FEATURES == ["p1", "p2", "p3", "p4"]
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[16], [32], [64], [128], [256]]
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.MAX_SIZE_TRAIN) == (400, 667, 1333)


@pytest.mark.parametrize(
    ("name", "resolution", "said"),
    [
        ("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", "EL", "would read p0"),
        ("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml", "L", r"RPN.IN_FEATURES is \['res4'\]: only levels of a feature"),
        ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", "H", "choose L or EL"),
        ("configs/MSAD/fusion_H050_L050_1x.yaml", "L", "."),
    ],
)
def test_what_has_no_student_is_said(name, resolution, said):
    cfg = load_config(name)
    if "fusion" in name:  # its detector's levels are moved, and its branches would not be
        cfg.MODEL.META_ARCHITECTURE, said = "PanopticFPN", "PanopticFPN: students are made of RetinaNet, "
    with pytest.raises(ValueError, match=said):
        student_config(cfg, resolution)


@pytest.fixture
def trained(project, tmp_path):
    """``trained(name)``: arguments for a plain detector of the project and a (random) checkpoint of it."""

    def make(name, *opts):
        weights = tmp_path / "mine" / "model_final.pth"
        weights.parent.mkdir(exist_ok=True)
        cfg = load_config(project / f"{name}.yaml", opts)
        torch.manual_seed(2)
        torch.save({"model": build_model(cfg).state_dict()}, weights)
        (weights.parent / "config.yaml").write_text(cfg.dump())  # what a run of detectron2 leaves
        return ["--config-file", str(weights.parent / "config.yaml"), "--weights", str(weights)]

    return make


def test_a_plain_run_gets_a_student_that_trains(tool, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert tool.main([*trained("retinanet"), "--output", "out"]) == 0
    said = capsys.readouterr().out
    assert "teacher: " in said and "of its teacher's multiply-adds" in said
    assert "python tools/train_net.py --config-file out/student.yaml" in said.splitlines()[-1]
    cfg = load_config("out/student.yaml", ["SOLVER.MAX_ITER", 2, "DATASETS.TEST", ()])
    assert cfg.MODEL.RETINANET.IN_FEATURES == ["p2", "p3", "p4", "p5", "p6"] and cfg.INPUT.MIN_SIZE_TEST == 32
    assert [{"CONFIG": "out/teacher.yaml", "WEIGHTS": str(tmp_path / "mine/model_final.pth")}] == cfg.DISTILL.TEACHERS
    prepare(cfg)
    Path(cfg.OUTPUT_DIR).mkdir(parents=True)
    train(cfg)
    lines = [json.loads(line) for line in (Path(cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()]
    assert lines[0]["loss_distill/AlignedL1"] > 0

    before = Path("out/student.yaml").read_text()
    assert tool.main([*trained("retinanet"), "--output", "out"]) == 0  # the same again
    Path("out/student.yaml").write_text(before + "SEED: 9\n")
    assert tool.main([*trained("retinanet"), "--output", "out"]) == 2
    assert "student.yaml exists and is another one" in capsys.readouterr().err
    assert Path("out/student.yaml").read_text().endswith("SEED: 9\n")


def test_wrong_input_writes_nothing(tool, trained, project, tmp_path, capsys):
    argv = trained("retinanet")
    data = project / "data"
    content = json.loads((data / "annotations_train.json").read_text())
    content["categories"] = content["categories"][:2]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] <= 2]
    (tmp_path / "two.json").write_text(json.dumps(content))
    val = ["--val-json", str(data / "annotations_val.json"), "--val-images", str(data / "images")]
    two = ["--train-json", str(tmp_path / "two.json"), "--train-images", str(data / "images"), *val]
    for more, said in (
        (two, "the detector has 6 classes (MODEL.RETINANET.NUM_CLASSES)"),
        (two[:2], "--train-json belongs to --train-images"),
        (val, "--val-json, --val-images without --train-json"),
        (["DATASETS.TRAIN", "('unheard_of',)"], "data sets (unheard_of) are not known here"),
        (["MODEL.RETINANET.NUM_CONVS", "2"], "is not a checkpoint of"),
        (["MODEL.RETINANET.NUM_CONV", "2"], "did you mean MODEL.RETINANET.NUM_CONVS?"),
    ):
        assert tool.main([*argv, "--output", str(tmp_path / "out"), *more]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_folder_of_data(tool, trained, project, tmp_path, clean_catalogs):
    """Also one that is called as a data set of the engine's."""
    shutil.copytree(project / "data", tmp_path / "coco_2017")
    folder = str(tmp_path / "coco_2017")
    argv = [*trained("fcos"), "--data", folder, "--resolution", "EL", "--output", str(tmp_path / "out")]
    assert tool.main(argv) == 0
    cfg = load_config(tmp_path / "out" / "student.yaml")
    assert cfg.MODEL.FCOS.IN_FEATURES == ["p1", "p2", "p3", "p4", "p5"] and cfg.DISTILL.STUDENT_RESOLUTION == "EL"
    files = [(entry["NAME"], Path(entry["JSON"]).name) for entry in cfg.DATASETS.REGISTER]
    names = ["data_coco_2017_train", "data_coco_2017_val"]
    assert files == list(zip(names, ["annotations_train.json", "annotations_val.json"]))
    assert [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST] == names


def test_converted_data_lie_beside_the_student(tool, trained, tmp_path, clean_catalogs):
    """A yaml that names the user's cache is dead once that is cleared."""
    write_yolo(tmp_path / "mine", list("abcdef"))
    assert tool.main([*trained("fcos"), "--data", str(tmp_path / "mine"), "--output", str(tmp_path / "out")]) == 0
    entries = load_config(tmp_path / "out/student.yaml").DATASETS.REGISTER
    files = [tmp_path / "out/data" / f"annotations_{split}.json" for split in ("train", "val")]
    assert [entry["JSON"] for entry in entries] == [str(file) for file in files] and all(f.is_file() for f in files)


@pytest.mark.parametrize("least, crop", [((240,), None), ((256,), [256, 256]), ((0,), [200, 300]), ((0,), None)])
def test_trained_alone_objects_have_the_size_that_students_see(tmp_path, least, crop):
    """An object of 40 pixels of H, of which the student sees 20, whatever is cut out of the file before."""
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((480, 640, 3), np.uint8))
    boxes = [[x, y, 40, 40] for x in range(0, 600, 44) for y in range(0, 440, 44)]
    annotations = [{"bbox": box, "bbox_mode": 1, "category_id": 0} for box in boxes]
    record = {"file_name": f"{tmp_path}/a.png", "height": 480, "width": 640, "annotations": annotations}

    def largest(cfg):
        seen = DatasetMapper(cfg, True)(copy.deepcopy(record))["instances"].gt_boxes.tensor
        return (seen[:, 2] - seen[:, 0]).max().item()

    opts = ["INPUT.MIN_SIZE_TEST", 480, "INPUT.MIN_SIZE_TRAIN", least]
    opts += ["INPUT.MAX_SIZE_TRAIN", 1333, "INPUT.RANDOM_FLIP", "none"]
    if crop:
        opts += ["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", crop]
    cfg = student_config(load_config("quickstart/baseline_H.yaml", opts), "L")
    size = largest(cfg)
    train_at(cfg, 1)
    assert largest(cfg) == pytest.approx(size / 2, abs=0.5)


def test_a_segmentors_crops_and_those_of_its_own_files_are_those_of_the_student():
    opts = ["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", [101, 60]]
    for name, low in (("Segmentation/pspnet_R_18_voc.yaml", False), ("quickstart/student_L.yaml", True)):
        cfg = load_config(name, [*opts, "INPUT.MIN_SIZE_TRAIN", (480, 0)])
        test = cfg.INPUT.MIN_SIZE_TEST
        train_at(cfg, 1, low_res_files=low)
        assert (list(cfg.INPUT.CROP.SIZE), cfg.INPUT.MIN_SIZE_TRAIN) == ([51, 30], (240, 0 if low else test))
