"""Hooks of the training loop."""

import json

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import (
    SimpleTrainer,
    default_writers,
    hooks,
)
from detectron2.utils.events import EventStorage, EventWriter, get_event_storage
from torch import nn
from toy_training import curve, toy_trainer

pytestmark = pytest.mark.usefixtures("one_thread")


class Memory(EventWriter):
    def __init__(self):
        self.writes, self.closed = [], False

    def write(self):
        self.writes.append(get_event_storage().iter)

    def close(self):
        self.closed = True


def test_periodic_writer():
    writer = Memory()
    trainer = toy_trainer()
    trainer.register_hooks([hooks.PeriodicWriter([writer], period=3)])
    trainer.train(0, 8)
    assert writer.writes == [2, 5, 7, 8]
    assert writer.closed


def test_default_writers(tmp_path):
    writers = default_writers(str(tmp_path), 10)
    with EventStorage(0) as storage:
        storage.put_scalars(total_loss=1.5, lr=0.1)
        storage.step()
        for writer in writers:
            writer.write()
            writer.close()
    line = json.loads((tmp_path / "metrics.json").read_text().splitlines()[-1])
    assert (line["total_loss"], line["lr"]) == (1.5, 0.1)


def test_evaluation_hook():
    calls = []

    def evaluation():
        calls.append(trainer.iter)
        return {"bbox": {"AP": len(calls)}, "speed": 2}

    trainer = toy_trainer()
    trainer.register_hooks([hooks.EvalHook(3, evaluation)])
    trainer.train(0, 6)
    # Not twice after the last iteration.
    assert calls == [2, 6]
    assert curve(trainer, "bbox/AP") == [1, 2]
    assert curve(trainer, "speed") == [2, 2]


def test_evaluation_hook_after_an_error():
    trainer = toy_trainer(loader=[torch.rand(4, 3)] * 2)
    calls = []
    trainer.register_hooks([hooks.EvalHook(0, lambda: calls.append(1))])
    with pytest.raises(StopIteration):
        trainer.train(0, 6)
    assert calls == []


def test_evaluation_hook_wants_numbers():
    trainer = toy_trainer()
    trainer.register_hooks([hooks.EvalHook(1, lambda: {"bbox": {"AP": "high"}})])
    with pytest.raises(ValueError, match="bbox/AP"):
        trainer.train(0, 3)


@pytest.mark.parametrize(("mode", "best"), [("max", 3.0), ("min", 1.0)])
def test_best_checkpoint(tmp_path, mode, best):
    values = iter([2.0, 3.0, 1.0, float("nan")])
    trainer = toy_trainer()
    kept = {}

    def evaluation():
        value = next(values)
        kept[value] = trainer.model.linear.weight.detach().clone()
        return {"AP": value}

    checkpointer = DetectionCheckpointer(trainer.model, str(tmp_path))
    trainer.register_hooks(
        [hooks.EvalHook(2, evaluation), hooks.BestCheckpointer(2, checkpointer, "AP", mode)]
    )
    trainer.train(0, 8)
    stored = torch.load(tmp_path / "model_best.pth", weights_only=False)["model"]["linear.weight"]
    assert torch.equal(torch.as_tensor(stored), kept[best])


def test_best_checkpoint_needs_a_direction():
    with pytest.raises((ValueError, AssertionError), match="up"):
        hooks.BestCheckpointer(1, None, "AP", mode="up")


def test_precise_batch_norm():
    torch.manual_seed(0)
    data = [torch.randn(16, 3) * 2 + 5 for _ in range(6)]
    batches = [data[i % 6] for i in range(20)]

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(x).square().sum()

    model = Loss()
    trainer = SimpleTrainer(model, batches, torch.optim.SGD(model.parameters(), lr=0.0))
    trainer.register_hooks([hooks.PreciseBN(0, model, batches, 6)])
    trainer.train(0, 1)
    torch.testing.assert_close(model.norm.running_mean, torch.cat(data).mean(0), rtol=0, atol=1e-5)
    assert list(trainer.storage.histories()) == ["rank_data_time", "data_time", "total_loss"]


def test_profiler_writes_a_trace(tmp_path):
    trainer = toy_trainer()
    activities = [torch.profiler.ProfilerActivity.CPU]
    profiler = hooks.TorchProfiler(
        lambda t: t.iter == 1, str(tmp_path), activities=activities, save_tensorboard=False
    )
    trainer.register_hooks([profiler, hooks.TorchMemoryStats(period=1)])
    trainer.train(0, 3)
    traces = list(tmp_path.iterdir())
    assert len(traces) == 1
    assert "1" in traces[0].name
    assert "traceEvents" in json.loads(traces[0].read_text())


def test_tensorboard_profiler(tmp_path):
    trainer = toy_trainer()
    activities = [torch.profiler.ProfilerActivity.CPU]
    trainer.register_hooks([hooks.TorchProfiler(lambda t: t.iter == 1, str(tmp_path), activities=activities)])
    trainer.train(0, 3)
    assert [path for path in tmp_path.rglob("*.json*") if path.is_file()]


def test_timer_leaves_the_warm_up_out():
    trainer = toy_trainer()
    trainer.register_hooks([hooks.IterationTimer(warmup_iter=3)])
    trainer.train(10, 16)
    assert [i for _, i in trainer.storage.history("time").values()] == [12, 13, 14, 15]
    assert all(0 < value < 10 for value in curve(trainer, "time"))
