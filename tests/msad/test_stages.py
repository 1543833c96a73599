"""DISTILL.STAGES: every stage is a run that starts from the student of the one before."""

from __future__ import annotations

import shutil

import pytest
import torch
from test_resume import SAVED, assert_equal_weights, config

from msad.engine import DistillTrainer, stages
from msad.engine.run_folder import check_folder, has_run
from msad.engine.setup import train

STAGES = [
    {"TEACHERS": ["small"], "SOLVER": {"MAX_ITER": 4}},
    {"TEACHERS": ["large"], "DISTILL": {"LOSSES": [{"NAME": "FitNet", "ADAPTATION": "always"}]}},
]


def curriculum(project, teacher_weights, folder, **options):
    cfg = config(project, teacher_weights, "student", folder, **options)
    teacher = dict(cfg.DISTILL.TEACHERS[0])
    cfg.DISTILL.TEACHERS = [{**teacher, "NAME": name} for name in ("small", "large")]
    cfg.DISTILL.STAGES = STAGES
    return cfg



def saved(folder, name="model_final.pth"):
    return torch.load(folder / name, weights_only=True)


def test_configs_of_stages(project, teacher_weights, tmp_path):
    first, second = stages.stage_configs(curriculum(project, teacher_weights, tmp_path))
    assert [[t["NAME"] for t in c.DISTILL.TEACHERS] for c in (first, second)] == [["small"], ["large"]]
    assert (str(tmp_path / "stage1"), str(tmp_path / "stage2")) == (first.OUTPUT_DIR, second.OUTPUT_DIR)
    assert (first.DISTILL.INIT_STUDENT, second.DISTILL.INIT_STUDENT) == ("full", "none")
    assert str(tmp_path / "stage1" / "model_final.pth") == second.MODEL.WEIGHTS
    assert (first.SOLVER.MAX_ITER, second.SOLVER.MAX_ITER) == (4, 6)
    assert [e["NAME"] for e in second.DISTILL.LOSSES] == ["FitNet"] and not second.DISTILL.STAGES


@pytest.mark.parametrize(
    ("stage", "error", "message"),
    [
        ({"TEACHERS": ["smal"]}, ValueError, r"STAGES\[0\]: no teacher is named 'smal'; did you mean small"),
        ({"SOLVER": {"MAX_ITERS": 3}}, KeyError, r"STAGES\[0\]: unknown config key SOLVER.MAX_ITERS"),
        ("small", ValueError, r"STAGES\[0\] is no mapping"),
    ],
)
def test_wrong_stages_are_named(project, teacher_weights, tmp_path, stage, error, message):
    cfg = curriculum(project, teacher_weights, tmp_path)
    cfg.DISTILL.STAGES = [stage]
    with pytest.raises(error, match=message):
        stages.stage_configs(cfg)


def test_a_curriculum_interrupted_in_its_second_stage(project, teacher_weights, tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(curriculum(project, teacher_weights, whole))
    assert all((whole / stage / "inference").is_dir() for stage in ("stage1", "stage2")), "each is evaluated"
    first, second = saved(whole / "stage1"), saved(whole / "stage2")
    # Adaptation layers belong to their stage, and the student carries none.
    assert not first.get("distill_losses") and second["distill_losses"]
    assert first["model"].keys() == second["model"].keys()
    assert second["iteration"] == 5 and first["iteration"] == 3, "each stage counts for itself"

    shutil.copytree(whole / "stage1", killed / "stage1")
    (killed / "stage2").mkdir()
    name = f"model_{SAVED - 1:07d}.pth"
    shutil.copy(whole / "stage2" / name, killed / "stage2" / name)
    (killed / "stage2" / "last_checkpoint").write_text(name)
    in_memory, load = [], DistillTrainer.build_model.__func__

    def build(cls, cfg):
        in_memory.append([teacher["NAME"] for teacher in cfg.DISTILL.TEACHERS])
        return load(cls, cfg)

    monkeypatch.setattr(DistillTrainer, "build_model", classmethod(build))
    train(curriculum(project, teacher_weights, killed), resume=True)
    assert in_memory == [["large"]], "the finished stage and its teacher are not loaded again"
    again = saved(killed / "stage2")
    assert_equal_weights(again["model"], second["model"])
    assert_equal_weights(again["distill_losses"], second["distill_losses"])


def test_the_folder_of_a_curriculum_is_a_used_one(project, teacher_weights, tmp_path):
    assert not has_run(tmp_path)
    (tmp_path / "stage2").mkdir()
    (tmp_path / "stage2" / "last_checkpoint").write_text("model_final.pth")
    assert has_run(tmp_path)
    cfg = curriculum(project, teacher_weights, tmp_path)
    with pytest.raises(ValueError, match="holds a run: add --resume"):
        check_folder(cfg, "", resume=False)


def test_the_second_stage_starts_from_the_first(project, teacher_weights, tmp_path, monkeypatch):
    starts, original = [], DistillTrainer.train

    def started(self):
        starts.append({k: v.clone() for k, v in self.checkpointer.model.state_dict().items()})
        assert self.start_iter == 0 and self.scheduler.last_epoch == 0, "schedules begin anew"
        return original(self)

    monkeypatch.setattr(DistillTrainer, "train", started)
    cfg = curriculum(project, teacher_weights, tmp_path)
    cfg.DISTILL.STAGES = [{**stage, "SOLVER": {"MAX_ITER": 2}, "TEST": {"EVAL_PERIOD": 0}} for stage in STAGES]
    train(cfg)
    assert_equal_weights(starts[1], saved(tmp_path / "stage1")["model"])
