"""Two gloo processes on CPU: distilled segmentors get the gradients of one process with the joint batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.engine import create_ddp_model, launch
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from msad import load_config
from msad.distill.teachers import FrozenTeacher
from msad.engine.build import build_distiller

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="detectron2 would use the GPUs")

CONFIG = Path(__file__).parents[2] / "configs" / "Segmentation" / "pspnet_R_18_voc.yaml"


def segmentor(width: int, seed: int):
    cfg = load_config(CONFIG)
    cfg.MODEL.DEVICE = "cpu"
    # Statistics of a batch would be those of a process.
    cfg.MODEL.RESNETS.update(NORM="FrozenBN", STEM_OUT_CHANNELS=8, RES2_OUT_CHANNELS=width)
    cfg.MODEL.SEM_SEG_HEAD.update(NORM="", NUM_CLASSES=3, CONVS_DIM=width, DROPOUT=0.0)
    torch.manual_seed(seed)
    return cfg, build_model(cfg)


def images() -> list[dict]:
    """Two images of different content, of which equally many pixels are labelled."""
    g = torch.Generator().manual_seed(5)
    made = []
    for _ in range(2):
        labels = torch.randint(0, 3, (64, 48), generator=g)
        labels[:10] = 255
        made.append({"image": torch.rand(3, 64, 48, generator=g) * 255, "sem_seg": labels})
    return made


def gradients(batch: list[dict]) -> dict[str, torch.Tensor]:
    """Of the student and of the losses, in the second of two steps: an unused parameter is an error there."""
    cfg, student = segmentor(8, 1)
    cfg.DISTILL.STUDENT_RESOLUTION, cfg.DISTILL.WARMUP_ITERS = "L", 0
    cfg.DISTILL.LOSSES = [
        {"NAME": "LAD", "TAP": "bottom_up", "MATCH": "by_index"},
        {"NAME": "NaiveL2", "TAP": "decoder", "MATCH": "by_index"},
        {"NAME": "CWD", "TAP": "scores", "MATCH": "by_index"},
    ]  # fmt: skip
    distiller = build_distiller(cfg, student, [FrozenTeacher(segmentor(12, 2)[1])]).train()
    model = create_ddp_model(distiller, device_ids=None, broadcast_buffers=False)
    for _ in range(2):
        model.zero_grad()
        with EventStorage():
            sum(model(batch).values()).backward()
    return {name: p.grad.clone() for name, p in distiller.named_parameters() if p.requires_grad}


def work(output: Path) -> None:
    """What each process does; leaves its gradients in ``output``."""
    torch.set_num_threads(1)
    rank = comm.get_rank()
    torch.save(gradients(images()[rank : rank + 1]), output / f"{rank}.pth")


def test_two_processes_have_the_gradients_of_the_joint_batch(tmp_path):
    launch(work, 2, dist_url="auto", args=(tmp_path,))
    first, second = (torch.load(tmp_path / f"{rank}.pth") for rank in range(2))
    joint = gradients(images())
    assert first.keys() == second.keys() == joint.keys()
    assert {name.split(".")[0] for name in joint} == {"student", "losses"}
    for name, wanted in joint.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()), msg=name)
    assert sum(value.abs().max() > 0 for value in joint.values()) > 0.9 * len(joint)
