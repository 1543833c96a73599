"""Learning rates from fvcore's parameter schedulers, which map training progress in [0, 1] to a value."""

from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    LinearParamScheduler,
    ParamScheduler,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["LRMultiplier", "LRScheduler", "WarmupParamScheduler"]


class WarmupParamScheduler(CompositeParamScheduler):
    """A scheduler whose beginning is replaced by a warm-up.

    Args:
        scheduler: the schedule without warm-up.
        warmup_factor: the first value, as a fraction of the first value of ``scheduler``.
        warmup_length: the part of the training that is warm-up, in [0, 1].
        warmup_method: "linear" rises to the value at which ``scheduler`` takes over; "constant" keeps the
            first value.
        rescale_interval: squeeze the whole ``scheduler`` into what remains after the warm-up. Otherwise its
            beginning is cut off.
    """

    def __init__(
        self, scheduler: ParamScheduler, warmup_factor: float, warmup_length: float,
        warmup_method: str = "linear", rescale_interval: bool = False,
    ):  # fmt: skip
        if rescale_interval and warmup_length >= 1:
            raise ValueError("a warm-up as long as the training leaves nothing to squeeze the schedule into")
        first = warmup_factor * scheduler(0.0)
        handover = scheduler(0.0 if rescale_interval else warmup_length)
        rises = {"linear": LinearParamScheduler(first, handover), "constant": ConstantParamScheduler(first)}
        if warmup_method not in rises:
            raise ValueError(f"warm-up method {warmup_method!r}, expected 'linear' or 'constant'")
        super().__init__(
            [rises[warmup_method], scheduler],
            lengths=[warmup_length, 1 - warmup_length],
            interval_scaling=["rescaled", "rescaled" if rescale_interval else "fixed"],
        )


class LRMultiplier(LRScheduler):
    """Multiplies the initial learning rate of each parameter group by a schedule.

    Args:
        optimizer: its groups' learning rates are the ones multiplied.
        multiplier: the schedule; its values are factors.
        max_iter: iterations of the whole training, one ``step()`` each.
        last_iter: iterations already done, minus one; -1 begins.
    """

    def __init__(self, optimizer: Optimizer, multiplier: ParamScheduler, max_iter: int, last_iter: int = -1):
        if not isinstance(multiplier, ParamScheduler):
            raise ValueError(f"multiplier must be a fvcore ParamScheduler, got {multiplier!r}")
        self._multiplier = multiplier
        self._max_iter = max_iter
        super().__init__(optimizer, last_epoch=last_iter)

    def state_dict(self) -> dict:
        """The position and the initial rates; the schedule itself comes from the configuration again."""
        return {name: getattr(self, name) for name in ("base_lrs", "last_epoch")}

    def get_lr(self) -> list[float]:
        factor = self._multiplier(self.last_epoch / self._max_iter)
        return [rate * factor for rate in self.base_lrs]
