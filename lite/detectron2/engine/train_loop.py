"""The two kinds of training step: full precision and autocast."""

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

import detectron2.utils.comm as comm
from detectron2.utils.events import get_event_storage

from .loop import HookBase, TrainerBase

__all__ = ["AMPTrainer", "HookBase", "SimpleTrainer", "TrainerBase"]


class SimpleTrainer(TrainerBase):
    """One model, one data loader, one optimizer: forward, backward, step.

    Args:
        model: in training mode returns a dict of scalar losses (or one scalar), given a batch. It is put
            into training mode here.
        data_loader: an iterable without an end.
        optimizer: steps all trainable parameters.
        gather_metric_period: losses are collected (and checked for NaN) every this many iterations; the
            collection waits for the device, so that a long period can speed up short steps.
        zero_grad_before_forward: clear gradients before the forward pass instead of before the backward
            pass. The latter overlaps with the forward pass, the former is needed by models that touch
            gradients in forward.
        async_write_metrics: collect in a thread. An error in it is raised in one of the following steps
            or at the end of training.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        data_loader,
        optimizer: torch.optim.Optimizer,
        gather_metric_period: int = 1,
        zero_grad_before_forward: bool = False,
        async_write_metrics: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.optimizer = model.train(), optimizer
        self.data_loader, self._data_loader_iter_obj = data_loader, None
        self.zero_grad_before_forward = zero_grad_before_forward
        self.gather_metric_period = gather_metric_period
        self.async_write_metrics = async_write_metrics
        self._metric_thread: ThreadPoolExecutor | None = None
        self._unfinished_writes: list[Future] = []

    @property
    def _data_loader_iter(self):
        # Made at the first step and not in the constructor: workers start with the state (sampler
        # position, random numbers) that a resumed run has restored by then.
        if self._data_loader_iter_obj is None:
            self._data_loader_iter_obj = iter(self.data_loader)
        return self._data_loader_iter_obj

    def reset_data_loader(self, data_loader_builder: Callable) -> None:
        """Replace the loader by `data_loader_builder()`; the old workers end before new ones start."""
        del self.data_loader
        self._data_loader_iter_obj = None
        self.data_loader = data_loader_builder()

    def run_step(self) -> None:
        data, data_time = self._next_batch()
        loss_dict, losses = self._forward(data)
        losses.backward()
        self.after_backward()
        self._report(loss_dict, data_time)
        self.optimizer.step()

    def _next_batch(self) -> tuple[object, float]:
        if not self.model.training:
            raise RuntimeError(f"{type(self).__name__}: the model is in eval mode; call model.train().")
        began = time.perf_counter()
        batch = next(self._data_loader_iter)
        return batch, time.perf_counter() - began

    def _forward(self, data) -> tuple[dict[str, Tensor], Tensor]:
        """Losses by name and their sum, with gradients cleared on one side of the forward pass."""
        if self.zero_grad_before_forward:
            self.optimizer.zero_grad()
        output = self.model(data)
        if isinstance(output, Tensor):
            loss_dict, total = {"total_loss": output}, output
        else:
            loss_dict, total = output, sum(output.values())
        if not self.zero_grad_before_forward:
            self.optimizer.zero_grad()
        return loss_dict, total

    def _report(self, loss_dict: Mapping[str, Tensor], data_time: float) -> None:
        if not self.async_write_metrics:
            self._write_metrics(loss_dict, data_time)
            return
        self._metric_thread = self._metric_thread or ThreadPoolExecutor(max_workers=1)
        while self._unfinished_writes and self._unfinished_writes[0].done():
            # Raises here what was raised there.
            self._unfinished_writes.pop(0).result()
        job = self._metric_thread.submit(self._write_metrics, loss_dict, data_time, iter=self.iter)
        self._unfinished_writes.append(job)

    def _write_metrics(
        self, loss_dict: Mapping[str, Tensor], data_time: float, prefix: str = "", iter: int | None = None
    ) -> None:
        now = self.iter if iter is None else iter
        if (now + 1) % self.gather_metric_period == 0:
            SimpleTrainer.write_metrics(loss_dict, data_time, now, prefix)

    @staticmethod
    def write_metrics(
        loss_dict: Mapping[str, Tensor], data_time: float, cur_iter: int, prefix: str = ""
    ) -> None:
        """Average the losses over the processes and put them into the event storage of the main one.

        Args:
            loss_dict: scalar tensors by name.
            data_time: seconds this process waited for data; the longest wait is recorded.
            cur_iter: the iteration that the values belong to.
            prefix: put before the name `total_loss`, for a trainer with several losses.

        Raises:
            FloatingPointError: the sum of the losses is not finite.
        """
        local = _to_floats(loss_dict)
        get_event_storage().put_scalar("rank_data_time", data_time, cur_iter=cur_iter)
        gathered = comm.gather((data_time, local))
        if comm.is_main_process():
            waits, losses = zip(*gathered)
            storage = get_event_storage()
            storage.put_scalar("data_time", max(waits), cur_iter=cur_iter)
            mean = {name: math.fsum(part[name] for part in losses) / len(losses) for name in local}
            total = _check_finite(mean, cur_iter)
            storage.put_scalar(f"{prefix}total_loss", total, cur_iter=cur_iter)
            if len(mean) > 1:
                storage.put_scalars(cur_iter=cur_iter, **mean)
        else:
            _check_finite(local, cur_iter)

    def state_dict(self) -> dict:
        return {**super().state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: Mapping) -> None:
        super().load_state_dict(state_dict)
        self.optimizer.load_state_dict(state_dict["optimizer"])

    def after_train(self) -> None:
        writes, self._unfinished_writes = self._unfinished_writes, []
        if self._metric_thread is not None:
            self._metric_thread.shutdown(wait=True)
            self._metric_thread = None
        super().after_train()
        for write in writes:
            write.result()


def _to_floats(loss_dict: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars as Python numbers, with one device-to-host copy for all of them."""
    if not loss_dict:
        return {}
    values = [loss.detach().reshape(1) for loss in loss_dict.values()]
    return dict(zip(loss_dict, torch.cat([value.to(values[0].device) for value in values]).tolist()))


