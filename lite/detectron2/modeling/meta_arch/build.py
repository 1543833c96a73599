"""From ``cfg.MODEL.META_ARCHITECTURE`` to a model."""

import torch
from torch import nn

from detectron2.utils.registry import Registry

__all__ = ["META_ARCH_REGISTRY", "build_model"]

META_ARCH_REGISTRY = Registry("META_ARCH")
META_ARCH_REGISTRY.__doc__ = """
Whole models by name; each is called as ``constructor(cfg)`` and returns a :class:`torch.nn.Module`.
"""


def build_model(cfg) -> nn.Module:
    """Build the model that ``cfg.MODEL.META_ARCHITECTURE`` names, on ``cfg.MODEL.DEVICE``.

    Weights are not loaded (``cfg.MODEL.WEIGHTS`` is a matter of the checkpointer).
    """
    constructor = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    return constructor(cfg).to(torch.device(cfg.MODEL.DEVICE))
