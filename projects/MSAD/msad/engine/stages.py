"""A curriculum of stages, each an ordinary run that starts from the student of the one before."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from ..config_values import nearest, valid_keys
from ..files import FINAL, atomic_write
from ..finding import error_text
from ..resolution import get_resolution
from .build import check_distillation, teacher_entries
from .first_screen import quiet_console
from .run_folder import write_config
from .scaling import schedule_overrides, set_iterations
from .stage_summary import write_summary

logger = logging.getLogger(__name__)

FINISHED = "finished.txt"  # in the folder of a stage: its number of iterations


def stage_configs(cfg: CfgNode) -> list[CfgNode]:
    """The config of every stage of DISTILL.STAGES.

    A stage has the teachers that it names (all, if it names none), what it overrides, the folder
    OUTPUT_DIR/stage{number}, and from the second on the student of the stage before as MODEL.WEIGHTS; that one is not
    initialised from a teacher again unless the stage says DISTILL: {INIT_STUDENT: ...}.

    Raises:
        ValueError: a stage that is no mapping, an unknown teacher, or none for a student below H; says which stage.
        KeyError: an unknown key; says which stage, and the nearest valid key.
    """
    known = {entry["NAME"]: entry for entry in teacher_entries(cfg)}
    configs: list[CfgNode] = []
    for number, stage in enumerate(cfg.DISTILL.STAGES, start=1):
        where = f"DISTILL.STAGES[{number - 1}]"
        if not isinstance(stage, Mapping):
            raise ValueError(f"{where} is no mapping such as {{TEACHERS: [name], SOLVER: {{MAX_ITER: 1000}}}}: {stage}")
        overrides = {key: value for key, value in stage.items() if key != "TEACHERS"}
        config = cfg.clone()
        config.defrost()
        config.DISTILL.STAGES = []
        config.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, f"stage{number}")
        if configs:
            config.MODEL.WEIGHTS = os.path.join(configs[-1].OUTPUT_DIR, FINAL)
            config.DISTILL.INIT_STUDENT = "none"
        names = stage.get("TEACHERS", list(known))
        for name in names:
            if name not in known:
                raise ValueError(f"{where}: no teacher is named {name!r}{nearest(str(name), list(known))}")
        config.DISTILL.TEACHERS = [known[name] for name in names]
        valid = valid_keys(config)
        for key in _leaves(overrides):
            if key not in valid:
                raise KeyError(f"{where}: unknown config key {key}{nearest(key, valid)}")
        config.merge_from_other_cfg(CfgNode(overrides))
        if not names and get_resolution(config.DISTILL.STUDENT_RESOLUTION).shift:
            raise ValueError(
                f"{where}: without a teacher nothing makes images smaller, and the student of "
                f"DISTILL.STUDENT_RESOLUTION {config.DISTILL.STUDENT_RESOLUTION} would learn from those of H: name a "
                "teacher, which does not run with DISTILL: {LOSSES: []}"
            )
        config.freeze()
        configs.append(config)
    return configs


def total_iterations(cfg: CfgNode) -> int:
    """Iterations of a run, or of all stages of a curriculum together."""
    return sum(stage.SOLVER.MAX_ITER for stage in (stage_configs(cfg) if cfg.DISTILL.STAGES else [cfg]))


def set_total_iterations(cfg: CfgNode, iterations: int | None, keep: Sequence[str] = ()) -> None:
    """:func:`msad.engine.scaling.set_iterations` that also knows curricula, whose stages keep their shares.

    Args:
        iterations: of all stages together, as nearly as whole numbers allow.
        keep: keys that stay as they are.
    """
    if iterations is None or not cfg.DISTILL.STAGES:
        return set_iterations(cfg, iterations, keep)
    factor, stages = iterations / total_iterations(cfg), []
    for stage, config in zip(cfg.DISTILL.STAGES, stage_configs(cfg)):
        config.defrost()
        set_iterations(config, max(round(config.SOLVER.MAX_ITER * factor), 1), keep)
        stages.append(dict(stage) | {
            section: {**stage.get(section, {}), **values} for section, values in schedule_overrides(config).items()
        })  # fmt: skip
    cfg.DISTILL.STAGES = stages


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    leaves = []
    for key, value in tree.items():
        leaves += _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [prefix + key]
    return leaves


def finished(cfg: CfgNode) -> bool:
    """Whether the stage ``cfg`` has been trained, evaluated and noted as such, for as many iterations."""
    final, note = (Path(cfg.OUTPUT_DIR, name) for name in (FINAL, FINISHED))
    return final.is_file() and note.is_file() and note.read_text() == str(cfg.SOLVER.MAX_ITER)


def check_stages(configs: Mapping[int, CfgNode]) -> None:
    """Build the networks and losses of stages, by number, so that a mistake in a later one costs no training.

    Raises:
        FileNotFoundError, KeyError, ValueError: as the stage would; says which.
    """
    for number, config in configs.items():
        try:
            with quiet_console():
                check_distillation(config)
        except (FileNotFoundError, KeyError, ValueError) as error:
            kind = next(kind for kind in (FileNotFoundError, KeyError, ValueError) if isinstance(error, kind))
            raise kind(f"DISTILL.STAGES[{number - 1}]: {error_text(error)}") from error


def train_stages(cfg: CfgNode, resume: bool, train: Callable[[CfgNode, bool], Any]) -> Any:
    """Train one stage after the other; with ``resume`` finished ones are skipped and an interrupted one continues.

    One that was interrupted in its last evaluation is evaluated again. Before any trains, those after the first
    that is to be trained are built once, see :func:`check_stages`.

    Only one stage's teachers are in memory at a time. Each stage has its config.yaml in its folder. After each stage,
    OUTPUT_DIR has a table and a curve over all stages so far, see :mod:`msad.engine.stage_summary`.

    Args:
        train: config, whether to resume -> the results of an ordinary run.

    Returns:
        what ``train`` returned for the last stage; None if there was nothing left to train.
    """
    configs, results = stage_configs(cfg), None
    pending = {n: config for n, config in enumerate(configs, start=1) if not (resume and finished(config))}
    check_stages({n: pending[n] for n in [*pending][1:]})
    for number, config in enumerate(configs, start=1):
        if number not in pending:
            logger.info("Stage %d of %d is finished: %s", number, len(configs), config.OUTPUT_DIR)
            if comm.is_main_process():
                write_summary(cfg.OUTPUT_DIR, configs)
            continue
        names = ", ".join(entry["NAME"] for entry in config.DISTILL.TEACHERS) or "no teacher"
        logger.info("Stage %d of %d: %d iterations, %s", number, len(configs), config.SOLVER.MAX_ITER, names)
        if comm.is_main_process():
            os.makedirs(config.OUTPUT_DIR, exist_ok=True)
            write_config(config)
        comm.synchronize()
        results = train(config, resume)
        if comm.is_main_process():
            with atomic_write(os.path.join(config.OUTPUT_DIR, FINISHED), "w") as file:
                file.write(str(config.SOLVER.MAX_ITER))
            write_summary(cfg.OUTPUT_DIR, configs)
        comm.synchronize()  # the next stage reads what the main process has just written
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return results
