"""What training says about bad input, checkpoints that lack something, and divergence."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase, hooks
from detectron2.evaluation import DatasetEvaluators
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from runs import assert_equal_weights, config, left_by_a_killed_run, train
from torch import nn

from msad import load_config
from msad.engine import DistillTrainer
from msad.engine.build import check_distillation, load_teacher
from msad.engine.checkpoint import CheckedCheckpointer
from msad.engine.preflight import examine
from msad.engine.setup import load_model
from msad.finding import ERROR

# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"DISTILL__TEACHERS": []}, ValueError, "DISTILL.LOSSES need a teacher"),
        ({"DISTILL__TEACHERS": [{}, {}]}, ValueError, "has no CONFIG and no WEIGHTS"),
        ({"DISTILL__TEACHERS": [{"CONFIG": "t.yaml"}]}, ValueError, "has no WEIGHTS; an entry is"),
        ({"DISTILL__TEACHERS": [{"CONFIG": "a", "WEIGHTS": "b", "ITERS": 3}]}, ValueError, "has no key ITERS"),
        ({"DISTILL__STUDENT_RESOLUTION": "M"}, ValueError, "unknown resolution 'M'; known: H, L, EL"),
        ({"DISTILL__TEACHER_BN": "train"}, ValueError, "TEACHER_BN must be 'eval' or 'batch', not 'train'"),
        ({"DISTILL__DECAY_FROM": 0.9, "DISTILL__DECAY_TO": 0.5}, ValueError, "DECAY_FROM <= DISTILL.DECAY_TO"),
        ({"DISTILL__WEIGHTING": "C"}, ValueError, "WEIGHTING must be '', 'convex' or 'additive', not 'C'"),
        ({"DISTILL__LOSSES": [{"NAME": "AlinedL1"}]}, ValueError, "unknown loss 'AlinedL1'; did you mean AlignedL1"),
        ({"DISTILL__LOSSES": [{"NAME": "AlignedL1", "LEVELS": ["p9"]}]}, ValueError, "p9 .* does not exist in the stu"),
        ({"SOLVER__OPTIMIZER": "Adam"}, ValueError, "OPTIMIZER must be 'SGD' or 'AdamW', not 'Adam'"),
        ({"SOLVER__IMS_PER_BATCH": 0}, ValueError, "IMS_PER_BATCH is 0"),
        ({"SOLVER__CHECKPOINT_PERIOD": 0}, ValueError, "CHECKPOINT_PERIOD must be at least 1, not 0"),
        ({"TEST__PRECISE_BN__ENABLED": True}, ValueError, "PRECISE_BN cannot be used with DISTILL.TEACHERS"),
        ({"DISTILL__STAGES": [{"TEACHERS": []}]}, ValueError, "a trainer runs one stage, .* call msad.engine.setup.t"),
        ({"MODEL__FCOS__NUM_CLASSES": 5}, ValueError, r"MODEL.FCOS.NUM_CLASSES.*5.*"),
    ],
)
def test_wrong_configuration_is_one_clear_error(student_config, options, error, message):
    with pytest.raises(error, match=message):
        DistillTrainer(student_config(**options))


def test_precise_statistics_need_layers_that_run_once(project, teacher_weights, tmp_path):
    """Those of a teacher run once a resolution: said in the first step, and not when the training ends."""
    options = {"TEST.PRECISE_BN.ENABLED": True, "TEST.PRECISE_BN.NUM_ITER": 2, "SOLVER.MAX_ITER": 2}
    with pytest.raises(ValueError, match=r"TEST.PRECISE_BN.ENABLED: detector\.backbone\.\S+ runs 2 times in a step"):
        train(config(project, teacher_weights, "teacher", tmp_path / "teacher", **options))
    trainer, *_ = train(config(project, teacher_weights, "fcos", tmp_path / "plain", **options))
    assert trainer.iter == 2


def test_nothing_is_evaluated_after_an_error_in_the_last_iteration(project, teacher_weights, tmp_path, monkeypatch):
    """Other processes would wait for this one in the middle of their step."""
    evaluated = []
    monkeypatch.setattr(DistillTrainer, "test", classmethod(lambda cls, cfg, model: evaluated.append(1) or {}))
    trainer = DistillTrainer(config(project, teacher_weights, "fcos", tmp_path / "run"))

    def fail():
        if trainer.iter == trainer.max_iter - 1:
            raise OSError("no space left")

    trainer.register_hooks([hooks.CallbackHook(after_step=lambda _: fail())])
    with pytest.raises(OSError, match="no space left"):
        trainer.train()
    assert not evaluated
    train(config(project, teacher_weights, "fcos", tmp_path / "whole"))
    assert evaluated == [1]


def test_levels_that_do_not_meet_are_reported(student_config, caplog):
    def warned(**options) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "msad"):
            DistillTrainer(student_config(DISTILL__INIT_STUDENT="none", **options)).resume_or_load(False)
        return [record.getMessage() for record in caplog.records if "levels" in record.getMessage()]

    assert not warned()
    (said,) = warned(DISTILL__STUDENT_RESOLUTION="H")
    sides = "student p2, p3, p4, p5, p6; teacher p3, p4, p5, p6, p7 (names of the H frame)"
    assert f"only p3, p4, p5, p6 are in both: {sides}. Fix: check DISTILL.STUDENT_RESOLUTION" in said
    far = student_config().DISTILL.TEACHERS[0] | {"SCALE": 2.0}  # whose p3 has stride 4 in pixels of H
    for losses in ([{"NAME": "FitNet", "MATCH": "by_index"}], []):
        assert not warned(DISTILL__TEACHERS=[far], DISTILL__LOSSES=losses)
    (said,) = warned(DISTILL__TEACHERS=[far], DISTILL__LOSSES=[{"NAME": "AlignedL1"}])
    assert "only p3, p4, p5, p6 are in both" in said


class Renamed(Backbone):
    """A network with a neck that does not say which part is the network."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.body = BACKBONE_REGISTRY.get("build_level_fpn_backbone")(cfg, input_shape)

    @property
    def size_divisibility(self):
        return self.body.size_divisibility

    def output_shape(self):
        return self.body.output_shape()

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("wanted", ["freeze", "tap"])
def test_a_neck_that_does_not_name_its_network(student_config, monkeypatch, wanted):
    """Its pyramid is not taken for the network in front of it."""
    monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, "Renamed", Renamed)
    loss = {"NAME": "FitNet", "TAP": "bottom_up", "MATCH": "by_index"}
    options = {"freeze": {"DISTILL__FREEZE_BACKBONE_ITERS": 2}, "tap": {"DISTILL__LOSSES": [loss]}}[wanted]
    cfg = student_config(MODEL__BACKBONE__NAME="Renamed", DISTILL__INIT_STUDENT="none")
    assert DistillTrainer(cfg).distiller is not None
    cfg = student_config(MODEL__BACKBONE__NAME="Renamed", DISTILL__INIT_STUDENT="none", **options)
    for make in (check_distillation, DistillTrainer):  # what comes before a curriculum, and before a run
        with pytest.raises(ValueError, match=r"Renamed has no attribute bottom_up: TAP bottom_up and .*FREEZE"):
            make(cfg)


