"""DISTILL.STAGES: every stage is a run that starts from the student of the one before."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from runs import CHILD, SAVED, TOOL, assert_equal_weights, config

from msad import load_config
from msad.distill.losses.fitnet import FitNet
from msad.engine import DistillTrainer, stages
from msad.engine.run_folder import changes, check_folder, has_run, last_checkpoint
from msad.engine.setup import train
from msad.engine.stage_summary import stage_table
from msad.visualization.stages import Stage, stages_figure

STAGES = [
    {"TEACHERS": ["small"], "SOLVER": {"MAX_ITER": 4}},
    {"TEACHERS": ["large"], "DISTILL": {"LOSSES": [{"NAME": "FitNet", "ADAPTATION": "always"}]}},
]
LEVELS = ["p3", "p4", "p5"]


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
        (
            {"TEACHERS": [], "DISTILL": {"LOSSES": [], "STUDENT_RESOLUTION": "L"}},
            ValueError,
            r"STAGES\[0\]: without a teacher nothing makes images smaller, .*STUDENT_RESOLUTION L would",
        ),
    ],
)
def test_wrong_stages_are_named(project, teacher_weights, tmp_path, stage, error, message):
    cfg = curriculum(project, teacher_weights, tmp_path)
    cfg.DISTILL.STAGES = [stage]
    with pytest.raises(error, match=message):
        stages.stage_configs(cfg)


@pytest.mark.parametrize(
    ("place", "key", "value", "error", "message"),
    [
        ("teacher", "WEIGHTS", "gone.pth", FileNotFoundError, r"STAGES\[1\]: DISTILL.TEACHERS: no checkpoint gone.pth"),
        ("teacher", "CONFIG", "gone.yaml", FileNotFoundError, r"STAGES\[1\]: .*gone.yaml"),
        ("stage", "LOSSES", [{"NAME": "FitNot"}], ValueError, r"STAGES\[1\]: .*unknown loss 'FitNot'"),
        ("stage", "DECAY_FROM", 2.0, ValueError, r"STAGES\[1\]: .*DECAY"),
    ],
)
def test_a_mistake_in_a_later_stage_costs_no_training(
    project, teacher_weights, tmp_path, place, key, value, error, message
):
    cfg = curriculum(project, teacher_weights, tmp_path)
    cfg.DISTILL.STAGES = copy.deepcopy(STAGES)
    (cfg.DISTILL.TEACHERS[1] if place == "teacher" else cfg.DISTILL.STAGES[1]["DISTILL"])[key] = value
    with pytest.raises(error, match=message):
        train(cfg)
    assert not (tmp_path / "stage1").exists()


def test_stages_that_are_finished_need_their_teachers_no_more(project, teacher_weights, tmp_path, monkeypatch):
    cfg = curriculum(project, teacher_weights, tmp_path)
    cfg.DISTILL.STAGES = [*STAGES, STAGES[0]]
    cfg.DISTILL.TEACHERS[0]["WEIGHTS"] = "gone.pth"  # of the first and the third stage
    done, built = {str(tmp_path / "stage1"), str(tmp_path / "stage2")}, []
    monkeypatch.setattr(stages, "finished", lambda config: config.OUTPUT_DIR in done)
    monkeypatch.setattr(stages, "write_summary", lambda *_: None)
    stages.train_stages(cfg, True, lambda config, _: built.append(config.OUTPUT_DIR))
    assert built == [str(tmp_path / "stage3")]  # which says by itself what it lacks
    done.clear()
    with pytest.raises(FileNotFoundError, match=r"STAGES\[2\]: DISTILL.TEACHERS: no checkpoint gone.pth"):
        stages.train_stages(cfg, True, lambda config, _: built.append(config.OUTPUT_DIR))
    assert len(built) == 1


def test_a_curriculum_killed_in_its_second_stage(project, teacher_weights, tmp_path, monkeypatch):
    """By SIGKILL, in a process of its own, after stage 2 has saved its first checkpoint."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(curriculum(project, teacher_weights, whole))
    assert all((whole / stage / "inference").is_dir() for stage in ("stage1", "stage2")), "each is evaluated"
    first, second = saved(whole / "stage1"), saved(whole / "stage2")
    # Adaptation layers belong to their stage, and the student carries none.
    assert not first.get("distill_losses") and second["distill_losses"]
    assert first["model"].keys() == second["model"].keys()
    assert second["iteration"] == 5 and first["iteration"] == 3, "each stage counts for itself"

    cfg = curriculum(project, teacher_weights, tmp_path / "unused")
    lists = {key: str([dict(entry) for entry in cfg.DISTILL[key]]) for key in ("TEACHERS", "STAGES")}
    line = [TOOL, "--config-file", project / "student.yaml", "--resume", "OUTPUT_DIR", killed]
    line += ["DISTILL.TEACHERS", lists["TEACHERS"], "DISTILL.STAGES", lists["STAGES"]]
    code, last = CHILD.format(tests=str(Path(__file__).parent)), SAVED + 1  # which only stage 2 reaches
    command = [sys.executable, "-c", code, last, tmp_path / "trace.json", *line]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (killed / "stage2" / "last_checkpoint").read_text() == f"model_{SAVED - 1:07d}.pth"
    assert_equal_weights(saved(killed / "stage1")["model"], first["model"])

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
    expected, momentum = (run["trainer"]["_trainer"]["optimizer"]["state"] for run in (second, again))
    assert expected.keys() == momentum.keys() and len(expected) > 10
    for parameter, state in expected.items():
        assert_equal_weights(momentum[parameter], state)
    # The table and the curve are of both stages, whichever process trained them.
    for folder in (whole, killed):
        rows = (folder / "stages.md").read_text().replace(" ", "").splitlines()[2:]
        assert [row.split("|")[1:4] for row in rows] == [["1", "small", "4"], ["2", "large", "6"]]
        assert (folder / "stages.png").stat().st_size > 5000


