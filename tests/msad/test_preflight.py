"""Every check of preflight on a setup that is broken in this one way, and what training does about it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from runs import config

from msad import load_config
from msad.data import register_datasets
from msad.distill.teachers import FrozenTeacher
from msad.engine import DistillTrainer
from msad.engine.preflight import examine, preflight, report
from msad.engine.preflight.config_checks import (
    check_anchors,
    check_classes,
    check_levels,
    check_pixels,
    check_schedule,
    check_sizes,
    check_two_stage,
)
from msad.engine.preflight.model_checks import (
    check_checkpoint,
    check_device,
    check_frozen,
    check_start,
    check_teacher_ap,
    check_test_size,
)
from msad.finding import ERROR, OK, WARNING, Finding, error_text
from msad.resolution import get_resolution


def levels_of(findings):
    return [finding.level for finding in findings]


@pytest.fixture
def pair(project):
    return load_config(project / "student.yaml"), load_config(project / "teacher.yaml")


def test_a_good_setup_has_no_complaints(pair):
    cfg, teacher = pair
    found = [*check_pixels(cfg, teacher), *check_sizes(cfg, teacher, get_resolution("L"))]
    assert levels_of(found) == [OK, OK] and not any(f.fix for f in found)


@pytest.mark.parametrize(
    ("student", "teacher", "shared", "level", "text"),
    [
        (["car", "bus"], ["car", "bus"], True, OK, "2 classes"),
        (["car", "bus"], ["bus", "car"], True, ERROR, "class 0 is 'car' for the student and 'bus'"),
        (["car", "bus"], ["bus", "car"], False, WARNING, "another order"),
        (["car", "bus"], ["car", "dog"], True, ERROR, "bus, dog"),
        (["car", "bus"], ["car"], True, WARNING, "2 classes of the student and 1"),
        (None, ["car"], True, WARNING, "not known"),
    ],
)
def test_classes(student, teacher, shared, level, text):
    (finding,) = check_classes(student, teacher, shared)
    assert finding.level == level and text in finding.text and bool(finding.fix) == (level != OK)


def test_pixels(pair):
    cfg, teacher = pair
    teacher.MODEL.PIXEL_STD = [1.0, 1.0, 1.0]
    (finding,) = check_pixels(cfg, teacher)
    assert finding.level == WARNING and "PIXEL_STD" in finding.text
    cfg.INPUT.FORMAT = "RGB"
    assert ERROR in levels_of(check_pixels(cfg, teacher))
    # Without the teacher's first layer in the student, each may have its own order.
    cfg.DISTILL.INIT_STUDENT = "none"
    teacher.MODEL.PIXEL_MEAN, teacher.MODEL.PIXEL_STD = [103.53, 116.28, 123.675], [57.375, 57.12, 58.395]
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = ([*reversed(teacher.MODEL[k])] for k in ("PIXEL_MEAN", "PIXEL_STD"))
    (finding,) = check_pixels(cfg, teacher)
    assert finding.level == OK and "RGB for the student, BGR for the teacher" in finding.text


def test_statistics_in_the_other_order_than_the_channels(pair):
    cfg, teacher = pair
    for config_ in pair:
        config_.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
    found = check_pixels(cfg, teacher)  # INPUT.FORMAT is BGR
    assert levels_of(found) == [WARNING, WARNING] and "other order" in found[0].text
    for config_ in pair:
        config_.INPUT.FORMAT = "RGB"
    assert levels_of(check_pixels(cfg, teacher)) == [OK]


def test_sizes(pair):
    cfg, teacher = pair
    cfg.INPUT.MIN_SIZE_TEST = 64
    cfg.INPUT.MIN_SIZE_TRAIN = (32,)
    found = check_sizes(cfg, teacher, get_resolution("L"))
    assert levels_of(found) == [WARNING, WARNING]
    assert "sizes of H" in found[0].fix and found[1].fix == "set INPUT.MIN_SIZE_TEST 32"
    teacher.INPUT.MIN_SIZE_TEST = 0  # its files as they are
    assert levels_of(check_sizes(cfg, teacher, get_resolution("L"))) == [WARNING]


def test_levels():
    def shapes(levels, channels=8, shift=0):
        return {f"p{n}": ShapeSpec(channels=channels, stride=2 ** (n + shift)) for n in levels}

    assert levels_of(check_levels(shapes([3, 4]), shapes([3, 4]))) == [OK]
    (finding,) = check_levels(shapes([1, 2]), shapes([3, 4]))
    assert finding.level == ERROR and "STUDENT_RESOLUTION" in finding.fix
    assert levels_of(check_levels(shapes([2, 3]), shapes([3, 4]))) == [WARNING]
    (finding,) = check_levels(shapes([3], shift=1), shapes([3]))
    assert finding.level == ERROR and finding.check == "strides" and "16" in finding.text
    (finding,) = check_levels(shapes([3], channels=4), shapes([3]))
    assert finding.level == OK and "adaptation layers" in finding.text


def test_levels_that_losses_pair_by_index():
    def shapes(levels, shift=0):
        return {f"p{n}": ShapeSpec(channels=8, stride=2 ** (n + shift)) for n in levels}

    for student in (shapes([1, 2]), shapes([2, 3]), shapes([3, 4], shift=1)):
        (finding,) = check_levels(student, shapes([3, 4]), {"by_index"})
        assert finding.level == OK and f"{next(iter(student))} with p3" in finding.text
    assert levels_of(check_levels(shapes([1, 2]), shapes([3, 4]), {"by_index", "by_stride"})) == [ERROR]
    # Nothing pairs levels in a control without losses, or where only predictions are compared.
    assert levels_of(check_levels(shapes([1, 2]), shapes([3, 4]), set())) == [WARNING]
    assert levels_of(check_levels(shapes([3], shift=1), shapes([3]), set())) == [WARNING]


def test_two_stage_values():
    (finding,) = check_two_stage([{"name": "FGD", "alpha": 1e-4}, {"name": "Chen"}, {"name": "Unknown"}], True)
    assert finding.level == WARNING and finding.text.endswith("R-CNN: BETA, GAMMA, LAM")
    assert "BETA 2.5e-05, GAMMA 5e-05, LAM 5e-07," in finding.fix
    found = check_two_stage([{"name": "MGD"}, {"name": "PKD"}, {"name": "FKD"}], True)
    fkd = "ALPHA 7e-05, BETA 0.004, TEMPERATURE 0.5, CHANNEL_MASK False,"
    values = ["WEIGHT 5e-07, MASK_RATIO 0.45,", "WEIGHT 6,", fkd]
    assert [value in f.fix for value, f in zip(values, found, strict=True)] == [True] * 3
    (finding,) = check_two_stage([{"name": "MGD"}, {"name": "PKD"}], False)  # weights are set otherwise
    assert "MASK_RATIO 0.45," in finding.fix and "WEIGHT" not in finding.fix


@pytest.mark.parametrize("arch", ["GeneralizedRCNN", "FCOS"])
def test_two_stage_values_are_for_rcnns(tiny_cfg, tiny_model, tmp_path, arch):
    name = "FasterRCNN" if arch == "GeneralizedRCNN" else arch
    cfg = tiny_cfg(name, DISTILL__STUDENT_RESOLUTION="H", DISTILL__LOSSES=[{"NAME": "MGD"}])
    (tmp_path / "teacher.yaml").write_text(cfg.dump())
    cfg.DISTILL.TEACHERS = [{"CONFIG": str(tmp_path / "teacher.yaml"), "WEIGHTS": "teacher.pth"}]
    found = preflight(cfg, tiny_model(name), [FrozenTeacher(tiny_model(name))], set())
    assert sum("MASK_RATIO 0.45" in f.fix for f in found) == (arch == "GeneralizedRCNN")


def test_anchors(project):
    cfg, teacher = (load_config(project / f"retinanet_{side}.yaml") for side in ("student", "teacher"))
    assert levels_of(check_anchors(cfg, teacher, 1)) == [OK]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = teacher.MODEL.ANCHOR_GENERATOR.SIZES
    (finding,) = check_anchors(cfg, teacher, 1)
    assert finding.level == WARNING and "divide the teacher's sizes by 2" in finding.fix
    assert check_anchors(load_config(project / "student.yaml"), teacher, 1) == []
    cfg.MODEL.META_ARCHITECTURE, cfg.MSAD.DETECTOR = "FusionStudent", "RetinaNet"
    assert levels_of(check_anchors(cfg, teacher, 1)) == [WARNING]


def test_schedule(pair):
    cfg, _ = pair  # 6 iterations, 8 of warm-up
    (finding,) = check_schedule(cfg)
    assert finding.level == WARNING and "WARMUP_ITERS 8" in finding.text
    cfg.DISTILL.WARMUP_ITERS = 2
    assert levels_of(check_schedule(cfg)) == [OK]
    cfg.DISTILL.BALANCE.RATIO = 1.0
    assert "BALANCE.ITERS" in check_schedule(cfg)[0].text
    cfg.DISTILL.BALANCE.ITERS, cfg.DISTILL.START_ITER = 1, 3
    assert levels_of(check_schedule(cfg)) == [OK]
    cfg.DISTILL.START_ITER = 4
    (finding,) = check_schedule(cfg)
    assert finding.text.startswith("DISTILL.START_ITER 4 and DISTILL.WARMUP_ITERS 2 are not below")
    cfg.DISTILL.START_ITER, cfg.DISTILL.WARMUP_ITERS = 3, 0
    cfg.DISTILL.DECAY_FROM, cfg.DISTILL.DECAY_TO = 0.25, 0.5
    (finding,) = check_schedule(cfg)
    assert finding.level == WARNING and "START_ITER 3 and ends at iteration 3: it never counts" in finding.text
    cfg.DISTILL.START_ITER = 2
    assert levels_of(check_schedule(cfg)) == [OK]


def test_start_of_the_student(project):
    student = build_model(load_config(project / "student.yaml"))
    assert levels_of(check_start(student, set(student.state_dict()))) == [OK]
    (finding,) = check_start(student, {name for name in student.state_dict() if ".bottom_up.stem" not in name})
    assert finding.level == WARNING and "stem" in finding.text and "MODEL.WEIGHTS" in finding.fix
    assert check_frozen(student, set(), 2) == []  # all is trained
    student.backbone.bottom_up.stem.requires_grad_(False)
    assert levels_of(check_frozen(student, set(student.state_dict()), 2)) == [OK]
    (finding,) = check_frozen(student, set(), 2)
    assert finding.level == ERROR and "random and frozen" in finding.text and "stem" in finding.text
    assert levels_of(check_frozen(student, set(), 0)) == [WARNING]  # a network's own constants


@pytest.mark.parametrize(("detector", "levels"), [("fcos", "p6, p7"), ("teacher", "p5, p6, p7"), ("gfl", "p6, p7")])
def test_maps_of_one_pixel_that_no_norm_takes_are_said_before_training(project, tmp_path, detector, levels):
    """Of a batch of one in evaluation; training has more images in a step."""
    cfg = load_config(project / f"{detector}.yaml", ["MODEL.FCOS.NORM", "GN", "MODEL.GFL.NORM", "GN"])
    cfg.OUTPUT_DIR = str(tmp_path)
    register_datasets(cfg)
    trainer = DistillTrainer(cfg)
    with pytest.raises(ValueError, match=rf"test size: an image of 64 x 64 pixels has a map of one pixel \({levels}\)"):
        trainer.resume_or_load(False)
    model = trainer.checkpointer.model
    assert model.training and getattr(model, "eval_branch", "fused") == "fused"
    assert "test size" in [f.check for f in examine(cfg, images=0) if f.level == ERROR]
    cfg.INPUT.MIN_SIZE_TEST = cfg.INPUT.MAX_SIZE_TEST = 320
    assert levels_of(check_test_size(cfg, model)) == [OK]
    cfg.INPUT.MIN_SIZE_TEST = cfg.INPUT.MAX_SIZE_TEST = 64
    assert check_test_size(cfg, build_model(load_config(project / f"{detector}.yaml"))) == []  # it has no such norms


def test_maps_of_one_pixel_of_a_model_without_a_backbone(project):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.GroupNorm(3, 3)

        def forward(self, inputs):
            return self.norm(inputs[0]["image"][None, :, :1, :1].float())

    cfg = load_config(project / "fcos.yaml")
    register_datasets(cfg)
    (finding,) = check_test_size(cfg, Model())
    assert finding.level == ERROR and "64 x 64 pixels has a map of one pixel, which norms" in finding.text


@pytest.mark.parametrize("detector", ["fcos", "teacher", "student"])
def test_random_numbers_are_not_frozen(project, teacher_weights, tmp_path, detector):
    """Without MODEL.WEIGHTS the first stages of detectron2's usual networks would stay random for ever."""
    cfg = config(project, teacher_weights, detector, tmp_path / "run")
    resnet18 = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.BACKBONE.FREEZE_AT", 2]
    cfg.merge_from_list(["MODEL.FPN.BOTTOM_UP", "build_resnet_backbone", *resnet18])
    cfg.DISTILL.INIT_STUDENT = "neck_and_head"
    trainer = DistillTrainer(cfg)
    with pytest.raises(ValueError, match=r"frozen layers: .* bottom-up network are random and frozen, e.g. .*stem"):
        trainer.resume_or_load(False)
    assert [f.check for f in examine(cfg, images=0) if f.level == ERROR] == ["frozen layers"]
    torch.save({"model": trainer.checkpointer.model.state_dict()}, tmp_path / "weights.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    DistillTrainer(cfg).resume_or_load(False)
    assert "frozen layers" in {f.check for f in examine(cfg, images=0) if f.level == OK}


def test_levels_that_nothing_compares_are_not_warned_of(project, teacher_weights, tmp_path):
    """Stock levels under a teacher that sees the image as the student does not: ScaleKD's students are such."""
    cfg, plain = config(project, teacher_weights, "student", tmp_path / "run"), load_config(project / "fcos.yaml")
    cfg.MODEL.FPN.LEVELS, cfg.MODEL.FCOS.IN_FEATURES = plain.MODEL.FPN.LEVELS, plain.MODEL.FCOS.IN_FEATURES
    cfg.DISTILL.LOSSES = []
    for start, expected in (("neck_and_head", [WARNING]), ("none", [])):
        cfg.DISTILL.INIT_STUDENT = start
        assert [f.level for f in examine(cfg, images=0) if f.check == "levels"] == expected


def test_checkpoints(project, teacher_weights, tmp_path):
    model = build_model(load_config(project / "teacher.yaml"))
    found, loaded = check_checkpoint("teacher", model, teacher_weights["teacher"])
    assert levels_of(found) == [OK] and loaded == set(model.state_dict())
    found, loaded = check_checkpoint("teacher", model, teacher_weights["teacher"] + "?matching_heuristics=True")
    assert levels_of(found) == [OK] and loaded == set(model.state_dict())
    found, loaded = check_checkpoint("teacher", model, str(tmp_path / "none.pth"))
    assert levels_of(found) == [ERROR] and not loaded
    (tmp_path / "broken.pth").write_bytes(b"no checkpoint")
    assert levels_of(check_checkpoint("teacher", model, str(tmp_path / "broken.pth"))[0]) == [ERROR]
    state = model.state_dict()
    state["renamed"] = state.pop("detector.head.cls_score.weight")
    torch.save({"model": state}, tmp_path / "renamed.pth")
    found, loaded = check_checkpoint("teacher", model, str(tmp_path / "renamed.pth"))
    assert levels_of(found) == [ERROR, WARNING] and "cls_score.weight" in found[0].text and "renamed" in found[1].text
    assert "detector.head.cls_score.weight" not in loaded


def test_examination_of_a_whole_setup(project, teacher_weights, tmp_path):
    cfg = config(project, teacher_weights, "student", tmp_path)
    found = examine(cfg, images=2)
    checks = {finding.check: finding for finding in found}
    assert {
        "data set 'tiny_train'",
        "data set 'tiny_val'",
        "teacher's weights",
        "classes",
        "pixels",
        "levels",
        "student's start",
        "losses",
    } <= checks.keys()
    assert {f.check for f in found if f.level == ERROR} == {"teacher's AP"}  # it has not been trained
    assert "2 images of tiny_val" in checks["teacher's AP"].text

    cfg.DISTILL.LOSSES = [{"NAME": "AlignedL2"}]
    cfg.DISTILL.TEACHERS[0]["WEIGHTS"] = "nowhere.pth"
    errors = {f.check: f.text for f in examine(cfg, images=2) if f.level == ERROR}
    assert errors.keys() == {"losses", "teacher's weights"} and "did you mean AlignedL1" in errors["losses"]


def test_a_detector_without_a_teacher(project, teacher_weights, tmp_path):
    cfg = config(project, teacher_weights, "fcos", tmp_path)
    found = {finding.check: finding for finding in examine(cfg)}
    sets = ["data set 'tiny_train'", "data set 'tiny_val'"]
    assert found.keys() == {"device", *sets, "schedule"} and {f.level for f in found.values()} == {OK}
    cfg.MODEL.FCOS.NUM_CLASSES = 5
    cfg.MODEL.WEIGHTS = "nowhere.pth"
    errors = [f.check for f in examine(cfg) if f.level == ERROR]
    assert sorted(set(errors)) == [*sets, "student's weights"]
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    assert [f.check for f in examine(cfg) if f.level == WARNING] == ["data"]


def test_messages_of_exceptions(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "none.png").read_bytes()
    assert "No such file or directory" in error_text(caught.value) and "none.png" in error_text(caught.value)
    assert error_text(KeyError("unknown key 'A'")) == "unknown key 'A'"
    assert error_text(ValueError("two\n lines")) == "two lines" and error_text(ValueError()) == "ValueError"


def test_a_missing_device_is_named_and_all_else_looked_at(project, teacher_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = config(project, teacher_weights, "student", tmp_path)
    assert levels_of(check_device(cfg)) == [OK]
    cfg.MODEL.DEVICE = "cuda"
    found = examine(cfg, images=0)
    (error,) = [f for f in found if f.level == ERROR]
    assert error.check == "device" and "no NVIDIA GPU or driver" in error.text and error.fix == "add MODEL.DEVICE cpu"
    assert {"teacher's weights", "levels", "losses"} <= {f.check for f in found}


@pytest.mark.parametrize(
    ("change", "check", "text"),
    [
        (["DISTILL.LOSSES", [{"NAME": "LD"}]], "losses", "LD compares the predictions of distributions heads"),
        (["DISTILL.BALANCE.RATIO", 0.5, "DISTILL.WEIGHTING", "convex"], "losses", "choose one"),
        (["DISTILL.DECAY_FROM", 0.9, "DISTILL.DECAY_TO", 0.5], "losses", "DECAY_FROM <= DISTILL.DECAY_TO"),
        (["DISTILL.STUDENT_RESOLUTION", "XL"], "student", "XL"),
    ],
)
def test_what_training_refuses_is_found_beside_all_else(project, teacher_weights, tmp_path, change, check, text):
    cfg = config(project, teacher_weights, "student", tmp_path)
    cfg.merge_from_list(change)
    found = examine(cfg, images=2)
    errors = {finding.check: finding.text for finding in found if finding.level == ERROR}
    assert text in errors[check]
    assert {"data set 'tiny_val'", "teacher's weights", "teacher's AP"} <= {finding.check for finding in found}


def test_no_validation_set_is_no_crash(project, teacher_weights, tmp_path):
    cfg = config(project, teacher_weights, "student", tmp_path)
    cfg.DATASETS.TEST = ()
    (finding,) = [f for f in examine(cfg, images=2) if f.check == "teacher's AP"]
    assert finding.level == WARNING and "DATASETS.TEST is empty" in finding.text


@pytest.mark.parametrize(("match", "level"), [({}, WARNING), ({"match": "by_index"}, OK)])
def test_levels_are_judged_by_how_losses_pair_them(project, teacher_weights, tmp_path, match, level):
    cfg = config(project, teacher_weights, "student", tmp_path)
    cfg.DISTILL.STUDENT_RESOLUTION = "EL"  # p2 to p6 of the student are p4 to p8
    cfg.DISTILL.LOSSES = [{"NAME": "CWD", **match}]
    (finding,) = [f for f in examine(cfg, images=0) if f.check == "levels"]
    assert finding.level == level and ("p4 with p3" in finding.text) == bool(match)


@pytest.mark.parametrize(("source", "refused"), [("a", False), ("mean", True), (["a", "b"], True), (None, True)])
def test_levels_are_judged_by_the_losses_that_read_a_teacher(project, teacher_weights, tmp_path, source, refused):
    """Aligned features of a teacher at 1x say nothing of the strides of one at 0.75x."""
    cfg = config(project, teacher_weights, "student", tmp_path)
    entry = {key: cfg.DISTILL.TEACHERS[0][key] for key in ("CONFIG", "WEIGHTS")}
    cfg.DISTILL.TEACHERS = [{"NAME": "a", **entry}, {"NAME": "b", **entry, "SCALE": 0.75}]
    if source == "mean":
        cfg.DISTILL.TEACHERS.append({"NAME": "mean", "MEAN_OF": ["a", "b"]})
    aligned = {"NAME": "AlignedL1", "SOURCE": source} if source else {"NAME": "AlignedL1"}
    cfg.DISTILL.LOSSES = [aligned, {"NAME": "FitNet", "SOURCE": "b", "MATCH": "by_index"}]
    found = examine(cfg, images=0)
    strides = [f for f in found if f.check == "strides" and "8 for the student and 10.6" in f.text]
    assert bool(strides) == refused and all(f.level == ERROR for f in strides)
    if not refused:
        assert any(f.check == "losses" and f.level == OK for f in found)


@pytest.fixture
def turned(project, clean_catalogs):
    """Writes a copy of tiny_train's annotations with two classes in turned order; text of a teacher's yaml of it."""
    register = load_config(project / "base.yaml").DATASETS.REGISTER
    (entry,) = [dict(entry) for entry in register if entry["NAME"] == "tiny_train"]

    def make(folder, name, classes=False, **changes):
        data = json.loads(Path(entry["JSON"]).read_text())
        data["categories"][0]["name"], data["categories"][1]["name"] = (c["name"] for c in data["categories"][1::-1])
        (folder / "turned.json").write_text(json.dumps(data))
        made = {**entry, "NAME": name, "JSON": str(folder / "turned.json"), **changes}
        if classes:
            made["CLASSES"] = [c["name"] for c in sorted(data["categories"], key=lambda c: c["id"])]
        (folder / "teacher.yaml").write_text(
            f"_BASE_: {project / 'teacher.yaml'}\nDATASETS:\n  REGISTER: [{made}]\n  TRAIN: [{name}]\n"
        )
        return {"CONFIG": str(folder / "teacher.yaml")}

    return make


@pytest.mark.parametrize(
    ("init", "losses", "level"),
    [
        ("full", ["AlignedL1"], ERROR),
        ("none", ["AlignedL1", "Chen"], ERROR),
        ("none", ["AlignedL1"], WARNING),
        ("none", [], WARNING),
    ],
)
@pytest.mark.parametrize("name", ["turned_compared", "tiny_train"])  # the latter is the student's set, too
def test_classes_must_be_equal_where_heads_are_copied_or_compared(
    project, teacher_weights, tmp_path, turned, init, losses, level, name
):
    cfg = config(project, teacher_weights, "student", tmp_path)
    cfg.DISTILL.TEACHERS[0].update(turned(tmp_path, name))
    cfg.DISTILL.INIT_STUDENT, cfg.DISTILL.LOSSES = init, [{"name": name} for name in losses]
    (finding,) = [f for f in examine(cfg, images=0) if f.check == "classes"]
    assert finding.level == level and "equal classes in another order" in finding.text


@pytest.mark.parametrize(
    ("case", "known"),
    [
        ("named", True), ("named as the student's", True), ("small", True),
        ("large", False), ("absent", False), ("broken", False),
    ],
)  # fmt: skip
def test_training_knows_the_classes_of_the_teachers_own_data(
    project, teacher_weights, tmp_path, turned, monkeypatch, caplog, case, known
):
    """From the yaml, even if the file is elsewhere, or from a file that does not take long to read."""
    cfg = config(project, teacher_weights, "student", tmp_path)
    name = "tiny_train" if case == "named as the student's" else f"turned_{case}"
    teacher = turned(tmp_path, name, classes=case == "named")
    cfg.DISTILL.TEACHERS[0].update(teacher)
    before = DatasetCatalog.list()
    if case in ("named", "absent"):
        (tmp_path / "turned.json").unlink()
    if case == "broken":
        (tmp_path / "turned.json").write_text("{")
    if case == "large":
        monkeypatch.setattr("msad.engine.preflight.run._SMALL_FILE", 100)
    run = DistillTrainer(cfg)
    if known:
        with pytest.raises(ValueError, match="classes: equal classes in another order"):
            run.resume_or_load(False)
        assert DatasetCatalog.list() == before
    else:
        with caplog.at_level("WARNING", logger="msad"):
            run.resume_or_load(False)
        assert "class names of student or teacher are not known" in caplog.text


def test_images_for_the_teachers_ap_are_spread_evenly(project, teacher_weights, tmp_path, monkeypatch):
    cfg = config(project, teacher_weights, "student", tmp_path)
    register_datasets(cfg)
    cfg.DATASETS.TEST = ("tiny_train",)
    order = [record["image_id"] for record in DatasetCatalog.get("tiny_train")]
    chosen = []

    def run(_model, loader, _evaluator):
        chosen[:] = [item["image_id"] for batch in loader for item in batch]
        return {"bbox": {"AP": 50.0}}

    monkeypatch.setattr("msad.engine.preflight.model_checks.inference_on_dataset", run)
    teacher = load_config(project / "teacher.yaml")
    for images, places in ((3, [0, 2, 4]), (4, [0, 1, 3, 4]), (9, range(6))):
        (finding,) = check_teacher_ap(cfg, teacher, torch.nn.Identity(), images)
        assert chosen == [order[i] for i in places] and f"on {len(chosen)} images" in finding.text


@pytest.mark.parametrize("kind", ["visdrone", "argoverse_hd", "sem_seg"])
def test_where_coco_does_not_judge_the_teacher_is_not_measured(
    project, teacher_weights, tmp_path, monkeypatch, kind
):
    cfg = config(project, teacher_weights, "student", tmp_path)
    register_datasets(cfg)
    monkeypatch.setitem(vars(MetadataCatalog.get("tiny_val")), "evaluator_type", kind)
    (finding,) = check_teacher_ap(cfg, load_config(project / "teacher.yaml"), torch.nn.Identity(), 2)
    assert finding.level == WARNING and "not measured: tiny_val" in finding.text


def test_a_teacher_has_to_exceed_the_student_without_distillation(
    project, teacher_weights, tmp_path, monkeypatch
):
    cfg = config(project, teacher_weights, "student", tmp_path)
    weights, aps = tmp_path / "no_kd.pth", {}
    torch.save({"model": build_model(cfg).state_dict()}, weights)

    def run(model, _loader, _evaluator):
        return {"bbox": {"AP": aps["teacher" if hasattr(model, "detector") else "student"]}}

    monkeypatch.setattr("msad.engine.preflight.model_checks.inference_on_dataset", run)
    for teacher, level, text in ((30.0, OK, "5.0 above"), (25.0, WARNING, "no more than the 25.0")):
        aps.update(teacher=teacher, student=25.0)
        (finding,) = [f for f in examine(cfg, 2, str(weights)) if f.check == "teacher's AP"]
        assert finding.level == level and text in finding.text, finding
    texts = [f.text for f in examine(cfg, 2, str(tmp_path / "none.pth")) if f.check == "teacher's AP"]
    assert any("none.pth" in text for text in texts)


def test_training_stops_at_errors_and_logs_warnings(project, teacher_weights, tmp_path, caplog, monkeypatch):
    run = DistillTrainer(config(project, teacher_weights, "student", tmp_path))
    with caplog.at_level("INFO", logger="msad"):
        run.resume_or_load(False)
    assert "Preflight, levels:" in caplog.text and "WARMUP_ITERS 8" in caplog.text
    other = Finding(ERROR, "classes", "two orders", "choose one")
    monkeypatch.setattr("msad.engine.preflight.run.check_training_sets", lambda *_: [other])
    with pytest.raises(ValueError, match=r"classes: two orders\. Fix: choose one"):
        DistillTrainer(config(project, teacher_weights, "student", tmp_path / "again")).resume_or_load(False)
    report([Finding(OK, "a", "b")])
