"""Every key the project adds to detectron2's config, and the loading of yaml files.

The comments above the defaults state unit and source; docs/CONFIG.md is generated from this file and config_model.py,
which has the keys of backbones and detectors.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from detectron2 import model_zoo
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg

from .config_model import add_model_config
from .config_values import check_entries, check_sections, decode, imports_of, nearest, read_trees, valid_keys, value_at
from .files import local_file

# Keys of earlier versions and what they are called now.
RENAMED = {"DISTILL.READING": "DISTILL.WEIGHTING", "SOLVER.SCALE_TO_BATCH": "SOLVER.REFERENCE_BATCH_SIZE"}


def add_msad_config(cfg: CN) -> CN:
    """Add the project's keys to a detectron2 config, in place, and return it."""
    # --- data sets declared in yaml ------------------------------------------------------------------------------
    # Entries {NAME, TYPE, ...}. TYPE "coco" (default) has JSON and IMAGES, and if wanted CLASSES, KEYPOINT_FLIP_PAIRS,
    # KEYPOINT_SIGMAS, LOW_RES_IMAGES (the student's own images), STUFF (label maps for HTC); CLASSES are the names that
    # the file must have, by ascending id. "visdrone" has IMAGES and ANNOTATIONS (folders) and PATCHES, "argoverse_hd"
    # and "coco_sem_seg" JSON and IMAGES, "sem_seg" IMAGES and LABELS (folders) and CLASSES. Paths are relative to
    # $DETECTRON2_DATASETS. See docs/DATA.md.
    cfg.DATASETS.REGISTER = []
    # Image files of a data set that are looked into before training (size, pixels, whether they are whole), taken at
    # equal distances; 0: all of them.
    cfg.DATASETS.CHECK_IMAGES = 5000
    # Read LOW_RES_IMAGES of the data sets in place of IMAGES. Students (with DISTILL.TEACHERS) do so anyway; this is
    # for detectors that are trained on these files without a teacher.
    cfg.DATASETS.LOW_RES = False

    add_model_config(cfg)

    cfg.MSAD = CN()
    # Modules of your own, which the yaml file alone can name: they are imported before it is read, register parts, and
    # where one has a function add_config(cfg), it adds its keys. See docs/USING.md.
    cfg.MSAD.IMPORTS = []

    # --- the multi-resolution teacher (MODEL.META_ARCHITECTURE: MultiScaleTeacher) -------------------------------
    # Meta-architecture of the detector inside the teacher, configured by its usual keys in the H frame.
    cfg.MSAD.DETECTOR = "FCOS"
    # Branches, H first: H, L (1/2), EL (1/4).
    cfg.MSAD.RESOLUTIONS = ["H", "L"]
    # What the teacher's inference uses: "fused" or one of RESOLUTIONS.
    cfg.MSAD.EVAL_BRANCH = "fused"
    # How low-resolution inputs are made from H: "antialias", or "nearest" as in the released code.
    cfg.MSAD.DOWNSAMPLE = "antialias"
    # Weight of the fused branch's detection losses (released JOINT_WEIGHT). DISTILL.WEIGHTING sets it.
    cfg.MSAD.W_FUSE = 0.4
    cfg.MSAD.FUSION = CN()
    # Hidden width of the gate: branches * channels / REDUCTION.
    cfg.MSAD.FUSION.REDUCTION = 16
    # Pool the gate's input over the image without its padding. False: as in the released code.
    cfg.MSAD.FUSION.MASK_PADDING = True
    # Scale the gate's input to a root mean square of 1, which keeps it from ending with all weight on one branch where
    # maps are large (pretrained backbones with frozen statistics). Not in the paper. The log has the weight of H as
    # fusion/gate_H.
    cfg.MSAD.FUSION.NORMALIZE = False

    # --- multi-scale fusion students (MODEL.META_ARCHITECTURE: FusionStudent) -------------------------------------
    cfg.MSAD.FUSION_STUDENT = CN()
    # Entries {RESOLUTION, WEIGHTS, MODEL: {...}}, H first: the branches, each a backbone of its own. MODEL has what
    # differs from the yaml's MODEL, which describes MSAD.DETECTOR in the H frame; MODEL.FPN.LEVELS follow by
    # themselves. WEIGHTS (optional) is a pretrained network or a detector whose backbone the branch takes over; it is
    # read where training begins, unless MODEL.WEIGHTS has a checkpoint for the whole student.
    cfg.MSAD.FUSION_STUDENT.BRANCHES = []
    # Run the branches behind the first on CUDA streams of their own, beside it; not yet run on a GPU. Without
    # effect on a CPU.
    cfg.MSAD.FUSION_STUDENT.STREAMS = False

    # --- distillation --------------------------------------------------------------------------------------------
    cfg.DISTILL = CN()
    # Entries {NAME, CONFIG: yaml of the teacher, WEIGHTS: its checkpoint, SCALE: size of its input relative to H}; the
    # first one initialises the student. NAME is "teacher" (the i-th of several: "teacher_i") and SCALE 1.0 by default.
    # An entry {NAME, MEAN_OF: [names], WEIGHTS_OF: [numbers]} is the mean of other teachers' features. Empty: ordinary
    # training.
    cfg.DISTILL.TEACHERS = []
    # Entries {NAME: registered loss, WEIGHT: float, SOURCE: name of a teacher or assistant (default: every teacher that
    # is in no mean), TAP: where features are read, LEVELS: H-frame levels, ...}; docs/CONFIG.md ends with all. Empty:
    # the student is only initialised from the teacher (the no-KD baseline of every comparison).
    cfg.DISTILL.LOSSES = []
    # Entries {NAME: registered assistant, OPTIMIZER, BASE_LR, WEIGHT_DECAY, SCHEDULE, HEAD_LEARNS, WAITS, ...}: sources
    # that are trained beside the student, each with its own optimizer; docs/CONFIG.md ends with all options.
    cfg.DISTILL.ASSISTANTS = []
    # Entries {TEACHERS: [names], and any sections of the config with what differs, as SOLVER: {MAX_ITER: 1000}}: the
    # student is trained in one run a stage, each from the student of the one before, in OUTPUT_DIR/stage1, stage2, ...
    cfg.DISTILL.STAGES = []
    # Resolution of the student: H, L (1/2) or EL (1/4); the loader's images are H and are downsampled to it on the
    # device. Pyramid levels align at halvings only, so another ratio is an error. For a student with a short side of S
    # pixels, scale H: INPUT.MIN_SIZE_TRAIN 2 S (L) or 4 S (EL), for the teacher too.
    cfg.DISTILL.STUDENT_RESOLUTION = "L"
    # What the student copies from the teacher before training: "full", "neck_and_head" or "none". Tensors are matched
    # by name and shape; a part of a head is copied whole or not at all, and only from a head of the same class.
    cfg.DISTILL.INIT_STUDENT = "full"
    # BatchNorm of the teacher: "eval" (running statistics) or "batch" (batch statistics, as in the released code;
    # its buffers do not change either way).
    cfg.DISTILL.TEACHER_BN = "eval"
    # Weight of the student's detection losses (gamma of the paper).
    cfg.DISTILL.W_DET = 1.0
    # Iterations without distillation losses at the beginning, in which assistants learn already unless they WAIT
    # (ScaleKD: 30000 of 90000).
    cfg.DISTILL.START_ITER = 0
    # Iterations at the beginning in which the student's backbone in front of the neck is not trained (ScaleKD: 10000 of
    # 90000).
    cfg.DISTILL.FREEZE_BACKBONE_ITERS = 0
    # Iterations after START_ITER over which the distillation weight rises linearly from 0 (released: 500).
    cfg.DISTILL.WARMUP_ITERS = 500
    # End of distillation: from DECAY_FROM to DECAY_TO (fractions of SOLVER.MAX_ITER) the weight falls linearly to 0.
    # [1.0, 1.0] keeps it to the end, as the paper and the released code do.
    cfg.DISTILL.DECAY_FROM = 1.0
    # See DECAY_FROM.
    cfg.DISTILL.DECAY_TO = 1.0
    # Weights from the paper's lambda and gamma: "" (W_DET, LOSSES as written), "convex" (gamma L_det + (1 - gamma)
    # L_KD, fused branch lambda) or "additive" (gamma L_det + lambda L_KD, fused branch 0.4); see
    # projects/MSAD/README.md. Gamma as the weight of distillation is not offered: the paper lowers gamma for the 3x
    # schedule so that distillation counts more, and there it would count less.
    cfg.DISTILL.WEIGHTING = ""
    # Lambda of the paper, used by WEIGHTING only (3x schedule: 0.4).
    cfg.DISTILL.LAMBDA = 0.4
    # Gamma of the paper, used by WEIGHTING only (3x schedule: 0.8).
    cfg.DISTILL.GAMMA = 0.8
    cfg.DISTILL.BALANCE = CN()
    # Replaces the WEIGHT of every loss: its gradient at the student's neck, or at the maps of the other TAP that it
    # reads, gets RATIO times the norm of the detection losses' (before warm-up and decay). 0: weights as written.
    cfg.DISTILL.BALANCE.RATIO = 0.0
    # Iterations, from START_ITER on, over which the norms are measured; the weights follow them and then stay.
    cfg.DISTILL.BALANCE.ITERS = 100
    # Every so many iterations, write m, n, mn/N and the angle of raw features (WACV 2024, figure 8) to
    # OUTPUT_DIR/features.jsonl, for tools/plot_features.py. 0: never.
    cfg.DISTILL.ANALYSIS_PERIOD = 0

    # --- evaluation and speed ------------------------------------------------------------------------------------
    # Images of each test set on which every evaluation also computes the detection losses by themselves, without
    # distillation, as "validation/L_detect". 0: it does not.
    cfg.TEST.LOSS_IMAGES = 0
    # "SGD" (detectron2's) or "AdamW", which trains small networks from scratch in far fewer iterations.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # LR_SCHEDULER_NAME WarmupPolyLR: exponent of the fall from BASE_LR over MAX_ITER.
    cfg.SOLVER.POLY_LR_POWER = 0.9
    # Learning rate at its end.
    cfg.SOLVER.POLY_LR_END = 0.0
    # Batch size that BASE_LR and all numbers of iterations were chosen for. If IMS_PER_BATCH is another one, both are
    # scaled linearly and the log says how (old -> new). 0: nothing is scaled. detectron2's SOLVER.REFERENCE_WORLD_SIZE,
    # the number of GPUs that a yaml was written for, scales IMS_PER_BATCH and the same numbers to those there are; with
    # both, this comes first.
    cfg.SOLVER.REFERENCE_BATCH_SIZE = 0
    # Memory format torch.channels_last for the convolutions.
    cfg.SOLVER.CHANNELS_LAST = False
    # torch.compile the backbones of student and teacher.
    cfg.SOLVER.COMPILE = False
    for old, new in RENAMED.items():
        cfg.register_renamed_key(old, new)
    return cfg


