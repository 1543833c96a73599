"""Training loop, hooks, resuming, set-up and predictor on toy models."""

import itertools
import json
import logging
from types import SimpleNamespace

import detectron2
import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.engine import (
    AMPTrainer,
    DefaultPredictor,
    DefaultTrainer,
    HookBase,
    SimpleTrainer,
    default_argument_parser,
    default_setup,
    default_writers,
    hooks,
)
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import EventStorage, EventWriter, get_event_storage
from torch import nn


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Toy(nn.Module):
    """Losses of a linear model, random by dropout."""

    def __init__(self, cfg=None):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.dropout = nn.Dropout(0.2)

    def forward(self, batch):
        if not self.training:
            return [{"image": item["image"], "size": (item["height"], item["width"])} for item in batch]
        x = self.dropout(self.linear(batch))
        return {"first": x.square().mean(), "second": (x - 1).abs().mean()}


@META_ARCH_REGISTRY.register()
class ToyOfEngineTest(Toy):
    """The same, for configs."""


class Loader:
    """Batches that depend on their number alone; counts the iterators made."""

    def __init__(self, start=0):
        self.start = start
        self.iterators = 0

    def __iter__(self):
        self.iterators += 1
        for number in itertools.count(self.start):
            yield torch.rand(4, 3, generator=torch.Generator().manual_seed(number))


def toy_trainer(kind=SimpleTrainer, loader=None, **kwargs):
    torch.manual_seed(0)
    model = Toy()
    return kind(
        model, loader or Loader(), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), **kwargs
    )


def curve(trainer, name="total_loss"):
    return [value for value, _ in trainer.storage.history(name).values()]


class Trace(HookBase):
    def __init__(self, events, name):
        self.events, self.name = events, name

    def note(self, event):
        self.events.append(f"{self.name} {event} {self.trainer.iter}")

    def before_train(self):
        self.note("before_train")

    def before_step(self):
        self.note("before_step")

    def after_backward(self):
        assert all(p.grad is not None for p in self.trainer.model.parameters())
        self.note("after_backward")

    def after_step(self):
        self.note("after_step")

    def after_train(self):
        self.note("after_train")


def test_order_of_hooks():
    events = []
    trainer = toy_trainer()
    trainer.register_hooks([Trace(events, "a"), None, Trace(events, "b")])
    trainer.train(3, 5)
    of_a_step = ("before_step", "after_backward", "after_step")
    steps = [f"{name} {event} {i}" for i in (3, 4) for event in of_a_step for name in "ab"]
    assert events == ["a before_train 3", "b before_train 3", *steps, "a after_train 5", "b after_train 5"]
    assert (trainer.start_iter, trainer.iter, trainer.max_iter) == (3, 5, 5)


def test_after_train_runs_after_an_error():
    events = []
    trainer = toy_trainer(loader=[torch.rand(4, 3)])
    trainer.register_hooks([Trace(events, "a")])
    with pytest.raises(StopIteration):
        trainer.train(0, 5)
    assert events[-1] == "a after_train 1"


def test_the_loader_is_started_by_the_first_step():
    loader = Loader()
    trainer = toy_trainer(loader=loader)
    assert loader.iterators == 0
    trainer.train(0, 3)
    assert loader.iterators == 1
    other = Loader(start=50)
    trainer.reset_data_loader(lambda: other)
    assert other.iterators == 0
    trainer.train(3, 4)
    assert (loader.iterators, other.iterators) == (1, 1)


def test_a_step_by_hand():
    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return (self.slope * x - 1).square()

    model = Line().eval()
    trainer = SimpleTrainer(
        model, [torch.tensor(1.0), torch.tensor(2.0)], torch.optim.SGD(model.parameters(), lr=0.1)
    )
    assert model.training
    trainer.train(0, 2)
    # Gradients 2 (2 - 1) = 2 and 4 (1.8 * 2 - 1) = 10.4.
    assert curve(trainer) == pytest.approx([1.0, 6.76])
    assert model.slope.item() == pytest.approx(2 - 0.2 - 1.04)
    assert set(trainer.storage.latest()) == {"total_loss", "data_time", "rank_data_time"}


@pytest.mark.parametrize("kwargs", [{"zero_grad_before_forward": True}, {"async_write_metrics": True}])
def test_options_do_not_change_the_training(kwargs):
    plain = toy_trainer()
    plain.train(0, 6)
    other = toy_trainer(**kwargs)
    other.train(0, 6)
    assert curve(other) == curve(plain)
    assert len(curve(other)) == 6


def test_metrics_can_be_gathered_rarely():
    often = toy_trainer()
    often.train(0, 7)
    rarely = toy_trainer(gather_metric_period=3)
    rarely.train(0, 7)
    assert [i for _, i in rarely.storage.history("total_loss").values()] == [2, 5]
    assert curve(rarely) == [curve(often)[2], curve(often)[5]]


