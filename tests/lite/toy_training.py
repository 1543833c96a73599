"""A linear model, its data and its trainers, by themselves and from a config."""

import itertools

import torch
from detectron2.config import get_cfg
from detectron2.engine import (
    DefaultTrainer,
    HookBase,
    SimpleTrainer,
)
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn


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