def add_imports(cfg: CN, imports: Iterable[str]) -> CN:
    """Import the modules of MSAD.IMPORTS and add their keys to a config, in place; returns it.

    Raises:
        ValueError: a module cannot be imported; names it.
    """
    for name in imports:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise ValueError(f"MSAD.IMPORTS: {name} cannot be imported ({error}); is it in PYTHONPATH?") from None
        if hasattr(module, "add_config"):
            module.add_config(cfg)
    return cfg


def default_config(imports: Iterable[str] = ()) -> CN:
    """detectron2's defaults with the project's keys and those of :func:`add_imports`."""
    return add_imports(add_msad_config(get_cfg()), imports)


def detector_architecture(cfg: CN) -> str:
    """Meta-architecture of the detector: of a teacher or fusion student, that of the one inside."""
    name = cfg.MODEL.META_ARCHITECTURE
    return cfg.MSAD.DETECTOR if name in ("MultiScaleTeacher", "FusionStudent") else name


def _unknown_key(error: KeyError, cfg: CN, source: str) -> KeyError:
    name = str(error.args[0]).rsplit(":", 1)[-1].strip().strip("'\"")
    return KeyError(f"{source}: unknown config key {name}{nearest(name, valid_keys(cfg))}")


def find_config(config_file: str | os.PathLike) -> str:
    """The path of a yaml file; one that does not exist is looked for among those that the project and detectron2 ship.

    Raises:
        FileNotFoundError: there is none.
    """
    name = os.fspath(config_file)
    if os.path.isfile(name) or "://" in name:
        return name
    installed, checkout = Path(__file__).parent / "configs", Path(__file__).parents[3] / "configs"
    shipped = (installed if installed.is_dir() else checkout) / name.removeprefix("configs/")
    if shipped.is_file():
        return str(shipped)
    with contextlib.suppress(RuntimeError):
        return model_zoo.get_config_file(name)
    raise FileNotFoundError(f"no config file {name}")


