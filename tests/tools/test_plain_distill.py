"""tools/plain_distill.py does in plain sight what DistillTrainer does: equal losses in every iteration."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng

from msad import load_config
from msad.data import register_datasets
from msad.engine import DistillTrainer

SCRIPT = Path(__file__).parents[2] / "tools" / "plain_distill.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("plain_distill", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Terms(HookBase):
    def __init__(self):
        self.steps = []

    def after_step(self):
        latest = self.trainer.storage.latest()
        self.steps.append({k: v for k, (v, i) in latest.items() if "loss" in k and i == self.trainer.iter})
        self.steps[-1].pop("total_loss")


def test_is_readable():
    assert len(SCRIPT.read_text().splitlines()) <= 150


@pytest.mark.parametrize(("optimizer", "init"), [("SGD", "full"), ("AdamW", "full"), ("SGD", "none")])
def test_losses_are_those_of_the_trainer(tool, project, teacher_weights, tmp_path, optimizer, init):
    """With "none" the student starts from MODEL.WEIGHTS, which differ from its random ones."""
    cfg = load_config(project / "student.yaml")
    cfg.DISTILL.TEACHERS[0]["WEIGHTS"] = teacher_weights["teacher"]
    losses = [{"NAME": "AlignedL1", "WEIGHT": 0.6}, {"NAME": "MGD"}, {"NAME": "FitNet", "ADAPTOR": "always"}]
    cfg.merge_from_list(["DISTILL.LOSSES", losses, "OUTPUT_DIR", str(tmp_path), "SOLVER.OPTIMIZER", optimizer])
    cfg.merge_from_list(["SOLVER.MAX_ITER", 4, "DISTILL.WARMUP_ITERS", 2, "DISTILL.W_DET", 0.7])
    cfg.DISTILL.INIT_STUDENT = init
    if init == "none":
        torch.manual_seed(11)
        torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "pretrained.pth")
        cfg.MODEL.WEIGHTS = str(tmp_path / "pretrained.pth")
    register_datasets(cfg)
    trainer, terms = DistillTrainer(cfg), Terms()
    trainer.resume_or_load(False)
    trainer.register_hooks([terms])
    trainer.train()

    seed_all_rng(cfg.SEED)
    student = build_model(cfg)
    plain = [{name: value.item() for name, value in step.items()} for step in tool.distill(cfg, student)]
    assert len(plain) == 4 and {"loss_distill/AlignedL1", "loss_distill/MGD"} < plain[0].keys()
    for ours, theirs in zip(plain, terms.steps, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    assert plain[3]["loss_distill/AlignedL1"] > 0
    trained = trainer.distiller.student.state_dict()
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, trained[name], msg=name)


def test_command_line(tool, project, teacher_weights, tmp_path, monkeypatch, capsys):
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["plain_distill.py", *map(str, args)])
        return tool.main()

    teachers = [{"CONFIG": "teacher.yaml", "WEIGHTS": teacher_weights["teacher"]}]
    opts = ["DISTILL.TEACHERS", teachers, "SOLVER.MAX_ITER", 1]
    assert call(project / "student.yaml", "--output", tmp_path, *opts) == 0
    weights = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    assert weights.keys() == build_model(load_config(project / "student.yaml")).state_dict().keys()
    assert call(project / "fcos.yaml") == 2
    assert "needs one DISTILL.TEACHERS entry" in capsys.readouterr().err
    for message, change in {
        "fusion students": ["MODEL.META_ARCHITECTURE", "FusionStudent"],
        "no head predictions (DISTILL.LOSSES: Chen)": ["DISTILL.LOSSES", [{"NAME": "CWD"}, {"NAME": "Chen"}]],
        "by_index": ["DISTILL.LOSSES", [{"NAME": "CWD", "MATCH": "by_index"}]],
        "SOLVER.AMP": ["SOLVER.AMP.ENABLED", True],
        "BALANCE": ["DISTILL.BALANCE.RATIO", 0.5],
    }.items():
        assert call(project / "student.yaml", *opts, *change) == 2
        assert message in capsys.readouterr().err