def test_wrong_init_mode(student_config):
    with pytest.raises(ValueError, match=r"INIT_STUDENT must be one of .*, not 'head'"):
        DistillTrainer(student_config(DISTILL__INIT_STUDENT="head")).resume_or_load(False)


def test_teacher_that_is_not_there(student_config, project):
    cfg = student_config()
    entry = dict(cfg.DISTILL.TEACHERS[0])
    with pytest.raises(FileNotFoundError, match=r"DISTILL.TEACHERS: no checkpoint absent.pth"):
        load_teacher({**entry, "WEIGHTS": "absent.pth"}, cfg)
    with pytest.raises(FileNotFoundError, match=r"no config file absent.yaml"):
        load_teacher({**entry, "CONFIG": "absent.yaml"}, cfg)


def test_teacher_of_the_other_channel_order(student_config):
    cfg = student_config(INPUT__FORMAT="RGB", DISTILL__INIT_STUDENT="neck_and_head")
    entry = dict(cfg.DISTILL.TEACHERS[0])
    assert load_teacher(entry, cfg).reverse_channels
    assert not load_teacher(entry, student_config()).reverse_channels
    with pytest.raises(ValueError, match=r"INPUT.FORMAT is RGB for .* BGR for .*INIT_STUDENT full copies"):
        load_teacher(entry, student_config(INPUT__FORMAT="RGB", DISTILL__INIT_STUDENT="full"))
    with pytest.raises(ValueError, match=r"INPUT.FORMAT is L for the student and BGR for the teacher"):
        load_teacher(entry, student_config(INPUT__FORMAT="L", DISTILL__INIT_STUDENT="none"))


