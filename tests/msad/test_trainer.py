"""DistillTrainer: what it builds, what it leaves alone, its switches, and what it says about bad input."""

from __future__ import annotations

import json
import logging
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from test_resume import assert_equal_weights, config, left_by_a_killed_run, train
from torch import nn

from msad import load_config
from msad.distill.losses import DISTILL_LOSS_REGISTRY
from msad.engine import DistillTrainer, trainer
from msad.engine.build import load_teacher
from msad.engine.checkpoint import CheckedCheckpointer
from msad.engine.setup import evaluate_branches, load_model


@pytest.fixture
def student(project, teacher_weights, tmp_path):
    """Makes the config of the FCOS student from KEY=value overrides (dots as two underscores)."""

    def make(name="student", **options):
        keys = {key.replace("__", "."): value for key, value in options.items()}
        return config(project, teacher_weights, name, tmp_path / "run", **keys)

    return make


# --- what is built ------------------------------------------------------------------------------------------------


def test_checkpoint_and_optimizer_hold_the_student_alone(student, project):
    cfg = student()
    run, _, _ = train(cfg)
    alone = build_model(load_config(project / "student.yaml"))
    saved = torch.load(Path(cfg.OUTPUT_DIR) / "model_final.pth", weights_only=True)
    assert saved["model"].keys() == alone.state_dict().keys()
    assert set(saved) == {"model", "trainer", "iteration"}
    optimized = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in run.distiller.student.parameters() if p.requires_grad}


@pytest.mark.parametrize("batch_norm", ["eval", "batch"])
def test_teacher_does_not_change_in_training(student, batch_norm):
    run = DistillTrainer(student(DISTILL__TEACHER_BN=batch_norm))
    run.resume_or_load(False)
    model = run.distiller.teacher.model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run.train()
    assert_equal_weights(model.state_dict(), before)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    modes = {m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert modes == {batch_norm == "batch"} and not model.training


def test_student_without_losses_is_only_initialised_from_the_teacher(student):
    run, trace, before = train(student(DISTILL__LOSSES=[]))
    teacher = run.distiller.teacher.detector.state_dict()
    assert all(torch.equal(value, teacher[key]) for key, value in before.items())
    assert not any("distill" in name for step in trace.steps for name in step["losses"])


class Weighted(nn.Module):
    """A distillation loss with a parameter of its own."""

    def __init__(self, levels):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(len(levels)))

    def forward(self, student, teacher, batch):
        return {"scaled": sum(a * (student[k] - teacher[k]).abs().mean() for a, k in zip(self.scale, student))}


def test_parameters_of_losses_are_trained_saved_and_resumed(student, monkeypatch, tmp_path):
    monkeypatch.setitem(DISTILL_LOSS_REGISTRY._obj_map, "Weighted", Weighted)
    losses = [{"NAME": "Weighted", "WEIGHT": 0.5}]
    whole, expected, _ = train(student(DISTILL__LOSSES=losses))
    assert whole.distiller.losses[0].loss.scale.ne(1).all()

    cfg = student(DISTILL__LOSSES=losses, OUTPUT_DIR=str(tmp_path / "killed"))
    left_by_a_killed_run(tmp_path / "run", tmp_path / "killed")
    again, resumed, _ = train(cfg, resume=True)
    assert resumed.steps == expected.steps[3:]
    assert torch.equal(again.distiller.losses[0].loss.scale, whole.distiller.losses[0].loss.scale)


