"""The yaml files of configs/effnet: what they share with those of the ResNets, and a step of every kind of student."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from msad import load_config
from msad.data import register_datasets
from msad.distill.teachers import FrozenTeacher
from msad.engine import DistillTrainer
from msad.engine.build import build_distiller
from msad.modeling.backbones.efficientnet_lite import EfficientNetLite

ROOT = Path(__file__).parents[2] / "configs"
DETECTORS = ("fcos", "retinanet", "faster_rcnn", "mask_rcnn", "keypoint_rcnn")
ROWS = ("H", "L", "L_shifted", "T", "S_L")
# Everything that makes a run small; the tiny data sets have six classes and no masks or keypoints.
SHRINK = [
    "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "DATALOADER.NUM_WORKERS", 0, "SEED", 3, "TEST.EVAL_PERIOD", 0,
    "INPUT.MIN_SIZE_TRAIN", [64], "INPUT.MAX_SIZE_TRAIN", 64, "DATASETS.TRAIN", ["tiny_train"], "DATASETS.TEST", [],
    "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", [], "MODEL.EFFICIENTNET_LITE.NORM", "BN",
    "MODEL.FPN.OUT_CHANNELS", 16, "MODEL.FCOS.NUM_CLASSES", 6, "MODEL.RETINANET.NUM_CLASSES", 6,
    "MODEL.ROI_HEADS.NUM_CLASSES", 6,
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("detector", DETECTORS)
def test_all_but_the_network_is_as_with_a_resnet(detector, row):
    path = ROOT / f"effnet/{detector}_{row}_1x.yaml"
    cfg, resnet = load_config(path), load_config(ROOT / f"MSAD/{detector}_R_50_{row}_1x.yaml")
    assert f"output/effnet/{path.stem}" == cfg.OUTPUT_DIR
    assert cfg.MODEL.WEIGHTS == "pretrained://efficientnet_lite0?matching_heuristics=True"
    assert (cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD) == ("RGB", [127.0] * 3, [128.0] * 3)
    cfg.INPUT.FORMAT = resnet.INPUT.FORMAT
    assert cfg.INPUT == resnet.INPUT and cfg.DATASETS == resnet.DATASETS
    images, others = (c.SOLVER.IMS_PER_BATCH * c.SOLVER.MAX_ITER for c in (cfg, resnet))
    assert images == others
    assert cfg.MSAD == resnet.MSAD
    options, others = cfg.MODEL, resnet.MODEL
    for key in ("META_ARCHITECTURE", "ANCHOR_GENERATOR", "RPN", "ROI_HEADS", "RETINANET", "MASK_ON", "KEYPOINT_ON"):
        assert options[key] == others[key], key
    assert options.FCOS.IN_FEATURES == others.FCOS.IN_FEATURES
    if row == "S_L":
        (teacher,) = cfg.DISTILL.TEACHERS
        assert Path(teacher["CONFIG"]) == ROOT / f"effnet/{detector}_T_1x.yaml"
        assert teacher["WEIGHTS"] == f"{load_config(teacher['CONFIG']).OUTPUT_DIR}/model_final.pth"
        cfg.DISTILL.TEACHERS = resnet.DISTILL.TEACHERS
    assert cfg.DISTILL == resnet.DISTILL


@pytest.mark.parametrize("detector", DETECTORS[:3])  # the others add heads of which the tiny data has no ground truth
def test_a_student_takes_a_step_under_its_teacher(project, tmp_path, detector):
    cfg = load_config(ROOT / f"effnet/{detector}_S_L_1x.yaml", SHRINK)
    teacher = load_config(cfg.DISTILL.TEACHERS[0]["CONFIG"], SHRINK)
    (tmp_path / "teacher.yaml").write_text(teacher.dump())
    torch.save({"model": build_model(teacher).state_dict()}, tmp_path / "teacher.pth")
    cfg.DATASETS.REGISTER = load_config(project / "base.yaml").DATASETS.REGISTER
    cfg.DISTILL.TEACHERS = [{"CONFIG": str(tmp_path / "teacher.yaml"), "WEIGHTS": str(tmp_path / "teacher.pth")}]
    cfg.DISTILL.WARMUP_ITERS, cfg.OUTPUT_DIR = 0, str(tmp_path)
    register_datasets(cfg)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(False)
    assert isinstance(trainer.distiller.student.backbone.bottom_up, EfficientNetLite)
    trainer.train()
    losses = {k: v for k, (v, _) in trainer.storage.latest().items() if "loss" in k}
    assert all(0 <= value < float("inf") for value in losses.values())
    assert any(k.startswith("loss_distill/AlignedL1") and value > 0 for k, value in losses.items())


@pytest.mark.parametrize(("detector", "own"), [("mask_rcnn", "loss_mask"), ("keypoint_rcnn", "loss_keypoint")])
def test_masks_and_keypoints_take_a_step(make_batch, detector, own):
    options = [*SHRINK, "MODEL.ROI_HEADS.NUM_CLASSES", 3, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 3]  # of make_batch
    cfg = load_config(ROOT / f"effnet/{detector}_S_L_1x.yaml", options)
    teacher = build_model(load_config(cfg.DISTILL.TEACHERS[0]["CONFIG"], options))
    cfg.DISTILL.WARMUP_ITERS = 0
    distiller = build_distiller(cfg, build_model(cfg), [FrozenTeacher(teacher)]).train()
    with EventStorage(0):
        losses = distiller(make_batch([(64, 96)] * 2))
    assert {own, "loss_box_reg", "loss_rpn_cls"} <= losses.keys() and all(x.isfinite() for x in losses.values())
    assert all(x > 0 for name, x in losses.items() if "AlignedL1" in name or name == own)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in distiller.student.parameters() if p.requires_grad)


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_light_head_is_light(detector):
    """It has at most 60 % of the student's parameters behind the neck, and the same neck."""

    def count(row):
        cfg = load_config(ROOT / f"effnet/{detector}_{row}_1x.yaml", ["MODEL.DEVICE", "meta"])
        with torch.device("meta"):
            model = build_model(cfg)
        neck = {n: tuple(p.shape) for n, p in model.named_parameters() if n.startswith("backbone.")}
        return sum(p.numel() for n, p in model.named_parameters() if not n.startswith("backbone.")), neck

    (student, neck), (light, light_neck) = count("S_L"), count("S_L_light")
    assert light <= 0.6 * student and light_neck == neck


