"""Variants, the configurations of a comparison: from yaml files, a folder of them, or a parameter's values."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from ..config import load_config, nearest
from ..config_values import decode, value_at


@dataclass(frozen=True)
class Variant:
    """One configuration of a comparison; it runs once a seed.

    Attributes:
        file: its yaml.
        overrides: KEY, VALUE, ... on top of it.
        budget: "" (as its config says), or relative to the variant called ``reference``: "equal_iterations" (as many as
            that one and its teachers together), "equal_time" (as many iterations as fit into its training time), or
            "equal_cost" (the input size of as many multiply-adds).
        count_teachers: the time of "equal_time" includes that of the teachers, on both sides.
        base: of "equal_time", the variant without a budget, whose steps are measured.
        title, description: what it is, for people.
        teacher: it is trained because others name it in DISTILL.TEACHERS.
        swept: (name of the file's variant, key, value) of a parameter sweep.
    """

    file: Path
    overrides: tuple = ()
    budget: str = ""
    reference: str = ""
    count_teachers: bool = False
    base: str = ""
    title: str = ""
    description: str = ""
    teacher: bool = False
    swept: tuple[str, str, Any] | None = None


def map_teachers(cfg: CfgNode, change: Callable[[dict], dict] = dict) -> list[dict]:
    """All entries of ``cfg`` that name a teacher by CONFIG and WEIGHTS; each is replaced by ``change(entry)``."""
    found = [dict(entry) for entry in cfg.DISTILL.TEACHERS if entry.get("CONFIG")]
    if change is not dict:
        cfg.DISTILL.TEACHERS = [change(dict(e)) if e.get("CONFIG") else dict(e) for e in cfg.DISTILL.TEACHERS]
    return found


def at_equal_time(name: str, variant: Variant, reference: str, count_teachers: bool) -> dict[str, Variant]:
    """{NAME@equal_time: the variant in the time of the reference}."""
    timed = replace(variant, budget="equal_time", reference=reference, count_teachers=count_teachers, base=name)
    return {f"{name}@equal_time": timed}


def equal_cost(file: Path, reference: str) -> dict[str, Variant]:
    """{"baseline_equal_cost": the conventional detector of ``file`` at the input size that costs the same}."""
    description = (
        "The conventional detector with its stock levels, trained and tested at the input size at which the whole "
        f"model costs as many multiply-adds as {reference}: what the same money buys without any of our method."
    )
    title = f"conventional, at the cost of {reference}"
    return {"baseline_equal_cost": Variant(file, (), "equal_cost", reference, title=title, description=description)}


# --- the standard study -----------------------------------------------------------------------------------------------

_NO_KD = ("DISTILL.LOSSES", [])
_SCRATCH = ("DISTILL.INIT_STUDENT", "none")
# name -> (file of the folder, overrides, title, description)
_STANDARD = {
    "baseline_H": ("baseline_H", (), "full resolution", "Ordinary training and testing at the full resolution H: the "
                   "accuracy that others are measured against, and the cost that they save."),
    "baseline_L": ("baseline_L", (), "half resolution, stock levels", "Ordinary training at half the resolution with "
                   "the stock pyramid levels (P3 and up): a stock detector on smaller images."),
    "baseline_L_multiscale": ("baseline_L_multiscale", (), "half resolution, several training sizes", "As baseline_L, "
                              "but trained on images of several sizes: resolution augmentation without our method."),
    "baseline_L_shifted": ("baseline_L_shifted", (), "half resolution, levels one finer", "Ordinary training at half "
                           "the resolution with levels one step finer (P2 and up). The head reads as many locations "
                           "as at full resolution. It is the student, trained without a teacher."),
    "teacher": ("teacher", (), "multi-resolution teacher", "One network trained on both resolutions at once, with "
                "aligned levels; tested on each resolution alone and on the fusion of both, which the student learns "
                "from and which costs more than the full-resolution model."),
    "student_L_no_kd": ("student_L", _NO_KD, "student without distillation", "The student, initialised from the "
                        "teacher and trained on the detection losses alone. What student_L has more, distillation "
                        "gave."),
    "student_L": ("student_L", (), "student (MSAD)", "The result: the half-resolution model, initialised from the "
                  "teacher and distilled from its fused features. At inference it is a stock detector."),
    "student_L_scratch": ("student_L", _SCRATCH, "student, not initialised", "Distilled like student_L, but not "
                          "initialised from the teacher."),
    "student_L_scratch_no_kd": ("student_L", (*_NO_KD, *_SCRATCH), "student, neither", "The student by itself, neither "
                                "initialised nor distilled."),
    "student_L_light": ("student_L_light", (), "student, light head", "Distilled like student_L, with a smaller head, "
                        "which is where most of the computation at half the resolution is."),
}  # fmt: skip
LONGER, _TIMED = "baseline_L_shifted@equal_iterations", "baseline_L_shifted@equal_time"
QUICK = (
    "baseline_H", "baseline_L", "baseline_equal_cost", "baseline_L_shifted", LONGER, "teacher", "student_L_no_kd",
    "student_L",
)  # fmt: skip


def standard_variants(folder: Path) -> dict[str, Variant]:
    """The study that a folder with baseline_H.yaml, teacher.yaml, student_L.yaml, ... makes: those whose file is there.

    Raises:
        ValueError: there is none.
    """
    out = {
        name: Variant(folder / f"{stem}.yaml", overrides, title=title, description=description)
        for name, (stem, overrides, title, description) in _STANDARD.items()
    }
    out |= equal_cost(folder / "baseline_H.yaml", "student_L")
    shifted = out["baseline_L_shifted"]
    out[LONGER] = replace(
        shifted, budget="equal_iterations", reference="student_L", title="finer levels, iterations of both stages",
        description="As baseline_L_shifted, trained for as many iterations as teacher and student together: what "
        "longer training alone gives.",
    )  # fmt: skip
    timed = replace(
        shifted, title="finer levels, time of both stages", description="As baseline_L_shifted, trained for as long as "
        "teacher and student together (of the processors' time; on a GPU by the clock): the same model with the whole "
        "budget.",
    )  # fmt: skip
    out |= at_equal_time("baseline_L_shifted", timed, "student_L", True)
    order = [*QUICK, *(name for name in out if name not in QUICK)]
    out = {name: out[name] for name in order if out[name].file.is_file()}
    out = {name: v for name, v in out.items() if not v.reference or v.reference in out}
    if not out:
        raise ValueError(f"--configs {folder}: none of {', '.join(f'{stem}.yaml' for stem in _STANDARD)} is in it")
    return out


def choose(variants: dict[str, Variant], names: Sequence[str]) -> dict[str, Variant]:
    """Those of ``names``, and those that they refer to, in the order of ``variants``; ValueError names an unknown."""
    wanted: set[str] = set()

    def add(name: str) -> None:
        if name not in variants:
            raise ValueError(f"unknown variant {name!r}{nearest(name, list(variants))}; known: {', '.join(variants)}")
        wanted.add(name)
        for other in filter(None, (variants[name].reference, variants[name].base)):
            add(other)

    for name in names:
        add(name)
    return {name: variant for name, variant in variants.items() if name in wanted}


# --- files and sweeps -------------------------------------------------------------------------------------------------


def unique_names(files: Sequence[Path]) -> dict[str, Path]:
    """name -> file: names without their ending, with the folder's where several files are called the same.

    Raises:
        ValueError: a file is named twice, or that is not enough to tell two apart.
    """
    stems = [file.stem for file in files]
    names = [stem if stems.count(stem) == 1 else f"{f.resolve().parent.name}_{stem}" for f, stem in zip(files, stems)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"several files are called {name}: {', '.join(str(f) for f in files if f.stem in name)}")
    return dict(zip(names, files))


def sweep(variants: dict[str, Variant], assignment: str, opts: Sequence = ()) -> dict[str, Variant]:
    """One variant a value of a key in place of each variant whose config has the key; the others stay.

    Args:
        assignment: "KEY=VALUE,VALUE,..."; the key may have positions in lists (DISTILL.LOSSES.0.WEIGHT), a value
            "x10" of a number is ten times that of the config. Numbers get the type that they have in the config.
        opts: KEY, VALUE, ... overrides of all variants, which belong to their configs.

    Raises:
        ValueError: the assignment has no values or one twice, or no config has the key.
    """
    key, _, values = assignment.partition("=")
    if not key or not values:
        raise ValueError(f"--sweep {assignment}: expected KEY=VALUE,..., as in DISTILL.LOSSES.0.WEIGHT=x0.1,x1,x10")
    out = {}
    for name, variant in variants.items():
        cfg = load_config(variant.file, [*opts, *variant.overrides])
        try:
            now = value_at(cfg, key)
        except (KeyError, IndexError, ValueError, TypeError):
            out[name] = variant
            continue
        for text in _split(values):
            value = _parse(text, now, is_typed=not _position(key))
            new = f"{name}_{key.split('.')[-1]}_{label(value)}"
            if new in out:
                raise ValueError(f"--sweep {assignment}: {new.removeprefix(f'{name}_')} twice")
            overrides = (*variant.overrides, *_override(cfg, key, value))
            out[new] = replace(variant, overrides=overrides, swept=(name, key, value))
    if not any(variant.swept for variant in out.values()):
        raise ValueError(f"--sweep {assignment}: no config has {key}")
    return out


def _split(values: str) -> list[str]:
    """``values`` at its commas, but for those inside of brackets."""
    out, depth = [""], 0
    for char in values:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            out.append("")
        else:
            out[-1] += char
    return out


def label(value: Any) -> str:
    """A swept value in the name of its variant, which is that of a folder, too."""
    return re.sub(r"[^\w.+-]+", "_", str(value)).strip("_")


def _parse(text: str, now: Any, is_typed: bool) -> Any:
    """What ``text`` stands for in place of ``now``; a value of the config keeps its type, one in a list need not."""
    if not text.startswith("x") or type(now) not in (int, float):
        return decode(text, now)
    value = float(f"{now * float(text[1:]):.9g}")
    return round(value) if type(now) is int and (is_typed or value.is_integer()) else value


def _position(key: str) -> int | None:
    """Where in the parts of a key the first position in a list is."""
    return next((i for i, part in enumerate(key.split(".")) if part.isdigit()), None)


def _override(cfg: CfgNode, key: str, value: Any) -> tuple[str, Any]:
    """KEY, VALUE for a config: of a position in a list that of the whole list with this value in it."""
    parts, at = key.split("."), _position(key)
    if at is None:
        return key, value
    whole = ".".join(parts[:at])
    return whole, _with(value_at(cfg, whole), parts[at:], value)


def _with(tree: Any, parts: Sequence[str], value: Any) -> Any:
    """A copy of lists and mappings with another value in one place."""
    if not parts:
        return value
    if isinstance(tree, (list, tuple)):
        return type(tree)(_with(x, parts[1:], value) if i == int(parts[0]) else x for i, x in enumerate(tree))
    return {**tree, parts[0]: _with(tree[parts[0]], parts[1:], value)}
