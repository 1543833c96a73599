"""A miniature project for tests that train: a data set of a few tiny images, and yaml files for every kind of run."""

from __future__ import annotations

import logging
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from msad import load_config
from msad.data.synthetic import make_dataset, register_entries

# A shell starts what it puts into the background deaf to Ctrl-C, and so would be the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Keys that every configuration shares. H is 64 pixels, L is 32.
BASE = """
VERSION: 2
MODEL:
  WEIGHTS: ""
  DEVICE: cpu
  BACKBONE: {{FREEZE_AT: 0}}
  RESNETS: {{OUT_FEATURES: [res2, res3, res4, res5], NORM: BN}}
  FPN: {{IN_FEATURES: [res2, res3, res4, res5], OUT_CHANNELS: 32}}
  PIXEL_MEAN: [114.0, 114.0, 114.0]
  PIXEL_STD: [58.0, 58.0, 58.0]
INPUT: {{MIN_SIZE_TRAIN: [64], MAX_SIZE_TRAIN: 64, MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 64}}
SOLVER:
  IMS_PER_BATCH: 2
  BASE_LR: 0.002
  MAX_ITER: 6
  STEPS: []
  WARMUP_ITERS: 3
  CHECKPOINT_PERIOD: 3
TEST: {{EVAL_PERIOD: 0}}
DATALOADER: {{NUM_WORKERS: 0}}
DATASETS:
  TRAIN: [tiny_train]
  TEST: [tiny_val]
{register}
SEED: 3
"""

