"""Eq. (10) of raw-feature distillation against the loss that it decomposes, and the record of a run."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from detectron2.utils.events import EventStorage
from runs import config, train

from msad.distill.analysis import decompose
from msad.distill.teachers import FrozenTeacher
from msad.engine.hooks import FeatureAnalysis


def test_worked_example():
    teacher = torch.tensor([[3.0, 1.0], [0.0, 4.0]]).view(1, 2, 1, 2)
    student = torch.tensor([[3.0, 0.0], [4.0, 2.0]]).view(1, 2, 1, 2)
    parts = decompose(student, teacher)
    assert parts.m.item() == pytest.approx(math.sqrt(26)) and parts.n.item() == pytest.approx(math.sqrt(29))
    assert parts.mn.item() == pytest.approx(math.sqrt(26 * 29) / 4)
    assert math.cos(math.radians(parts.angle.item())) == pytest.approx(17 / math.sqrt(26 * 29), abs=1e-6)
    assert parts.magnitude.item() == pytest.approx(0.0205, abs=5e-5)
    assert parts.angular.item() == pytest.approx(5.2295, abs=5e-5)


def test_parts_add_up_to_naive_l2():
    torch.manual_seed(0)
    s, t = torch.randn(3, 5, 4, 6), 2 * torch.randn(3, 5, 4, 6) + 1
    parts = decompose(s, t)
    for i in range(3):
        naive = F.mse_loss(s[i], t[i])
        torch.testing.assert_close(parts.magnitude[i] + parts.angular[i], naive, rtol=1e-5, atol=1e-6)
        cosine = F.cosine_similarity(s[i].flatten(), t[i].flatten(), dim=0)
        weight = 2 * parts.mn[i]
        torch.testing.assert_close(parts.angular[i], weight * (1 - cosine), rtol=1e-4, atol=1e-5)


def test_special_cases():
    x = torch.randn(2, 3, 4, 4)
    same = decompose(x, 3 * x)  # the angle of parallel maps is 0 up to float32's acos near 1
    assert same.angle.max() < 0.1 and same.angular.abs().max() < 1e-5 and same.magnitude.min() > 0.1
    zero = decompose(torch.zeros_like(x), x)
    assert zero.angle.tolist() == pytest.approx([90.0, 90.0]) and zero.angular.abs().max() == 0
    with pytest.raises(ValueError, match="one shape"):
        decompose(x, x[:, :2])


def test_record_of_a_run(project, teacher_weights, tmp_path):
    options = {"SOLVER.MAX_ITER": 4}
    _, plain, _ = train(config(project, teacher_weights, "student", tmp_path / "plain", **options))
    options["DISTILL.ANALYSIS_PERIOD"] = 3
    run, observed, _ = train(config(project, teacher_weights, "student", tmp_path / "observed", **options))
    assert observed.steps == plain.steps  # looking changes nothing
    lines = [json.loads(line) for line in (tmp_path / "observed/features.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 3]
    assert set(lines[0]["levels"]) == {"p3", "p4", "p5", "p6", "p7"}
    level = lines[0]["levels"]["p3"]
    # 32 channels on 8x8 cells; means over images, so the product of means only approximates the mean product.
    assert level["mn"] == pytest.approx(level["m"] * level["n"] / (32 * 64), rel=0.2)
    assert 0 < level["angle"] < 180 and not run.distiller.on_context
    assert not (tmp_path / "plain/features.jsonl").exists()


@pytest.mark.parametrize("channels", [4, 8])
def test_the_first_loss_with_a_level_is_the_one_that_is_looked_at(
    tiny_model, make_distiller, make_batch, tmp_path, channels
):
    """Two losses with adaptation layers of their own, under a student as wide as its teacher or narrower."""
    student = tiny_model(levels=range(2, 7), seed=1, MODEL__FPN__OUT_CHANNELS=channels)
    first = {"NAME": "NaiveL2", "LEVELS": ["p3", "p4"], "ADAPTATION": "always", "WEIGHT": 2.0}
    second = {"NAME": "CAD", "LEVELS": ["p3", "p4", "p5"], "ADAPTATION": "always"}
    distiller = make_distiller(student=student, losses=[first, second])
    hook, seen = FeatureAnalysis(distiller, 1, str(tmp_path)), []
    distiller.on_context.append(seen.append)
    hook.trainer = SimpleNamespace(iter=0)
    hook.before_step()
    with EventStorage(0):
        loss = distiller(make_batch([(64, 64), (64, 96)]))["loss_distill/NaiveL2"].item()
    hook.after_step()
    levels = json.loads((tmp_path / "features.jsonl").read_text())["levels"]
    assert 2 * sum(levels[name]["magnitude"] + levels[name]["angular"] for name in ("p3", "p4")) == pytest.approx(
        loss, rel=1e-4
    )
    # A level that only the second has is seen behind the second's layer; one of no loss as it is, if it can be.
    (context,) = seen
    for name, layer in (("p5", distiller.losses[1].adaptation["p5"]), ("p6", torch.nn.Identity())):
        s, t = context.student[name], context.sources["teacher"][name]
        if name == "p6" and channels == 4:
            assert name not in levels
        else:
            angle = decompose(layer(s), t).angle.mean().item()
            assert levels[name]["angle"] == pytest.approx(angle, rel=1e-4), name


def test_teacher_of_a_control_runs_only_when_it_is_observed(project, teacher_weights, tmp_path, monkeypatch):
    calls, original = [], FrozenTeacher.features
    monkeypatch.setattr(FrozenTeacher, "features", lambda *args: calls.append(1) or original(*args))
    keys = {"DISTILL.LOSSES": [], "SOLVER.MAX_ITER": 3, "DISTILL.ANALYSIS_PERIOD": 2}
    train(config(project, teacher_weights, "student", tmp_path / "run", **keys))
    assert len(calls) == 2
    assert len((tmp_path / "run/features.jsonl").read_text().splitlines()) == 2


def test_every_process_looks_and_the_main_one_writes(project, teacher_weights, tmp_path, monkeypatch):
    """The teacher runs for the analysis, and where its normalisation is synchronised it needs all processes."""
    from msad.engine import hooks

    calls, original = [], FrozenTeacher.features
    monkeypatch.setattr(FrozenTeacher, "features", lambda *args: calls.append(1) or original(*args))
    monkeypatch.setattr(hooks.comm, "is_main_process", lambda: False)
    keys = {"DISTILL.LOSSES": [], "SOLVER.MAX_ITER": 2, "DISTILL.ANALYSIS_PERIOD": 1, "TEST.EVAL_PERIOD": 0}
    cfg = config(project, teacher_weights, "student", tmp_path / "run", **keys)
    model = train(cfg)[0]
    assert len(calls) == 2 and not model.distiller.on_context
    assert not (tmp_path / "run/features.jsonl").exists()
