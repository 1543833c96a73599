"""One training run in one folder: trained or resumed, and evaluated.

``python -m msad.experiments.run FOLDER`` runs what FOLDER/config.yaml describes and leaves there, beside what training
writes: ``result.json``, or ``failed.txt`` with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook

from ..config import load_config
from ..engine.setup import evaluate, evaluate_branches, load_model, prepare
from ..engine.stages import stage_configs, total_iterations, train_stages
from ..engine.trainer import DistillTrainer
from ..files import FINAL, read_json, write_json


def train_and_evaluate(folder: Path) -> dict:
    """Do what ``folder``/config.yaml says, going on where an earlier attempt stopped; notes and returns the result.

    Returns:
        {"iterations", "warmup": iterations of the learning rate's warm-up, "seconds" and "cpu_seconds" that training
        took, "steps" done in that time (those that an interruption cost are done twice), "warnings": texts, "results":
        {name: {task: {metric: value}}}}. The name is that of the folder; of a teacher one a branch, NAME_BRANCH.

    Raises:
        ValueError: another process works in the folder.
    """
    cfg = load_config(folder / "config.yaml")
    cfg.freeze()
    is_curriculum = bool(cfg.DISTILL.STAGES)

    def train(cfg: CfgNode, resume: bool = True) -> None:
        trainer = _Trainer(cfg, _Clock(folder / "clock.json"), evaluates=is_curriculum)
        trainer.resume_or_load(resume=resume)
        if trainer.start_iter < trainer.max_iter or is_curriculum:  # a stage may lack its evaluation only
            trainer.train()

    with exclusive_lock(folder), log_to(folder / "log.txt"), Warnings(folder / "warnings.json") as warnings:
        prepare(cfg)
        if is_curriculum:
            train_stages(cfg, True, train)
            shutil.copy(Path(stage_configs(cfg)[-1].OUTPUT_DIR) / FINAL, folder / FINAL)
        else:
            train(cfg)
        model = load_model(cfg, str(folder / FINAL))
        if cfg.MODEL.META_ARCHITECTURE == "MultiScaleTeacher":
            results = {f"{folder.name}_{branch}": r for branch, r in evaluate_branches(cfg, model).items()}
        else:
            results = {folder.name: evaluate(cfg, model)}
        clock = read_json(folder / "clock.json")
        result = {"iterations": total_iterations(cfg), "warmup": cfg.SOLVER.WARMUP_ITERS, **clock}
        result |= {"warnings": warnings.texts, "results": results}
        write_json(folder / "result.json", result)
    return result


@contextlib.contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Keep other processes from training in ``folder`` meanwhile; ValueError if one does."""
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = f"another process is training in {folder}; wait for it or choose another --output"
            raise ValueError(text) from None
        yield


class _Trainer(DistillTrainer):
    """Measures time; leaves the evaluation after training to the run, which evaluates every branch of a teacher.

    Args:
        evaluates: whether it evaluates at the end all the same, as stages of a curriculum do.
    """

    def __init__(self, cfg: CfgNode, clock: _Clock, evaluates: bool) -> None:
        self._clock, self._evaluates = clock, evaluates
        super().__init__(cfg)

    def build_hooks(self) -> list:
        left_out = self.cfg.TEST.EVAL_PERIOD <= 0 and not self._evaluates
        hooks = [hook for hook in super().build_hooks() if not (left_out and isinstance(hook, EvalHook))]
        return [self._clock, *hooks]  # the first: what other hooks do after a step is not training


class _Clock(HookBase):
    """Seconds of the training steps by the wall clock and of the processors, over resumes, in a file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.spent = {"seconds": 0.0, "cpu_seconds": 0.0, "steps": 0, **(read_json(file) or {})}

    def before_step(self) -> None:
        self.start = time.perf_counter(), time.process_time()

    def after_step(self) -> None:
        self.spent["seconds"] += time.perf_counter() - self.start[0]
        self.spent["cpu_seconds"] += time.process_time() - self.start[1]
        self.spent["steps"] += 1
        done = self.trainer.iter + 1
        if done % 20 == 0 or done == self.trainer.max_iter:
            write_json(self.file, {key: round(value, 1) for key, value in self.spent.items()})


class Warnings(logging.Handler):
    """Keeps what is warned of, each text once, in a file, from which a resumed run goes on."""

    def __init__(self, file: Path) -> None:
        super().__init__(logging.WARNING)
        self.file, self.texts = file, read_json(file) or []

    def __enter__(self) -> Warnings:
        logging.getLogger("msad").addHandler(self)
        return self

    def __exit__(self, *_exception: object) -> None:
        logging.getLogger("msad").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self.texts:
            self.texts.append(text)
            write_json(self.file, self.texts)


@contextlib.contextmanager
def log_to(file: Path) -> Iterator[None]:
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


def end_with_parent() -> None:
    """End this process when its parent, which holds the other end of the standard input, has ended."""

    def wait() -> None:
        os.read(sys.stdin.fileno(), 1)  # not sys.stdin.read, which Python cannot leave at its own end
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one folder; status 1 if it failed, with the reason in failed.txt."""
    parser = argparse.ArgumentParser(description="Train and evaluate what FOLDER/config.yaml describes.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; default: torch's")
    parser.add_argument("--end-with-stdin", action="store_true", help="end when the standard input is closed")
    args = parser.parse_args(argv)
    if args.end_with_stdin:
        end_with_parent()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        train_and_evaluate(args.folder)
    except Exception as error:
        text = str(error).strip()
        (args.folder / "failed.txt").write_text(f"{type(error).__name__}: {text.splitlines()[0] if text else ''}")
        with open(args.folder / "log.txt", "a") as file:
            file.write(traceback.format_exc())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
