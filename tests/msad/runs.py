"""Short runs of tools/train_net.py's trainer and what tests compare of them."""

from __future__ import annotations

import functools
import itertools
import shutil
from pathlib import Path

import torch
from detectron2.engine import HookBase, create_ddp_model, defaults, launch
from detectron2.utils import comm

from msad import load_config
from msad.data import register_datasets
from msad.engine import DistillTrainer

ITERATIONS, SAVED = 6, 3  # the checkpoint holds SAVED finished iterations
TOOL = Path(__file__).parents[2] / "tools" / "train_net.py"
TEACHER = {"student": "teacher", "retinanet_student": "retinanet_teacher", "gfl_student": "gfl_teacher"}

on_cpu = functools.partial(create_ddp_model, device_ids=None)


def in_two_processes(function, folder, batch, *args):
    """What ``function(part, *args)`` returns in each of two gloo processes, ``part`` being an image of ``batch``."""
    launch(_save_of_rank, 2, dist_url="auto", args=(function, folder, batch, args))
    return [torch.load(folder / f"{rank}.pth") for rank in range(2)]


def _save_of_rank(function, folder, batch, args):
    torch.set_num_threads(1)
    defaults.create_ddp_model = on_cpu
    rank = comm.get_rank()
    torch.save(function(batch[rank : rank + 1], *args), folder / f"{rank}.pth")


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
    assert not different, different


# Runs tools/train_net.py with Trace; kills the process without warning after iteration argv[1], if that is not -1,
# and writes the trace to argv[2] otherwise.
CHILD = """
import json, os, runpy, signal, sys
sys.path.insert(0, {tests!r})
from detectron2.engine import HookBase, create_ddp_model, defaults, launch
from detectron2.utils import comm
from runs import Trace
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
