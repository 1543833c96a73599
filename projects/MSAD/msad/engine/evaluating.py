"""Evaluation during training: after what has been trained, of one model in all processes, without a trace."""

from __future__ import annotations

import torch
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook, PreciseBN
from detectron2.utils import comm
from torch import nn

from ..evaluation.detection_loss import own_counts
from ..modeling.features import batch_norms


def guard_hooks(hooks: list[HookBase], model: nn.Module) -> None:
    """Let detectron2's hooks neither evaluate after an error nor change what the training of ``model`` goes on with.

    An EvalHook takes a training that stops in its last iteration for a finished one: it would evaluate before the error
    is seen, and wait for the processes that have none. Precise statistics run the model, which counts positives.
    """
    for hook in hooks:
        if isinstance(hook, EvalHook):
            _only_at_the_end(hook)
        if isinstance(hook, PreciseBN):
            _keep_counts(hook, model)


def _only_at_the_end(hook: EvalHook) -> None:
    after_train = hook.after_train

    def guarded() -> None:
        if hook.trainer.iter >= hook.trainer.max_iter:  # counted on after the last iteration alone
            after_train()

    hook.after_train = guarded


def _keep_counts(hook: PreciseBN, model: nn.Module) -> None:
    update_stats = hook.update_stats

    def counted() -> None:
        with own_counts(model):
            update_stats()

    hook.update_stats = counted


def share_statistics(model: nn.Module) -> None:
    """Give the BatchNorms of every process the running statistics of the first, which are in the checkpoint."""
    if comm.get_world_size() > 1:
        for norm in batch_norms(model):
            for statistic in filter(torch.is_tensor, (norm.running_mean, norm.running_var)):
                torch.distributed.broadcast(statistic, 0)