def test_losses_of_several_types_are_reported_exactly():
    losses = {
        "half": torch.tensor(0.1, dtype=torch.float16),
        "single": torch.tensor([0.1]),
        "double": torch.tensor(0.1, dtype=torch.float64),
    }
    with EventStorage() as storage:
        SimpleTrainer.write_metrics(losses, 0.0, 0)
    assert {name: storage.latest()[name][0] for name in losses} == {k: v.item() for k, v in losses.items()}


@pytest.mark.skipif("lite" not in detectron2.__version__, reason="the other engine only logs such an error")
def test_an_error_in_the_metrics_thread_is_raised():
    trainer = toy_trainer(async_write_metrics=True)
    forward = trainer.model.forward
    trainer.model.forward = lambda batch: {**forward(batch), "bad": batch.sum() * float("nan")}
    with pytest.raises(FloatingPointError, match="bad"):
        trainer.train(0, 3)
    trainer.model.forward = forward
    trainer.train(0, 3)
    assert len(curve(trainer)) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_training(value):
    class Breaks(Toy):
        def forward(self, batch):
            losses = super().forward(batch)
            if len(seen) == 2:
                losses["second"] = losses["second"] * value
            seen.append(1)
            return losses

    seen = []
    model = Breaks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = SimpleTrainer(model, Loader(), optimizer)
    with pytest.raises(FloatingPointError) as raised:
        trainer.train(10, 20)
    message = str(raised.value)
    assert "12" in message
    assert "'first'" in message and "'second'" in message
    assert ("nan" if value != value else "inf") in message
    assert trainer.iter == 12
    # The broken gradients have not reached the weights.
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_model_in_eval_mode_is_not_trained():
    trainer = toy_trainer()
    trainer.model.eval()
    with pytest.raises((RuntimeError, AssertionError), match="eval mode"):
        trainer.train(0, 1)


class Counting(HookBase):
    count = 0

    def after_step(self):
        self.count += 1

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


class Silent(HookBase):
    pass


def test_state_of_trainer_and_hooks():
    trainer = toy_trainer()
    trainer.register_hooks([Silent(), Counting()])
    trainer.train(0, 3)
    state = trainer.state_dict()
    assert state["hooks"] == {"Counting": {"count": 3}}
    assert set(state) == {"iteration", "hooks", "optimizer"}
    other = toy_trainer()
    hook = Counting()
    other.register_hooks([hook])
    other.load_state_dict({**state, "hooks": {**state["hooks"], "Gone": {"x": 1}}})
    assert hook.count == 3
    assert other.iter == 3
    momentum = [s["momentum_buffer"] for s in other.optimizer.state_dict()["state"].values()]
    expected = [s["momentum_buffer"] for s in trainer.optimizer.state_dict()["state"].values()]
    assert all(torch.equal(a, b) for a, b in zip(momentum, expected))


def amp_on_cpu():
    trainer = toy_trainer(AMPTrainer, precision=torch.bfloat16)
    try:
        trainer.train(0, 1)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_amp(precision):
    if not torch.cuda.is_available() and not amp_on_cpu():
        pytest.skip("this engine trains with mixed precision on a GPU only, and there is none")
    seen = []

    class Watching(Toy):
        def forward(self, batch):
            seen.append(self.linear(batch).dtype)
            return super().forward(batch)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = Watching().to(device)
    start = [p.detach().clone() for p in model.parameters()]
    batches = [batch.to(device) for batch in itertools.islice(Loader(), 4)]
    trainer = AMPTrainer(
        model, batches, torch.optim.SGD(model.parameters(), lr=0.1), precision=precision, log_grad_scaler=True
    )
    trainer.train(0, 4)
    assert set(seen) == {precision}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(start, model.parameters()))
    assert len(trainer.storage.history("[metric]grad_scaler").values()) == 4
    state = trainer.state_dict()
    assert "grad_scaler" in state
    other = AMPTrainer(model, batches, torch.optim.SGD(model.parameters(), lr=0.1), precision=precision)
    other.load_state_dict(state)
    assert other.grad_scaler.state_dict() == state["grad_scaler"]


def config(folder, **changes):
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(folder)
    cfg.MODEL.META_ARCHITECTURE = "ToyOfEngineTest"
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.SOLVER.MAX_ITER = 8
    cfg.SOLVER.STEPS = (5,)
    cfg.SOLVER.WARMUP_ITERS = 4
    cfg.SOLVER.BASE_LR = 0.1
    cfg.SOLVER.CHECKPOINT_PERIOD = 3
    for key, value in changes.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


