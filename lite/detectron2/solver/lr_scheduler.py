"""Learning rates from fvcore's parameter schedulers, which map training progress in [0, 1] to a value."""

from fvcore.common.param_scheduler import ParamScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

__all__ = ["LRMultiplier", "LRScheduler", "WarmupParamScheduler"]


class WarmupParamScheduler(ParamScheduler):
    """A scheduler whose beginning is replaced by a warm-up.

    Args:
        scheduler: the schedule without warm-up.
        warmup_factor: the first value, as a fraction of the first value of ``scheduler``.
        warmup_length: the part of the training that is warm-up, in [0, 1].
        warmup_method: "linear" rises to the value at which ``scheduler`` takes over; "constant" keeps the
            first value.
        rescale_interval: squeeze the whole ``scheduler`` into what remains after the warm-up. Otherwise its
            beginning is cut off.

    Raises:
        ValueError: unknown ``warmup_method``, or a ``warmup_length`` outside [0, 1].
    """

    def __init__(
        self,
        scheduler: ParamScheduler,
        warmup_factor: float,
        warmup_length: float,
        warmup_method: str = "linear",
        rescale_interval: bool = False,
    ):
        if warmup_method not in ("linear", "constant"):
            raise ValueError(f"a warm-up is linear or constant, not {warmup_method!r}")
        if not 0 <= warmup_length <= 1:
            raise ValueError(f"a warm-up takes between 0 and 1 of the training, not {warmup_length}")
        self._main, self._length, self._squeeze = scheduler, warmup_length, rescale_interval
        self._first = warmup_factor * scheduler(0.0)
        self._rise = 0.0
        if warmup_method == "linear":
            self._rise = scheduler(0.0 if rescale_interval else warmup_length) - self._first

    def __call__(self, where: float) -> float:
        if where < self._length or self._length == 1:
            return self._first + self._rise * where / self._length
        return self._main((where - self._length) / (1 - self._length) if self._squeeze else where)


class LRMultiplier(LambdaLR):
    """Multiplies the initial learning rate of each parameter group by a schedule.

    Args:
        optimizer: its groups' learning rates are the ones multiplied.
        multiplier: the schedule; its values are factors.
        max_iter: iterations of the whole training, one ``step()`` each.
        last_iter: iterations already done, minus one; -1 begins.

    Raises:
        ValueError: ``multiplier`` is no ``ParamScheduler``.
    """

    def __init__(self, optimizer: Optimizer, multiplier: ParamScheduler, max_iter: int, last_iter: int = -1):
        if not isinstance(multiplier, ParamScheduler):
            raise ValueError(f"the schedule of an LRMultiplier is a ParamScheduler of fvcore, not {multiplier!r}")
        super().__init__(optimizer, lambda iteration: multiplier(iteration / max_iter), last_epoch=last_iter)

    def state_dict(self) -> dict:
        """The position and the initial rates; the schedule itself comes from the configuration again."""
        return {"base_lrs": self.base_lrs, "last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict) -> None:
        """Continue from a :meth:`state_dict`."""
        LRScheduler.load_state_dict(self, state_dict)  # LambdaLR's wants the state of its functions too
