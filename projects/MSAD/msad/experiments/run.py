"""One training run that is finished, resumed or begun: the unit of which studies and comparisons are made."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook
from tqdm import tqdm

from ..engine.checkpoint import atomic_write
from ..engine.setup import evaluate, evaluate_branches, load_model, prepare
from ..engine.trainer import DistillTrainer


def read_result(folder: Path) -> dict | None:
    """What the finished run in ``folder`` left, see :func:`run_config`, or None."""
    file = folder / "result.json"
    return json.loads(file.read_text()) if file.is_file() else None


def check_result(cfg: CfgNode) -> dict:
    """The result in the OUTPUT_DIR of ``cfg``, which is finished.

    Raises:
        ValueError: it is that of another config.
    """
    result = read_result(Path(cfg.OUTPUT_DIR))
    if result["fingerprint"] != _fingerprint(cfg):
        raise _other_run(cfg)
    return result


def run_config(cfg: CfgNode, name: str, title: str, *, position: int = 0) -> dict:
    """Train ``cfg`` in its OUTPUT_DIR, evaluate and note the result; goes on where an earlier attempt stopped.

    Args:
        cfg: frozen.
        name: under which results are noted; those of a teacher as ``{name}_{branch}``.
        title: of the progress bar.
        position: line of the progress bar on the terminal.

    Returns:
        {"fingerprint": of the config, "iterations", "seconds" and "cpu_seconds" that training took, "steps" done in
        that time (those that an interruption cost are done twice), "results": {name: {task: {metric: value}}}}.

    Raises:
        ValueError: the folder holds an unfinished run of another config, or another process works in it.
    """
    folder = Path(cfg.OUTPUT_DIR)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        return _run(cfg, name, title, folder, position)


def _run(cfg: CfgNode, name: str, title: str, folder: Path, position: int) -> dict:
    used = folder / "config.yaml"
    if (folder / "last_checkpoint").is_file() and used.is_file() and used.read_text() != cfg.dump():
        raise _other_run(cfg)
    used.write_text(cfg.dump())
    with log_to(folder / "log.txt"):
        prepare(cfg)
        trainer = _Trainer(cfg, _Progress(title, folder / "clock.json", position))
        trainer.resume_or_load(resume=True)
        if trainer.start_iter < trainer.max_iter:
            trainer.train()
        model = load_model(cfg, str(folder / "model_final.pth"))
        if cfg.MODEL.META_ARCHITECTURE == "MultiScaleTeacher":
            results = {f"{name}_{branch}": r for branch, r in evaluate_branches(cfg, model).items()}
        else:
            results = {name: evaluate(cfg, model)}
    result = {
        "fingerprint": _fingerprint(cfg),
        "iterations": trainer.max_iter,
        **json.loads((folder / "clock.json").read_text()),
        "results": results,
    }
    with atomic_write(str(folder / "result.json"), "w") as file:
        json.dump(result, file, indent=1)
    return result


def _other_run(cfg: CfgNode) -> ValueError:
    where = cfg.OUTPUT_DIR
    return ValueError(f"{where} holds a run of another configuration; choose another --output or delete it")


def _fingerprint(cfg: CfgNode) -> str:
    return hashlib.sha1(cfg.dump().encode()).hexdigest()[:12]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes from training in ``folder`` meanwhile."""
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = f"another process is training in {folder}; wait for it or choose another --output"
            raise ValueError(text) from None
        yield


class _Trainer(DistillTrainer):
    """Shows progress; leaves the evaluation after training to the run, which evaluates every branch of a teacher."""

    def __init__(self, cfg: CfgNode, progress: _Progress) -> None:
        self._progress = progress
        super().__init__(cfg)

    def build_hooks(self) -> list:
        final = self.cfg.TEST.EVAL_PERIOD == 0
        hooks = [hook for hook in super().build_hooks() if not (final and isinstance(hook, EvalHook))]
        return [self._progress, *hooks]  # the first: what other hooks do after a step is not training


class _Progress(HookBase):
    """A progress bar with ETA and the current loss, and the seconds that training took, over resumes.

    Seconds are those of the wall clock and, as other work on the machine falsifies them, of the processors. They are
    those of the steps: evaluation and writing of checkpoints between them is not training.
    """

    def __init__(self, title: str, clock: Path, position: int = 0) -> None:
        self.title = title
        self.position = position
        self.clock = clock  # file with the seconds of earlier, interrupted attempts
        self.spent = {"seconds": 0.0, "cpu_seconds": 0.0, "steps": 0}
        if clock.is_file():
            self.spent.update(json.loads(clock.read_text()))

    def before_train(self) -> None:
        self.bar = tqdm(
            total=self.trainer.max_iter, initial=self.trainer.start_iter, desc=self.title, unit="it",
            mininterval=0.5 if sys.stderr.isatty() else 60, dynamic_ncols=True, position=self.position,
            leave=self.position == 0,
        )  # fmt: skip

    def before_step(self) -> None:
        self.start = time.perf_counter(), time.process_time()

    def after_step(self) -> None:
        self.spent["seconds"] += time.perf_counter() - self.start[0]
        self.spent["cpu_seconds"] += time.process_time() - self.start[1]
        self.spent["steps"] += 1
        self.bar.update()
        done = self.trainer.iter + 1
        if done % 20 == 0 or done == self.trainer.max_iter:
            loss = self.trainer.storage.latest().get("total_loss")
            if loss:
                self.bar.set_postfix(loss=f"{loss[0]:.3f}", refresh=False)
            with atomic_write(str(self.clock), "w") as file:
                json.dump({key: round(value, 1) for key, value in self.spent.items()}, file)

    def after_train(self) -> None:
        self.bar.close()


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
