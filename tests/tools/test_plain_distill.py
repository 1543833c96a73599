"""tools/plain_distill.py does in plain sight what DistillTrainer does: equal losses in every iteration."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from load_tool import load_tool

from msad import load_config
from msad.data import register_datasets
from msad.engine import DistillTrainer

SCRIPT = Path(__file__).parents[2] / "tools" / "plain_distill.py"


@pytest.fixture(scope="module")
def tool():
    return load_tool("plain_distill")


@pytest.fixture(autouse=True)
def torchscript_as_written():
    """detectron2 has scripted functions, which round otherwise from their third call in a process on."""
    with torch.jit.optimized_execution(False):
        yield


class Terms(HookBase):
    def __init__(self):
        self.steps = []

    def after_step(self):
        latest = self.trainer.storage.latest()
        self.steps.append({k: v for k, (v, i) in latest.items() if "loss" in k and i == self.trainer.iter})
        self.steps[-1].pop("total_loss")


def test_is_readable():
    assert len(SCRIPT.read_text().splitlines()) <= 155


def compare_with_trainer(tool, cfg, tmp_path, monkeypatch):
    """Train both ways; assert equal losses in 4 iterations and equal students, and return the plain ones."""
    cfg.merge_from_list(["OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", 4, "DISTILL.WARMUP_ITERS", 2])
    cfg.merge_from_list(["DISTILL.W_DET", 0.7, "DISTILL.START_ITER", 1])
    register_datasets(cfg)
    trainer, terms = DistillTrainer(cfg), Terms()
    trainer.resume_or_load(False)
    trainer.register_hooks([terms])
    trainer.train()

    def refuse(*_args, **_options):
        raise AssertionError("a hook")

    seed_all_rng(cfg.SEED)
    student = build_model(cfg)
    for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook"):
        monkeypatch.setattr(torch.nn.Module, f"register_{kind}", refuse)
    plain = [{name: value.item() for name, value in step.items()} for step in tool.distill(cfg, student)]
    assert len(plain) == 4
    for ours, theirs in zip(plain, terms.steps, strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-5, abs=1e-7)
        assert not any(ours[name] for name in ours.keys() - theirs)  # of factor 0, which the trainer leaves out
    trained = trainer.distiller.student.state_dict()
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, trained[name], msg=name)
    return plain


@pytest.mark.parametrize(("optimizer", "init"), [("SGD", "full"), ("AdamW", "full"), ("SGD", "none")])
def test_losses_are_those_of_the_trainer(tool, project, teacher_weights, tmp_path, monkeypatch, optimizer, init):
    """With "none" the student starts from MODEL.WEIGHTS, which differ from its random ones."""
    cfg = load_config(project / "student.yaml")
    cfg.DISTILL.TEACHERS[0]["WEIGHTS"] = teacher_weights["teacher"]
    losses = [{"NAME": "AlignedL1", "WEIGHT": 0.6}, {"NAME": "MGD"}, {"NAME": "FitNet", "ADAPTATION": "always"}]
    cfg.merge_from_list(["DISTILL.LOSSES", losses, "SOLVER.OPTIMIZER", optimizer, "DISTILL.INIT_STUDENT", init])
    if init == "none":
        torch.manual_seed(11)
        torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "pretrained.pth")
        cfg.MODEL.WEIGHTS = str(tmp_path / "pretrained.pth")
    plain = compare_with_trainer(tool, cfg, tmp_path, monkeypatch)
    assert {"loss_distill/AlignedL1", "loss_distill/MGD"} < plain[0].keys()
    assert plain[3]["loss_distill/AlignedL1"] > 0


RCNN = """
_BASE_: {project}/fcos.yaml
MODEL:
  META_ARCHITECTURE: GeneralizedRCNN
  FPN: {{LEVELS: [p2, p3, p4, p5, p6], TOP_BLOCK: maxpool}}
  ANCHOR_GENERATOR: {{SIZES: [[8], [16], [32], [64], [128]]}}
  RPN: {{IN_FEATURES: [p2, p3, p4, p5, p6], BATCH_SIZE_PER_IMAGE: 64, POST_NMS_TOPK_TRAIN: 100}}
  ROI_HEADS:
    {{NAME: StandardROIHeads, IN_FEATURES: [p2, p3, p4, p5], NUM_CLASSES: 6, BATCH_SIZE_PER_IMAGE: 16}}
  ROI_BOX_HEAD: {{NAME: FastRCNNConvFCHead, NUM_FC: 1, FC_DIM: 16, POOLER_RESOLUTION: 3}}
