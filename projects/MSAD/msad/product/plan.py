"""What the training will take: seconds from a few measured steps, and room on the disk."""

from __future__ import annotations

import gc
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from detectron2.modeling import build_model

from ..data.low_res import build_test_mapper
from ..data.register import registered
from ..engine.provenance import machine
from ..engine.stages import stage_configs
from ..engine.trainer import DistillTrainer
from ..experiments.jobs import format_seconds
from ..experiments.run import log_to
from ..experiments.variants import map_teachers
from ..files import FINAL
from .inference_cost import InferenceCost
from .steps import kept

STEPS = 6  # of each training, of which the first WARMUP do not count
WARMUP = 2
IMAGES = 3  # that are detected in


class Measured(NamedTuple):
    """Of one run: iterations, seconds of a step and of detecting in an image (all branches), bytes of a checkpoint and
    the number of ``checkpoints`` that it leaves."""

    iterations: int
    step: float
    image: float
    checkpoint: int
    checkpoints: int

    def seconds(self, test_images: int) -> float:
        return self.iterations * self.step + test_images * self.image

    @property
    def bytes(self) -> int:
        return self.checkpoints * self.checkpoint


class _Stopwatch(HookBase):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def before_step(self) -> None:
        self.begin = time.perf_counter()

    def after_step(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.begin)


def measure(configs: Mapping[str, CfgNode], steps: int = STEPS) -> dict[str, Measured]:
    """Train each config for a few steps, teachers first, in a folder that is deleted again.

    Args:
        configs: by the name that DISTILL.TEACHERS calls its yaml; what others learn from comes before them.
    """
    out: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, cfg in configs.items():
            stages = enumerate(stage_configs(cfg) if cfg.DISTILL.STAGES else [cfg])
            parts = [_measure(part, Path(folder), f"{name}{number}", steps, number == 0) for number, part in stages]
            total = sum(part.iterations for part in parts)
            step = sum(part.iterations * part.step for part in parts) / total
            out[name] = parts[-1]._replace(iterations=total, step=step, checkpoints=sum(p.checkpoints for p in parts))
            if (Path(folder) / f"{name}0" / FINAL).is_file():
                shutil.move(Path(folder) / f"{name}0", Path(folder) / name)
    gc.collect()
    torch.cuda.empty_cache()  # the runs are processes of their own
    return out


def _measure(cfg: CfgNode, folder: Path, name: str, steps: int, first: bool) -> Measured:
    iterations, period = cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD
    cfg = cfg.clone()
    cfg.defrost()
    test, cfg.DATASETS.TEST = cfg.DATASETS.TEST[0], ()
    cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = str(folder / name), steps, steps
    cfg.SOLVER.WARMUP_ITERS = min(cfg.SOLVER.WARMUP_ITERS, steps // 2)
    cfg.DISTILL.START_ITER, cfg.DISTILL.WARMUP_ITERS = 0, 1  # a step with all of its losses
    cfg.DISTILL.BALANCE.ITERS = 1  # measured in the first step alone, which does not count
    map_teachers(cfg, lambda entry: _measured_teacher(entry, folder))
    if not first:  # the student of an earlier stage, which has not been trained
        cfg.MODEL.WEIGHTS = ""
    cfg.freeze()
    Path(cfg.OUTPUT_DIR).mkdir(parents=True)
    watch = _Stopwatch()
    with registered(cfg), log_to(Path(cfg.OUTPUT_DIR) / "log.txt"):
        trainer = DistillTrainer(cfg)
        trainer.register_hooks([watch])
        trainer.resume_or_load(resume=False)
        trainer.train()
    size = (Path(cfg.OUTPUT_DIR) / FINAL).stat().st_size
    return Measured(iterations, statistics.median(watch.seconds[min(WARMUP, steps - 1) :]), _detect(cfg, test), size,
                    iterations // period + 1)  # fmt: skip


def _measured_teacher(entry: dict, folder: Path) -> dict:
    """A given checkpoint stays; one that is still to be trained is that of its measured steps."""
    if Path(entry["WEIGHTS"]).is_file():
        return entry
    return dict(entry, WEIGHTS=str(folder / Path(entry["CONFIG"]).stem / FINAL))


def _detect(cfg: CfgNode, test: str) -> float:
    """Seconds that detecting in an image takes, in every branch of a multi-resolution teacher."""
    model = build_model(cfg).eval()
    with registered(cfg), torch.no_grad():
        inputs = [*map(build_test_mapper(cfg, test), DatasetCatalog.get(test)[: IMAGES + 1])]
        model(inputs[:1])
        begin = time.perf_counter()
        for one in inputs[1:] or inputs:
            model([one])
        branches = len(getattr(model, "branches", ())) or 1
    return branches * (time.perf_counter() - begin) / len(inputs[1:] or inputs)


class Plan(NamedTuple):
    """What is going to happen.

    Attributes:
        data: lines about the data and sizes, see :func:`msad.product.advice.describe`.
        changes: what the conversion of the data left out or changed.
        runs: what each run takes.
        test_images: number of images that each is evaluated on.
        free: bytes on the disk of the output folder.
        cost: of the student at inference.
    """

    data: list[str]
    changes: list[str]
    runs: dict[str, Measured]
    test_images: int
    free: int
    cost: InferenceCost

    @property
    def seconds(self) -> float:
        return sum(run.seconds(self.test_images) for run in self.runs.values())

    @property
    def bytes(self) -> int:
        return sum(run.bytes for run in self.runs.values())

    def text(self) -> str:
        """For people."""
        lines = [*self.data]
        lines += [f"left out or changed: {change}" for change in self.changes]
        lines += self.cost.lines()
        for name, run in self.runs.items():
            lines.append(f"{name}: {run.iterations} iterations of {run.step:.3g} s, about "
                         f"{format_seconds(run.seconds(self.test_images))}")  # fmt: skip
        lines.append(f"in all about {format_seconds(self.seconds)} of training and evaluation, {_size(self.bytes)} of "
                     f"checkpoints ({_size(self.free)} free)")  # fmt: skip
        return "\n".join(lines)


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(count / 1e6, 0.1):.1f} MB"


def measured_once(configs: Mapping[str, CfgNode], file: Path, steps: int = STEPS) -> dict[str, Measured]:
    """:func:`measure`, kept in ``file`` as long as configs and machine stay."""
    device = next(iter(configs.values())).MODEL.DEVICE
    key = [{name: cfg.dump() for name, cfg in configs.items()}, machine(device), steps]
    runs = kept(file, key, lambda: {name: run._asdict() for name, run in measure(configs, steps).items()})
    return {name: Measured(**run) for name, run in runs.items()}
