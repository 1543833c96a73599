"""Files of adaptation costs, JSON of tools/adaptation_cost.py or typed in yaml, and the DISTILL.STAGES that follow.

.. code-block:: yaml

    student: S
    quality: {I: 38.2, II: 38.7}        # performance of the teachers, e.g. AP on validation data
    costs:                              # from: {to: C(from, to)}
      S: {I: 0.939, II: 0.060}
      I: {II: 0.070}
      II: {I: 1.181}
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import yaml

from ...config import load_config
from ...config_values import plain, value_at
from .order import Costs, check_costs


@dataclass(frozen=True)
class CostTable:
    """Adaptation costs and what is known of the networks.

    Attributes:
        student: its name.
        quality: performance of each teacher, in the order of the file.
        costs: C(from, to).
        normalized_costs: the same divided by the variance of "to" (1 - R^2); empty if not measured.
        teachers: DISTILL.TEACHERS entries of the teachers; empty if not known.
        config, weights: yaml and checkpoint of the student; "" if not known.
        opts: overrides of that yaml, KEY, VALUE, ..., with which the costs were measured.
    """

    student: str
    quality: dict[str, float]
    costs: Costs
    normalized_costs: Costs = field(default_factory=dict)
    teachers: list[dict] = field(default_factory=list)
    config: str = ""
    weights: str = ""
    opts: list = field(default_factory=list)


def read_costs(path: str | os.PathLike, quality: Mapping[str, float] | None = None) -> CostTable:
    """Read and check a file of adaptation costs.

    Args:
        quality: performances that replace or complete those of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON or yaml, or something is missing or wrong; names the file and the culprit.
    """
    path = os.fspath(path)
    with open(path) as file:
        try:
            content = yaml.safe_load(file)  # JSON is yaml
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is neither JSON nor yaml: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no table of costs: it must have the keys student, quality and costs")
    if not isinstance(content.get("student"), str):
        raise ValueError(f"{path}: student must be the name of a network, got {content.get('student')!r}")
    costs = _numbers_of_pairs(content.get("costs"), f"{path}: costs")
    known = _numbers(content.get("quality") or {}, f"{path}: quality") | dict(quality or {})
    teachers = [name for name in _names(costs) if name != content["student"]]
    for name in teachers:
        if name not in known:
            raise ValueError(f"{path}: the performance of teacher {name!r} is not known; give it as quality")
    for name in known:
        if name not in teachers:
            raise ValueError(f"{path}: {name!r} has a quality but no costs; the teachers are {', '.join(teachers)}")
    try:
        check_costs(costs, content["student"], teachers)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return CostTable(
        student=content["student"],
        quality={name: known[name] for name in teachers},
        costs=costs,
        normalized_costs=_numbers_of_pairs(content.get("normalized_costs") or {}, f"{path}: normalized_costs"),
        teachers=list(content.get("teachers") or []),
        config=content.get("config") or "",
        weights=content.get("weights") or "",
        opts=list(content.get("opts") or []),
    )


def parse_quality(pairs: Sequence[str]) -> dict[str, float]:
    """Performances of teachers from NAME=AP texts of a command line; ValueError for what is none."""
    quality = {}
    for pair in pairs:
        name, equals, value = pair.rpartition("=")
        try:
            quality[name] = float(value)
        except ValueError:
            equals = ""
        if not (name and equals and math.isfinite(quality[name])):
            raise ValueError(f"--quality takes NAME=AP, got {pair!r}")
    return quality


def _names(costs: Costs) -> list[str]:
    return list(dict.fromkeys([*costs, *(name for row in costs.values() for name in row)]))


def _numbers(mapping: Any, where: str) -> dict[str, float]:
    if not isinstance(mapping, dict):
        raise ValueError(f"{where} must be a mapping from names to numbers, got {mapping!r}")
    for name, value in mapping.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{where}: {name!r} must be a number, got {value!r}")
    return {str(name): float(value) for name, value in mapping.items()}


def _numbers_of_pairs(mapping: Any, where: str) -> dict[str, dict[str, float]]:
    if not isinstance(mapping, dict):
        raise ValueError(f"{where} must be a mapping from: {{to: cost}}, got {mapping!r}")
    return {str(name): _numbers(row, f"{where} from {name!r}") for name, row in mapping.items()}


def stages_block(
    order: Sequence[str], teachers: Sequence[Mapping[str, Any]] = (), overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The DISTILL block of a curriculum: one stage a teacher.

    Args:
        order: names of the teachers, first stage first.
        teachers: DISTILL.TEACHERS entries; those of the order are repeated in the block.
        overrides: of every stage.
    """
    block: dict[str, Any] = {"STAGES": [{"TEACHERS": [name], **(overrides or {})} for name in order]}
    entries = {entry.get("NAME"): dict(entry) for entry in teachers}
    if all(name in entries for name in order):
        block = {"TEACHERS": [entries[name] for name in order], **block}
    return {"DISTILL": block}


def curriculum(
    block: Mapping[str, Any], config: str, weights: str, folder: str, opts: Sequence = ()
) -> dict[str, Any]:
    """A whole config of :func:`stages_block`, which begins with the off-the-shelf student.

    Its OUTPUT_DIR is the student's with "_progressive" behind it.

    Args:
        config, weights: yaml and checkpoint of that student.
        opts: overrides of the yaml, which are written down but for what the curriculum itself sets.
        folder: of the file that is to be written, to which paths of files become relative.
    """

    def beside(path: str) -> str:
        return os.path.relpath(path, folder or ".") if os.path.isfile(path) else path

    distill = {"INIT_STUDENT": "none", **block["DISTILL"]}
    distill["TEACHERS"] = [
        {key: beside(value) if key in ("CONFIG", "WEIGHTS") else value for key, value in entry.items()}
        for entry in distill["TEACHERS"]
    ]
    cfg = load_config(config, list(opts))
    whole: dict[str, Any] = {
        "_BASE_": beside(config), "MODEL": {"WEIGHTS": beside(weights)},
        "OUTPUT_DIR": f"{cfg.OUTPUT_DIR}_progressive", "DISTILL": distill,
    }  # fmt: skip
    for key in opts[::2]:
        *sections, name = key.split(".")
        node = reduce(lambda tree, section: tree.setdefault(section, {}), sections, whole)
        node.setdefault(name, plain(value_at(cfg, key)))
    return whole


def dump_stages(block: Mapping[str, Any]) -> str:
    """A block or config of this module as yaml, a line a teacher and a stage."""
    lines = [f"{key}: {_on_one_line(value)}" for key, value in block.items() if key != "DISTILL"]
    lines.append("DISTILL:")
    for key, value in block["DISTILL"].items():
        if isinstance(value, list):
            lines += [f"  {key}:", *(f"    - {_on_one_line(entry)}" for entry in value)]
        else:
            lines.append(f"  {key}: {_on_one_line(value)}")
    return "\n".join(lines) + "\n"


def _on_one_line(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)
    return text.removesuffix("...\n").strip()  # with which a scalar ends
