"""An interrupted and resumed run repeats the uninterrupted one, bit by bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import CHILD, ITERATIONS, SAVED, TOOL, assert_equal_weights, config, left_by_a_killed_run, train

from msad.engine import DistillTrainer


@pytest.mark.parametrize("name", ["fcos", "retinanet", "teacher", "student", "retinanet_student", "gfl_student"])
def test_resumed_run_repeats_the_uninterrupted_one(project, teacher_weights, tmp_path, name):
    whole, expected, _ = train(config(project, teacher_weights, name, tmp_path / "whole"))
    left_by_a_killed_run(tmp_path / "whole", tmp_path / "killed")
    # Another number of loader processes and another draw of everything that is drawn at start.
    cfg = config(project, teacher_weights, name, tmp_path / "killed", **{"DATALOADER.NUM_WORKERS": 1})
    torch.rand(7)
    again, resumed, before = train(cfg, resume=True)

    assert [s["iteration"] for s in expected.steps] == list(range(ITERATIONS))
    assert resumed.steps == expected.steps[SAVED:]
    assert len(resumed.steps[0]["losses"]) >= 3
    assert len({json.dumps(s["images"]) for s in expected.steps}) > 1
    assert_equal_weights(again.checkpointer.model.state_dict(), whole.checkpointer.model.state_dict())
    saved = torch.load(tmp_path / "killed" / f"model_{SAVED - 1:07d}.pth", weights_only=True)["model"]
    assert_equal_weights(before, saved)


def test_precise_statistics_leave_the_training_alone(project, teacher_weights, tmp_path):
    """They run the model, which counts positives, after the checkpoint's count is taken."""
    options = {"TEST.PRECISE_BN.ENABLED": True, "TEST.PRECISE_BN.NUM_ITER": 2, "TEST.EVAL_PERIOD": SAVED}
    _, expected, _ = train(config(project, teacher_weights, "fcos", tmp_path / "whole", **options))
    _, plain, _ = train(config(project, teacher_weights, "fcos", tmp_path / "plain"))
    left_by_a_killed_run(tmp_path / "whole", tmp_path / "killed")
    _, resumed, _ = train(config(project, teacher_weights, "fcos", tmp_path / "killed", **options), resume=True)
    losses = [[step["losses"] for step in trace.steps] for trace in (expected, plain, resumed)]
    assert losses[0] == losses[1] and losses[2] == losses[0][SAVED:]


def test_resumed_student_keeps_its_weights_and_its_warmup(project, teacher_weights, tmp_path):
    cfg = config(project, teacher_weights, "student", tmp_path / "whole")
    trainer, trace, start = train(cfg)
    teacher = trainer.distiller.teacher.detector.state_dict()
    assert all(torch.equal(value, teacher[key]) for key, value in start.items())  # INIT_STUDENT: full
    factors = [i / cfg.DISTILL.WARMUP_ITERS for i in range(ITERATIONS)]
    assert [s["factor"] for s in trace.steps] == factors

    left_by_a_killed_run(tmp_path / "whole", tmp_path / "killed")
    _, resumed, before = train(config(project, teacher_weights, "student", tmp_path / "killed"), resume=True)
    assert [s["factor"] for s in resumed.steps] == factors[SAVED:]
    learned = [k for k in before if k.endswith("weight") and not torch.equal(before[k], teacher[k])]
    assert len(learned) > 10


def test_run_without_a_seed_resumes_with_the_seed_it_drew(project, teacher_weights, tmp_path):
    names = ["whole", "other"]
    seeds, traces = [], []
    for name in names:
        trainer, trace, _ = train(config(project, teacher_weights, "fcos", tmp_path / name, SEED=-1))
        seeds.append(trainer.cfg.SEED)
        traces.append(trace)
    assert seeds[0] != seeds[1] and min(seeds) >= 0

    left_by_a_killed_run(tmp_path / "whole", tmp_path / "killed")
    _, resumed, _ = train(config(project, teacher_weights, "fcos", tmp_path / "killed", SEED=-1), resume=True)
    assert resumed.steps == traces[0].steps[SAVED:]


def test_initial_weights_depend_on_the_seed_alone(project, teacher_weights, tmp_path):
    def start(seed):
        cfg = config(project, teacher_weights, "fcos", tmp_path, SEED=seed)
        return DistillTrainer(cfg).model.state_dict()

    first = start(3)
    torch.rand(5)
    assert_equal_weights(start(3), first)
    assert not torch.equal(start(4)["head.cls_score.weight"], first["head.cls_score.weight"])


def test_resuming_a_finished_run_trains_nothing(project, teacher_weights, tmp_path):
    first, _, _ = train(config(project, teacher_weights, "fcos", tmp_path))
    again, trace, _ = train(config(project, teacher_weights, "fcos", tmp_path), resume=True)
    assert again.start_iter == ITERATIONS and trace.steps == []
    assert_equal_weights(again.checkpointer.model.state_dict(), first.checkpointer.model.state_dict())


def test_what_a_process_did_before_does_not_change_a_run(project, teacher_weights, tmp_path):
    """Warmed-up TorchScript functions would round otherwise."""
    traces = [train(config(project, teacher_weights, "student", tmp_path / str(run)))[1].steps for run in range(2)]
    assert traces[0] == traces[1]


def test_kill_minus_nine_between_two_checkpoints(project, teacher_weights, tmp_path):
    """Every run in a process of its own, as users have it."""
    cfg = config(project, teacher_weights, "student", tmp_path / "unused")
    code = CHILD.format(tests=str(Path(__file__).parent))
    teachers = str([dict(cfg.DISTILL.TEACHERS[0])])

    def run(name, last):
        arguments = [TOOL, "--config-file", project / "student.yaml", "--resume", "OUTPUT_DIR", tmp_path / name]
        trace = tmp_path / f"{name}.json"
        command = [sys.executable, "-c", code, str(last), trace, *arguments, "DISTILL.TEACHERS", teachers]
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
        return done, json.loads(trace.read_text()) if trace.exists() else None

    whole, expected = run("whole", -1)
    assert whole.returncode == 0 and len(expected) == ITERATIONS, whole.stderr
    killed, trace = run("killed", ITERATIONS - 2)
    assert killed.returncode == -signal.SIGKILL and trace is None, killed.stderr
    assert (tmp_path / "killed" / "last_checkpoint").read_text() == f"model_{SAVED - 1:07d}.pth"
    resumed, steps = run("killed", -1)
    assert resumed.returncode == 0, resumed.stderr
    assert steps == expected[SAVED:]
