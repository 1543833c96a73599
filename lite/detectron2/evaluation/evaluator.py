"""Evaluators and the loop that feeds them."""

import datetime
import logging
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch

from detectron2.utils.comm import get_world_size, is_main_process
from detectron2.utils.logger import log_every_n_seconds

__all__ = ["DatasetEvaluator", "DatasetEvaluators", "inference_context", "inference_on_dataset"]

logger = logging.getLogger(__name__)


class DatasetEvaluator:
    """Collects the outputs for a data set and computes metrics from them at the end."""

    def reset(self) -> None:
        """Forget what was collected; called before each evaluation."""

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Take a batch.

        Args:
            inputs: what the model got, a dict an image.
            outputs: what the model returned for them, in the same order.
        """

    def evaluate(self) -> dict | None:
        """Compute the metrics; called in all processes.

        Returns:
            {task: {metric: value}} in the main process; other processes may return None.
        """


class DatasetEvaluators(DatasetEvaluator):
    """Several evaluators as one; their results are joined and must not have keys in common."""

    def __init__(self, evaluators: list[DatasetEvaluator]) -> None:
        super().__init__()
        self._evaluators = evaluators

    def reset(self) -> None:
        for evaluator in self._evaluators:
            evaluator.reset()

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for evaluator in self._evaluators:
            evaluator.process(inputs, outputs)

    def evaluate(self) -> OrderedDict:
        joined: OrderedDict = OrderedDict()
        for evaluator in self._evaluators:
            part = evaluator.evaluate()
            if part is None or not is_main_process():
                continue
            for key, value in part.items():
                if key in joined:
                    culprit = type(evaluator).__name__
                    raise ValueError(f"Two evaluators have results named {key!r}; {culprit} is one.")
                joined[key] = value
        return joined


@contextmanager
def inference_context(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside, the mode from before outside (also after an error)."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def inference_on_dataset(
    model,
    data_loader,
    evaluator: DatasetEvaluator | list[DatasetEvaluator] | None,
    callbacks: Mapping | None = None,
) -> dict:
    """Run `model` over `data_loader` and evaluate the outputs.

    Args:
        model: called with each batch; a module is in eval mode and without gradients meanwhile.
        data_loader: has a length; each process has its part of the data.
        evaluator: one or several, or None to run the model alone, as a benchmark.
        callbacks: functions without arguments under "on_start", "before_inference", "after_inference"
            and "on_end"; the middle two are called for every batch.

    Returns:
        What `evaluator.evaluate()` returns; an empty dict if that is None.
    """
    if evaluator is None or isinstance(evaluator, (list, tuple)):
        evaluator = DatasetEvaluators(list(evaluator or []))
    callbacks = callbacks or {}

    def notify(event: str) -> None:
        callbacks.get(event, lambda: None)()

    total = len(data_loader)
    logger.info("Inference on %d batches", total)
    evaluator.reset()
    watch = _Stopwatch(total)
    with ExitStack() as stack:
        if isinstance(model, torch.nn.Module):
            stack.enter_context(inference_context(model))
        stack.enter_context(torch.no_grad())
        notify("on_start")
        watch.start()
        for inputs in data_loader:
            watch.lap("data")
            notify("before_inference")
            outputs = model(inputs)
            # GPU work is counted where it was ordered, not where somebody waits for it.
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            notify("after_inference")
            watch.lap("model")
            evaluator.process(inputs, outputs)
            watch.lap("evaluator")
            watch.finish_batch()
        notify("on_end")
    watch.log_summary()

    results = evaluator.evaluate()
    return {} if results is None else results


class _Stopwatch:
    """Seconds a batch by part; the first batches (caches, cuDNN, worker start) do not count."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._warmup = max(min(5, total - 1), 0)
        self._done = 0

    def start(self) -> None:
        self._parts = {"data": 0.0, "model": 0.0, "evaluator": 0.0}
        self._began = self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self._parts[part] += now - self._last
        self._last = now

    def finish_batch(self) -> None:
        self._done += 1
        if self._done == self._warmup:
            self.start()
        elif self._done > 2 * self._warmup:
            # An estimate from fewer batches would jump about.
            per_batch, parts = self._averages()
            left = datetime.timedelta(seconds=int(per_batch * (self._total - self._done)))
            message = f"Inference {self._done}/{self._total}: {per_batch:.4f} s/batch ({parts}), ETA {left}"
            # The caller's line is this one for all batches, so that the period holds.
            log_every_n_seconds(logging.INFO, message, n=5, name=__name__)

    def _averages(self) -> tuple[float, str]:
        count = max(self._done - self._warmup, 1)
        parts = ", ".join(f"{name} {seconds / count:.4f}" for name, seconds in self._parts.items())
        return (self._last - self._began) / count, parts

    def log_summary(self) -> None:
        if self._done == 0:
            return
        per_batch, parts = self._averages()
        logger.info(
            f"Inference took {per_batch:.4f} s/batch ({parts}) on each of {get_world_size()} processes, "
            f"without the first {self._warmup} batches"
        )