def _check_finite(losses: Mapping[str, float], iteration: int) -> float:
    total = sum(losses.values())
    if not math.isfinite(total):
        raise FloatingPointError(
            f"The loss is not finite in iteration {iteration}; loss_dict = {dict(losses)}"
        )
    return total


class AMPTrainer(SimpleTrainer):
    """`SimpleTrainer` with autocast, on the device that the model's parameters are on.

    Args:
        grad_scaler: the scaler for float16; by default a `torch.amp.GradScaler` for that device.
        precision: torch.float16 (the gradients are scaled) or torch.bfloat16 (the scaler idles).
        log_grad_scaler: write the scale to the event storage each iteration.

    The other arguments are those of `SimpleTrainer`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        data_loader,
        optimizer: torch.optim.Optimizer,
        gather_metric_period: int = 1,
        zero_grad_before_forward: bool = False,
        grad_scaler=None,
        precision: torch.dtype = torch.float16,
        log_grad_scaler: bool = False,
        async_write_metrics: bool = False,
    ) -> None:
        super().__init__(
            model, data_loader, optimizer, gather_metric_period, zero_grad_before_forward, async_write_metrics
        )
        parameter = next(model.parameters(), None)
        self._device_type = "cpu" if parameter is None else parameter.device.type
        # bfloat16 has the range of float32. The scaler is kept all the same, so that the state has one form.
        self.grad_scaler = torch.amp.GradScaler(self._device_type) if grad_scaler is None else grad_scaler
        self.precision = precision
        self.log_grad_scaler = log_grad_scaler

    def run_step(self) -> None:
        data, data_time = self._next_batch()
        with torch.autocast(self._device_type, dtype=self.precision):
            loss_dict, losses = self._forward(data)
        scaler = self.grad_scaler if self.precision == torch.float16 else None
        (losses if scaler is None else scaler.scale(losses)).backward()
        if self.log_grad_scaler:
            get_event_storage().put_scalar("[metric]grad_scaler", self.grad_scaler.get_scale())
        self.after_backward()
        self._report(loss_dict, data_time)
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()

    def state_dict(self) -> dict:
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: Mapping) -> None:
        super().load_state_dict(state_dict)
        # A scaler that was disabled (saved without a GPU) has an empty state.
        if state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
