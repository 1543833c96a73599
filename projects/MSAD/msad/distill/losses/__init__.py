"""Distillation losses, one file a method. Importing this package fills DISTILL_LOSS_REGISTRY."""

from . import aligned, chen, cwd, fgd, fitnet, fkd, ld, mgd, pkd, raw_features, sdf  # noqa: F401
from .registry import DISTILL_LOSS_REGISTRY, build_losses

__all__ = ["DISTILL_LOSS_REGISTRY", "build_losses"]
