"""Trainer, hooks, checkpoints, set-up and predictor on toy models.

The run under the reference engine leaves checkpoints in the work folder, from which the other run resumes.
"""

import contextlib
import io
import itertools
import json
import logging
import os
import pathlib
from types import SimpleNamespace

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.engine import (
    DefaultPredictor,
    DefaultTrainer,
    HookBase,
    SimpleTrainer,
    default_argument_parser,
    default_setup,
    hooks,
)
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import get_event_storage
from fvcore.common.checkpoint import Checkpointer
from fvcore.common.param_scheduler import CosineParamScheduler
from torch import nn

TOLERANCE = 1e-7

TIMES = ("time", "data_time", "rank_data_time", "eta_seconds")


@META_ARCH_REGISTRY.register()
class EngineProbeModel(nn.Module):
    """Two losses of a small network with batch norm; in eval mode tells what it was given."""

    def __init__(self, cfg):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.rand(parameter.shape, generator=generator) - 0.3

    def forward(self, batch):
        if not self.training:
            return [{"image": item["image"], "size": (item["height"], item["width"])} for item in batch]
        x = self.body(batch)
        get_event_storage().put_scalar("seen", float(batch.sum()))
        return {"loss_a": (x - 1).abs().mean(), "loss_b": x.square().mean()}


class _Batches:
    """An endless loader that counts how often it was started."""

    starts = 0

    def __iter__(self):
        type(self).starts += 1
        generator = torch.Generator().manual_seed(5)
        while True:
            yield torch.rand(6, 3, generator=generator)


class _Recorder(HookBase):
    def __init__(self, events):
        for name in ("before_train", "after_train", "before_step", "after_step", "after_backward"):
            setattr(self, name, lambda name=name: events.append(f"{name} {self.trainer.iter}"))


class _Constant(DatasetEvaluator):
    def __init__(self, value):
        self.value = value
        self.count = 0

    def process(self, inputs, outputs):
        self.count += len(inputs)

    def evaluate(self):
        return {"bbox": {"AP": self.value, "AP-x": self.count}}


class _Trainer(DefaultTrainer):
    @classmethod
    def build_train_loader(cls, cfg):
        return _Batches()

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        item = {"image": torch.zeros(3, 4, 4), "height": 4, "width": 4}
        return [[item], [item, item]]

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        if dataset_name == "none":
            raise NotImplementedError
        return _Constant(len(dataset_name))


def _config(output: pathlib.Path | str, **changes):
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "EngineProbeModel"
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.OUTPUT_DIR = str(output)
    cfg.DATASETS.TEST = ("first",)
    solver = cfg.SOLVER
    solver.BASE_LR, solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS = 0.05, 6, (4,), 3
    solver.CHECKPOINT_PERIOD = 3
    cfg.TEST.EVAL_PERIOD = 2
    for key, value in changes.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def _trace(trainer) -> dict:
    return {
        name: [[float(v) for v in pair] for pair in history.values()]
        for name, history in sorted(trainer.storage.histories().items())
        if name not in TIMES
    }


def _flat(prefix: str, content, out: dict) -> None:
    """Nested containers of a checkpoint as {path: number, array or text}."""
    if isinstance(content, dict):
        for key, value in content.items():
            _flat(f"{prefix}/{key}", value, out)
    elif isinstance(content, (list, tuple)):
        for index, value in enumerate(content):
            _flat(f"{prefix}/{index}", value, out)
    elif isinstance(content, torch.Tensor):
        out[prefix] = content.numpy()
    elif isinstance(content, (bool, type(None))):
        out[prefix] = str(content)
    else:
        out[prefix] = content


def _curves(prefix: str, trace: dict, out: dict) -> None:
    out[f"{prefix}/names"] = sorted(trace)
    for name, pairs in trace.items():
        out[f"{prefix}/{name}"] = np.array(pairs)


