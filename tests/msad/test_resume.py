"""An interrupted and resumed run repeats the uninterrupted one, bit by bit."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase

from msad import load_config
from msad.data import register_datasets
from msad.engine import DistillTrainer

ITERATIONS, SAVED = 6, 3  # the checkpoint holds SAVED finished iterations
TOOL = Path(__file__).parents[2] / "tools" / "train_net.py"
TEACHER = {"student": "teacher", "retinanet_student": "retinanet_teacher", "gfl_student": "gfl_teacher"}


class Trace(HookBase):
    """Per iteration: all losses and learning rates, the images, and the factor on the distillation losses."""

    def __init__(self, trainer):
        self.steps = []
        self._images = []
        model = trainer._trainer.model
        model.register_forward_pre_hook(lambda _, args: self._images.append([d["file_name"] for d in args[0]]))

    def after_step(self):
        distiller = self.trainer.distiller
        storage = self.trainer.storage
        losses = {k: v for k, (v, i) in storage.latest().items() if "loss" in k and i == self.trainer.iter}
        self.steps.append(
            {
                "iteration": self.trainer.iter,
                "losses": losses,
                "lr": self.trainer.optimizer.param_groups[0]["lr"],
                "images": self._images.pop(),
                "factor": None if distiller is None else distiller.factor(storage.iter),
            }
        )


def config(project, teacher_weights, name, output, **options):
    cfg = load_config(project / f"{name}.yaml")
    if name in TEACHER:
        cfg.DISTILL.TEACHERS[0]["WEIGHTS"] = teacher_weights[TEACHER[name]]
    cfg.OUTPUT_DIR = str(output)
    cfg.merge_from_list(list(itertools.chain(*options.items())))
    register_datasets(cfg)
    Path(output).mkdir(exist_ok=True)
    return cfg


def train(cfg, resume=False):
    """The trainer after the run, its Trace, and the student's or baseline's weights before the first step."""
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume)
    before = {k: v.clone() for k, v in trainer.checkpointer.model.state_dict().items()}
    trace = Trace(trainer)
    trainer.register_hooks([trace])
    trainer.train()
    return trainer, trace, before


def left_by_a_killed_run(finished: Path, target: Path) -> None:
    """What the run in ``finished`` would have left, had it been killed after its first checkpoint."""
    target.mkdir()
    name = f"model_{SAVED - 1:07d}.pth"
    shutil.copy(finished / name, target / name)
    (target / "last_checkpoint").write_text(name)


def assert_equal_weights(first, second):
    assert first.keys() == second.keys()
    different = [k for k in first if not torch.equal(first[k], second[k])]
    assert not different


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


# Runs tools/train_net.py with Trace; kills the process without warning after iteration argv[1], if that is not -1,
# and writes the trace to argv[2] otherwise.
CHILD = """
import json, os, runpy, signal, sys
sys.path.insert(0, {tests!r})
from detectron2.engine import HookBase
from test_resume import Trace
from msad.engine import DistillTrainer
last, output, sys.argv = int(sys.argv[1]), sys.argv[2], sys.argv[3:]

class Kill(HookBase):
    def after_step(self):
        if self.trainer.iter == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def after_train(self):
        with open(output, "w") as file:
            json.dump(trace[-1].steps, file)

trace = []
build_hooks = DistillTrainer.build_hooks

def with_trace(self):
    trace.append(Trace(self))
    return build_hooks(self) + [trace[-1], Kill()]

DistillTrainer.build_hooks = with_trace
runpy.run_path(sys.argv[0], run_name="__main__")
"""


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
