"""What is shown before the first loss: what will happen, in a few lines; everything longer is in log.txt."""

from __future__ import annotations

import contextlib
import datetime
import logging
import time
from collections.abc import Iterator

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from torch import nn

from ..config import detector_architecture
from ..data.sem_seg import is_segmentation
from ..modeling.adapters import adapt, detector_of
from .build import teacher_entries

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def quiet_console() -> Iterator[None]:
    """Inside, the engine's loggers show warnings only; their files get everything."""
    found = [handler for name in ("detectron2", "fvcore") for handler in logging.getLogger(name).handlers]
    consoles = [(handler, handler.level) for handler in found if not isinstance(handler, logging.FileHandler)]
    for handler, _ in consoles:
        handler.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for handler, level in consoles:
            handler.setLevel(level)


def data_line(name: str) -> str:
    """Images, instances or label maps, and classes of a registered data set, in one line."""
    records, metadata = DatasetCatalog.get(name), MetadataCatalog.get(name)
    what = f"{sum(len(record.get('annotations', ())) for record in records)} instances"
    if is_segmentation(records):
        what = "label maps"
    classes = metadata.get("stuff_classes" if is_segmentation(records) else "thing_classes") or []
    shown = ", ".join(classes[:6]) + (", ..." if len(classes) > 6 else "")
    return f"{name}: {len(records)} images, {what}, {len(classes)} classes ({shown})"


def describe_model(cfg: CfgNode, model: nn.Module) -> str:
    """Kind, backbone, parameters and levels, in one line."""
    kind, inner = cfg.MODEL.META_ARCHITECTURE, detector_architecture(cfg)
    kind = kind if kind == inner else f"{kind} of {inner}"
    counts = [(p.numel() / 1e6, p.requires_grad) for p in model.parameters()]
    total, trained = sum(n for n, _ in counts), sum(n for n, requires_grad in counts if requires_grad)
    text = f"{kind}, {cfg.MODEL.BACKBONE.NAME}, {total:.2f} M parameters, {trained:.2f} M of them trained"
    return "; ".join(filter(None, (text, describe_levels(model))))


def describe_levels(model: nn.Module) -> str:
    """The pyramid levels that the heads read, with their strides in pixels of the network's input; "" for none."""
    detector = detector_of(model)
    shapes = detector.backbone.output_shape()
    levels = adapt(detector).levels
    if not levels:
        return ""
    return f"levels {', '.join(levels)} of strides {', '.join(str(shapes[level].stride) for level in levels)}"


def first_screen(cfg: CfgNode, model: nn.Module, start_iter: int) -> list[str]:
    """What a training will do, a line each for data, model, weights, teachers, losses, schedule and folder.

    The images and instances of the training sets are in the lines of their loader.

    Args:
        cfg: of the trainer, with its schedule scaled.
        model: what is trained and saved: the student, if there is a teacher.
        start_iter: iterations that are done.
    """
    teachers = teacher_entries(cfg)
    lines = [f"Training on {', '.join(cfg.DATASETS.TRAIN)}"]
    lines += [f"Evaluation on {data_line(name)}" for name in cfg.DATASETS.TEST]
    lines.append(f"Model: {describe_model(cfg, model)}")
    lines.append(f"Weights: {cfg.MODEL.WEIGHTS or 'MODEL.WEIGHTS is empty'}")
    for entry in teachers:
        name = f" {entry['NAME']}" if len(teachers) > 1 else ""
        mean = f"mean of {', '.join(entry.get('MEAN_OF', ()))}"
        lines.append(f"Teacher{name}: {mean if 'MEAN_OF' in entry else '{CONFIG} with {WEIGHTS}'.format(**entry)}")
    if teachers:
        losses = ", ".join(f"{entry['NAME']} (weight {entry.get('WEIGHT', 'its own')})" for entry in cfg.DISTILL.LOSSES)
        lines.append(f"Distillation: {losses or 'none, the student only starts from its teacher'}; "
                     f"student at {cfg.DISTILL.STUDENT_RESOLUTION}, started by {cfg.DISTILL.INIT_STUDENT}")  # fmt: skip
    solver, period = cfg.SOLVER, cfg.TEST.EVAL_PERIOD
    lines.append(
        f"Schedule: iterations {start_iter} to {solver.MAX_ITER} of {solver.IMS_PER_BATCH} images, {solver.OPTIMIZER}, "
        f"learning rate {solver.BASE_LR:g}, a checkpoint every {solver.CHECKPOINT_PERIOD}, evaluation "
        f"{f'every {period} and ' if period > 0 else ''}at the end"
    )
    return [*lines, f"Output: {cfg.OUTPUT_DIR}, with the config and everything longer than this in it"]


class TimeEstimate(HookBase):
    """Say once how long the training will take, from its first iterations.

    Args:
        skip: iterations that do not count, as the first ones are slow.
        measure: iterations that do.
    """

    def __init__(self, skip: int = 5, measure: int = 20) -> None:
        self.skip, self.measure = skip, measure

    def before_step(self) -> None:
        if self.trainer.iter == self.trainer.start_iter + self.skip:
            self.begin = time.perf_counter()

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done == self.trainer.start_iter + self.skip + self.measure:
            seconds = (time.perf_counter() - self.begin) / self.measure
            left = datetime.timedelta(seconds=round(seconds * (self.trainer.max_iter - done)))
            logger.info("About %s to go: %d iterations of %.3f s, without evaluations", left,
                        self.trainer.max_iter - done, seconds)  # fmt: skip
