"""ScaleKD in two gloo processes on the CPU: the gradients of student, losses and assistant."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from runs import in_two_processes, on_cpu
from test_scalekd import SCALEKD, scalekd

from msad.distill.teachers import FrozenTeacher
from msad.engine import DistillTrainer
from msad.engine.build import build_distiller

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="detectron2 would use the GPUs")
PARTS = {"student", "losses", "assistant"}


def gradients_of(distiller, batch):
    """By name, after a step on ``batch``; the first part of a name is one of PARTS."""
    model = on_cpu(distiller, broadcast_buffers=False)
    torch.manual_seed(5)  # of the sampling of anchors and proposals
    with EventStorage(0):
        sum(model(batch).values()).backward()
    (step,) = distiller.assistants
    parts = {"student": distiller.student, "losses": distiller.losses, "assistant": step.assistant}
    named = [(f"{part}.{k}", p.grad) for part, module in parts.items() for k, p in module.named_parameters()]
    return {name: grad.clone() for name, grad in named if grad is not None}


def gradients_of_fcos(batch, project, weights, folder):
    cfg = scalekd(project, {"teacher": weights}, folder / f"run{comm.get_rank()}", **{"DISTILL.WARMUP_ITERS": 0})
    cfg.MODEL.RESNETS.NORM = "FrozenBN"
    torch.manual_seed(3)
    distiller = DistillTrainer.build_model(cfg).train()
    # FCOS divides by a running mean of positives of a process.
    distiller.student.loss_normalizer = 8.0 if comm.get_world_size() > 1 else 16.0
    return gradients_of(distiller, batch)


def test_two_processes_are_one_with_the_joint_batch(project, teacher_weights, tmp_path, make_batch):
    batch = make_batch([(64, 64)] * 2)
    batch[1]["instances"] = batch[0]["instances"]  # equal counts of positives, by which each process divides
    args = project, teacher_weights["teacher"], tmp_path
    first, second = in_two_processes(gradients_of_fcos, tmp_path, batch, *args)
    joint = gradients_of_fcos(batch, *args)
    assert first.keys() == joint.keys() and {name.split(".")[0] for name in joint} == PARTS
    for name, grad in joint.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], grad, rtol=1e-3, atol=1e-5 * grad.abs().max().item() + 1e-9, msg=name)


def gradients_of_rcnn(batch, text):
    cfg = CfgNode.load_cfg(text)
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(build_model(cfg))
    return gradients_of(build_distiller(cfg, models[0], [FrozenTeacher(models[1], scale=2.0)]).train(), batch)


def test_two_processes_with_an_rcnn_have_the_mean_gradient(tiny_cfg, tmp_path, make_batch):
    """Proposals are sampled per process, so a joint batch has others; the mean of what each has alone is exact.

    The assistant's weights stay: trained on both images, it would give targets that no process has alone.
    """
    cfg = tiny_cfg("FasterRCNN", DISTILL__STUDENT_RESOLUTION="H", DISTILL__WARMUP_ITERS=0)
    cfg.DISTILL.ASSISTANTS = [{**SCALEKD["ASSISTANTS"][0], "BASE_LR": 0.0}]
    cfg.DISTILL.LOSSES = SCALEKD["LOSSES"]
    batch = make_batch([(64, 96)] * 2, boxes=[3, 1])
    first, second = in_two_processes(gradients_of_rcnn, tmp_path, batch, cfg.dump())
    alone = [gradients_of_rcnn(batch[rank : rank + 1], cfg.dump()) for rank in range(2)]
    assert first.keys() == second.keys() == alone[0].keys() == alone[1].keys()
    assert any("roi_heads" in name for name in first) and any("proposal_generator" in name for name in first)
    for name, grad in first.items():
        assert torch.equal(grad, second[name]), name
        mean = (alone[0][name] + alone[1][name]) / 2
        torch.testing.assert_close(grad, mean, rtol=1e-4, atol=1e-6 * mean.abs().max().item() + 1e-9, msg=name)
    differing = [name for name in first if not torch.allclose(alone[0][name], alone[1][name])]
    assert {name.split(".")[0] for name in differing} == PARTS
