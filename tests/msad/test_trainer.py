"""DistillTrainer: what it builds, what it leaves alone, and what it evaluates."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, build_detection_train_loader
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from runs import assert_equal_weights, config, left_by_a_killed_run, train
from torch import nn

from msad import load_config
from msad.distill.losses import DISTILL_LOSS_REGISTRY
from msad.engine import DistillTrainer, trainer
from msad.engine.gates import GateLogger
from msad.engine.setup import evaluate_branches, load_model

# --- what is built ------------------------------------------------------------------------------------------------


def test_checkpoint_and_optimizer_hold_the_student_alone(student_config, project):
    cfg = student_config()
    run, _, _ = train(cfg)
    alone = build_model(load_config(project / "student.yaml"))
    saved = torch.load(Path(cfg.OUTPUT_DIR) / "model_final.pth", weights_only=True)
    assert saved["model"].keys() == alone.state_dict().keys()
    assert set(saved) == {"model", "trainer", "iteration"}
    optimized = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in run.distiller.student.parameters() if p.requires_grad}


@pytest.mark.parametrize("batch_norm", ["eval", "batch"])
def test_teacher_does_not_change_in_training(student_config, batch_norm):
    run = DistillTrainer(student_config(DISTILL__TEACHER_BN=batch_norm))
    run.resume_or_load(False)
    model = run.distiller.teacher.model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run.train()
    assert_equal_weights(model.state_dict(), before)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    modes = {m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert modes == {batch_norm == "batch"} and not model.training


def test_student_without_losses_is_only_initialised_from_the_teacher(student_config):
    run, trace, before = train(student_config(DISTILL__LOSSES=[]))
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


def test_parameters_of_losses_are_trained_saved_and_resumed(student_config, monkeypatch, tmp_path):
    monkeypatch.setitem(DISTILL_LOSS_REGISTRY._obj_map, "Weighted", Weighted)
    losses = [{"NAME": "Weighted", "WEIGHT": 0.5}]
    whole, expected, _ = train(student_config(DISTILL__LOSSES=losses))
    assert whole.distiller.losses[0].loss.scale.ne(1).all()

    cfg = student_config(DISTILL__LOSSES=losses, OUTPUT_DIR=str(tmp_path / "killed"))
    left_by_a_killed_run(tmp_path / "run", tmp_path / "killed")
    again, resumed, _ = train(cfg, resume=True)
    assert resumed.steps == expected.steps[3:]
    assert torch.equal(again.distiller.losses[0].loss.scale, whole.distiller.losses[0].loss.scale)


def test_optimizers(student_config):
    def groups(optimizer):
        named = {id(p): n for n, p in model.named_parameters()}
        return {named[id(p)]: g for g in optimizer.param_groups for p in g["params"]}

    cfg = student_config("fcos", SOLVER__WEIGHT_DECAY=0.3, SOLVER__WEIGHT_DECAY_NORM=0.1, SOLVER__BASE_LR=0.01)
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


def test_reading_sets_the_weights(student_config):
    cfg = trainer.apply_weighting(student_config(DISTILL__WEIGHTING="convex", DISTILL__LAMBDA=0.3, DISTILL__GAMMA=0.8))
    assert (cfg.MSAD.W_FUSE, cfg.DISTILL.W_DET) == (0.3, 0.8)
    assert [{"NAME": "AlignedL1", "WEIGHT": pytest.approx(0.6)}] == cfg.DISTILL.LOSSES
    cfg = student_config()
    assert trainer.apply_weighting(cfg) is cfg


# --- evaluation ---------------------------------------------------------------------------------------------------


def test_evaluator_takes_the_sigmas_of_the_data_set(student_config, monkeypatch):
    seen = []

    def init(self, *args, kpt_oks_sigmas=(), **kwargs):
        seen.append(list(kpt_oks_sigmas))
        monkeypatch.undo()
        self.__init__(*args, kpt_oks_sigmas=kpt_oks_sigmas, **kwargs)

    cfg = student_config()
    DatasetCatalog.get("tiny_val")  # as the test loader does before the evaluator is built
    own = MetadataCatalog.get("tiny_val").keypoint_oks_sigmas
    assert len(own) > 2
    monkeypatch.setattr(COCOEvaluator, "__init__", init)
    DistillTrainer.build_evaluator(cfg, "tiny_val")
    monkeypatch.setattr(COCOEvaluator, "__init__", init)
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.5] * len(own)
    DistillTrainer.build_evaluator(cfg, "tiny_val")
    assert seen == [own, [0.5] * len(own)]


def test_branches_of_a_teacher_are_evaluated_and_the_choice_is_kept(student_config, teacher_weights):
    cfg = student_config("teacher", MSAD__EVAL_BRANCH="L")
    model = load_model(cfg, teacher_weights["teacher"])
    results = evaluate_branches(cfg, model)
    assert list(results) == ["fused", "H", "L"] and all("AP" in r["bbox"] for r in results.values())
    assert model.eval_branch == "L" and not model.training
    with pytest.raises(ValueError, match=r"MSAD.EVAL_BRANCH 'EL' is not one of .*'fused', 'H', 'L'"):
        model.set_eval_branch("EL")


@pytest.mark.parametrize(("name", "resolutions"), [("teacher", "HL"), ("teacher", "H"), ("student", "HL")])
def test_gates_of_teachers_with_several_branches_are_looked_at(project, teacher_weights, tmp_path, name, resolutions):
    options = {"MSAD.RESOLUTIONS": [*resolutions]}
    run = DistillTrainer(config(project, teacher_weights, name, tmp_path / "run", **options))
    looked = [hook.fusion for hook in run._hooks if isinstance(hook, GateLogger)]
    assert looked == ([run.model.fusion] if (name, resolutions) == ("teacher", "HL") else [])


def test_nothing_is_evaluated_without_weights(student_config):
    with pytest.raises(ValueError, match=r"MODEL.WEIGHTS is empty"):
        load_model(student_config())


# --- subclasses ---------------------------------------------------------------------------------------------------


class OwnLoader(DistillTrainer):
    """With the loader of detectron2's tutorial, which knows nothing of seeds, iterations and skipped images."""

    @classmethod
    def build_train_loader(cls, cfg):
        return build_detection_train_loader(cfg, mapper=DatasetMapper(cfg, is_train=True))


def test_a_loader_of_ones_own_trains_and_is_resumed(student_config, caplog):
    cfg = student_config(SOLVER__CHECKPOINT_PERIOD=1, SOLVER__MAX_ITER=2)
    with caplog.at_level(logging.WARNING, "msad"):
        first = OwnLoader(cfg)
    assert caplog.text.count("OwnLoader.build_train_loader makes a ") == 1
    assert "a resumed run sees other images than an uninterrupted one" in caplog.text
    first.resume_or_load(False)
    first.train()
    assert not {"seed", "start_iter"} & vars(first._trainer.data_loader).keys(), "nothing is set that nobody reads"
    cfg.SOLVER.MAX_ITER = 3
    again = OwnLoader(cfg)
    again.resume_or_load(True)
    assert again.start_iter == 2
    again.train()
    assert again.iter == 3
