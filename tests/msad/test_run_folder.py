"""What may be written into an OUTPUT_DIR, and what a resumed run may change."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from msad import load_config
from msad.config_values import value_at
from msad.engine import run_folder
from msad.engine.first_screen import TimeEstimate, first_screen
from msad.engine.run_folder import check_folder, check_inputs, check_iterations, set_aside


@pytest.fixture
def begun(project, tmp_path):
    """``begun(*opts)``: the config of a run at tmp_path/run that has done 6 iterations, with other options now."""
    name = str(project / "student.yaml")
    base = ["OUTPUT_DIR", str(tmp_path / "run")]
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(load_config(name, base).dump())
    torch.save({"iteration": 5}, folder / "model_0000005.pth")
    (folder / "last_checkpoint").write_text("model_0000005.pth")
    return lambda *opts: load_config(name, [*base, *opts])


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_is_not_overwritten(begun, tmp_path):
    before = files(tmp_path / "run")
    with pytest.raises(ValueError, match=r"run holds a run: add --resume .* or choose another OUTPUT_DIR"):
        check_folder(begun(), "", resume=False)
    (tmp_path / "run" / "last_checkpoint").unlink()  # one checkpoint is enough
    with pytest.raises(ValueError, match="holds a run"):
        check_folder(begun(), "", resume=False)
    assert {k: v for k, v in before.items() if k != "last_checkpoint"} == files(tmp_path / "run")


def test_an_unchanged_run_is_resumed_in_silence(begun):
    cfg = begun()
    assert check_folder(cfg, "", resume=True) == (cfg, [])


@pytest.mark.parametrize(
    ("opts", "key", "kept"),
    [
        (("SOLVER.BASE_LR", 0.5), "SOLVER.BASE_LR", 0.002),
        (("SOLVER.WEIGHT_DECAY", 0.5), "SOLVER.WEIGHT_DECAY", 1e-4),
        (("SEED", 77), "SEED", 3),
    ],
)
def test_what_the_checkpoint_overrides_is_said_and_not_noted_as_used(begun, opts, key, kept):
    cfg, notes = check_folder(begun(*opts), "", resume=True)
    assert value_at(cfg, key) == kept and notes == [f"{key} {opts[1]} is ignored: the run goes on with {kept}"]


def test_what_takes_effect_is_said(begun):
    opts = ("SOLVER.MAX_ITER", 9, "INPUT.MIN_SIZE_TEST", 40, "DISTILL.W_DET", 0.5, "MODEL.FCOS.NMS_THRESH_TEST", 0.3)
    losses = [{"NAME": "AlignedL1", "WEIGHT": 0.9}]
    cfg, notes = check_folder(begun(*opts, "DISTILL.LOSSES", losses), "", resume=True)
    assert cfg.SOLVER.MAX_ITER == 9 and cfg.DISTILL.W_DET == 0.5 and losses == cfg.DISTILL.LOSSES
    assert "SOLVER.MAX_ITER has changed since the run began, from here on: 6 -> 9" in notes and len(notes) == 5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SOLVER.OPTIMIZER", "AdamW"),
        ("SOLVER.AMP.ENABLED", True),
        ("MODEL.FCOS.CONV_DIMS", [16]),
        ("MODEL.FCOS.NUM_CLASSES", 7),
        ("MODEL.META_ARCHITECTURE", "RetinaNet"),
        ("DISTILL.LOSSES", [{"NAME": "CWD"}]),
        ("DISTILL.LOSSES", []),
        ("DISTILL.STUDENT_RESOLUTION", "H"),
        ("DISTILL.TEACHERS", []),
        ("DATASETS.TRAIN", ("tiny_val",)),
        ("INPUT.FORMAT", "RGB"),
    ],
)
def test_what_a_run_consists_of_cannot_change(begun, tmp_path, key, value):
    before = files(tmp_path / "run")
    with pytest.raises(ValueError, match=rf"run cannot be resumed with another {key}: it was begun with .*, now"):
        check_folder(begun(key, value), "", resume=True)
    assert files(tmp_path / "run") == before


def test_a_teacher_does_not_change_its_scale(begun):
    """Where its files lie may change, what it sees may not."""
    cfg = begun()
    entry = cfg.DISTILL.TEACHERS[0]
    cfg.DISTILL.TEACHERS = [{**entry, "WEIGHTS": "elsewhere.pth"}]
    check_folder(cfg, "", resume=True)
    cfg.DISTILL.TEACHERS = [{**entry, "SCALE": 0.5}]
    with pytest.raises(ValueError, match=r"cannot be resumed with another DISTILL.TEACHERS: .*'SCALE': 0.5"):
        check_folder(cfg, "", resume=True)


def test_checkpoints_of_which_none_is_the_last(begun, tmp_path):
    (tmp_path / "run" / "last_checkpoint").unlink()
    with pytest.raises(ValueError, match="run has checkpoints, but no file last_checkpoint: write the name"):
        check_folder(begun(), "", resume=True)


@pytest.mark.parametrize("content", ["", "half", "short", "weights alone"])
def test_a_damaged_checkpoint_is_named_with_the_way_out(begun, tmp_path, content):
    folder = tmp_path / "run"
    whole = (folder / "model_0000005.pth").read_bytes()
    damaged = {"": b"", "half": whole[: len(whole) // 2], "short": whole[:-100]}
    if content in damaged:
        (folder / "model_0000005.pth").write_bytes(damaged[content])
    else:
        torch.save({"model": {}}, folder / "model_0000005.pth")
    with pytest.raises(ValueError, match=r"^--resume: .*run/model_0000005.pth is damaged or no .*: begin a new run$"):
        check_folder(begun(), "", resume=True)
    (folder / "model_0000002.pth").write_bytes(whole)
    with pytest.raises(ValueError, match=r"write the name of another \(model_0000002.pth\) into .*/last_checkpoint$"):
        check_folder(begun(), "", resume=True)


def test_damaged_records_of_a_run(begun, tmp_path, monkeypatch):
    (tmp_path / "run" / "config.yaml").write_text("")
    _, (note,) = check_folder(begun(), "", resume=True)
    assert "config.yaml cannot be compared with the config" in note
    monkeypatch.setattr(run_folder, "dataset_fingerprint", lambda cfg: {})
    (tmp_path / "run" / "inputs.json").write_text("")
    with pytest.raises(ValueError, match=r"--resume: .*inputs.json is damaged .*; delete it"):
        check_inputs(begun(), resumed=True)


@pytest.mark.parametrize("key", ["SOLVER.REFERENCE_BATCH_SIZE", "SOLVER.REFERENCE_WORLD_SIZE", ""])
def test_what_scales_the_schedule_stays(begun, monkeypatch, key):
    cfg = begun("SOLVER.REFERENCE_BATCH_SIZE", 4, "SOLVER.REFERENCE_WORLD_SIZE", 2)
    monkeypatch.setattr(run_folder, "dataset_fingerprint", lambda cfg: {})
    cfg.DISTILL.TEACHERS = []
    check_inputs(cfg, resumed=False)
    if key.endswith("BATCH_SIZE"):
        cfg.SOLVER.IMS_PER_BATCH = 8
        said = "resumed with 8 images: it was begun with 2, and SOLVER.REFERENCE_BATCH_SIZE scales"
    else:
        monkeypatch.setattr(run_folder.comm, "get_world_size", lambda: 4)
        said = "resumed with 4 processes: it was begun with 1, and SOLVER.REFERENCE_WORLD_SIZE scales"
    if key:
        with pytest.raises(ValueError, match=said):
            check_inputs(cfg, resumed=True)
    else:
        cfg.SOLVER.REFERENCE_WORLD_SIZE = 0
        check_inputs(cfg, resumed=True)


def test_a_run_does_not_end_before_where_it_is(begun, caplog):
    with pytest.raises(ValueError, match=r"MAX_ITER is 5, but the run in .* has done 6 iterations"):
        check_folder(begun("SOLVER.MAX_ITER", 5), "", resume=True)
    with caplog.at_level(logging.INFO, "msad"):
        check_iterations(6, 6, "out")
    assert "is finished: 6 of 6 iterations are done" in caplog.text


def test_folders_of_others_are_refused(project, tmp_path):
    mine = tmp_path / "config.yaml"
    mine.write_text(f"_BASE_: {project / 'fcos.yaml'}\n")
    with pytest.raises(ValueError, match=r"would overwrite .*config.yaml"):
        check_folder(load_config(mine, ["OUTPUT_DIR", str(tmp_path)]), str(mine), resume=False)
    assert mine.read_text().startswith("_BASE_")
    student = load_config(project / "student.yaml", ["OUTPUT_DIR", str(project)])
    with pytest.raises(ValueError, match=r"is the folder of the teacher's .*teacher.yaml"):
        check_folder(student, "", resume=False)


def test_records_without_a_checkpoint_are_moved_aside(tmp_path):
    for number in (1, 2):
        (tmp_path / "metrics.json").write_text(str(number))
        (tmp_path / "notes.txt").write_text("mine")
        set_aside(tmp_path)
        assert (tmp_path / f"aborted-{number}" / "metrics.json").read_text() == str(number)
    set_aside(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["aborted-1", "aborted-2", "notes.txt"]


def test_data_and_teachers_are_what_they_were(project, teacher_weights, tmp_path, monkeypatch, caplog):
    weights = tmp_path / "teacher.pth"
    weights.write_bytes(b"one")
    teacher = tmp_path / "teacher.yaml"
    teacher.write_text(f"_BASE_: {project}/teacher.yaml\n")
    entry = {"CONFIG": str(teacher), "WEIGHTS": str(weights)}
    cfg = load_config(project / "student.yaml", ["OUTPUT_DIR", str(tmp_path), "DISTILL.TEACHERS", [entry]])
    data = {"tiny_train": {"annotations": "a", "images": "b"}, "tiny_val": {"annotations": "c", "images": "d"}}
    monkeypatch.setattr(run_folder, "dataset_fingerprint", lambda cfg: json.loads(json.dumps(data)))
    check_inputs(cfg, resumed=False)
    check_inputs(cfg, resumed=True)
    sets = "[{NAME: t, JSON: elsewhere.json, IMAGES: elsewhere}]"
    other = f"DATASETS: {{REGISTER: {sets}}}\nSOLVER: {{MAX_ITER: 7}}\nTEST: {{EVAL_PERIOD: 3}}\n"
    score = "MODEL: {FCOS: {SCORE_THRESH_TEST: 0.3}}\n"
    teacher.write_text(f"_BASE_: {project}/teacher.yaml\n{other}{score}")
    check_inputs(cfg, resumed=True)  # what its features do not depend on
    teacher.write_text(f"_BASE_: {project}/teacher.yaml\n{other}INPUT: {{FORMAT: RGB}}\n")
    with pytest.raises(ValueError, match=r"CONFIG \(INPUT.FORMAT in .*teacher.yaml\) has another content"):
        check_inputs(cfg, resumed=True)
    teacher.write_text(f"_BASE_: {project}/teacher.yaml\n")
    moved = tmp_path / "moved.pth"
    moved.write_bytes(b"one")
    cfg.DISTILL.TEACHERS[0]["WEIGHTS"] = str(moved)  # the same file elsewhere
    check_inputs(cfg, resumed=True)
    moved.write_bytes(b"two")
    with pytest.raises(ValueError, match=r"cannot be resumed: DISTILL.TEACHERS\[0\].WEIGHTS .*moved.pth"):
        check_inputs(cfg, resumed=True)
    cfg.DISTILL.TEACHERS[0]["WEIGHTS"] = f"{moved}?matching_heuristics=True"
    with pytest.raises(ValueError, match=r"cannot be resumed: DISTILL.TEACHERS\[0\].WEIGHTS"):
        check_inputs(cfg, resumed=True)
    cfg.DISTILL.TEACHERS[0]["WEIGHTS"] = str(moved)
    moved.write_bytes(b"one")
    data["tiny_val"]["annotations"] = "x"
    with caplog.at_level(logging.WARNING, "msad"):
        check_inputs(cfg, resumed=True)
    assert "tiny_val has changed since the run began: annotations" in caplog.text
    data["tiny_train"]["images"] = "y"
    with pytest.raises(ValueError, match=r"data set tiny_train \(images\) has another content"):
        check_inputs(cfg, resumed=True)


def test_a_checkpoint_that_was_not_there_is_not_taken_for_content(begun, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "dataset_fingerprint", lambda cfg: {})
    cfg = begun()
    cfg.DISTILL.TEACHERS[0]["WEIGHTS"] = str(tmp_path / "mistyped.pth")
    check_inputs(cfg, resumed=False)
    (tmp_path / "teacher.pth").write_bytes(b"one")
    cfg.DISTILL.TEACHERS[0]["WEIGHTS"] = str(tmp_path / "teacher.pth")
    check_inputs(cfg, resumed=True)
    assert len(json.loads((tmp_path / "run" / "inputs.json").read_text())["teachers"][0]["WEIGHTS"]) == 64


def test_stages_that_have_not_begun_may_change(begun, tmp_path):
    one, two = {"SOLVER": {"MAX_ITER": 4}}, {"SOLVER": {"MAX_ITER": 5}}
    file = tmp_path / "run" / "config.yaml"
    file.write_text(begun("DISTILL.STAGES", [one, two]).dump())
    (tmp_path / "run" / "stage1").mkdir()
    (tmp_path / "run" / "stage1" / "model_0000001.pth").write_bytes(b"")
    _, (note,) = check_folder(begun("DISTILL.STAGES", [one, one]), "", resume=True)
    assert note.startswith("DISTILL.STAGES has changed since the run began, from here on")
    for stages in ([two, two], [], [two]):
        with pytest.raises(ValueError, match=r"cannot be resumed with another DISTILL.STAGES"):
            check_folder(begun("DISTILL.STAGES", stages), "", resume=True)


def test_first_screen_says_what_will_happen(project, tiny_model):
    cfg = load_config(project / "student.yaml")
    run_folder.dataset_fingerprint(cfg)  # registers the data sets
    model = tiny_model()
    text = "\n".join(first_screen(cfg, model, 2))
    total = sum(p.numel() for p in model.parameters()) / 1e6
    wanted = ["tiny_train", "tiny_val: 2 images, ", " 6 classes (disc, ", f"{total:.2f} M parameters", "teacher.yaml"]
    wanted += ["AlignedL1 (weight 0.6)", "iterations 2 to 6 of 2 images", "learning rate 0.002", cfg.OUTPUT_DIR]
    wanted.append("\nTeacher: ")
    wanted.append("; levels p3, p4, p5, p6, p7 of strides 8, 16, 32, 64, 128")
    assert [part for part in wanted if part not in text] == []
    for cfg.TEST.EVAL_PERIOD, said in ((3, "evaluation every 3 and at the end"), (-1, "evaluation at the end")):
        assert said in "\n".join(first_screen(cfg, model, 2))
    one = cfg.DISTILL.TEACHERS[0]
    cfg.DISTILL.TEACHERS = [{"NAME": "near", **one}, one, {"NAME": "both", "MEAN_OF": ["near", "teacher_2"]}]
    lines = first_screen(cfg, model, 2)
    files = f"{one['CONFIG']} with {one['WEIGHTS']}"
    wanted = [f"Teacher near: {files}", f"Teacher teacher_2: {files}", "Teacher both: mean of near, teacher_2"]
    assert [line for line in lines if line.startswith("Teacher")] == wanted


def test_time_to_go_is_said_once(caplog):
    class Trainer:
        start_iter, max_iter, iter = 100, 1000, 100

    hook = TimeEstimate(skip=2, measure=3)
    hook.trainer = Trainer
    with caplog.at_level(logging.INFO, "msad"):
        for Trainer.iter in range(100, 120):
            hook.before_step()
            hook.after_step()
    (line,) = [r.getMessage() for r in caplog.records]
    assert "895 iterations of 0.000 s" in line and line.startswith("About 0:00:0")