def _default_trainer(workdir, output, out):
    _Batches.starts = 0
    events = []
    trainer = _Trainer(_config(output / "full"))
    out["hooks"] = [type(hook).__qualname__ for hook in trainer._hooks]
    trainer.register_hooks([_Recorder(events), None])
    out["loader starts before training"] = _Batches.starts
    trainer.resume_or_load(resume=False)
    out["train returns"] = str(trainer.train())
    out["loader starts"] = _Batches.starts
    out["events"] = events
    _curves("full", _trace(trainer), out)
    files = sorted(path.name for path in (output / "full").iterdir())
    out["files"] = [name for name in files if not name.startswith("events.out")]
    lines = [json.loads(line) for line in (output / "full" / "metrics.json").read_text().splitlines()]
    out["metrics.json"] = json.dumps([sorted(line) for line in lines])
    out["metrics.json/values"] = np.array([line.get("total_loss", line["iteration"]) for line in lines])
    checkpoint = torch.load(output / "full" / "model_0000002.pth", weights_only=False)
    _flat("checkpoint", checkpoint, out)

    # The first run leaves a folder of its own; the second one resumes from that folder.
    source = workdir / "resume"
    if not source.exists():
        source.mkdir()
        (source / "model_0000002.pth").write_bytes((output / "full" / "model_0000002.pth").read_bytes())
        (source / "last_checkpoint").write_text("model_0000002.pth")
    target = output / "resumed"
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    resumed = _Trainer(_config(target))
    resumed.resume_or_load(resume=True)
    out["resumed/start"] = [resumed.start_iter, resumed.iter, resumed.max_iter]
    _flat("resumed/state", resumed.state_dict(), out)
    resumed.train()
    _curves("resumed", _trace(resumed), out)

    scaled = _Trainer.auto_scale_workers(
        _config("anywhere", SOLVER__REFERENCE_WORLD_SIZE=4, SOLVER__IMS_PER_BATCH=16, SOLVER__MAX_ITER=1001),
        3,
    )
    out["scaled"] = json.dumps(scaled, sort_keys=True)
    precise = _Trainer(_config(output / "bn", TEST__PRECISE_BN__ENABLED=True, TEST__PRECISE_BN__NUM_ITER=3))
    out["precise hooks"] = [type(hook).__qualname__ for hook in precise._hooks]
    precise.train()
    _flat("precise", precise.model.state_dict(), out)

    cfg = _config(output / "verify", TEST__EXPECTED_RESULTS=[["bbox", "AP", 5.0, 0.1]])
    out["verified"] = json.dumps(_Trainer(cfg).train())
    for names in (("first",), ("first", "none"), ("none",)):
        cfg = _config(output, DATASETS__TEST=names)
        out[f"test {names}"] = json.dumps(_Trainer.test(cfg, trainer.model))
    out["test given"] = json.dumps(_Trainer.test(_config(output), trainer.model, _Constant(9.5)))


class _Quadratic(nn.Module):
    def __init__(self, scalar=False):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.scalar = scalar

    def forward(self, x):
        value = (self.weight * x).square().sum()
        return value if self.scalar else {"a": value, "b": self.weight.abs().sum()}


def _note_calls(calls: list) -> hooks.CallbackHook:
    def noting(event):
        return lambda trainer: calls.append(f"{event} {trainer.iter}")

    return hooks.CallbackHook(
        before_train=noting("before_train"),
        before_step=noting("before_step"),
        after_step=noting("after_step"),
        after_train=noting("after_train"),
    )


def _simple_trainer(prefix, scalar, kwargs, out):
    model = _Quadratic(scalar).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    trainer = SimpleTrainer(model, itertools.repeat(torch.tensor([1.0, 0.5])), optimizer, **kwargs)
    calls = []
    scheduler = hooks.LRScheduler(optimizer, CosineParamScheduler(1.0, 0.1))
    trainer.register_hooks([hooks.IterationTimer(), scheduler, _note_calls(calls)])
    trainer.train(0, 5)
    _curves(prefix, _trace(trainer), out)
    out[f"{prefix}/calls"] = calls
    out[f"{prefix}/timed"] = [i for _, i in trainer.storage.history("time").values()]
    out[f"{prefix}/state"] = json.dumps(trainer.state_dict(), default=str, sort_keys=True)


def _simple(out):
    settings = {
        "plain": {},
        "zero first": {"zero_grad_before_forward": True},
        "every second": {"gather_metric_period": 2},
        "async": {"async_write_metrics": True},
    }
    for name, kwargs in settings.items():
        for scalar in (False, True):
            _simple_trainer(f"simple/{name}/{scalar}", scalar, kwargs, out)

    groups = [[nn.Parameter(torch.zeros(1))] for _ in range(4)]
    for name, rates in (("two equal", [0.1, 0.2, 0.3, 0.2]), ("all differ", [0.1, 0.2, 0.3, 0.4])):
        params = [{"params": g, "lr": r} for g, r in zip(groups, rates)]
        optimizer = torch.optim.SGD(params, lr=1.0)
        out[f"group/{name}"] = hooks.LRScheduler.get_best_param_group_id(optimizer)
    several = [{"params": groups[0]}, {"params": groups[1] + groups[2]}, {"params": groups[3]}]
    out["group/sizes"] = hooks.LRScheduler.get_best_param_group_id(torch.optim.SGD(several, lr=1.0))


