"""A study: every row of a comparison trained and evaluated under equal terms, over several seeds.

A folder of yaml files describes the models (baseline_H.yaml, teacher.yaml, student_L.yaml, ...); ROWS says which rows
of the table are trained from which file, under which control. Finished rows are kept, an interrupted row resumes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from tqdm import tqdm

from ..config import load_config
from .checkpoint import replacing
from .setup import evaluate, evaluate_branches, load_model, prepare
from .trainer import DistillTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One training run of the comparison.

    Attributes:
        config: yaml file in the study's folder.
        opts: overrides of it.
        needs: rows that must be finished first.
        budget: "same" iterations as in the yaml; "iterations" or "seconds" (of the processor where there is no GPU):
            as many as teacher and student together.
    """

    config: str
    opts: tuple = ()
    needs: tuple[str, ...] = ()
    budget: str = "same"


def _constant_weight(value: float) -> tuple:
    """The paper's loss at a fixed weight to the end of training."""
    return (
        "DISTILL.LOSSES", [{"NAME": "AlignedL1", "WEIGHT": value}], "DISTILL.DECAY_FROM", 1.0, "DISTILL.DECAY_TO", 1.0,
    )  # fmt: skip


_STUDENT = ("teacher",)
ROWS: dict[str, Row] = {
    "baseline_H": Row("baseline_H.yaml"),
    "baseline_L": Row("baseline_L.yaml"),
    "baseline_L_multiscale": Row("baseline_L_multiscale.yaml"),
    "baseline_L_shifted": Row("baseline_L_shifted.yaml"),
    "teacher": Row("teacher.yaml"),
    "student_L_control": Row("student_L.yaml", ("DISTILL.LOSSES", []), _STUDENT),
    "student_L": Row("student_L.yaml", (), _STUDENT),
    "student_L_w0.6": Row("student_L.yaml", _constant_weight(0.6), _STUDENT),
    "student_L_w2": Row("student_L.yaml", _constant_weight(2.0), _STUDENT),
    "student_L_scratch": Row("student_L.yaml", ("DISTILL.INIT_STUDENT", "none"), _STUDENT),
    "student_L_light": Row("student_L_light.yaml", (), _STUDENT),
    "baseline_L_2x": Row("baseline_L_shifted.yaml", (), ("teacher", "student_L"), "iterations"),
    "baseline_L_time": Row("baseline_L_shifted.yaml", (), ("teacher", "student_L"), "seconds"),
}


@dataclass
class Study:
    """Where a study lives and what it runs.

    Attributes:
        configs: folder of the yaml files.
        output: results; one folder a seed, one below it a row.
        opts: overrides for every row, e.g. of the data set.
        seeds: SOLVER seeds; every row runs once with each.
        rows: names in ROWS.
        short_side: of H in pixels; scales all input sizes of the yaml files alike. None: as they are.
    """

    configs: Path
    output: Path
    opts: list = field(default_factory=list)
    seeds: tuple[int, ...] = (0,)
    rows: tuple[str, ...] = tuple(ROWS)
    short_side: int | None = None

    def config(self, name: str, seed: int) -> CfgNode:
        """The frozen config of a row; budgets that depend on other rows are read from their results."""
        row = ROWS[name]
        cfg = load_config(self.configs / row.config, [])
        cfg.merge_from_list([*self.opts, *row.opts, "SEED", seed, "OUTPUT_DIR", str(self.folder(name, seed))])
        if self.short_side:
            _scale_inputs(cfg, self.short_side / load_config(self.configs / "Base.yaml").INPUT.MIN_SIZE_TEST)
        if cfg.DISTILL.TEACHERS:
            teacher = self.folder("teacher", seed)
            cfg.DISTILL.TEACHERS = [
                {"CONFIG": str(teacher / "config.yaml"), "WEIGHTS": str(teacher / "model_final.pth")}
            ]
        if row.budget != "same":
            results = [self.result(needed, seed) for needed in row.needs]
            if row.budget == "iterations":
                cfg.SOLVER.MAX_ITER = sum(r["iterations"] for r in results)
            else:
                clock = "cpu_seconds" if cfg.MODEL.DEVICE == "cpu" else "seconds"
                own = self.result("baseline_L_shifted", seed)
                cfg.SOLVER.MAX_ITER = round(sum(r[clock] for r in results) * own["iterations"] / own[clock])
        cfg.freeze()
        return cfg

    def folder(self, name: str, seed: int) -> Path:
        return self.output / f"seed{seed}" / name

    def result(self, name: str, seed: int) -> dict | None:
        """What the finished row left, or None."""
        file = self.folder(name, seed) / "result.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def ordered(self) -> list[str]:
        """Rows in an order in which nothing waits for a later one, including what they need."""
        out: list[str] = []

        def add(name: str) -> None:
            if name not in ROWS:
                raise ValueError(f"unknown row {name!r}; known: {', '.join(ROWS)}")
            needs = ROWS[name].needs + (("baseline_L_shifted",) if ROWS[name].budget == "seconds" else ())
            for needed in needs:
                add(needed)
            if name not in out:
                out.append(name)

        for name in self.rows:
            add(name)
        return out


def _scale_inputs(cfg: CfgNode, factor: float) -> None:
    sizes = cfg.INPUT
    sizes.MIN_SIZE_TRAIN = tuple(round(size * factor) for size in sizes.MIN_SIZE_TRAIN)
    for key in ("MAX_SIZE_TRAIN", "MIN_SIZE_TEST", "MAX_SIZE_TEST"):
        sizes[key] = round(sizes[key] * factor)


def _fingerprint(cfg: CfgNode) -> str:
    return hashlib.sha1(cfg.dump().encode()).hexdigest()[:12]


