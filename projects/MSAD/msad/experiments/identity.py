"""By what the run in a folder is recognised: its config, data, weights and code; what has changed, and what is kept."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode

from .. import __version__
from ..config import load_config
from ..data.cache import checkpoint_id
from ..data.fingerprint import dataset_fingerprint
from ..data.register import registered
from ..engine.run_folder import changes, has_run, same_but_places
from ..engine.scaling import SCHEDULE
from ..engine.setup import engine_name
from ..files import local_file, read_json, write_json
from .run import exclusive_lock
from .variants import map_teachers

TEST_DATA = "test data"


def identity(cfg: CfgNode) -> dict:
    """By what a run is recognised: its config, data, the weights that it starts from and learns from, and the code."""
    weights = [cfg.MODEL.WEIGHTS, *(entry.get("WEIGHTS", "") for entry in map_teachers(cfg))]
    return {
        "config": _digest(cfg),
        "code": _code(),
        "weights": [checkpoint_id(file) for file in weights],
        "data": _data(cfg.DATASETS.dump(), os.getenv("DETECTRON2_DATASETS", "")),
    }


def _digest(cfg: CfgNode) -> str:
    return hashlib.sha256(cfg.dump().encode()).hexdigest()


@functools.lru_cache
def _data(datasets: str, root: str) -> dict:
    """Once a process: all runs are of the data as they are when the first is begun."""
    cfg = CfgNode({"DATASETS": CfgNode.load_cfg(datasets)})
    with registered(cfg):
        return dataset_fingerprint(cfg)


@functools.cache
def _code() -> list[str]:
    return [engine_name(), __version__]


def _before(folder: Path) -> dict | None:
    """The identity of the run that has left a checkpoint or result in ``folder``, or None if there is none."""
    if not has_run(folder) and not (folder / "result.json").is_file():
        return None
    return read_json(folder / "identity.json") or {"config": "", "code": []}


def is_finished(cfg: CfgNode, say=print, timed: bool = False) -> bool:
    """Whether the OUTPUT_DIR of ``cfg`` holds its finished run; otherwise make the folder ready for (going on with) it.

    Of a run whose training data or teachers have changed since, nothing is used: its folder is renamed, NAME~1. If it
    is the test data that have changed, the model stays and is evaluated again.

    Args:
        cfg: frozen.
        say: is told of what has changed.
        timed: its schedule follows from a time that another run took, and another one is such a change, too.

    Raises:
        ValueError: the folder holds a run of another config or engine, or another process works in it.
    """
    folder, now = Path(cfg.OUTPUT_DIR), identity(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder):
        before = _before(folder)
        if before is not None:
            check_same(cfg, SCHEDULE if timed else ())
            what = _changed(cfg, before, now, timed)
            if what == TEST_DATA:
                say(f"{folder}: the {what} have changed, it is evaluated again")
                (folder / "result.json").unlink(missing_ok=True)
            elif what:
                old = next(p for n in range(1, 10**6) if not (p := folder.with_name(f"{folder.name}~{n}")).exists())
                folder.rename(old)
                folder.mkdir()
                say(f"{folder}: the {what} have changed, it is trained again; the earlier run is {old.name}")
        else:  # nothing is used of an attempt that reached no checkpoint, which may have been of another config
            for name in ("clock.json", "warnings.json"):
                (folder / name).unlink(missing_ok=True)
        (folder / "failed.txt").unlink(missing_ok=True)
        if (folder / "result.json").is_file():
            return True
        (folder / "config.yaml").write_text(cfg.dump())
        write_json(folder / "identity.json", now)
    return False


def check_reportable(cfg: CfgNode, timed: bool = False) -> None:
    """ValueError if :func:`is_finished` would not keep the run in the OUTPUT_DIR of ``cfg``, or its result; says why.

    Nothing in the folder is touched. Data and weights that are gone have not changed.
    """
    check_same(cfg, SCHEDULE if timed else ())
    before = _before(Path(cfg.OUTPUT_DIR))
    if before is not None and (what := _changed(cfg, before, identity(cfg), timed)):
        raise ValueError(f"{cfg.OUTPUT_DIR}: the {what} have changed since its run; without --report-only the same "
                         f"command {'evaluates' if what == TEST_DATA else 'trains'} it again")  # fmt: skip


def _changed(cfg: CfgNode, before: dict, now: dict, timed: bool) -> str:
    """What has changed, of data, weights and measured times, since the run of an identity; "" for nothing."""
    data = {name for name, found in now["data"].items()
            if found != before["data"].get(name) and found["annotations"] not in ("missing", "unknown")}  # fmt: skip
    # The id of a checkpoint that is there has no file's ending.
    there = [not Path(local_file(found)).suffix for found in now["weights"]]
    weights = [list(itertools.compress(of["weights"], there)) for of in (before, now)]
    changed = {
        "training data": not data.isdisjoint(cfg.DATASETS.TRAIN),
        "weights of its teacher or its start": weights[0] != weights[1],
        "measured times or the reference": timed and bool(_differences(cfg, before)),
        TEST_DATA: bool(data),
    }
    return next((cause for cause, applies in changed.items() if applies), "")


def check_same(cfg: CfgNode, free: Sequence[str] = ()) -> None:
    """ValueError if the OUTPUT_DIR of ``cfg`` holds a run of another config or engine; names what differs.

    Where the folder, the teachers and the data lie is no difference, so folders may be moved. Nor is a key that the run
    does not know yet, unless ``cfg`` changes it, nor are those that are ``free``.
    """
    before = _before(Path(cfg.OUTPUT_DIR))
    if before is None:
        return
    if not before["code"]:
        other = "kind, which has no identity.json"
    elif before["code"] != _code():
        other = f"engine or version ({', '.join(before['code'])})"
    elif differing := _differences(cfg, before, free):
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        other = f"configuration ({', '.join(differing[:3])}{more})"
    else:
        return
    raise ValueError(f"{cfg.OUTPUT_DIR} holds a run of another {other}; choose another --output or delete it")


def _differences(cfg: CfgNode, before: dict, free: Sequence[str] = ()) -> list[str]:
    """What is not as in the config.yaml of the run in ``cfg``'s OUTPUT_DIR, "KEY value, now value"."""
    if before["config"] == _digest(cfg):
        return []
    file = Path(cfg.OUTPUT_DIR) / "config.yaml"
    if not file.is_file():
        return ["its config.yaml is gone"]
    try:
        old = load_config(file)
    except (KeyError, ValueError) as error:
        return [f"its config.yaml cannot be read: {error}"]
    differing = [c for c in changes(old, cfg) if c[0] not in free and not same_but_places(*c)]
    return [f"{key} {was}, now {now}" for key, was, now in differing]