def test_only_the_teacher_that_initialises_needs_the_channel_order(student_config):
    first = dict(student_config().DISTILL.TEACHERS[0], NAME="first")
    second = dict(first, NAME="second")
    cfg = student_config(INPUT__FORMAT="RGB", DISTILL__INIT_STUDENT="full", DISTILL__TEACHERS=[first, second])
    assert load_teacher(second, cfg).reverse_channels
    mean = {"NAME": "mean", "MEAN_OF": ["first", "second"]}  # initialises nothing
    cfg.DISTILL.TEACHERS = [mean, first, second]
    with pytest.raises(ValueError, match=r"INIT_STUDENT full copies"):
        load_teacher(first, cfg)


def test_teacher_checkpoint_must_be_complete(student_config, project, teacher_weights, tmp_path):
    cfg = student_config()
    entry = {"CONFIG": str(project / "teacher.yaml"), "WEIGHTS": str(tmp_path / "other.pth")}
    weights = torch.load(teacher_weights["teacher"], weights_only=True)["model"]

    def save(model):
        torch.save({"model": model}, entry["WEIGHTS"])

    save({k: v for k, v in weights.items() if k != "fusion.excite.weight"})
    with pytest.raises(ValueError, match=r"other.pth is not a checkpoint of .*teacher.yaml: 1 tensors .*fusion.excite"):
        load_teacher(entry, cfg)
    save({k: torch.zeros(3, *v.shape[1:]) if "cls_score" in k else v for k, v in weights.items()})
    with pytest.raises(ValueError, match=r"2 tensors are absent or of another shape, e.g. .*cls_score"):
        load_teacher(entry, cfg)
    save({"encoder." + k: v for k, v in weights.items()})
    with pytest.raises(ValueError, match=r"no tensor of the checkpoint fits MultiScaleTea.*the file has e.g. enc"):
        load_teacher(entry, cfg)
    save(weights)
    assert_equal_weights(load_teacher(entry, cfg).model.state_dict(), weights)


def test_weights_that_fit_nothing_stop_a_run(student_config, teacher_weights, tmp_path):
    torch.save({"model": {"layer.weight": torch.zeros(2, 2)}}, tmp_path / "odd.pth")
    run = DistillTrainer(student_config("fcos", MODEL__WEIGHTS=str(tmp_path / "odd.pth")))
    with pytest.raises(ValueError, match=r"no tensor of the checkpoint fits FCOS.*the file has e.g. layer.weight"):
        run.resume_or_load(False)
    # a checkpoint of which something fits is detectron2's business: a backbone, a head for other classes
    torch.save({"model": {"head.cls_score.bias": torch.ones(6)}}, tmp_path / "odd.pth")
    run = DistillTrainer(run.cfg)
    run.resume_or_load(False)
    assert run.model.head.cls_score.bias.eq(1).all()
    assert "head.cls_score.weight" in run.checkpointer.missing_or_mismatched