class ToyTrainer(DefaultTrainer):
    """Randomness and data follow the iteration, so that a resumed training can be compared."""

    @classmethod
    def build_train_loader(cls, cfg):
        return Loader()

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        return {"bbox": {"AP": 1.0}}

    def run_step(self):
        if self._trainer._data_loader_iter_obj is None:
            self._trainer.data_loader = Loader(start=self.iter)
        torch.manual_seed(self.iter)
        super().run_step()


def trained(folder, resume=False, **changes):
    torch.manual_seed(0)
    trainer = ToyTrainer(config(folder, **changes))
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def test_a_resumed_training_continues_exactly(tmp_path):
    whole = trained(tmp_path / "whole")
    assert (tmp_path / "whole" / "model_final.pth").is_file()

    class Killed(Exception):
        pass

    def kill(trainer):
        if trainer.iter == 4:
            raise Killed

    torch.manual_seed(0)
    broken = ToyTrainer(config(tmp_path / "parts"))
    broken.register_hooks([hooks.CallbackHook(after_step=kill)])
    with pytest.raises(Killed):
        broken.train()
    names = {path.name for path in (tmp_path / "parts").iterdir()}
    assert "model_0000002.pth" in names
    assert "model_final.pth" not in names

    torch.manual_seed(123)
    resumed = ToyTrainer(config(tmp_path / "parts"))
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 3
    resumed.train()
    assert curve(resumed) == curve(whole)[3:]
    assert curve(resumed, "lr") == curve(whole, "lr")[3:]
    for (name, a), (_, b) in zip(whole.model.state_dict().items(), resumed.model.state_dict().items()):
        assert torch.equal(a, b), name

    again = ToyTrainer(config(tmp_path / "parts"))
    again.resume_or_load(resume=True)
    assert again.start_iter == again.max_iter == 8


def test_without_resume_the_training_starts_anew(tmp_path):
    first = trained(tmp_path, SOLVER__MAX_ITER=3)
    weights = str(tmp_path / "model_final.pth")
    fresh = ToyTrainer(config(tmp_path / "other", MODEL__WEIGHTS=weights))
    fresh.resume_or_load(resume=True)
    assert fresh.start_iter == 0
    assert torch.equal(fresh.model.linear.weight, first.model.linear.weight)
    assert fresh.scheduler.last_epoch == 0
    here = ToyTrainer(config(tmp_path, MODEL__WEIGHTS=weights))
    here.resume_or_load(resume=False)
    assert here.start_iter == 0


def test_warm_up_and_steps_are_logged(tmp_path):
    # Linear from a thousandth over four iterations, a tenth from iteration 5 on.
    factors = [0.001 + 0.999 * i / 4 for i in range(4)] + [1] + [0.1] * 3
    assert curve(trained(tmp_path), "lr") == pytest.approx([0.1 * f for f in factors])


def test_default_trainer_is_made_of_parts(tmp_path):
    trainer = ToyTrainer(config(tmp_path))
    assert [type(h).__name__ for h in trainer._hooks] == [
        "IterationTimer", "LRScheduler", "PeriodicCheckpointer", "EvalHook", "PeriodicWriter",
    ]  # fmt: skip
    assert trainer.model is trainer._trainer.model
    assert trainer.optimizer is trainer._trainer.optimizer
    assert trainer.data_loader is trainer._trainer.data_loader
    assert trainer.scheduler.optimizer is trainer.optimizer
    assert (trainer.start_iter, trainer.max_iter) == (0, 8)
    assert type(trainer._trainer) is SimpleTrainer
    assert type(ToyTrainer(config(tmp_path, SOLVER__AMP__ENABLED=True))._trainer) is AMPTrainer
    replacement = Toy()
    trainer.model = replacement
    assert trainer._trainer.model is replacement


def test_files_and_lines_of_a_training(tmp_path):
    trained(tmp_path, TEST__EVAL_PERIOD=4)
    names = {path.name for path in tmp_path.iterdir()}
    assert {
        "last_checkpoint",
        "metrics.json",
        "model_0000002.pth",
        "model_0000005.pth",
        "model_final.pth",
    } <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    by_iteration = {line["iteration"]: line for line in lines if "total_loss" in line}
    assert list(by_iteration) == [7]
    assert {"first", "second", "lr", "time", "data_time", "eta_seconds"} <= set(by_iteration[7])
    results = [line["iteration"] for line in lines if "bbox/AP" in line]
    assert results == [3, 8] or results == [7, 8]
    checkpoint = torch.load(tmp_path / "model_0000005.pth", weights_only=False)
    assert set(checkpoint) == {"model", "trainer", "iteration"}
    assert checkpoint["iteration"] == checkpoint["trainer"]["iteration"] == 5
    assert set(checkpoint["trainer"]) == {"iteration", "hooks", "_trainer"}