def test_an_evaluation_that_was_killed_is_made_up_for(project, teacher_weights, tmp_path, monkeypatch):
    """After the last checkpoint of the last stage, in its evaluation or before the table was written."""
    cfg = curriculum(project, teacher_weights, tmp_path)
    cfg.DISTILL.STAGES = [{**stage, "SOLVER": {"MAX_ITER": 1}} for stage in STAGES]
    train(cfg)
    metrics, table = tmp_path / "stage2" / "metrics.json", tmp_path / "stages.md"
    written = table.read_text()
    assert "bbox/AP" in written
    loaded, build = [], DistillTrainer.build_model.__func__
    monkeypatch.setattr(DistillTrainer, "build_model", classmethod(lambda cls, c: loaded.append(1) or build(cls, c)))
    table.unlink()
    train(cfg, resume=True)
    assert not loaded and table.read_text() == written

    weights = (tmp_path / "stage2" / "model_final.pth").read_bytes()
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(f"{json.dumps(r)}\n" for r in records if r["iteration"] < 1))
    (tmp_path / "stage2" / stages.FINISHED).unlink()
    table.unlink()
    train(cfg, resume=True)
    assert len(loaded) == 1 and table.read_text() == written
    assert (tmp_path / "stage2" / "model_final.pth").read_bytes() == weights
    stages.train_stages(cfg, True, lambda *_: pytest.fail("all is there"))


def test_stages_without_metrics_are_finished_too(project, teacher_weights, tmp_path):
    """Data without annotations are tested for the detections that they give."""
    records = [{k: v for k, v in r.items() if k != "annotations"} for r in DatasetCatalog.get("tiny_val")]
    DatasetCatalog.register("unlabelled", lambda: records)
    MetadataCatalog.get("unlabelled").set(thing_classes=MetadataCatalog.get("tiny_val").thing_classes)
    try:
        cfg = curriculum(project, teacher_weights, tmp_path)
        cfg.DATASETS.TEST = ("unlabelled",)
        cfg.DISTILL.STAGES = [{**stage, "SOLVER": {"MAX_ITER": 1}} for stage in STAGES]
        train(cfg)
        assert all(map(stages.finished, stages.stage_configs(cfg)))
        stages.train_stages(cfg, True, lambda *_: pytest.fail("all is there"))
        cfg.DISTILL.STAGES = [{**stage, "SOLVER": {"MAX_ITER": 2}} for stage in STAGES]
        assert not any(map(stages.finished, stages.stage_configs(cfg))), "they are trained on"
    finally:
        DatasetCatalog.remove("unlabelled")
        MetadataCatalog.remove("unlabelled")


