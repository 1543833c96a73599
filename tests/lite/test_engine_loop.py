"""Training loop: order of hooks, steps, losses, state, mixed precision."""

import itertools

import detectron2
import pytest
import torch
from detectron2.engine import (
    AMPTrainer,
    HookBase,
    SimpleTrainer,
)
from detectron2.utils.events import EventStorage
from torch import nn
from toy_training import Loader, Toy, Trace, curve, toy_trainer

pytestmark = pytest.mark.usefixtures("one_thread")


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
    assert len(momentum) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(momentum, expected))


def amp_on_cpu():
    trainer = toy_trainer(AMPTrainer, precision=torch.bfloat16)
    try:
        trainer.train(0, 1)
    except AssertionError as error:
        if "lite" in detectron2.__version__ or "CUDA" not in str(error):
            raise
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