DISTILL: {{STUDENT_RESOLUTION: H}}
"""


def test_losses_of_an_rcnn_are_those_of_the_trainer(tool, project, tmp_path, monkeypatch):
    """Anchors and proposals are drawn alike."""
    (tmp_path / "rcnn.yaml").write_text(RCNN.format(project=project))
    cfg = load_config(tmp_path / "rcnn.yaml")
    torch.manual_seed(12)
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "teacher.pth")
    cfg.DISTILL.TEACHERS = [{"CONFIG": str(tmp_path / "rcnn.yaml"), "WEIGHTS": str(tmp_path / "teacher.pth")}]
    cfg.merge_from_list(["DISTILL.LOSSES", [{"NAME": "AlignedL1"}, {"NAME": "FKD"}]])
    plain = compare_with_trainer(tool, cfg, tmp_path, monkeypatch)
    assert {"loss_rpn_cls", "loss_box_reg", "loss_distill/AlignedL1", "loss_distill/FKD/relation"} < plain[0].keys()
    assert plain[3]["loss_distill/AlignedL1"] > 0


def test_command_line(tool, project, teacher_weights, tmp_path, monkeypatch, capsys):
    def call(*args):
        return tool.main(list(map(str, args)))

    teachers = [{"CONFIG": "teacher.yaml", "WEIGHTS": teacher_weights["teacher"]}]
    opts = ["DISTILL.TEACHERS", teachers, "SOLVER.MAX_ITER", 1]
    assert call(project / "student.yaml", "--output", tmp_path, *opts) == 0
    weights = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    assert weights.keys() == build_model(load_config(project / "student.yaml")).state_dict().keys()
    capsys.readouterr()
    for _ in range(2):  # without a seed, each run draws one
        assert call(project / "student.yaml", "--output", tmp_path, *opts, "SEED", -1) == 0
    drawn = re.findall(r"SEED is not set; this run uses (\d+)\n", capsys.readouterr().out)
    assert len(drawn) == len(set(drawn)) == 2
    assert call(project / "fcos.yaml") == 2
    assert "needs one DISTILL.TEACHERS entry" in capsys.readouterr().err
    for message, change in {
        "fusion students": ["MODEL.META_ARCHITECTURE", "FusionStudent"],
        "no head predictions, as Chen does": ["DISTILL.LOSSES", [{"NAME": "CWD"}, {"NAME": "Chen"}]],
        "knows no MATCH: by_index, as CWD has": ["DISTILL.LOSSES", [{"NAME": "CWD", "MATCH": "by_index"}]],
        "knows no SCALE: 2.0, as teacher has": ["DISTILL.TEACHERS", [{**teachers[0], "SCALE": 2.0}]],
        "did you mean AlignedL1?": ["DISTILL.LOSSES", [{"NAME": "AlignedL2", "MATCH": "by_stride", "TAP": "neck"}]],
        "SOLVER.AMP": ["SOLVER.AMP.ENABLED", True],
        "BALANCE": ["DISTILL.BALANCE.RATIO", 0.5],
        "no ignored regions": [
            "DATASETS.REGISTER", [{"NAME": "drone", "TYPE": "visdrone", "IMAGES": "i", "ANNOTATIONS": "a"}],
            "DATASETS.TRAIN", ("drone",),
        ],
    }.items():
        assert call(project / "student.yaml", *opts, *change) == 2
        assert message in capsys.readouterr().err
