"""DefaultTrainer: resuming, files, schedule."""

import json

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    SimpleTrainer,
    hooks,
)
from toy_training import Toy, ToyTrainer, config, curve, trained

pytestmark = pytest.mark.usefixtures("one_thread")


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