def _broken(out):
    class Bad(_Quadratic):
        def forward(self, x):
            losses = super().forward(x)
            step = int(x.sum())
            return losses if step < 2 else {**losses, "b": losses["b"] * float("inf")}

    model = Bad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = SimpleTrainer(model, (torch.full((2,), i / 2) for i in range(9)), optimizer)
    try:
        trainer.train(0, 9)
    except Exception as error:
        out["broken"] = [type(error).__name__, "iteration" in str(error), "'b'" in str(error)]
    out["broken/iteration"] = trainer.iter


class _Spy(Checkpointer):
    """Notes what would be saved."""

    def __init__(self, model, folder):
        super().__init__(model, folder)
        self.saved = []

    def save(self, name, **kwargs):
        self.saved.append([name, sorted(kwargs.items())])


def _best(mode, values, output, out):
    model = _Quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = SimpleTrainer(model, itertools.repeat(torch.ones(2)), optimizer)
    spy = _Spy(model, str(output))
    results = iter(values)
    trainer.register_hooks(
        [
            hooks.EvalHook(2, lambda: {"bbox": {"AP": next(results)}}),
            hooks.BestCheckpointer(2, spy, "bbox/AP", mode, file_prefix="top"),
        ]
    )
    trainer.train(0, 11)
    out[f"best/{mode}"] = json.dumps(spy.saved)
    _curves(f"best/{mode}/trace", _trace(trainer), out)


def _setup(output, out):
    parser = default_argument_parser()
    out["parser"] = json.dumps(
        [[a.option_strings, a.dest, a.default, a.nargs, str(a.type), a.const] for a in parser._actions],
        default=str,
    )
    line = [
        "--config-file",
        "a.yaml",
        "--num-gpus",
        "2",
        "--eval-only",
        "--dist-url",
        "auto",
        "SOLVER.BASE_LR",
        "1",
    ]
    out["parsed"] = json.dumps(vars(parser.parse_args(line)), sort_keys=True)
    out["parsed/nothing"] = json.dumps(vars(parser.parse_args([])), sort_keys=True)

    benchmark = torch.backends.cudnn.benchmark
    cfg = _config(output / "setup", SEED=3, CUDNN_BENCHMARK=True)
    default_setup(cfg, SimpleNamespace(config_file="", eval_only=True))
    out["setup/benchmark unchanged"] = torch.backends.cudnn.benchmark == benchmark
    out["setup/random"] = [torch.rand(1).item(), float(np.random.rand())]
    default_setup(cfg, SimpleNamespace(config_file=""))
    out["setup/benchmark"] = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = benchmark
    stored = get_cfg()
    stored.merge_from_file(os.path.join(cfg.OUTPUT_DIR, "config.yaml"))
    out["setup/config.yaml"] = json.dumps(stored, sort_keys=True) == json.dumps(cfg, sort_keys=True)
    out["setup/files"] = sorted(os.listdir(cfg.OUTPUT_DIR))


def _predictor(output, out):
    image = (np.arange(20 * 30 * 3) % 251).reshape(20, 30, 3).astype(np.uint8)
    MetadataCatalog.get("first").set(thing_classes=["x"])
    for order in ("BGR", "RGB"):
        cfg = _config(output, INPUT__FORMAT=order, INPUT__MIN_SIZE_TEST=10, INPUT__MAX_SIZE_TEST=14)
        path = str(output / "weights.pth")
        DetectionCheckpointer(EngineProbeModel(cfg), str(output)).save("weights")
        cfg.MODEL.WEIGHTS = path
        predictor = DefaultPredictor(cfg)
        answer = predictor(image)
        out[f"predictor/{order}"] = answer["image"].numpy()
        out[f"predictor/{order}/size"] = list(answer["size"])
        out[f"predictor/{order}/classes"] = predictor.metadata.thing_classes
        out[f"predictor/{order}/dtype"] = str(answer["image"].dtype)


def probe(workdir: pathlib.Path) -> dict[str, object]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.disable(logging.CRITICAL)
    output = workdir / f"run{os.getpid()}"
    output.mkdir()
    out: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        _default_trainer(workdir, output, out)
        _simple(out)
        _broken(out)
        _best("max", [1.0, 3.0, float("nan"), 2.0, 3.0, 4.0], output, out)
        _best("min", [5.0, 3.0, 4.0, 3.0, 1.0, 2.0], output, out)
        _setup(output, out)
        _predictor(output, out)
    logging.disable(logging.NOTSET)
    return out