def test_a_stage_holds_its_own_teachers_alone_and_changes_none(project, teacher_weights, tmp_path, monkeypatch):
    alive, seen, build, original = [], [], DistillTrainer.build_model.__func__, DistillTrainer.train

    def built(cls, cfg):
        seen.append([ref() is not None for ref in alive])
        model = build(cls, cfg)
        alive.extend(weakref.ref(teacher.model) for teacher in model.teachers)
        return model

    def trained(self):
        before = {k: v.clone() for k, v in self.distiller.teacher.model.state_dict().items()}
        result = original(self)
        assert_equal_weights(self.distiller.teacher.model.state_dict(), before)
        return result

    monkeypatch.setattr(DistillTrainer, "build_model", classmethod(built))
    monkeypatch.setattr(DistillTrainer, "train", trained)
    content = Path(teacher_weights["teacher"]).read_bytes()
    cfg = curriculum(project, teacher_weights, tmp_path)
    cfg.DISTILL.STAGES = [{**stage, "SOLVER": {"MAX_ITER": 2}} for stage in STAGES]
    train(cfg)
    assert seen == [[], [False]], "the teacher of stage 1 is gone before that of stage 2 is loaded"
    assert Path(teacher_weights["teacher"]).read_bytes() == content


LOSSES = [{"NAME": "FitNet", "WEIGHT": 0.5, "ADAPTATION": "always"}, {"NAME": "CWD"}, {"NAME": "FGD"}, {"NAME": "MGD"}]


def test_every_loss_and_what_it_trains_is_new_in_each_stage(project, teacher_weights, tmp_path, monkeypatch):
    starts, original = [], DistillTrainer.train

    def started(self):
        starts.append({k: v.clone() for k, v in self.distiller.losses.state_dict().items()})
        return original(self)

    monkeypatch.setattr(DistillTrainer, "train", started)
    cfg = curriculum(project, teacher_weights, tmp_path, **{"DATASETS.TEST": [], "DISTILL.WARMUP_ITERS": 0})
    losses = [*LOSSES, LOSSES[-1]]
    cfg.DISTILL.STAGES = [
        {"TEACHERS": [("small", "large")[i % 2]], "DISTILL": {"LOSSES": [loss]}, "SOLVER": {"MAX_ITER": 2}}
        for i, loss in enumerate(losses)
    ]
    train(cfg)
    ends = [saved(tmp_path / f"stage{i}").get("distill_losses", {}) for i in range(1, 6)]
    kinds = [{key.split(".")[1] for key in end} - {"loss"} or {key.split(".")[2] for key in end} for end in ends]
    assert kinds[0] == {"adaptation"} and not ends[1] and "generators" not in kinds[2] and ends[2]
    assert kinds[3] == kinds[4] == {"generators"}
    moved = [key for key in ends[3] if not torch.equal(ends[3][key], starts[3][key])]
    assert moved, "MGD's generators have learned in stage 4"
    assert_equal_weights(starts[4], starts[3])


def test_a_curriculum_begins_with_an_off_the_shelf_student(project, teacher_weights, tmp_path, monkeypatch):
    starts, original = [], DistillTrainer.train

    def started(self):
        starts.append({k: v.clone() for k, v in self.checkpointer.model.state_dict().items()})
        return original(self)

    shelf = tmp_path / "shelf"
    train(config(project, teacher_weights, "student", shelf, **{"DISTILL.TEACHERS": [], "DISTILL.LOSSES": []}))
    monkeypatch.setattr(DistillTrainer, "train", started)
    options = {"MODEL.WEIGHTS": str(shelf / "model_final.pth"), "DISTILL.INIT_STUDENT": "none", "SOLVER.MAX_ITER": 1}
    cfg = curriculum(project, teacher_weights, tmp_path / "run", **options)
    cfg.DISTILL.STAGES = [{**stage, "SOLVER": {"MAX_ITER": 1}} for stage in STAGES]
    train(cfg)
    assert_equal_weights(starts[0], saved(shelf)["model"])
    assert_equal_weights(starts[1], saved(tmp_path / "run" / "stage1")["model"])


