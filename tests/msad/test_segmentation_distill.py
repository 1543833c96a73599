"""Segmentors as teachers and students: backbone, decoder and scores, at full and at half resolution."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from msad import load_config
from msad.distill.context import DistillContext
from msad.distill.teachers import FrozenTeacher
from msad.engine.build import build_distiller
from msad.engine.hooks import FeatureAnalysis
from msad.modeling.taps import tap
from msad.resolution import downsample_batch, downsample_labels

CONFIG = Path(__file__).parents[2] / "configs" / "Segmentation" / "pspnet_R_18_voc.yaml"


def segmentor(width, seed):
    cfg = load_config(CONFIG)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.update(NORM="BN", STEM_OUT_CHANNELS=16, RES2_OUT_CHANNELS=width)
    cfg.MODEL.SEM_SEG_HEAD.update(NORM="BN", NUM_CLASSES=3, CONVS_DIM=width, DROPOUT=0.0)
    torch.manual_seed(seed)
    return cfg, build_model(cfg)


def batch():
    g = torch.Generator().manual_seed(5)
    return [
        {"image": torch.randint(0, 255, (3, h, w), generator=g), "sem_seg": torch.randint(0, 3, (h, w), generator=g)}
        for h, w in ((64, 96), (50, 70))
    ]


def distiller(losses, resolution="H"):
    cfg, student = segmentor(16, 1)
    teacher = segmentor(24, 2)[1]
    cfg.DISTILL.STUDENT_RESOLUTION, cfg.DISTILL.LOSSES, cfg.DISTILL.WARMUP_ITERS = resolution, losses, 0
    return build_distiller(cfg, student, [FrozenTeacher(teacher)]), student, teacher


def step(model, inputs):
    with EventStorage(0):
        return model(inputs)


class TestLabels:
    def test_middle_of_each_block(self):
        labels = torch.arange(20).view(4, 5)
        assert downsample_labels(labels, 1).tolist() == [[6, 8, 9], [16, 18, 19]]  # the odd column repeats its last
        assert downsample_labels(labels, 2).tolist() == [[12, 14]]
        assert downsample_labels(labels, 0) is labels

    def test_labels_go_with_their_images(self):
        for item, small in zip(batch(), downsample_batch(batch(), 1, "cpu")):
            assert small["sem_seg"].shape == small["image"].shape[1:]
            assert torch.equal(small["sem_seg"], item["sem_seg"][1::2, 1::2])


def test_every_loss_at_every_tap():
    losses = [
        {"NAME": name, "TAP": tap, "WEIGHT": 1.0, "ADAPTATION_NORM": "BN"}
        for name in ("NaiveL2", "MagnitudeMD", "LAD", "PAD", "CAD", "CWD")
        for tap in ("bottom_up", "decoder")
    ] + [{"NAME": "CWD", "TAP": "scores", "TAU": 4.0, "WEIGHT": 3.0}]  # fmt: skip
    model, student, teacher = distiller(losses)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    found = step(model, batch())
    assert sum(name.startswith("loss_distill") for name in found) == len(losses) and {"loss_sem_seg"} < set(found)
    assert all(torch.isfinite(loss) and loss > 0 for loss in found.values())
    sum(found.values()).backward()
    assert [n for n, p in student.named_parameters() if p.grad is None] == []
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any("teacher" in name for name in model.state_dict())


def padded(model, images):
    pixels = [(x - model.pixel_mean) / model.pixel_std for x in images]
    h, w = (-(-max(x.shape[i] for x in pixels) // 16) * 16 for i in (1, 2))
    return torch.stack([F.pad(x, (0, w - x.shape[2], 0, h - x.shape[1])) for x in pixels])


@pytest.mark.parametrize("tap", ["bottom_up", "scores"])
def test_value_is_that_of_the_maps(tap):
    options = {"LEVELS": ["res5"]} if tap == "bottom_up" else {}
    model, student, teacher = distiller([{"NAME": "CWD", "TAP": tap, "WEIGHT": 2.0, **options}])
    found = step(model, batch())["loss_distill/CWD"]
    x = padded(student, [item["image"] for item in batch()])
    with torch.no_grad():
        student.train()
        s, t = student.backbone(x), teacher.backbone(x)
        if tap == "bottom_up":
            s, t = model.losses[0].adaptation["res5"](s["res5"]), t["res5"]
        else:
            s, t = student.sem_seg_head.layers(s), teacher.sem_seg_head.layers(t)
        log_s, log_t = (y.flatten(2).log_softmax(dim=2) for y in (s, t))
    expected = 2 * (log_t.exp() * (log_t - log_s)).sum(dim=2).mean()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_weights_by_gradients():
    """DISTILL.BALANCE compares each loss with that of the labels at the maps that it reads."""
    cfg, student = segmentor(16, 1)
    cfg.DISTILL.STUDENT_RESOLUTION, cfg.DISTILL.WARMUP_ITERS, cfg.DISTILL.BALANCE.RATIO = "H", 0, 0.5
    cfg.DISTILL.LOSSES = [{"NAME": "LAD", "TAP": "decoder"}, {"NAME": "CWD", "TAP": "scores"}]
    model = build_distiller(cfg, student, [FrozenTeacher(segmentor(24, 2)[1])])
    with tap(student, {"decoder": ["decoder"], "scores": ["scores"]}) as taken:
        found = step(model, batch())
    for name, place in (("LAD", "decoder"), ("CWD", "scores")):
        (maps,) = taken[place].values()
        losses = found["loss_sem_seg"], found[f"loss_distill/{name}"]
        labels, ours = (torch.autograd.grad(loss, maps, retain_graph=True)[0].norm() for loss in losses)
        torch.testing.assert_close(ours, 0.5 * labels, rtol=1e-4, atol=0)


def test_student_at_half_resolution():
    """Maps of stride 8 at H and at L: paired by index, the student's resized to the teacher's grid."""
    losses = [{"NAME": "LAD", "TAP": "decoder"}, {"NAME": "CWD", "TAP": "scores"}]
    with pytest.raises(ValueError, match="by_index"):
        distiller(losses, "L")
    model, student, _ = distiller([dict(loss, MATCH="by_index") for loss in losses], "L")
    seen = []
    student.sem_seg_head.bottleneck.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    found = step(model, batch())
    assert seen[0] == (2, 16, 4, 6)  # of 32x48 pixels
    assert {"loss_distill/LAD", "loss_distill/CWD", "loss_sem_seg"} <= set(found)
    sum(found.values()).backward()
    assert [n for n, p in student.named_parameters() if p.grad is None] == []


def test_grids_of_both_resolutions_are_aligned():
    """Where scores are linear in the place in the image, those of the student at L are the teacher's at H.

    The middle of each location of stride 8 lies in H pixels at 4, 12, ... in the teacher and at 8, 24, ... in the
    student, whose map is resized to the former.
    """
    model, *_ = distiller([{"NAME": "NaiveL2", "TAP": "scores", "MATCH": "by_index"}], "L")

    def places(stride, h, w):
        y, x = (torch.arange(n) * stride + stride / 2 for n in (h, w))
        return (0.5 * y[:, None] + 0.25 * x).expand(1, 3, h, w)

    taps = {"scores": {"student": {"scores": places(16.0, 4, 6)}, "teacher": {"scores": places(8.0, 9, 12)}}}
    student, teacher = model.losses[0]._on_one_grid(DistillContext([], taps=taps))
    s, t = student["scores"], teacher["scores"]
    assert s.shape == t.shape == (1, 3, 8, 12)  # what the teacher padded beyond the student is cut off
    torch.testing.assert_close(s[..., 1:-1, 1:-1], t[..., 1:-1, 1:-1])  # beyond the outermost middles there is no line


def test_losses_under_mixed_precision():
    entries = [{"NAME": "LAD", "TAP": "decoder"}, {"NAME": "CWD", "TAP": "scores"}, {"NAME": "CAD", "TAP": "bottom_up"}]
    model, student, _ = distiller(entries)
    wanted = step(model, batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = step(model, batch())
    for name, value in found.items():
        assert value.dtype == torch.float32 and value.item() == pytest.approx(wanted[name].item(), rel=0.1), name
    sum(found.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters())


def test_analysis_sees_what_the_loss_compares(tmp_path):
    """Behind the adaptation layer, so that its two parts add up to naive L2 (eq. 10)."""
    model, *_ = distiller([{"NAME": "NaiveL2", "TAP": "decoder", "WEIGHT": 2.0}])
    hook = FeatureAnalysis(model, 2, str(tmp_path))
    for iteration in range(3):
        hook.trainer = SimpleNamespace(iter=iteration)
        hook.before_step()
        found = step(model, batch())["loss_distill/NaiveL2"].item()
        hook.after_step()
    lines = [json.loads(line) for line in (tmp_path / "features.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 2] and list(lines[0]["levels"]) == ["decoder"]
    parts = lines[1]["levels"]["decoder"]
    assert 2 * (parts["magnitude"] + parts["angular"]) == pytest.approx(found, rel=1e-4)
    assert not model.on_context and not model.losses[0].loss._forward_pre_hooks


def test_what_a_segmentor_does_not_have_is_said():
    with pytest.raises(ValueError, match=r"the student has no pyramid .* TAP names: bottom_up, decoder or scores"):
        distiller([{"NAME": "LAD"}])
    tapped = {"TAP": "decoder", "MATCH": "by_index"}
    for entry in ({"NAME": "FGD", **tapped}, {"NAME": "FitNet", "GT_ONLY": True, **tapped}):
        with pytest.raises(ValueError, match=f"{entry['NAME']} looks at ground truth boxes, which a segmentor has not"):
            distiller([entry])
    distiller([{"NAME": "FitNet", **tapped}])
