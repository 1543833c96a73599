"""Comparisons that were run apart, as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from detectron2.config import CfgNode

from ..config import load_config
from ..engine.run_folder import changes, same_but_places
from ..files import FINAL, read_json
from .costs import costs_of_trained


class Part(NamedTuple):
    """A finished comparison or quickstart: its folder, and what is added to the names of its variants."""

    folder: Path
    suffix: str = ""


def join(parts: Sequence[Part]) -> dict:
    """The data of one report from those of several; differences are then taken seed by seed over all of them.

    A run that failed in one part gives way to another part's. The reference is the first part's that has one. What
    parts say of costs is left out: milliseconds compare only where models take turns (:func:`joined_costs`).

    Raises:
        ValueError: a folder has no report.json of a comparison, or two have the same variant with the same seed, other
            configs under one name, or other test data; names them.
    """
    variants, runs, owners = {}, {}, {}
    found = [_read(part.folder) for part in parts]
    _check_data(parts, found)
    _check_configs(parts, found)
    for (folder, suffix), data in zip(parts, found):
        other = f"; rename those of one folder with SUFFIX={folder}"
        for name, variant in data["variants"].items():
            if "teachers" in variant:
                variant = {**variant, "teachers": [teacher + suffix for teacher in variant["teachers"]]}
            known = variants.setdefault(name + suffix, variant)
            if Path(known["file"]).name != Path(variant["file"]).name:
                raise ValueError(f"{name + suffix} is {known['file']} and, in {folder}, {variant['file']}{other}")
        for run in data["runs"]:
            old, new, seed = run["variant"], run["variant"] + suffix, run["seed"]
            if "error" not in run and (new, seed) in owners:
                raise ValueError(f"{new} with seed {seed} is in {owners[new, seed]} and in {folder}{other}")
            renamed = {name.replace(old, new, 1): result for name, result in run.get("results", {}).items()}
            found_run = {**run, "variant": new, **({"results": renamed} if renamed else {})}
            if "error" in run:
                runs.setdefault((new, seed), found_run)
            else:
                owners[new, seed], runs[new, seed] = folder, found_run
    references = [data["reference"] + part.suffix for part, data in zip(parts, found) if data.get("reference")]
    names = dict.fromkeys(name for data in found for name in data.get("versions", ()))
    return {
        "engine": _all_of(data.get("engine") for data in found),
        "versions": {name: _all_of(data.get("versions", {}).get(name) for data in found) for name in names},
        "data": next((data["data"] for data in found if data.get("data")), None),
        "seeds": sorted({seed for data in found for seed in data.get("seeds", ())}),
        "reference": next(iter(references), ""), "variants": variants, "runs": list(runs.values()),
    }  # fmt: skip


def _homes(part: Part, data: dict) -> Iterator[tuple[dict, Path]]:
    """(run, its folder) of the runs that did not fail and whose folder is still there."""
    for run in data["runs"]:
        home = part.folder / f"seed{run['seed']}" / run["variant"]
        if "error" not in run and (home / "config.yaml").is_file() and (home / "identity.json").is_file():
            yield run, home


def _check_data(parts: Sequence[Part], found: Sequence[dict]) -> None:
    first = None
    for part, data in zip(parts, found):
        for _, home in _homes(part, data):
            names, known = load_config(home / "config.yaml").DATASETS.TEST, read_json(home / "identity.json")["data"]
            tested = [known.get(name) for name in names]
            first = first or (tested, names, home)
            if tested != first[0]:
                one, other = (f"{folder} on {', '.join(sets)}" for _, sets, folder in (first, (tested, names, home)))
                raise ValueError(f"the models were tested on other data: {one}, and {other}")


def _check_configs(parts: Sequence[Part], found: Sequence[dict]) -> None:
    """Whether what has one name was trained with one config, but for its seed and what a budget chooses."""
    first: dict[str, tuple[CfgNode, Path]] = {}
    for part, data in zip(parts, found):
        for run, home in _homes(part, data):
            name = run["variant"] + part.suffix
            if data["variants"].get(run["variant"], {}).get("budget") == "equal_time":
                continue
            cfg = load_config(home / "config.yaml")
            other, place = first.setdefault(name, (cfg, home))
            differing = [c for c in changes(other, cfg) if c[0] != "SEED" and not same_but_places(*c)]
            if differing:
                key, was, now = differing[0]
                raise ValueError(
                    f"{name} has {key} {was} in {place} and {now} in {home}; rename those of one folder with "
                    f"SUFFIX={part.folder}"
                )


def _read(folder: Path) -> dict:
    data = read_json(folder / "report.json")
    if data is None or not {"variants", "runs"} <= data.keys():
        raise ValueError(f"{folder} has no report.json of compare.py or quickstart.py")
    return data


def _all_of(values) -> str:
    return " and ".join(dict.fromkeys(value for value in values if value))


def joined_costs(parts: Sequence[Part]) -> dict[str, dict]:
    """Costs of all variants whose weights are still there, of the first seed that has them, measured in turns.

    See :func:`msad.experiments.costs.measure_costs`.
    """
    models = {}
    for folder, suffix in parts:
        finished = [run for run in _read(folder)["runs"] if "error" not in run]
        for run in sorted(finished, key=lambda run: run["seed"]):
            home, name = folder / f"seed{run['seed']}" / run["variant"], run["variant"] + suffix
            weights = home / FINAL
            if name not in models and weights.is_file():
                models[name] = load_config(home / "config.yaml"), weights
    return costs_of_trained(models)