FILES = {
    # FCOS on the project's own backbone and neck; a gradient clip keeps the random networks stable.
    "fcos.yaml": """
_BASE_: base.yaml
MODEL:
  META_ARCHITECTURE: FCOS
  BACKBONE: {NAME: build_level_fpn_backbone}
  RESNETS: {STEM_OUT_CHANNELS: 8, RES2_OUT_CHANNELS: 8}
  FPN: {BOTTOM_UP: build_tiny_resnet_backbone, LEVELS: [p3, p4, p5, p6, p7]}
  FCOS: {CONV_DIMS: [32], NORM: "", NUM_CLASSES: 6, SCORE_THRESH_TEST: 0.001}
SOLVER: {CLIP_GRADIENTS: {ENABLED: True, CLIP_TYPE: norm, CLIP_VALUE: 10.0}}
""",
    "teacher.yaml": """
_BASE_: fcos.yaml
MODEL: {META_ARCHITECTURE: MultiScaleTeacher}
""",
    "student.yaml": """
_BASE_: fcos.yaml
MODEL:
  FPN: {LEVELS: [p2, p3, p4, p5, p6]}
  FCOS: {IN_FEATURES: [p2, p3, p4, p5, p6]}
INPUT: {MIN_SIZE_TEST: 32, MAX_SIZE_TEST: 32}
DISTILL:
  TEACHERS: [{CONFIG: teacher.yaml, WEIGHTS: not_trained_yet.pth}]
  LOSSES: [{NAME: AlignedL1, WEIGHT: 0.6}]
  WARMUP_ITERS: 8
""",
    # GFL, whose losses are normalised by the batch alone.
    "gfl.yaml": """
_BASE_: fcos.yaml
MODEL:
  META_ARCHITECTURE: GFL
  GFL: {CONV_DIMS: [32], NORM: "", NUM_CLASSES: 6, SCORE_THRESH_TEST: 0.001}
""",
    "gfl_teacher.yaml": """
_BASE_: gfl.yaml
MODEL: {META_ARCHITECTURE: MultiScaleTeacher}
MSAD: {DETECTOR: GFL}
""",
    "gfl_student.yaml": """
_BASE_: gfl.yaml
MODEL:
  FPN: {LEVELS: [p2, p3, p4, p5, p6]}
  GFL: {IN_FEATURES: [p2, p3, p4, p5, p6]}
INPUT: {MIN_SIZE_TEST: 32, MAX_SIZE_TEST: 32}
DISTILL:
  TEACHERS: [{CONFIG: gfl_teacher.yaml, WEIGHTS: not_trained_yet.pth}]
  LOSSES: [{NAME: AlignedL1, WEIGHT: 0.6}]
  WARMUP_ITERS: 8
""",
    # RetinaNet on the project's tiny backbone.
    "retinanet.yaml": """
_BASE_: fcos.yaml
MODEL:
  META_ARCHITECTURE: RetinaNet
  RETINANET: {NUM_CLASSES: 6, NUM_CONVS: 1, SCORE_THRESH_TEST: 0.001}
  ANCHOR_GENERATOR: {SIZES: [[8], [16], [32], [64], [128]]}
""",
    "retinanet_teacher.yaml": """
_BASE_: retinanet.yaml
MODEL: {META_ARCHITECTURE: MultiScaleTeacher}
MSAD: {DETECTOR: RetinaNet}
""",
    "retinanet_student.yaml": """
_BASE_: retinanet.yaml
MODEL:
  FPN: {LEVELS: [p2, p3, p4, p5, p6]}
  RETINANET: {IN_FEATURES: [p2, p3, p4, p5, p6]}
  ANCHOR_GENERATOR: {SIZES: [[4], [8], [16], [32], [64]]}
INPUT: {MIN_SIZE_TEST: 32, MAX_SIZE_TEST: 32}
DISTILL:
  TEACHERS: [{CONFIG: retinanet_teacher.yaml, WEIGHTS: not_trained_yet.pth}]
  LOSSES: [{NAME: AlignedL1, WEIGHT: 0.6}]
  WARMUP_ITERS: 8
""",
    # A student of stock parts and stock keys only; trained with the DISTILL keys given as overrides.
    "stock_student.yaml": """
VERSION: 2
MODEL:
  META_ARCHITECTURE: RetinaNet
  WEIGHTS: ""
  DEVICE: cpu
  BACKBONE: {NAME: build_retinanet_resnet_fpn_backbone, FREEZE_AT: 0}
  RESNETS:
    {DEPTH: 50, STEM_OUT_CHANNELS: 8, RES2_OUT_CHANNELS: 16, WIDTH_PER_GROUP: 4,
     OUT_FEATURES: [res2, res3, res4, res5], NORM: BN}
  FPN: {IN_FEATURES: [res2, res3, res4, res5], OUT_CHANNELS: 32}
  ANCHOR_GENERATOR: {SIZES: [[4], [8], [16], [32], [64]]}
  RETINANET: {IN_FEATURES: [p2, p3, p4, p5, p6], NUM_CLASSES: 6, NUM_CONVS: 1, SCORE_THRESH_TEST: 0.001}
INPUT: {MIN_SIZE_TRAIN: [64], MAX_SIZE_TRAIN: 64, MIN_SIZE_TEST: 32, MAX_SIZE_TEST: 32}
SOLVER: {IMS_PER_BATCH: 2, BASE_LR: 0.001, MAX_ITER: 2, STEPS: [], WARMUP_ITERS: 0}
DATASETS: {TRAIN: [tiny_train], TEST: [tiny_val]}
DATALOADER: {NUM_WORKERS: 0}
SEED: 3
""",
}


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """What checks of data keep is not left in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _consoles_of_this_test():
    """detectron2 sets a logger up once a process, on the output that the first test had and that is closed since."""
    for name in ("detectron2", "fvcore", "msad"):
        for handler in logging.getLogger(name).handlers:
            if type(handler) is logging.StreamHandler:
                handler.stream = sys.stdout  # setStream would flush the closed one


@pytest.fixture
def wait_for():
    """``wait_for(condition)``, however slow the machine is; the suite's own time limit ends it."""

    def wait(condition) -> None:
        while not condition():
            time.sleep(0.05)

    return wait


@pytest.fixture
def clean_catalogs():
    """Data sets that a test registers are forgotten after it."""
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Path:
    """Folder of the yaml files; the data sets tiny_train (6 images) and tiny_val (2) are below it."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("project")
    make_dataset(root / "data", num_train=6, num_val=2, size=(64, 64), seed=1, objects=(2, 4), min_size=8)
    entries = "\n".join(f"    - {entry}" for entry in register_entries(root / "data", "tiny"))
    (root / "base.yaml").write_text(BASE.format(register="  REGISTER:\n" + entries))
    for name, text in FILES.items():
        (root / name).write_text(text)
    return root


@pytest.fixture(scope="session")
def teacher_weights(project) -> dict[str, str]:
    """Checkpoints (of untrained, seeded networks) of the teachers, by the name of their yaml."""
    files = {}
    for name in ("teacher", "retinanet_teacher", "gfl_teacher"):
        torch.manual_seed(11)
        files[name] = str(project / f"{name}.pth")
        torch.save({"model": build_model(load_config(project / f"{name}.yaml")).state_dict()}, files[name])
    return files