def load_config(config_file: str | os.PathLike, opts: list | tuple = ()) -> CN:
    """detectron2's defaults, the project's, a yaml file and ``KEY VALUE`` overrides, in this order.

    Relative paths in the yaml file, MODEL.WEIGHTS and the CONFIG and WEIGHTS of DISTILL.TEACHERS, are looked up beside
    it, as ``_BASE_`` is, and then in the working directory; for those of overrides it is the other way round. A
    config.yaml that :func:`msad.export.export` wrote is completed by the msad.yaml beside it.

    Raises:
        FileNotFoundError: no such yaml file, or none that it is based on.
        ValueError: not a yaml file, wrong entries of a list, overrides that are not pairs or of the wrong type, or a
            module of MSAD.IMPORTS that cannot be imported.
        KeyError: an unknown key; names the file and the nearest valid key.
    """
    config_file, files = os.fspath(config_file), []
    if config_file:
        config_file = find_config(config_file)
        exported = os.path.join(os.path.dirname(config_file), "msad.yaml")
        more = [exported] if os.path.basename(config_file) == "config.yaml" and os.path.isfile(exported) else []
        files = [config_file, *more]
    trees = [tree for file in files for tree in read_trees(file)]
    imports = imports_of(trees)
    cfg = default_config(imports)
    for file, tree in trees:
        check_sections(file, tree, cfg)
    for file in files:
        try:
            cfg.merge_from_file(file)
        except KeyError as error:
            raise _unknown_key(error, cfg, file) from None
    cfg.merge_from_list(["MSAD.IMPORTS", imports])  # of all files, where the last one's list would stand
    check_entries(cfg)
    _look_beside(cfg, os.path.dirname(config_file))
    if len(opts) % 2:
        raise ValueError(f"overrides must be KEY VALUE pairs, got {list(opts)}")
    for key, value in zip(opts[::2], opts[1::2]):
        if key not in valid_keys(cfg):
            raise _unknown_key(KeyError(key), cfg, "command line")
        value = decode(value, value_at(cfg, key))
        cfg.merge_from_list([key, repr(value) if isinstance(value, str) else value])  # or texts are decoded again
    if imports != cfg.MSAD.IMPORTS:
        raise ValueError("MSAD.IMPORTS belongs into the yaml file: its modules are imported before that is read")
    check_entries(cfg)
    name = detector_architecture(cfg)
    if any(cfg.MODEL.LIGHT_HEAD.values()) and "Light" not in name:
        raise ValueError(f"MODEL.LIGHT_HEAD has no effect on {name}: use LightRetinaNet, LightFCOS or LightGFL")
    _look_beside(cfg, os.path.dirname(config_file), os.path.exists)
    return cfg


def _look_beside(cfg: CN, folder: str, settled: Callable[[str], bool] = lambda path: False) -> None:
    """Let relative paths of files that are in ``folder`` say so, but for those that are ``settled``."""
    holders = [(cfg.MODEL, ("WEIGHTS",)), *((teacher, ("CONFIG", "WEIGHTS")) for teacher in cfg.DISTILL.TEACHERS)]
    for holder, keys in holders:
        for key in keys:
            path = holder.get(key) or ""
            file = local_file(path) if isinstance(path, str) else ""  # another kind is refused where it is read
            if file and not settled(file) and os.path.isfile(os.path.join(folder, file)):
                holder[key] = os.path.join(folder, path)