def test_optimizers(student):
    def groups(optimizer):
        named = {id(p): n for n, p in model.named_parameters()}
        return {named[id(p)]: g for g in optimizer.param_groups for p in g["params"]}

    cfg = student("fcos", SOLVER__WEIGHT_DECAY=0.3, SOLVER__WEIGHT_DECAY_NORM=0.1, SOLVER__BASE_LR=0.01)
    model = build_model(cfg)
    norm, weight = "backbone.bottom_up.stem.conv1.norm.weight", "head.cls_score.weight"
    for name, kind in (("SGD", torch.optim.SGD), ("AdamW", torch.optim.AdamW)):
        cfg.SOLVER.OPTIMIZER = name
        optimizer = DistillTrainer.build_optimizer(cfg, model)
        assert isinstance(optimizer, kind)
        by_name = groups(optimizer)
        assert by_name.keys() == dict(model.named_parameters()).keys()
        assert (by_name[norm]["weight_decay"], by_name[weight]["weight_decay"]) == (0.1, 0.3)
        assert by_name[weight]["lr"] == 0.01
        # SOLVER.CLIP_GRADIENTS works for both
        p = next(model.parameters())
        p.grad = torch.full_like(p, 100.0)
        optimizer.step()
        assert p.grad.norm() < 10.01
        optimizer.zero_grad()
    assert optimizer.defaults["fused"]
    cfg.SOLVER.AMP.ENABLED = True  # whose scaled gradients a fused step would unscale after they were clipped
    assert not DistillTrainer.build_optimizer(cfg, model).defaults["fused"]


def test_reading_sets_the_weights(student):
    cfg = trainer.apply_weighting(student(DISTILL__WEIGHTING="convex", DISTILL__LAMBDA=0.3, DISTILL__GAMMA=0.8))
    assert (cfg.MSAD.W_FUSE, cfg.DISTILL.W_DET) == (0.3, 0.8)
    assert [{"NAME": "AlignedL1", "WEIGHT": pytest.approx(0.6)}] == cfg.DISTILL.LOSSES
    cfg = student()
    assert trainer.apply_weighting(cfg) is cfg


# --- switches of speed --------------------------------------------------------------------------------------------


def losses_of(cfg) -> list[dict[str, float]]:
    return [step["losses"] for step in train(cfg)[1].steps]


def test_channels_last_gives_the_same_losses(student):
    expected = losses_of(student())
    run, trace, _ = train(student(SOLVER__CHANNELS_LAST=True))
    for model in (run.distiller.student, run.distiller.teacher.model):
        kernels = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        assert kernels and all(w.is_contiguous(memory_format=torch.channels_last) for w in kernels)
    for step, reference in zip(trace.steps, expected):
        assert step["losses"] == pytest.approx(reference, rel=1e-3)