def test_a_student_at_a_quarter_under_teachers_of_growing_input(project, teacher_weights, tmp_path, monkeypatch):
    """Table 13: levels are paired by index, and the student's maps are upsampled to those of each teacher."""
    grids, evaluate = [], FitNet.forward

    def forward(self, student, teacher, context):
        shapes = {name: features.shape[-2:] for name, features in context.student.items()}
        grids.append([(tuple(t.shape[-2:]), tuple(ours)) for t, ours in zip(teacher.values(), shapes.values())])
        assert all(s.shape == teacher[name].shape for name, s in student.items())
        return evaluate(self, student, teacher, context)

    monkeypatch.setattr(FitNet, "forward", forward)
    options = {"DISTILL.STUDENT_RESOLUTION": "EL", "INPUT.MIN_SIZE_TEST": 16, "INPUT.MAX_SIZE_TEST": 16}
    options |= {"MODEL.FPN.LEVELS": LEVELS, "MODEL.FCOS.IN_FEATURES": LEVELS, "DISTILL.WARMUP_ITERS": 0}
    options |= {"DISTILL.INIT_STUDENT": "none", "SOLVER.MAX_ITER": 1}
    cfg = curriculum(project, teacher_weights, tmp_path, **options)
    plain = {"CONFIG": str(project / "fcos.yaml"), "WEIGHTS": str(tmp_path / "fcos.pth")}
    torch.manual_seed(0)
    torch.save({"model": build_model(load_config(plain["CONFIG"])).state_dict()}, plain["WEIGHTS"])
    cfg.DISTILL.TEACHERS = [{"NAME": str(scale), "SCALE": scale, **plain} for scale in (0.5, 0.75, 1.0)]
    cfg.DISTILL.LOSSES = [{"NAME": "FitNet", "WEIGHT": 0.5, "MATCH": "by_index"}]
    cfg.DISTILL.STAGES = [{"TEACHERS": [name]} for name in ("0.5", "0.75", "1.0")]
    train(cfg)
    # The finest levels, of stride 8 in each input, padding included: the student's is a quarter of the image.
    assert [of_stage[0] for of_stage in grids] == [((4 * k, 4 * k), (4, 4)) for k in (2, 3, 4)]
    assert (tmp_path / "stage3" / "model_final.pth").is_file()


def test_stages_without_a_teacher_and_with_all_of_them(project, teacher_weights, tmp_path):
    """Longer training with the learning rate restarted, and both teachers at once."""
    cfg = curriculum(project, teacher_weights, tmp_path)
    cfg.DISTILL.STUDENT_RESOLUTION = "H"
    cfg.DISTILL.STAGES = [{"TEACHERS": [], "DISTILL": {"LOSSES": []}}, {"SOLVER": {"MAX_ITER": 2}}]
    alone, both = stages.stage_configs(cfg)
    assert not alone.DISTILL.TEACHERS and [t["NAME"] for t in both.DISTILL.TEACHERS] == ["small", "large"]
    assert stages.total_iterations(cfg) == 6 + 2


def test_iterations_are_shared_out_over_stages(project, teacher_weights, tmp_path):
    cfg = curriculum(project, teacher_weights, tmp_path, **{"SOLVER.STEPS": [4], "DISTILL.WARMUP_ITERS": 2})
    assert stages.total_iterations(cfg) == 10
    stages.set_total_iterations(cfg, 40)
    first, second = stages.stage_configs(cfg)
    assert [c.SOLVER.MAX_ITER for c in (first, second)] == [16, 24]
    assert [c.SOLVER.STEPS for c in (first, second)] == [(16,), (16,)]
    assert [e["NAME"] for e in second.DISTILL.LOSSES] == ["FitNet"], "other overrides stay"
    assert first.SOLVER.WARMUP_ITERS == 3 and first.DISTILL.WARMUP_ITERS == 2, "longer runs keep their warm-ups"
    stages.set_total_iterations(cfg, 20)
    assert [c.SOLVER.MAX_ITER for c in stages.stage_configs(cfg)] == [8, 12]
    assert stages.stage_configs(cfg)[0].SOLVER.WARMUP_ITERS == 2
    stages.set_total_iterations(cfg, None)
    assert stages.total_iterations(cfg) == 20


