"""Every yaml of a distillation loss builds its student, teacher and loss, and takes a step on tiny data."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from msad import load_config
from msad.data import register_datasets
from msad.distill.losses import DISTILL_LOSS_REGISTRY
from msad.engine import DistillTrainer

ROOT = Path(__file__).parents[2] / "configs"
NUCLEI = sorted(path for path in (ROOT / "nuclei" / "losses").glob("*.yaml") if not path.stem.startswith("Base"))
RAW = sorted(path for path in (ROOT / "RawFeatures").glob("*.yaml") if not path.name.startswith("teacher"))
COCO = sorted(path for path in (ROOT / "losses").glob("*.yaml") if not path.name.startswith("Base"))
# Everything that makes a run small; the tiny data sets have six classes.
SHRINK = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "DATALOADER.NUM_WORKERS", 0, "SEED", 3]
SHRINK += ["INPUT.MIN_SIZE_TRAIN", [64], "INPUT.MAX_SIZE_TRAIN", 64, "DATASETS.TRAIN", ["tiny_train"]]
SHRINK += ["SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", [], "TEST.EVAL_PERIOD", 0]
CLASSES = ["MODEL.FCOS.NUM_CLASSES", 6, "MODEL.RETINANET.NUM_CLASSES", 6]
# A stock ResNet of bottlenecks, narrow enough for a test.
NARROW = ["MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16]
NARROW += ["MODEL.RESNETS.WIDTH_PER_GROUP", 4]
NARROW += ["MODEL.FPN.OUT_CHANNELS", 16, "MODEL.RETINANET.NUM_CONVS", 1]
NARROW += ["MODEL.ROI_HEADS.NUM_CLASSES", 6, "MODEL.ROI_BOX_HEAD.FC_DIM", 16]


@pytest.fixture(scope="module")
def losses_of_a_step(project, tmp_path_factory):
    """Makes the losses of the first step of a yaml, with a random teacher of the yaml's own configuration."""
    folder = tmp_path_factory.mktemp("teachers")
    made = {}

    def teacher(path: str, changes: list) -> dict[str, str]:
        if path not in made:
            cfg = load_config(path, [*SHRINK, *changes])
            config, weights = folder / f"{len(made)}.yaml", folder / f"{len(made)}.pth"
            config.write_text(cfg.dump())
            torch.manual_seed(1)
            torch.save({"model": build_model(cfg).state_dict()}, weights)
            made[path] = {"CONFIG": str(config), "WEIGHTS": str(weights)}
        return made[path]

    def run(path: Path, changes: list) -> tuple[DistillTrainer, dict[str, float]]:
        cfg = load_config(path, [*SHRINK, *changes])
        cfg.DATASETS.REGISTER = load_config(project / "base.yaml").DATASETS.REGISTER
        cfg.DATASETS.TEST = ()
        cfg.DISTILL.TEACHERS = [teacher(cfg.DISTILL.TEACHERS[0]["CONFIG"], changes)]
        cfg.DISTILL.WARMUP_ITERS = 0
        cfg.OUTPUT_DIR = str(folder)
        register_datasets(cfg)
        trainer = DistillTrainer(cfg)
        trainer.resume_or_load(False)
        trainer.train()
        return trainer, {k: v for k, (v, _) in trainer.storage.latest().items() if "loss" in k}

    return run


def check(path, trainer, losses):
    entries = trainer.cfg.DISTILL.LOSSES
    terms = [k for k in losses if k.startswith("loss_distill/")]
    assert all(any(k.startswith(f"loss_distill/{entry['NAME']}") for k in terms) for entry in entries)
    assert bool(terms) == bool(entries) and all(v == v and v != float("inf") for v in losses.values())
    # What a file is called is what it does.
    names = {"naive": "NaiveL2", "md": "MagnitudeMD", "msad": "AlignedL1", "no_kd": None}
    key = path.stem
    if path.parent.name != "losses" or path.parent.parent.name != "nuclei":
        key = re.search(r"_R_50_(?:S_[LH]_)?(no_kd|[A-Za-z0-9]+)_", key)[1]
    expected = names.get(key.lower(), key)
    assert [entry["NAME"].lower() for entry in entries[:1]] == ([expected.lower()] if expected else [])


