"""The folder of a run: no run is overwritten by another, and one is resumed only as what it was begun."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from ..config import default_config, load_config
from ..config_values import plain, set_value, valid_keys, value_at
from ..data.cache import checkpoint_id
from ..data.fingerprint import dataset_fingerprint
from ..files import atomic_write, local_file, read_json, write_json
from ..finding import error_text

logger = logging.getLogger(__name__)
RECORD = "inputs.json"
# What a checkpoint overrides, and what nobody reads once a run has begun.
KEPT = {
    *("SOLVER.BASE_LR", "SOLVER.BIAS_LR_FACTOR", "SOLVER.WEIGHT_DECAY", "SOLVER.WEIGHT_DECAY_NORM"),
    *("SOLVER.WEIGHT_DECAY_BIAS", "SOLVER.MOMENTUM", "SOLVER.NESTEROV", "SEED", "MODEL.WEIGHTS"),
    "DISTILL.INIT_STUDENT",
}  # fmt: skip
# What a run is, but for FREE: with another value its checkpoint does not fit, or stands for something else.
FIXED = ("MODEL.", "MSAD.", "DISTILL.", "DATASETS.TRAIN", "INPUT.FORMAT", "SOLVER.OPTIMIZER", "SOLVER.AMP.",
         "SOLVER.REFERENCE_BATCH_SIZE", "SOLVER.REFERENCE_WORLD_SIZE")  # fmt: skip
FREE = {
    *("MODEL.DEVICE", "MSAD.EVAL_BRANCH", "MSAD.W_FUSE", "MSAD.FUSION_STUDENT.STREAMS", "DISTILL.W_DET"),
    *("DISTILL.WARMUP_ITERS", "DISTILL.DECAY_FROM", "DISTILL.DECAY_TO", "DISTILL.WEIGHTING", "DISTILL.LAMBDA"),
    *("DISTILL.GAMMA", "DISTILL.ANALYSIS_PERIOD"),
}  # fmt: skip
# Parts of entries that may differ: files are compared by their content, see :func:`check_inputs`.
LOOSE = {"DISTILL.TEACHERS": ("CONFIG", "WEIGHTS"), "DISTILL.LOSSES": ("WEIGHT",)}


def has_run(folder: Path) -> bool:
    """Whether a run, or the stage of one, has left a checkpoint in ``folder``."""
    return (folder / "last_checkpoint").is_file() or any(folder.glob("model_*.pth")) or bool(_begun_stages(folder))


def _begun_stages(folder: Path) -> list[Path]:
    """Folders of the stages of a curriculum that have left a checkpoint, in their order."""
    numbered = [stage for stage in folder.glob("stage[0-9]*") if stage.name.removeprefix("stage").isdecimal()]
    return sorted(filter(has_run, numbered), key=lambda stage: int(stage.name.removeprefix("stage")))


def write_config(cfg: CfgNode) -> None:
    """Write OUTPUT_DIR/config.yaml."""
    with atomic_write(Path(cfg.OUTPUT_DIR) / "config.yaml", "w") as file:
        file.write(cfg.dump())


def last_checkpoint(folder: Path) -> str:
    """The checkpoint that a run in ``folder`` would go on with, of a curriculum that of its last begun stage.

    Raises:
        FileNotFoundError: there is none.
    """
    named = folder / "last_checkpoint"
    if not named.is_file() and (begun := _begun_stages(folder)):
        return last_checkpoint(begun[-1])
    file = folder / named.read_text().strip() if named.is_file() else named
    if not file.is_file():
        raise FileNotFoundError(f"--resume: {folder} has no checkpoint to go on with: there is no {file.name}")
    return str(file)


def check_folder(cfg: CfgNode, config_file: str, resume: bool) -> tuple[CfgNode, list[str]]:
    """Whether a run may write into OUTPUT_DIR; nothing is written here.

    Args:
        config_file: of the command line.
        resume: whether it goes on with what is there.

    Returns:
        the config to run, in which a resumed run's checkpoint has the last word, and what is to be said of that.

    Raises:
        ValueError: the folder has another run, a teacher or the config file itself; or what the run consists of has
            changed since it began, with the key.
    """
    folder = Path(cfg.OUTPUT_DIR)
    found = has_run(folder)
    if found and not resume:
        raise ValueError(
            f"OUTPUT_DIR {folder} holds a run: add --resume to go on with it, or choose another OUTPUT_DIR"
        )
    mine = folder / "config.yaml"
    if not found and mine.is_file() and config_file and Path(config_file).is_file() and mine.samefile(config_file):
        raise ValueError(f"the run would overwrite {config_file}: choose another OUTPUT_DIR than its folder")
    for entry in cfg.DISTILL.TEACHERS:
        for path in (entry.get("CONFIG"), entry.get("WEIGHTS")):
            if path and folder.resolve() == Path(path).resolve().parent:
                raise ValueError(f"OUTPUT_DIR {folder} is the folder of the teacher's {path}: choose another one")
    if not found:
        return cfg, [] if not resume else [f"--resume: there is no checkpoint in {folder}, so the run begins"]
    if any(folder.glob("model_*.pth")) and not (folder / "last_checkpoint").is_file():
        raise ValueError(
            f"{folder} has checkpoints, but no file last_checkpoint: write the name of the one to go on with into it"
        )
    if not mine.is_file():
        return cfg, [f"{mine} is gone, so that what has changed since the run began is not known"]
    try:
        old = default_config(cfg.MSAD.IMPORTS)
        old.merge_from_file(str(mine))
    except (KeyError, TypeError, ValueError) as error:
        return cfg, [f"{mine} cannot be compared with the config: {error}"]
    _check_length(cfg, folder)
    return _resumed(cfg, old)


def _check_length(cfg: CfgNode, folder: Path) -> None:
    if cfg.SOLVER.REFERENCE_BATCH_SIZE or cfg.SOLVER.REFERENCE_WORLD_SIZE:
        return  # MAX_ITER is not yet that of the run; the trainer looks again
    if not (folder / "last_checkpoint").is_file():
        return  # as of a curriculum, whose stages have schedules of their own
    try:
        file = Path(last_checkpoint(folder))
    except FileNotFoundError:
        return
    try:
        done = torch.load(file, map_location="cpu", mmap=True, weights_only=True)["iteration"] + 1
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, pickle.UnpicklingError) as error:
        others = ", ".join(sorted(other.name for other in folder.glob("model_*.pth") if other.name != file.name))
        fix = f"write the name of another ({others}) into {folder}/last_checkpoint" if others else "begin a new run"
        what = f"{file} is damaged or no checkpoint of a run ({error_text(error)[:120]})"
        raise ValueError(f"--resume: {what}: {fix}") from error
    check_iterations(done, cfg.SOLVER.MAX_ITER, cfg.OUTPUT_DIR)


def check_iterations(done: int, wanted: int, folder: str) -> None:
    """Raise ValueError if a run is to end before where it already is."""
    if done > wanted:
        raise ValueError(f"SOLVER.MAX_ITER is {wanted}, but the run in {folder} has done {done} iterations already")
    if done == wanted:
        logger.info("The run in %s is finished: %d of %d iterations are done", folder, done, wanted)


def _resumed(cfg: CfgNode, old: CfgNode) -> tuple[CfgNode, list[str]]:
    out, notes = cfg.clone(), []
    out.defrost()
    for key, before, now in changes(old, cfg):
        if key in KEPT:
            notes.append(f"{key} {now} is ignored: the run goes on with {before}")
            set_value(out, key, before)
        elif key.startswith(FIXED) and not _may_change(key, before, now, Path(cfg.OUTPUT_DIR)):
            raise ValueError(
                f"the run in {cfg.OUTPUT_DIR} cannot be resumed with another {key}: it was begun with {before}, now "
                f"{now}; take its own value, or begin a new run in another OUTPUT_DIR"
            )
        else:
            notes.append(f"{key} has changed since the run began, from here on: {before} -> {now}")
    return out, notes


def changes(old: CfgNode, new: CfgNode) -> Iterator[tuple[str, Any, Any]]:
    """(key, old value, new value) of all that differs but OUTPUT_DIR, and DATASETS.REGISTER, which names files."""
    for key in valid_keys(new):
        before, now = (value_at(cfg, key) for cfg in (old, new))
        if isinstance(now, CfgNode) or key in ("OUTPUT_DIR", "DATASETS.REGISTER"):
            continue
        if plain(before) != plain(now):
            yield key, before, now


def _may_change(key: str, before: Any, now: Any, folder: Path) -> bool:
    if key == "DISTILL.STAGES" and before and now:  # those to come may change
        begun = max((n for n in range(1, len(before) + 1) if has_run(folder / f"stage{n}")), default=0)
        return plain(before[:begun]) == plain(now[:begun])
    if key in LOOSE:
        before, now = ([{k: v for k, v in e.items() if k not in LOOSE[key]} for e in plain(x)] for x in (before, now))
        return before == now
    return _is_free(key)


def same_but_places(key: str, before: Any, now: Any) -> bool:
    """Whether two values of a key differ in nothing but the folders of teachers' files, whose names must agree."""
    if key != "DISTILL.TEACHERS":
        return False
    names = [[{**e, **{k: Path(e[k]).name for k in LOOSE[key] if k in e}} for e in plain(x)] for x in (before, now)]
    return names[0] == names[1]