def test_a_shorter_curriculum_is_scaled_as_a_single_run(project, teacher_weights, tmp_path):
    options = {"SOLVER.MAX_ITER": 90, "DISTILL.START_ITER": 30, "DISTILL.FREEZE_BACKBONE_ITERS": 10}
    cfg = curriculum(project, teacher_weights, tmp_path, **options)
    cfg.DISTILL.STAGES = [{"TEACHERS": ["small"]}, {"DISTILL": {"START_ITER": 45, "LOSSES": []}}]
    stages.set_total_iterations(cfg, 60)
    first, second = stages.stage_configs(cfg)
    assert [c.SOLVER.MAX_ITER for c in (first, second)] == [30, 30] and not second.DISTILL.LOSSES
    assert [c.DISTILL.START_ITER for c in (first, second)] == [10, 15]
    assert [c.DISTILL.FREEZE_BACKBONE_ITERS for c in (first, second)] == [3, 3]
    stages.set_total_iterations(cfg, 20, keep=["DISTILL.START_ITER"])
    assert [c.DISTILL.START_ITER for c in stages.stage_configs(cfg)] == [10, 15]


def test_the_table_has_the_losses_without_distillation():
    step = {"loss_cls": 1.0, "loss_box": 0.5, "loss_distill/FitNet": 7.0, "total_loss": 8.5}
    early, end = {"bbox/AP": 3.0, "validation/L_detect": 2.0}, {"bbox/AP": 12.5, "validation/L_detect": 0.75}
    records = [{"iteration": 1, **step, **early}, {"iteration": 3, **step}, {"iteration": 4, **end}]
    found = [
        Stage(1, "small", 4, records),
        Stage(2, "no teacher", 6, [{"iteration": 5, "loss_cls": 0.25, "total_loss": 0.25}]),
    ]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in stage_table(found).splitlines()]
    assert rows[0] == ["stage", "teachers", "iterations", "bbox/AP", "training L_detect", "validation L_detect"]
    assert rows[2:] == [["1", "small", "4", "12.50", "1.5000", "0.7500"], ["2", "no teacher", "6", "-", "0.2500", "-"]]
    assert [list(x) for x in found[0].curve("/AP")] == [[2, 4], [3.0, 12.5]], "the last evaluation is of iteration 4"
    above, below = stages_figure(found).axes
    assert list(above.lines[0].get_xdata()) == [2, 4] and list(above.lines[1].get_xdata()) == [4, 4], "where it ends"
    drawn = [list(line.get_xdata()) for line in below.lines]
    assert drawn[0] == [2, 4] and [4 + 6] in drawn, "stages follow one another"


def test_the_table_of_segmentors_has_mean_iou():
    stage = Stage(1, "large", 4, [{"iteration": 4, "sem_seg/mIoU": 41.5, "sem_seg/IoU-disc": 20.0}])
    assert "sem_seg/mIoU |" in stage_table([stage]) and "41.5" in stage_table([stage])
    above = stages_figure([stage]).axes[0]
    assert list(above.lines[0].get_ydata()) == [41.5] and above.get_ylabel() == "validation sem_seg/mIoU"


def test_the_folder_of_a_curriculum_is_a_used_one(project, teacher_weights, tmp_path):
    assert not has_run(tmp_path)
    (tmp_path / "stage2").mkdir()
    (tmp_path / "stage2" / "last_checkpoint").write_text("model_final.pth")
    assert has_run(tmp_path)
    cfg = curriculum(project, teacher_weights, tmp_path)
    with pytest.raises(ValueError, match="holds a run: add --resume"):
        check_folder(cfg, "", resume=False)


def test_the_last_checkpoint_is_that_of_the_last_begun_stage(project, teacher_weights, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no last_checkpoint"):
        last_checkpoint(tmp_path)
    for number in (2, 9, 10, 11):
        (tmp_path / f"stage{number}").mkdir()
    for number in (2, 9, 10):
        (tmp_path / f"stage{number}" / "last_checkpoint").write_text("model_0000003.pth")
        torch.save({"iteration": 3}, tmp_path / f"stage{number}" / "model_0000003.pth")
    assert last_checkpoint(tmp_path) == str(tmp_path / "stage10" / "model_0000003.pth")
    # The iterations of a stage are not compared with the length of the whole.
    (tmp_path / "config.yaml").write_text(curriculum(project, teacher_weights, tmp_path).dump())
    check_folder(curriculum(project, teacher_weights, tmp_path, **{"SOLVER.MAX_ITER": 2}), "", resume=True)


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
    for stage in stages.stage_configs(cfg):
        assert not [*changes(load_config(Path(stage.OUTPUT_DIR) / "config.yaml"), stage)]
    assert last_checkpoint(tmp_path) == str(tmp_path / "stage2" / "model_final.pth")
