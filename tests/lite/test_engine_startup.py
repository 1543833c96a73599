"""Arguments, set-up and predictor."""

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
    DefaultPredictor,
    DefaultTrainer,
    default_argument_parser,
    default_setup,
)
from toy_training import Toy, config

pytestmark = pytest.mark.usefixtures("one_thread")


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
