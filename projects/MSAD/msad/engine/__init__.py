"""Training and evaluation on detectron2's engine."""

from .trainer import DistillTrainer

__all__ = ["DistillTrainer"]
