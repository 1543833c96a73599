"""Training of assistants: each has its own optimizer, schedule and gradient scaler, and steps before the student."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import defaults
from detectron2.utils.events import get_event_storage
from torch import nn

from ..distill.assistants import TRAINING_OPTIONS, Assistant
from ..distill.context import DistillContext
from ..distill.options import check_options
from ..modeling.features import same_statistics
from ..modeling.scalars import scalars_under
from .solver import build_lr_scheduler

OPTIMIZERS = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}
SCHEDULES = ("solver", "constant")
LOG_PERIOD = 20


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Inside, ``module`` gets no gradients, and its running statistics do not change."""
    trained = [p for p in module.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with same_statistics(module):
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class AssistantStep:
    """One training step of an assistant, to be listed in ``Distiller.assistants``.

    It is deliberately no ``nn.Module``: the assistant stays outside the module that DistributedDataParallel wraps for
    the student, and outside the student's checkpoint. Several processes average its gradients as the student's.

    Args:
        name: of the source that the assistant is.
        assistant: on its device.
        cfg: of the run.
        entry: its DISTILL.ASSISTANTS entry: OPTIMIZER ("Adam", "AdamW", "SGD"; default "Adam"), BASE_LR (default
            SOLVER.BASE_LR), WEIGHT_DECAY (default 0), SCHEDULE ("solver": that of the student; "constant"),
            HEAD_LEARNS (default False: the student's heads also learn from the assistant's features, detached), WAITS
            (default False: it learns from the beginning, and not first at DISTILL.START_ITER; needs the constant
            schedule, since the other would begin with it).
        student: whose heads the assistant's losses may go through; they get no gradients from them.

    Raises:
        ValueError: an unknown optimizer or schedule, an option of another kind, or WAITS with a schedule.
    """

    def __init__(self, name: str, assistant: Assistant, cfg: CfgNode, entry: dict, student: nn.Module) -> None:
        given = {key.lower(): value for key, value in entry.items() if key.lower() in TRAINING_OPTIONS}
        options = {**TRAINING_OPTIONS, "base_lr": cfg.SOLVER.BASE_LR}
        options |= check_options(f"DISTILL.ASSISTANTS: {name}", given, TRAINING_OPTIONS)
        kind, schedule = options["optimizer"], options["schedule"]
        if kind not in OPTIMIZERS or schedule not in SCHEDULES:
            raise ValueError(
                f"DISTILL.ASSISTANTS: {name}: OPTIMIZER must be one of {', '.join(OPTIMIZERS)} and SCHEDULE one of "
                f"{', '.join(SCHEDULES)}, not {kind!r} and {schedule!r}"
            )
        self.waits, self.start_iter = options["waits"], cfg.DISTILL.START_ITER if options["waits"] else 0
        if self.waits and schedule != "constant":
            raise ValueError(f"DISTILL.ASSISTANTS: {name}: WAITS needs SCHEDULE: constant")
        self.name, self.assistant, self.student = name, assistant.train(), student
        self.model = defaults.create_ddp_model(assistant, broadcast_buffers=False)
        device = torch.device(cfg.MODEL.DEVICE).type
        self.optimizer = OPTIMIZERS[kind](
            assistant.parameters(),
            lr=options["base_lr"],
            weight_decay=options["weight_decay"],
            fused=True if device == "cpu" else None,  # as of the student's optimizer, see solver.build_optimizer
        )
        self._total: torch.Tensor | None = torch.zeros(())  # of the last step; None: it has not come so far
        self.scheduler = build_lr_scheduler(cfg, self.optimizer) if schedule == "solver" else None
        self.head_learns, self.w_det = options["head_learns"], cfg.DISTILL.W_DET
        self.scaler = torch.amp.GradScaler(device, enabled=cfg.SOLVER.AMP.ENABLED)

    def __call__(self, context: DistillContext, read: bool = True) -> None:
        """Train the assistant on the step and put its features into ``context.sources``.

        Args:
            read: whether anything but the student's heads reads its features.
        """
        with scalars_under(f"assistant/{self.name}"):
            self._step(context, read)

    def _step(self, context: DistillContext, read: bool) -> None:
        own = context.detached()
        if context.iteration >= self.start_iter:  # the first iteration of a training tries all losses
            self._learn(own)
        if read or self.head_learns:
            with torch.no_grad():
                context.sources[self.name] = self.assistant.features(own)
        if self.head_learns:
            with same_statistics(self.student):  # these features do not occur at inference
                taught = context.run_losses(context.sources[self.name])
            context.detection.update({f"{key}@{self.name}": self.w_det * value for key, value in taught.items()})

    def _learn(self, own: DistillContext) -> None:
        self._total = None
        with untouched(self.student):
            losses = self.model(own)
        self.optimizer.zero_grad()
        total = sum(losses.values())
        self._total = total.detach()
        with torch.autocast(total.device.type, enabled=False):
            self.scaler.scale(total).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scheduler is not None:
            self.scheduler.step()
        torch.clear_autocast_cache()  # it has the weights of before the step
        if (own.iteration + 1) % LOG_PERIOD == 0:
            for name, value in losses.items():
                get_event_storage().put_scalar(name, float(value.detach()))

    def is_finite(self) -> bool:
        """Whether the losses of the last step were computed and finite."""
        return self._total is not None and bool(self._total.isfinite())

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs: module, optimizer, schedule and scaler."""
        return {
            "module": self.assistant.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.assistant.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if state["scaler"]:  # that of a scaler that was disabled is empty
            self.scaler.load_state_dict(state["scaler"])