@pytest.mark.parametrize("path", NUCLEI, ids=lambda p: p.stem)
def test_nuclei(losses_of_a_step, path):
    trainer, losses = losses_of_a_step(path, CLASSES)
    check(path, trainer, losses)
    assert trainer.cfg.DISTILL.STUDENT_RESOLUTION == "L"
    assert sum(v for k, v in losses.items() if "distill" in k) > 0 or path.stem == "no_kd"


def test_nuclei_weights_come_from_all_losses_of_the_folder(losses_of_a_step):
    trainer, _ = losses_of_a_step(ROOT / "nuclei/losses/Base-balance.yaml", CLASSES)
    balance = trainer.distiller.balance
    entries = [entry for path in NUCLEI for entry in load_config(path).DISTILL.LOSSES]
    assert sorted(balance.names) == sorted({entry["NAME"] for entry in entries})
    assert (balance.weights > 0).all() and balance.ratio <= 1e-6  # measured, and without effect
    assert all("WEIGHT" in entry for entry in entries)


@pytest.mark.parametrize("path", RAW, ids=lambda p: p.stem)
def test_raw_features(losses_of_a_step, path):
    # Random weights instead of ImageNet's: nothing may be frozen.
    trainer, losses = losses_of_a_step(path, [*CLASSES, *NARROW, "MODEL.BACKBONE.FREEZE_AT", 0])
    check(path, trainer, losses)
    assert trainer.cfg.DISTILL.LOSSES[0]["WEIGHT"] == 3.0


@pytest.mark.parametrize("path", COCO, ids=lambda p: p.stem)
def test_coco(losses_of_a_step, path):
    changes = ["MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.RESNETS.NORM", "BN"]
    trainer, losses = losses_of_a_step(path, [*CLASSES, *NARROW, *changes])
    check(path, trainer, losses)
    assert sum(v for k, v in losses.items() if "distill" in k) > 0 or "no_kd" in path.stem
    assert (trainer.cfg.DISTILL.BALANCE.RATIO > 0) == ("balanced" in path.stem)


@pytest.mark.parametrize("path", COCO, ids=lambda p: p.stem)
def test_published_values(path):
    """Those for one stage are the losses' defaults, written out; the levels are the authors'."""
    one_stage = path.stem.startswith("retinanet")
    for entry in load_config(path).DISTILL.LOSSES:
        loss = DISTILL_LOSS_REGISTRY.get(entry["NAME"])
        if one_stage and entry["NAME"] != "FitNet":
            defaults = {k.upper(): p.default for k, p in inspect.signature(loss).parameters.items()}
            defaults["WEIGHT"] = getattr(loss, "default_weight", 1.0)
            options = {k: v for k, v in entry.items() if k not in ("NAME", "LEVELS")}
            assert options == {k: defaults[k] for k in options}
        if entry["NAME"] in ("CWD", "PKD") or (entry["NAME"] in ("FGD", "MGD") and not one_stage):
            assert entry["LEVELS"] == [f"p{i + one_stage}" for i in range(2, 6)]
        else:
            assert "LEVELS" not in entry


def test_nothing_but_the_loss_differs():
    reference = load_config(ROOT / "nuclei/losses/no_kd.yaml")
    (teacher,) = reference.DISTILL.TEACHERS
    reference.DISTILL.LOSSES = reference.DISTILL.TEACHERS = []
    for path in NUCLEI:
        cfg = load_config(path)
        (entry,) = cfg.DISTILL.TEACHERS
        assert Path(entry["CONFIG"]).samefile(teacher["CONFIG"]) and entry["WEIGHTS"] == teacher["WEIGHTS"]
        cfg.DISTILL.LOSSES = cfg.DISTILL.TEACHERS = []
        assert cfg == reference
    assert len(NUCLEI) >= 14  # Base*.yaml are none of them