@pytest.fixture
def compiled(monkeypatch) -> list:
    """The graphs that torch.compile makes, run as they are: code generation for the CPU takes minutes."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


def compare_compiled(student, name="student", rel=1e-4, **options):
    expected = losses_of(student(name, **options))
    run, trace, before = train(student(name, SOLVER__COMPILE=True, **options))
    assert before.keys() == build_model(run.cfg).state_dict().keys()
    for step, reference in zip(trace.steps, expected):
        assert step["losses"] == pytest.approx(reference, rel=rel)


def test_compiled_student_and_teacher_give_the_same_losses(student, compiled, project, tmp_path):
    # A teacher with one branch: less to compile.
    teacher = {"CONFIG": str(project / "fcos.yaml"), "WEIGHTS": str(tmp_path / "fcos.pth")}
    torch.save({"model": build_model(load_config(teacher["CONFIG"])).state_dict()}, teacher["WEIGHTS"])
    options = {"SOLVER__MAX_ITER": 2, "DATASETS__TEST": (), "DISTILL__WARMUP_ITERS": 0}
    compare_compiled(student, DISTILL__TEACHERS=[teacher], **options)
    assert len(compiled) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["student", "teacher", "retinanet_student"])
def test_compiled_runs_with_evaluation_give_the_same_losses(student, compiled, name):
    compare_compiled(student, name)
    assert len(compiled) >= 3


@pytest.mark.slow
def test_compiled_with_the_default_backend(student):
    torch._dynamo.reset()
    compare_compiled(student, rel=1e-3, SOLVER__MAX_ITER=2, DATASETS__TEST=(), DISTILL__WARMUP_ITERS=0)


# For autocast: torch's bfloat16 convolutions on CPU read memory that nobody has written when they differentiate a
# stride-2 convolution of a 1x1 map, which C5 of the small images is.
TWICE_THE_SIZE = {"INPUT__MIN_SIZE_TRAIN": (128,), "INPUT__MAX_SIZE_TRAIN": 128}


def test_distillation_under_autocast(student):
    run = DistillTrainer(student(**TWICE_THE_SIZE))
    distiller = run.distiller
    distiller.factor = lambda iteration: 1.0
    batch = next(iter(run.data_loader))
    results = {}
    for enabled in (False, True):
        distiller.zero_grad()
        distiller.student.loss_normalizer = 100
        with EventStorage(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = distiller(batch)
            sum(losses.values()).backward()
        results[enabled] = {k: v.item() for k, v in losses.items()}
        gradients = [p.grad for p in distiller.student.parameters() if p.requires_grad]
        assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in gradients)
    assert results[True] == pytest.approx(results[False], rel=0.05)
    assert results[True] != results[False]


def test_amp_trains_where_the_engine_supports_it(student):
    expected = losses_of(student(**TWICE_THE_SIZE))
    try:
        trace = losses_of(student(SOLVER__AMP__ENABLED=True, **TWICE_THE_SIZE))
    except AssertionError as error:
        assert "CUDA" in str(error)  # an engine whose AMP needs a GPU says so
    else:
        for losses, reference in zip(trace, expected[:2]):
            assert losses == pytest.approx(reference, rel=0.05)


# --- evaluation ---------------------------------------------------------------------------------------------------


def test_evaluator_takes_the_sigmas_of_the_data_set(student, monkeypatch):
    seen = []

    def init(self, *args, kpt_oks_sigmas=(), **kwargs):
        seen.append(list(kpt_oks_sigmas))
        monkeypatch.undo()
        self.__init__(*args, kpt_oks_sigmas=kpt_oks_sigmas, **kwargs)

    cfg = student()
    DatasetCatalog.get("tiny_val")  # as the test loader does before the evaluator is built
    own = MetadataCatalog.get("tiny_val").keypoint_oks_sigmas
    assert len(own) > 2
    monkeypatch.setattr(COCOEvaluator, "__init__", init)
    DistillTrainer.build_evaluator(cfg, "tiny_val")
    monkeypatch.setattr(COCOEvaluator, "__init__", init)
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.5] * len(own)
    DistillTrainer.build_evaluator(cfg, "tiny_val")
    assert seen == [own, [0.5] * len(own)]


def test_branches_of_a_teacher_are_evaluated_and_the_choice_is_kept(student, teacher_weights):
    cfg = student("teacher", MSAD__EVAL_BRANCH="L")
    model = load_model(cfg, teacher_weights["teacher"])
    results = evaluate_branches(cfg, model)
    assert list(results) == ["fused", "H", "L"] and all("AP" in r["bbox"] for r in results.values())
    assert model.eval_branch == "L" and not model.training
    with pytest.raises(ValueError, match=r"MSAD.EVAL_BRANCH 'EL' is not one of .*'fused', 'H', 'L'"):
        model.set_eval_branch("EL")


def test_nothing_is_evaluated_without_weights(student):
    with pytest.raises(ValueError, match=r"MODEL.WEIGHTS is empty"):
        load_model(student())


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
        ({"MODEL__FCOS__NUM_CLASSES": 5}, ValueError, r"MODEL.FCOS.NUM_CLASSES.*5.*"),
    ],
)
def test_wrong_configuration_is_one_clear_error(student, options, error, message):
    with pytest.raises(error, match=message):
        DistillTrainer(student(**options))


def test_levels_that_do_not_meet_are_reported(student, caplog):
    with caplog.at_level(logging.WARNING, "msad"):
        DistillTrainer(student())
        assert "differ in their levels" not in caplog.text
        DistillTrainer(student(DISTILL__STUDENT_RESOLUTION="H"))
    assert "Student (p2, p3, p4, p5, p6) and teacher (p3, p4, p5, p6, p7) differ in their levels" in caplog.text
    assert "is DISTILL.STUDENT_RESOLUTION H right?" in caplog.text


def test_wrong_init_mode(student):
    with pytest.raises(ValueError, match=r"INIT_STUDENT must be one of .*, not 'head'"):
        DistillTrainer(student(DISTILL__INIT_STUDENT="head")).resume_or_load(False)


def test_teacher_that_is_not_there(student, project):
    cfg = student()
    entry = dict(cfg.DISTILL.TEACHERS[0])
    with pytest.raises(FileNotFoundError, match=r"DISTILL.TEACHERS: no checkpoint absent.pth"):
        load_teacher({**entry, "WEIGHTS": "absent.pth"}, cfg)
    with pytest.raises(FileNotFoundError, match=r"no config file absent.yaml"):
        load_teacher({**entry, "CONFIG": "absent.yaml"}, cfg)


def test_teacher_of_the_other_channel_order(student):
    cfg = student(INPUT__FORMAT="RGB", DISTILL__INIT_STUDENT="neck_and_head")
    entry = dict(cfg.DISTILL.TEACHERS[0])
    assert load_teacher(entry, cfg).reverse_channels
    assert not load_teacher(entry, student()).reverse_channels
    with pytest.raises(ValueError, match=r"INPUT.FORMAT is RGB for .* BGR for .*INIT_STUDENT full copies"):
        load_teacher(entry, student(INPUT__FORMAT="RGB", DISTILL__INIT_STUDENT="full"))
    with pytest.raises(ValueError, match=r"INPUT.FORMAT is L for the student and BGR for the teacher"):
        load_teacher(entry, student(INPUT__FORMAT="L", DISTILL__INIT_STUDENT="none"))


def test_only_the_teacher_that_initialises_needs_the_channel_order(student):
    first = dict(student().DISTILL.TEACHERS[0], NAME="first")
    second = dict(first, NAME="second")
    cfg = student(INPUT__FORMAT="RGB", DISTILL__INIT_STUDENT="full", DISTILL__TEACHERS=[first, second])
    assert load_teacher(second, cfg).reverse_channels
    mean = {"NAME": "mean", "MEAN_OF": ["first", "second"]}  # initialises nothing
    cfg.DISTILL.TEACHERS = [mean, first, second]
    with pytest.raises(ValueError, match=r"INIT_STUDENT full copies"):
        load_teacher(first, cfg)


def test_teacher_checkpoint_must_be_complete(student, project, teacher_weights, tmp_path):
    cfg = student()
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


def test_weights_that_fit_nothing_stop_a_run(student, teacher_weights, tmp_path):
    torch.save({"model": {"layer.weight": torch.zeros(2, 2)}}, tmp_path / "odd.pth")
    run = DistillTrainer(student("fcos", MODEL__WEIGHTS=str(tmp_path / "odd.pth")))
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
def test_empty_data_set_is_named(student, project, tmp_path, emptied):
    name = "nothing_" + "_".join(emptied)
    entry = annotate(project, tmp_path, name, lambda content: [content[key].clear() for key in emptied])
    with pytest.raises((ValueError, AssertionError), match=name):
        DistillTrainer(student("fcos", DATASETS__REGISTER=[entry], DATASETS__TRAIN=(name,)))


class Poison(HookBase):
    """Makes the weights useless before iteration ``at``."""

    def __init__(self, at):
        self.at = at

    def before_step(self):
        if self.trainer.iter == self.at:
            self.trainer.distiller.student.head.cls_score.bias.data.fill_(float("nan"))


def test_nan_loss_stops_the_run_and_names_the_iteration(student):
    cfg = student()
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


def test_unreadable_images_are_skipped_counted_and_logged(student, project, tmp_path, caplog):
    images = tmp_path / "images"
    shutil.copytree(project / "data" / "images", images)
    broken = images / "train_000002.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    entry = {"NAME": "broken", "JSON": str(project / "data" / "annotations_train.json"), "IMAGES": str(images)}
    cfg = student("fcos", DATASETS__REGISTER=[entry], DATASETS__TRAIN=("broken",))
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


def test_a_learning_rate_that_is_far_too_high_is_named(student):
    """Whatever engine and loss say of it: assertions on boxes, scores that are not finite."""
    run = DistillTrainer(student("fcos", SOLVER__BASE_LR=1e8, SOLVER__WARMUP_ITERS=0, SOLVER__MAX_ITER=30,
                                 SOLVER__CLIP_GRADIENTS__ENABLED=False))  # fmt: skip
    run.resume_or_load(False)
    with pytest.raises(FloatingPointError, match=r"not finite at iteration \d+ \(.*lower SOLVER.BASE_LR .now 1e\+08"):
        run.train()


@pytest.mark.parametrize("error", [ValueError("wrong shape"), AssertionError("bad box: x1 larger than x2")])
def test_other_errors_of_a_step_are_left_alone(student, error):
    run = DistillTrainer(student("fcos"))

    def fail(inputs):
        raise error

    run.model.forward = fail
    expected = FloatingPointError if "bad box" in str(error) else ValueError
    with pytest.raises(expected, match="not finite" if "bad box" in str(error) else "^wrong shape$"):
        run.train()


def test_what_the_loader_raises_is_no_divergence_and_keeps_its_cause(student):
    run = DistillTrainer(student("fcos"))

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


def test_nan_in_a_checkpoint_is_named(student, project, teacher_weights, tmp_path):
    weights = torch.load(teacher_weights["teacher"], weights_only=True)["model"]
    name = "detector.backbone.fpn_lateral3.weight"
    weights[name] = weights[name].clone()
    weights[name].view(-1)[3] = float("nan")
    torch.save({"model": weights}, tmp_path / "nan.pth")
    cfg = student()
    entry = {"CONFIG": str(project / "teacher.yaml"), "WEIGHTS": str(tmp_path / "nan.pth")}
    with pytest.raises(ValueError, match=rf"DISTILL.TEACHERS: .*nan.pth has NaN or infinity in {name}"):
        load_teacher(entry, cfg)
    with pytest.raises(ValueError, match=rf"nan.pth has NaN or infinity in {name}"):
        load_model(load_config(project / "teacher.yaml"), str(tmp_path / "nan.pth"))


def test_a_checkpoint_with_gaps_is_not_evaluated(student, tmp_path):
    cfg = student("fcos")
    weights = DistillTrainer.build_model(cfg).state_dict()
    torch.save({"model": weights}, tmp_path / "whole.pth")
    load_model(cfg, str(tmp_path / "whole.pth"))
    weights.pop("backbone.fpn_lateral3.weight")
    torch.save({"model": weights}, tmp_path / "gap.pth")
    with pytest.raises(ValueError, match=r"gap.pth is not a checkpoint of this config: 1 tensors .*fpn_lateral3"):
        load_model(cfg, str(tmp_path / "gap.pth"))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint nowhere.pth"):
        load_model(cfg, "nowhere.pth")


def test_missing_weights_stop_training(student):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint nowhere.pth"):
        DistillTrainer(student("fcos", MODEL__WEIGHTS="nowhere.pth")).resume_or_load(False)


def test_a_teacher_starts_from_a_plain_detector(student, project, tmp_path, caplog):
    torch.manual_seed(5)
    plain = DistillTrainer.build_model(student("fcos")).state_dict()
    torch.save({"model": plain}, tmp_path / "plain.pth")
    run = DistillTrainer(student("teacher", MODEL__WEIGHTS=str(tmp_path / "plain.pth")))
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


def test_nothing_is_said_of_a_missing_checkpoint_where_none_is_asked_for(student, caplog):
    run = DistillTrainer(student())
    run.checkpointer.logger.propagate = True
    with caplog.at_level(logging.INFO):
        run.resume_or_load(False)
    assert "No checkpoint" not in caplog.text and "from scratch" not in caplog.text