def annotate(project, tmp_path, name, edit) -> dict:
    """A DATASETS.REGISTER entry with an edited copy of the training annotations."""
    content = json.loads((project / "data" / "annotations_train.json").read_text())
    edit(content)
    (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return {"NAME": name, "JSON": str(tmp_path / f"{name}.json"), "IMAGES": str(project / "data" / "images")}


@pytest.mark.parametrize("emptied", [("images", "annotations"), ("annotations",)])
def test_empty_data_set_is_named(student_config, project, tmp_path, emptied):
    name = "nothing_" + "_".join(emptied)
    entry = annotate(project, tmp_path, name, lambda content: [content[key].clear() for key in emptied])
    with pytest.raises((ValueError, AssertionError), match=name):
        DistillTrainer(student_config("fcos", DATASETS__REGISTER=[entry], DATASETS__TRAIN=(name,)))


class OwnEvaluator(DistillTrainer):
    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        return DatasetEvaluators([])


@pytest.mark.parametrize(
    ("kind", "more", "message", "fix"),
    [
        ("lvis", {}, "has evaluator_type 'lvis'; there are", "register one in .*EVALUATOR_REGISTRY, or override"),
        ("visdrone", {"crop": (0, 0, 8, 8)}, "has patches of images .*; test on whole images", "correct DATASETS.TEST"),
    ],
)
def test_what_an_evaluator_refuses_is_said_before_training(student_config, kind, more, message, fix):
    cfg = student_config("fcos", DATASETS__TEST=("judged",))
    records = [{**record, **more} for record in DatasetCatalog.get("tiny_val")]
    DatasetCatalog.register("judged", lambda: records)
    classes = MetadataCatalog.get("tiny_val").thing_classes
    MetadataCatalog.get("judged").set(evaluator_type=kind, thing_classes=classes)
    try:
        with pytest.raises(ValueError, match=f"evaluation: data set 'judged' {message}.*Fix: {fix}"):
            DistillTrainer(cfg)
        assert OwnEvaluator(cfg).iter == 0, "which judges every set by itself"
        assert [f.check for f in examine(cfg, images=0) if f.level == ERROR] == ["evaluation"]
    finally:
        DatasetCatalog.remove("judged")
        MetadataCatalog.remove("judged")


class Poison(HookBase):
    """Makes the weights useless before iteration ``at``."""

    def __init__(self, at):
        self.at = at

    def before_step(self):
        if self.trainer.iter == self.at:
            self.trainer.distiller.student.head.cls_score.bias.data.fill_(float("nan"))


def test_nan_loss_stops_the_run_and_names_the_iteration(student_config):
    cfg = student_config()
    run = DistillTrainer(cfg)
    run.resume_or_load(False)
    run.register_hooks([Poison(4)])
    said = r"^loss not finite at iteration 4 \(.*loss_fcos_cls.*\).*; lower SOLVER.BASE_LR \(now 0\.002\)$"
    with pytest.raises(FloatingPointError, match=said):
        run.train()
    left = sorted(p.name for p in Path(cfg.OUTPUT_DIR).glob("*.pth"))
    assert left == ["model_0000002.pth"]
    saved = torch.load(Path(cfg.OUTPUT_DIR) / left[0], weights_only=True)
    assert all(v.isfinite().all() for v in saved["model"].values())


def logged(cfg, name) -> list[float]:
    """Values of a scalar in metrics.json."""
    lines = map(json.loads, (Path(cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def test_unreadable_images_are_skipped_counted_and_logged(student_config, project, tmp_path, caplog):
    images = tmp_path / "images"
    shutil.copytree(project / "data" / "images", images)
    broken = images / "train_000002.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    entry = {"NAME": "broken", "JSON": str(project / "data" / "annotations_train.json"), "IMAGES": str(images)}
    cfg = student_config("fcos", DATASETS__REGISTER=[entry], DATASETS__TRAIN=("broken",))
    with caplog.at_level(logging.WARNING, "msad"):
        run, trace, _ = train(cfg)
    # 6 iterations of 2 images see every one of 6 images twice
    assert run.data_loader.skipped == 2
    assert "skipped " + str(broken) in caplog.text and "2 images could not be used" in caplog.text
    assert logged(cfg, "skipped_images") == [2]
    assert all(str(broken) not in step["images"] for step in trace.steps)

    left_by_a_killed_run(Path(cfg.OUTPUT_DIR), tmp_path / "killed")
    cfg.OUTPUT_DIR = str(tmp_path / "killed")
    train(cfg, resume=True)
    assert logged(cfg, "skipped_images") == [2]  # with those of the run that was resumed


# --- checkpoints --------------------------------------------------------------------------------------------------


class Unpicklable:
    def state_dict(self):
        return {"file": open(__file__)}


def test_interrupted_writing_leaves_the_last_checkpoint(tmp_path):
    model = nn.Linear(2, 2)
    CheckedCheckpointer(model, str(tmp_path)).save("model_a")
    content = (tmp_path / "model_a.pth").read_bytes()
    failing = CheckedCheckpointer(model, str(tmp_path), trainer=Unpicklable())
    for name in ("model_a", "model_b"):
        with pytest.raises(TypeError):
            failing.save(name)
    assert (tmp_path / "model_a.pth").read_bytes() == content
    assert not (tmp_path / "model_b.pth").exists()
    assert (tmp_path / "last_checkpoint").read_text() == "model_a.pth"
    assert CheckedCheckpointer(model, str(tmp_path)).get_checkpoint_file() == str(tmp_path / "model_a.pth")


def test_only_the_main_process_writes(tmp_path):
    CheckedCheckpointer(nn.Linear(1, 1), str(tmp_path), save_to_disk=False).save("model")
    CheckedCheckpointer(nn.Linear(1, 1)).save("model")
    assert not list(tmp_path.iterdir())


# --- divergence ---------------------------------------------------------------------------------------------------


def test_a_learning_rate_that_is_far_too_high_is_named(student_config):
    """Whatever engine and loss say of it: assertions on boxes, scores that are not finite."""
    run = DistillTrainer(student_config("fcos", SOLVER__BASE_LR=1e8, SOLVER__WARMUP_ITERS=0, SOLVER__MAX_ITER=30,
                                 SOLVER__CLIP_GRADIENTS__ENABLED=False))  # fmt: skip
    run.resume_or_load(False)
    with pytest.raises(FloatingPointError, match=r"not finite at iteration \d+ \(.*lower SOLVER.BASE_LR .now 1e\+08"):
        run.train()


@pytest.mark.parametrize("error", [ValueError("wrong shape"), AssertionError("bad box: x1 larger than x2")])
def test_other_errors_of_a_step_are_left_alone(student_config, error):
    run = DistillTrainer(student_config("fcos"))

    def fail(inputs):
        raise error

    run.model.forward = fail
    expected = FloatingPointError if "bad box" in str(error) else ValueError
    with pytest.raises(expected, match="not finite" if "bad box" in str(error) else "^wrong shape$"):
        run.train()


def test_what_the_loader_raises_is_no_divergence_and_keeps_its_cause(student_config):
    run = DistillTrainer(student_config("fcos"))

    def batches():
        try:
            raise OSError("disk")
        except OSError as error:
            raise ValueError("a.png has infinite or NaN pixels") from error
        yield

    run._trainer.data_loader = batches()
    with pytest.raises(ValueError, match=r"^a.png has") as caught:
        run.train()
    assert isinstance(caught.value.__cause__, OSError)


def test_nan_in_a_checkpoint_is_named(student_config, project, teacher_weights, tmp_path):
    weights = torch.load(teacher_weights["teacher"], weights_only=True)["model"]
    name = "detector.backbone.fpn_lateral3.weight"
    weights[name] = weights[name].clone()
    weights[name].view(-1)[3] = float("nan")
    torch.save({"model": weights}, tmp_path / "nan.pth")
    cfg = student_config()
    entry = {"CONFIG": str(project / "teacher.yaml"), "WEIGHTS": str(tmp_path / "nan.pth")}
    with pytest.raises(ValueError, match=rf"DISTILL.TEACHERS: .*nan.pth has NaN or infinity in {name}"):
        load_teacher(entry, cfg)
    with pytest.raises(ValueError, match=rf"nan.pth has NaN or infinity in {name}"):
        load_model(load_config(project / "teacher.yaml"), str(tmp_path / "nan.pth"))


def test_a_checkpoint_with_gaps_is_not_evaluated(student_config, tmp_path):
    cfg = student_config("fcos")
    weights = DistillTrainer.build_model(cfg).state_dict()
    torch.save({"model": weights}, tmp_path / "whole.pth")
    load_model(cfg, str(tmp_path / "whole.pth"))
    weights.pop("backbone.fpn_lateral3.weight")
    torch.save({"model": weights}, tmp_path / "gap.pth")
    with pytest.raises(ValueError, match=r"gap.pth is not a checkpoint of this config: 1 tensors .*fpn_lateral3"):
        load_model(cfg, str(tmp_path / "gap.pth"))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint nowhere.pth"):
        load_model(cfg, "nowhere.pth")


def test_missing_weights_stop_training(student_config):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint nowhere.pth"):
        DistillTrainer(student_config("fcos", MODEL__WEIGHTS="nowhere.pth")).resume_or_load(False)


def test_a_teacher_starts_from_a_plain_detector(student_config, project, tmp_path, caplog):
    torch.manual_seed(5)
    plain = DistillTrainer.build_model(student_config("fcos")).state_dict()
    torch.save({"model": plain}, tmp_path / "plain.pth")
    run = DistillTrainer(student_config("teacher", MODEL__WEIGHTS=str(tmp_path / "plain.pth")))
    run.checkpointer.logger.propagate = True
    with caplog.at_level(logging.INFO, run.checkpointer.logger.name):
        run.resume_or_load(False)
    own = run.model.state_dict()
    assert all(torch.equal(own[f"detector.{name}"], value) for name, value in plain.items())
    new = set(run.checkpointer.missing_or_mismatched)  # the gate, and the finer level that the branch at L reads
    assert {name.rpartition(".")[0] for name in new} == {
        "fusion.squeeze", "fusion.excite", "detector.backbone.fpn_lateral2", "detector.backbone.fpn_output2"
    }  # fmt: skip
    (said,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Weights of a plain detector; new")]
    assert set(said.partition("values: ")[2].split(", ")) == new
    with pytest.raises(ValueError, match=r"plain.pth is not a checkpoint of this config: 6 tensors"):
        load_model(load_config(project / "teacher.yaml"), str(tmp_path / "plain.pth"))


def test_nothing_is_said_of_a_missing_checkpoint_where_none_is_asked_for(student_config, caplog):
    run = DistillTrainer(student_config())
    run.checkpointer.logger.propagate = True
    with caplog.at_level(logging.INFO):
        run.resume_or_load(False)
    assert "No checkpoint" not in caplog.text and "from scratch" not in caplog.text