def _is_free(key: str) -> bool:
    return key in FREE or (key.startswith("MODEL.") and key.endswith("_TEST"))


def set_aside(folder: Path) -> None:
    """Move the records of a run that never reached a checkpoint away, so that a new one does not append to them."""
    names = ("metrics.json", "features.jsonl", "events.out.tfevents.*")
    left = [file for name in names for file in folder.glob(name)]
    if left:
        number = 1 + max((int(p.name.rpartition("-")[2]) for p in folder.glob("aborted-*") if _numbered(p)), default=0)
        target = folder / f"aborted-{number}"
        target.mkdir()
        for file in left:
            file.rename(target / file.name)
        logger.warning("An earlier run left no checkpoint in %s; its records are now in %s", folder, target)


def _numbered(path: Path) -> bool:
    return re.fullmatch(r"aborted-\d+", path.name) is not None


def check_inputs(cfg: CfgNode, resumed: bool) -> None:
    """Note data, teachers and batch of a run in OUTPUT_DIR/inputs.json, or compare them with what a resumed run noted.

    Raises:
        ValueError: the training data or a teacher are no longer what the run was begun with, or there are other
            images a step or processes, by which its schedule is scaled; names it.
    """
    file = Path(cfg.OUTPUT_DIR) / RECORD
    inputs = {"data": dataset_fingerprint(cfg), "teachers": [_teacher(entry) for entry in cfg.DISTILL.TEACHERS]}
    inputs["images"], inputs["processes"] = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size()
    if resumed and file.is_file():
        try:
            before = read_json(file)
        except ValueError as error:
            text = f"--resume: {file} is damaged ({error}); delete it if data and teachers are what they were"
            raise ValueError(text) from None
        for what, key in (("images", "REFERENCE_BATCH_SIZE"), ("processes", "REFERENCE_WORLD_SIZE")):
            then = before.get(what, inputs[what])
            if then != inputs[what] and cfg.SOLVER[key]:
                raise ValueError(
                    f"the run in {cfg.OUTPUT_DIR} cannot be resumed with {inputs[what]} {what}: it was begun with "
                    f"{then}, and SOLVER.{key} scales its schedule by them; take as many, or begin a new run in "
                    "another OUTPUT_DIR"
                )
        for number, (then, now) in enumerate(zip(before["teachers"], inputs["teachers"])):
            entry = cfg.DISTILL.TEACHERS[number]
            where = f"DISTILL.TEACHERS[{number}]"
            if "WEIGHTS" in then and then["WEIGHTS"] != now.get("WEIGHTS"):
                raise ValueError(_another(cfg, f"{where}.WEIGHTS", entry["WEIGHTS"]))
            if isinstance(then.get("CONFIG"), str):  # of a run that an earlier version began
                continue
            then, now = then.get("CONFIG", {}), now.get("CONFIG", {})
            if differing := [key for key in {**then, **now} if then.get(key) != now.get(key)]:
                raise ValueError(_another(cfg, f"{where}.CONFIG", f"{', '.join(differing)} in {entry['CONFIG']}"))
        for name, now in inputs["data"].items():
            then = before["data"].get(name, now)
            parts = ", ".join(part for part in now if now[part] != then.get(part))
            if parts and name in cfg.DATASETS.TRAIN:
                raise ValueError(_another(cfg, f"data set {name}", parts))
            if parts:
                logger.warning("Data set %s has changed since the run began: %s", name, parts)
    write_json(file, inputs)


def _another(cfg: CfgNode, what: str, detail: str) -> str:
    return (
        f"the run in {cfg.OUTPUT_DIR} cannot be resumed: {what} ({detail}) has another content than when it began; "
        "begin a new run in another OUTPUT_DIR"
    )


def _teacher(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What a teacher is: its weights, and the settings by which it makes features, where they are not the defaults."""
    if "MEAN_OF" in entry:
        return {}
    weights = str(entry.get("WEIGHTS", ""))
    cfg = load_config(entry["CONFIG"])
    settings = {
        key: plain(value)
        for key, _, value in changes(default_config(cfg.MSAD.IMPORTS), cfg)
        if key.startswith(("MODEL.", "MSAD.", "INPUT.FORMAT")) and key not in KEPT and not _is_free(key)
    }
    moved = (file := local_file(weights)) and not Path(file).is_file()  # nothing is known of a file that is gone
    return {"CONFIG": settings, **({} if moved else {"WEIGHTS": checkpoint_id(weights)})}
