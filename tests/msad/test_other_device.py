"""Training and detection on a device that is not the CPU: no tensors of two devices meet, and nothing changes.

``other_device`` stands for a GPU: what runs here needs none, and is checked by ``Tensor``, which refuses mixtures.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from other_device import OTHER, Tensor, other_device
from test_every_detector import DENSE, RCNN, fit_code, losses_of, merged, model_keys, run, student_keys, write
from test_loss_properties import ALL, OPTIONS
from test_scalekd import SCALEKD
from test_segmentation_distill import CONFIG as SEGMENTOR
from test_segmentation_distill import batch as labelled_images

from msad import load_config
from msad.distill.teachers import FrozenTeacher
from msad.engine.build import build_distiller
from msad.engine.setup import evaluate, load_model


def on(device: str):
    return other_device() if device == OTHER else contextlib.nullcontext()


def test_the_other_device_refuses_what_a_gpu_refuses():
    with other_device():
        x, here = torch.arange(6.0, device=OTHER).view(2, 3), torch.ones(2, 3)
        assert isinstance(x, Tensor) and x.device.type == OTHER and (x + here.to(OTHER)).tolist()[1] == [4, 5, 6]
        for mix in (lambda: x + here, lambda: torch.cat((x, here)), lambda: here[x > 1], lambda: here.add_(x)):
            with pytest.raises(RuntimeError, match="of the CPU"):
                mix()
        for numpy in (x.numpy, lambda: np.asarray(x)):
            with pytest.raises(TypeError, match="NumPy reads the CPU's memory"):
                numpy()
        assert (x[here > 0] * torch.tensor(2.0)).sum().item() == 30  # indices and single numbers may be the CPU's
        x[:, 1] = -1  # through a view
        assert x.cpu().tolist() == [[0, -1, 2], [3, -1, 5]] and type(x.cpu()) is torch.Tensor
        assert here.copy_(x).sum() == 8


def test_the_other_device_knows_what_the_cpu_waits_for():
    with other_device() as waits:
        x = torch.arange(6.0, device=OTHER)
        x[x.argsort()] = x.relu() * 2 + torch.ones(6).to(OTHER)
        assert waits == []
        _ = x.max().item(), x.tolist(), x.cpu(), x[x > 1], (x > 1).nonzero(), bool(x.all()), torch.ones(6).copy_(x)
    assert waits == ["_local_scalar_dense", "tolist", "_to_copy", "index", "nonzero", "_local_scalar_dense", "copy_"]


@pytest.mark.parametrize("arch", [*DENSE, "MaskRCNN", "KeypointRCNN", "CascadeRCNN", "HTC"])
def test_students_train_and_detect_alike(project, tmp_path, arch):
    """Two iterations under a teacher, its training too, a checkpoint, and the evaluation of the student."""
    finest = 2 if arch in RCNN else 3
    code = fit_code(project, tmp_path) if arch == "MEInst" else {}
    inner = merged(model_keys(arch, finest), code)
    around = {"MODEL": {"META_ARCHITECTURE": "MultiScaleTeacher"}}
    around["MSAD"] = {"DETECTOR": inner["MODEL"]["META_ARCHITECTURE"]}

    def losses_and_results(device: str):
        teacher = write(project, tmp_path, "teacher", merged(inner, around))
        student = write(project, tmp_path, "student", merged(student_keys(arch, "L", finest), code, {
            "DISTILL": {
                "TEACHERS": [{"CONFIG": "teacher.yaml", "WEIGHTS": str(tmp_path / device / "teacher/model_final.pth")}],
                "LOSSES": [{"NAME": "AlignedL1", "WEIGHT": 0.6}], "WARMUP_ITERS": 0,
            },
        }))  # fmt: skip
        losses = []
        for name, cfg in (("teacher", teacher), ("student", student)):
            folder = tmp_path / device / name
            cfg.MODEL.DEVICE, cfg.DATASETS.TEST, cfg.OUTPUT_DIR = device, (), str(folder)
            run(cfg, 2, resume=False)
            losses += [{k: v for k, v in line.items() if "loss" in k} for line in losses_of(folder)]
        student.DATASETS.TEST = ("tiny_val",)
        return losses, evaluate(student, load_model(student, f"{student.OUTPUT_DIR}/model_final.pth"))

    with on(OTHER):
        there = losses_and_results(OTHER)
    here = losses_and_results("cpu")
    assert len(here[0]) == 2 and there[0] == here[0]  # of the second iteration
    np.testing.assert_equal(there[1], here[1])  # NaN where a size has no objects


def two_steps(device: str, make, batch) -> list[dict[str, float]]:
    with on(device):
        model, losses = make(device), []
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3, momentum=0.9)
        for iteration in range(2):
            torch.manual_seed(iteration)  # of the masks that losses draw
            with EventStorage(iteration):
                found = model.train()(batch())
            optimizer.zero_grad()
            sum(found.values()).backward()
            optimizer.step()
            losses.append({k: v.item() for k, v in found.items()})
        return losses


FEATURES = [{"NAME": name, **OPTIONS.get(name, {})} for name in ALL if name != "SDF"]
AT_H = {"DISTILL__STUDENT_RESOLUTION": "H"}
LOSSES = {
    "features": ("FCOS", {}, FEATURES, []),
    "heads": ("GFL", {}, [{"NAME": "LD"}, {"NAME": "Chen"}], []),
    "two stages": ("FasterRCNN", {}, [{"NAME": "Chen"}], []),
    "balanced": ("FCOS", {"DISTILL__BALANCE__RATIO": 0.5}, [{"NAME": "AlignedL1"}, {"NAME": "PKD"}], []),
    "ScaleKD": ("RetinaNet", AT_H, SCALEKD["LOSSES"], SCALEKD["ASSISTANTS"]),
    "ScaleKD, two stages": ("CascadeMask", AT_H, SCALEKD["LOSSES"], SCALEKD["ASSISTANTS"]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_assistants(tiny_cfg, tiny_model, make_batch, name):
    arch, options, losses, assistants = LOSSES[name]

    def make(device: str):
        finest = 1 if arch == "FasterRCNN" else 2
        levels = None if options is AT_H else range(finest, finest + 5)
        cfg = tiny_cfg(arch, levels, MODEL__DEVICE=device, DISTILL__WARMUP_ITERS=0, **options)
        cfg.DISTILL.LOSSES, cfg.DISTILL.ASSISTANTS = losses, assistants
        student = tiny_model(arch, levels, MODEL__DEVICE=device)
        teacher = tiny_model(arch, seed=1, MODEL__DEVICE=device)
        return build_distiller(cfg, student, [FrozenTeacher(teacher, scale=2.0 if assistants else 1.0)])

    def batch():
        return make_batch([(64, 96), (50, 70)])

    there, here = two_steps(OTHER, make, batch), two_steps("cpu", make, batch)
    assert sum("distill" in key for key in here[1]) >= len(losses)
    if assistants:  # their optimizer is fused on the CPU alone, and attention has other kernels
        here = [pytest.approx(losses, rel=1e-5) for losses in here]
    assert there == here


def test_feature_losses_never_wait_for_the_device(tiny_cfg, tiny_model, make_batch):
    """What the CPU waits for in a step is what it waits for without distillation."""
    with other_device() as waits:
        found = []
        for losses in ([], FEATURES):
            cfg = tiny_cfg("FCOS", range(2, 7), MODEL__DEVICE=OTHER, DISTILL__WARMUP_ITERS=0)
            cfg.DISTILL.LOSSES = losses
            student, teacher = tiny_model("FCOS", range(2, 7), MODEL__DEVICE=OTHER), tiny_model(MODEL__DEVICE=OTHER)
            model = build_distiller(cfg, student, [FrozenTeacher(teacher)] if losses else []).train()
            for _ in range(2):  # the second step: what is made once is made
                waits.clear()
                with EventStorage(0):
                    terms = model(make_batch([(64, 96), (50, 70)]))
                sum(terms.values()).backward()
            found.append(list(waits))
            assert any("distill" in key for key in terms) == bool(losses)
    assert found[0] and found[0] == found[1]


def test_segmentors():
    def make(device: str):
        def build(seed: int):
            cfg = load_config(SEGMENTOR)
            cfg.MODEL.DEVICE = device
            cfg.MODEL.RESNETS.update(NORM="BN", STEM_OUT_CHANNELS=16, RES2_OUT_CHANNELS=16)
            cfg.MODEL.SEM_SEG_HEAD.update(NORM="BN", NUM_CLASSES=3, CONVS_DIM=16, DROPOUT=0.0)
            torch.manual_seed(seed)
            return cfg, build_model(cfg)

        cfg, student = build(1)
        cfg.DISTILL.STUDENT_RESOLUTION, cfg.DISTILL.WARMUP_ITERS = "L", 0
        cfg.DISTILL.LOSSES = [
            {"NAME": name, "TAP": where, "MATCH": "by_index"} for name, where in (("CWD", "scores"), ("LAD", "decoder"))
        ]
        return build_distiller(cfg, student, [FrozenTeacher(build(2)[1])])

    assert two_steps(OTHER, make, labelled_images) == two_steps("cpu", make, labelled_images)