def test_schedule_scales_with_the_number_of_processes():
    cfg = get_cfg()
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 8
    cfg.SOLVER.IMS_PER_BATCH = 16
    cfg.SOLVER.BASE_LR = 0.02
    cfg.SOLVER.MAX_ITER = 900
    cfg.SOLVER.STEPS = (600, 801)
    cfg.SOLVER.WARMUP_ITERS = 100
    cfg.SOLVER.CHECKPOINT_PERIOD = 500
    cfg.TEST.EVAL_PERIOD = 50
    cfg.freeze()
    scaled = DefaultTrainer.auto_scale_workers(cfg, 4)
    assert scaled.is_frozen()
    assert scaled.SOLVER.REFERENCE_WORLD_SIZE == 4
    assert (scaled.SOLVER.IMS_PER_BATCH, scaled.SOLVER.BASE_LR) == (8, 0.01)
    assert (scaled.SOLVER.MAX_ITER, scaled.SOLVER.STEPS) == (1800, (1200, 1602))
    assert (scaled.SOLVER.WARMUP_ITERS, scaled.SOLVER.CHECKPOINT_PERIOD) == (200, 1000)
    assert scaled.TEST.EVAL_PERIOD == 100
    assert cfg.SOLVER.IMS_PER_BATCH == 16
    assert DefaultTrainer.auto_scale_workers(cfg, 8) is cfg


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


def test_arguments():
    parser = default_argument_parser(epilog="the end")
    assert "the end" in parser.format_help()
    args = parser.parse_args(
        ["--resume", "--num-gpus", "4", "--config-file", "x.yaml", "A.B", "1", "C", "two"]
    )
    assert args.resume and not args.eval_only
    assert (args.num_gpus, args.num_machines, args.machine_rank) == (4, 1, 0)
    assert args.config_file == "x.yaml"
    assert args.opts == ["A.B", "1", "C", "two"]
    assert args.dist_url.startswith("tcp://127.0.0.1:")


def test_setup_writes_and_seeds(tmp_path):
    cfg = config(tmp_path / "job", SEED=11)
    draws = []
    for _ in range(2):
        default_setup(cfg, SimpleNamespace(config_file="", eval_only=False))
        draws.append((torch.rand(3).tolist(), np.random.rand(), torch.randint(100, (1,)).item()))
    assert draws[0] == draws[1]
    again = get_cfg()
    again.merge_from_file(str(tmp_path / "job" / "config.yaml"))
    # As json, because yaml has no tuples.
    assert json.dumps(again, sort_keys=True) == json.dumps(cfg, sort_keys=True)
    assert "ToyOfEngineTest" in (tmp_path / "job" / "log.txt").read_text()
    for name in ("detectron2", "fvcore"):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            handler.close()
            logger.removeHandler(handler)


@pytest.mark.skipif("lite" not in detectron2.__version__, reason="the other engine has test-time augmentation")
def test_missing_test_time_augmentation_is_said_once(tmp_path, monkeypatch):
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append((record.levelno, record.getMessage()))
    engine = logging.getLogger("detectron2.engine.defaults")
    monkeypatch.setattr(engine, "handlers", [handler])
    cfg = config(tmp_path, TEST__AUG__ENABLED=False)
    cfg.DATASETS.TEST = ()
    assert DefaultTrainer.test(cfg, Toy()) == {} and not said
    cfg.TEST.AUG.ENABLED = True
    for _ in range(2):
        DefaultTrainer.test(cfg, Toy())
    (level, text), *others = said
    assert level == logging.WARNING and "TEST.AUG.ENABLED: this engine has no test-time augmentation" in text
    assert not others


@pytest.mark.parametrize("order", ["BGR", "RGB"])
def test_predictor(tmp_path, order):
    model = Toy()
    DetectionCheckpointer(model, str(tmp_path)).save("w")
    weights = str(tmp_path / "w.pth")
    cfg = config(tmp_path, INPUT__FORMAT=order, INPUT__MIN_SIZE_TEST=20, MODEL__WEIGHTS=weights)
    predictor = DefaultPredictor(cfg)
    assert torch.equal(predictor.model.linear.weight, model.linear.weight)
    image = np.zeros((10, 15, 3), dtype=np.uint8)
    image[..., 0] = 200
    output = predictor(image)
    assert output["size"] == (10, 15)
    assert output["image"].shape == (3, 20, 30)
    assert output["image"].dtype == torch.float32
    blue = 0 if order == "BGR" else 2
    assert output["image"][blue].min() == 200
    assert output["image"].sum() == 200 * 20 * 30