class _Progress(HookBase):
    """A progress bar with ETA and the current loss, and the seconds that training took, over resumes.

    Seconds are those of the wall clock and, as other work on the machine falsifies them, of the processors.
    """

    def __init__(self, title: str, clock: Path) -> None:
        self.title = title
        self.clock = clock  # file with the seconds of earlier, interrupted attempts
        self.before = json.loads(clock.read_text()) if clock.is_file() else {"seconds": 0.0, "cpu_seconds": 0.0}

    def before_train(self) -> None:
        self.start = (time.perf_counter(), time.process_time())
        self.bar = tqdm(
            total=self.trainer.max_iter, initial=self.trainer.start_iter, desc=self.title, unit="it",
            mininterval=0.5, dynamic_ncols=True,
        )  # fmt: skip

    def _save_clock(self) -> None:
        wall, cpu = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
        now = {"seconds": self.before["seconds"] + wall, "cpu_seconds": self.before["cpu_seconds"] + cpu}
        self.clock.write_text(json.dumps({key: round(value, 1) for key, value in now.items()}))

    def after_step(self) -> None:
        self.bar.update()
        if (self.trainer.iter + 1) % 20 == 0:
            loss = self.trainer.storage.latest().get("total_loss")
            if loss:
                self.bar.set_postfix(loss=f"{loss[0]:.3f}", refresh=False)
            self._save_clock()

    def after_train(self) -> None:
        self.bar.close()
        self._save_clock()


@contextlib.contextmanager
def _log_to(file: Path) -> Iterable[None]:
    """Send the engine's log and printed tables to ``file`` and keep the terminal for progress."""
    handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter("[%(asctime)s %(name)s] %(message)s"))
    names = ("detectron2", "fvcore", "msad")
    saved = {name: (logging.getLogger(name).handlers[:], logging.getLogger(name).propagate) for name in names}
    for name in names:
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(logging.INFO)
    try:
        with open(file, "a") as stream, contextlib.redirect_stdout(stream):
            yield
    finally:
        handler.close()
        for name, (handlers, propagate) in saved.items():
            logging.getLogger(name).handlers, logging.getLogger(name).propagate = handlers, propagate


def run_row(study: Study, name: str, seed: int) -> dict:
    """Train and evaluate one row unless its result is there; returns {evaluated name: metrics} and costs in time."""
    cfg = study.config(name, seed)
    folder = Path(cfg.OUTPUT_DIR)
    other = ValueError(f"{folder} holds a run of another configuration; choose another --output or delete it")
    done = study.result(name, seed)
    if done is not None:
        if done["fingerprint"] != _fingerprint(cfg) and ROWS[name].budget != "seconds":
            raise other
        return done
    folder.mkdir(parents=True, exist_ok=True)
    used = folder / "config.yaml"
    if (folder / "last_checkpoint").is_file() and used.is_file() and used.read_text() != cfg.dump():
        raise other
    used.write_text(cfg.dump())
    with _log_to(folder / "log.txt"):
        prepare(cfg)
        trainer = DistillTrainer(cfg)
        trainer.resume_or_load(resume=True)
        if trainer.start_iter < cfg.SOLVER.MAX_ITER:
            trainer.register_hooks([_Progress(f"{name} (seed {seed})", folder / "clock.json")])
            trainer.train()
        model = load_model(cfg, str(folder / "model_final.pth"))
        if cfg.MODEL.META_ARCHITECTURE == "MultiScaleTeacher":
            results = {f"{name}_{branch}": r for branch, r in evaluate_branches(cfg, model).items()}
        else:
            results = {name: evaluate(cfg, model)}
    result = {
        "fingerprint": _fingerprint(cfg),
        "iterations": cfg.SOLVER.MAX_ITER,
        **json.loads((folder / "clock.json").read_text()),
        "results": results,
    }
    with replacing(str(folder / "result.json"), "w") as file:
        json.dump(result, file, indent=1)
    return result


def run(study: Study, report: Callable[[str], None] = tqdm.write) -> dict[str, dict]:
    """Run all rows for all seeds and return :func:`collect`'s table."""
    order = study.ordered()
    for seed in study.seeds:
        for number, name in enumerate(order, start=1):
            result = run_row(study, name, seed)
            scores = ", ".join(f"{k} {v['bbox']['AP']:.1f}" for k, v in result["results"].items())
            report(f"[seed {seed}, {number}/{len(order)}] {scores}  ({result['seconds']:.0f} s)")
    return collect(study)


def collect(study: Study) -> dict[str, dict]:
    """Mean over the seeds of what has been evaluated: row -> {task: {metric: mean}, "std", "per_seed", ...}.

    "std" is the sample standard deviation of each task's AP (absent for a single seed).
    """
    table: dict[str, dict] = {}
    for name in study.ordered():
        runs = [r for r in (study.result(name, seed) for seed in study.seeds) if r is not None]
        if not runs:
            continue
        for evaluated in runs[0]["results"]:
            per_seed = [r["results"][evaluated] for r in runs]
            entry: dict = {
                task: {metric: float(np.mean([p[task][metric] for p in per_seed])) for metric in values}
                for task, values in per_seed[0].items()
            }
            entry["per_seed"] = [p["bbox"]["AP"] for p in per_seed]
            if len(runs) > 1:
                entry["std"] = {"AP": float(np.std(entry["per_seed"], ddof=1))}
            for clock in ("seconds", "cpu_seconds"):
                entry[clock] = round(float(np.mean([r[clock] for r in runs])), 1)
            entry["iterations"] = int(np.mean([r["iterations"] for r in runs]))
            table[evaluated] = entry
    return table