# --- studies on small data --------------------------------------------------------------------------------------------


def shifted(levels):
    return [f"p{int(name[1:]) - 1}" for name in levels]


@pytest.mark.parametrize("folder", ["nuclei_effnet", "diagrams", "nuclei_mask_effnet", "mouse_effnet", "aerial_effnet"])
def test_rows_of_a_study_differ_in_what_they_are_called_after(folder):
    """Set the stated difference back, and a row is the baseline at H."""

    def load(row):
        return load_config(ROOT / folder / f"{row}.yaml")

    reference, low, low_shifted, teacher, student = map(
        load, ("baseline_H", "baseline_L", "baseline_L_shifted", "teacher", "student_L")
    )
    size_keys = ("MIN_SIZE_TRAIN", "MAX_SIZE_TRAIN", "MIN_SIZE_TEST", "MAX_SIZE_TEST")

    def sizes(cfg):
        return [list(v) if isinstance(v, (list, tuple)) else [v] for v in (cfg.INPUT[key] for key in size_keys)]

    full = sizes(reference)
    halves = [[size // 2 for size in values] for values in full]
    assert sizes(low) == sizes(low_shifted) == halves and sizes(teacher) == full
    assert sizes(student) == full[:2] + halves[2:], "the loader of a student reads H"
    detector = reference.MODEL.META_ARCHITECTURE
    heads = ("FCOS",) if detector == "FCOS" else ("RPN", "ROI_HEADS")
    for cfg in (low_shifted, student):
        assert shifted(reference.MODEL.FPN.LEVELS) == cfg.MODEL.FPN.LEVELS
        cfg.MODEL.FPN.LEVELS = reference.MODEL.FPN.LEVELS
        for head in heads:
            assert shifted(reference.MODEL[head].IN_FEATURES) == cfg.MODEL[head].IN_FEATURES
            cfg.MODEL[head].IN_FEATURES = reference.MODEL[head].IN_FEATURES
        if detector != "FCOS":
            anchors = [[size / 2 for size in level] for level in reference.MODEL.ANCHOR_GENERATOR.SIZES]
            assert anchors == cfg.MODEL.ANCHOR_GENERATOR.SIZES
            cfg.MODEL.ANCHOR_GENERATOR.SIZES = reference.MODEL.ANCHOR_GENERATOR.SIZES
    (entry,) = student.DISTILL.TEACHERS
    assert Path(entry["CONFIG"]) == ROOT / folder / "teacher.yaml"
    assert entry["WEIGHTS"] == f"output/{folder}/teacher/model_final.pth"
    student.DISTILL = reference.DISTILL
    assert ("MultiScaleTeacher", detector) == (teacher.MODEL.META_ARCHITECTURE, teacher.MSAD.DETECTOR)
    teacher.MODEL.META_ARCHITECTURE, teacher.MSAD = detector, reference.MSAD
    for cfg in (low, low_shifted, student):
        for key in size_keys:
            cfg.INPUT[key] = reference.INPUT[key]
    assert low == low_shifted == teacher == student == reference


def test_diagrams_are_not_flipped():
    """Arrows, the marks inside of symbols and writing have a side."""
    for path in (ROOT / "diagrams").rglob("*.yaml"):
        assert load_config(path).INPUT.RANDOM_FLIP == "none", path


def test_losses_of_the_nuclei_differ_in_the_loss():
    reference = load_config(ROOT / "nuclei_effnet/losses/no_kd.yaml")
    assert reference.DISTILL.LOSSES == [] and reference.DISTILL.BALANCE.RATIO == 0
    files = [p for p in (ROOT / "nuclei_effnet/losses").glob("*.yaml") if p.stem not in ("Base", "no_kd")]
    assert len(files) == 5
    for path in files:
        cfg = load_config(path)
        (entry,) = cfg.DISTILL.LOSSES
        assert entry["NAME"].lower() == {"msad": "alignedl1"}.get(path.stem, path.stem)
        assert cfg.DISTILL.BALANCE.RATIO == 0.5
        cfg.DISTILL.LOSSES, cfg.DISTILL.BALANCE = [], reference.DISTILL.BALANCE
        assert cfg == reference, path


def test_teachers_of_the_nuclei_each_have_their_control():
    folder = ROOT / "nuclei_effnet/teachers"
    files = [p for p in folder.glob("*.yaml") if not p.stem.endswith(("Base", "_no_kd"))]
    assert {p.stem for p in files} == {"multi", "plain", "lite2", "neck_and_head", "imagenet"}
    for path in files:
        cfg, control = load_config(path), load_config(folder / f"{path.stem}_no_kd.yaml")
        assert cfg.DISTILL.LOSSES == load_config(ROOT / "nuclei_effnet/student_L.yaml").DISTILL.LOSSES
        cfg.DISTILL.LOSSES = []
        assert cfg == control, path
        (entry,) = cfg.DISTILL.TEACHERS
        teacher = load_config(entry["CONFIG"])
        assert entry["WEIGHTS"] == f"output/nuclei_effnet/{Path(entry['CONFIG']).stem}/model_final.pth"
        assert ("lite2" if path.stem == "lite2" else "lite0") == teacher.MODEL.EFFICIENTNET_LITE.VARIANT
        assert ("FCOS" if path.stem == "plain" else "MultiScaleTeacher") == teacher.MODEL.META_ARCHITECTURE
        inherited = {"imagenet": "none", "neck_and_head": "neck_and_head", "lite2": "neck_and_head"}
        assert inherited.get(path.stem, "full") == cfg.DISTILL.INIT_STUDENT
