"""What the numbers of a comparison are worth: whether training was long enough, and what each step gave, in words."""

from __future__ import annotations

import math

from .jobs import format_seconds
from .rows import AP, MIOU, Row, full_resolution, rows_of, teachers_of, without_detections
from .statistics import Estimate

MIN_SEEDS = 3  # fewer are not called evidence
MIN_AP = 10.0  # of the full-resolution detector: below, it has hardly begun to learn
MAX_GAIN = 0.1  # of the longer training, as a share of the AP of the ordinary one
MAX_WARMUP = 0.1  # of the iterations
_LONGER = "@equal_iterations"
# resolution -> how it is called, and what its levels are
_CALLED = {"H": ("full", ""), "L": ("half", "one finer at half"), "EL": ("quarter", "two finer at a quarter of")}


def no_percentages(data: dict, metric: str = AP) -> list[str]:
    """Reasons why shares of the full-resolution model would mislead: training that is far from done.

    Args:
        metric: TASK/METRIC; it is the AP or mIoU of its task, over all classes and sizes, that says how far.
    """
    task = metric.split("/")[0]
    whole = MIOU if MIOU.startswith(f"{task}/") else f"{task}/AP"
    rows = rows_of(data)
    named = {row.name: found.mean for row in rows if (found := row.estimate(whole)) is not None}
    reasons = []
    short = [r.name for r in rows if (r.mean("warmup") or 0) > MAX_WARMUP * (r.mean("iterations") or math.inf)]
    if short:
        reasons.append(
            f"The warm-up takes more than a tenth of the iterations of {_some(short)}: these runs compare learning "
            "rates; lower SOLVER.WARMUP_ITERS or train longer."
        )
    full = full_resolution(rows, whole)
    longer = [(name, name.removesuffix(_LONGER)) for name in named if name.endswith(_LONGER)]
    gains = [(name, base) for name, base in longer if named[name] > (1 + MAX_GAIN) * named.get(base, math.inf)]
    if full is not None and named[full.name] < MIN_AP:
        reasons.append(f"{full.name} reaches only {_number(named[full.name], whole)}: {_far(data, full)}")
    elif gains:
        name, base = gains[0]
        reasons.append(
            f"Longer training alone lifts {base} from {named[base]:.1f} to {_number(named[name], whole)}: "
            f"{_far(data, next(row for row in rows if row.name == base))}"
        )
    return reasons


def _far(data: dict, row: Row) -> str:
    text = "training is far from converged"
    if row.mean("iterations") is None:
        return f"{text}."
    took = sum(run.get("seconds", 0.0) for run in data["runs"] if not run.get("same_as"))
    return f"{text}, try {4 * row.mean('iterations'):.0f} iterations, {format_seconds(4 * took)} of training in all."


def _short(metric: str) -> str:
    """A metric's name in a sentence: its own, where it is that of the task's tables."""
    return metric.split("/")[1] if metric in (AP, MIOU) else metric


def _number(value: float, metric: str) -> str:
    return f"{value:.1f} {_short(metric)}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def summary(data: dict, metric: str = AP) -> list[str]:
    """Sentences: first what the numbers are worth, then the student, then each step of the method.

    Args:
        metric: TASK/METRIC that is spoken of; models without it are left out.
    """
    rows = [row for row in rows_of(data) if row.estimate(metric) is not None]
    if not rows:
        return ["No model has been evaluated yet."]
    doubts = no_percentages(data, metric)
    empty = without_detections(data)
    said = [f"Nothing is detected by {_some(empty)}: AP counts as 0 there."] if empty else []
    named = {row.name: row for row in rows}
    sentences = [*doubts, *said, _evidence(rows, metric)]
    for resolution in _CALLED:
        if f"student_{resolution}" in named:
            full = full_resolution(rows, metric)
            sentences.append(_headline(named[f"student_{resolution}"], resolution, full, metric, not doubts))
    sentences += filter(None, [alone_as_long(data, metric)])
    for resolution in _CALLED:
        for name, other, what in _steps(resolution, named):
            if name in named and other in named:
                sentences.append(_step(named[name], named[other], what, metric))
    return sentences


def alone_as_long(data: dict, metric: str = AP) -> str:
    """What the student's architecture reaches alone in the time of teacher and student; "" if that was not trained."""
    named = {row.name: row for row in rows_of(data) if row.estimate(metric) is not None}
    for name in _CALLED:
        student, alone = named.get(f"student_{name}"), named.get(f"baseline_{name}_shifted@equal_time")
        change = student.minus(alone, metric) if student and alone else None
        if change is not None:
            return (
                "Trained alone for as long as teacher and student together, the student's architecture reaches "
                f"{_number(alone.estimate(metric).mean, metric)}: distillation is {_relation(change, 'that', metric)}."
            )
    return ""


def _steps(resolution: str, named: dict[str, Row]) -> list[tuple[str, str, str]]:
    """(row, other row, what the difference is) of what leads to the student at this resolution, by its names."""
    student, low = f"student_{resolution}", f"baseline_{resolution}"
    no_kd, shifted = f"{student}_no_kd", f"{low}_shifted"
    teachers = teachers_of(named[no_kd]) if no_kd in named else []
    fused = [f"{name}_fused" for name in teachers if f"{name}_fused" in named]
    kind = "multi-resolution teacher" if fused else "teacher"
    seen = [f"{name}_fused" if f"{name}_fused" in named else name for name in teachers]
    return [
        (shifted, low, f"Level shift (pyramid levels {_CALLED[resolution][1]} the resolution)"),
        (no_kd, shifted, f"Initialisation from the {kind}"),
        *((name, no_kd, "What the teacher is ahead of the student without distillation") for name in seen),
        (student, no_kd, "Distillation itself"),
        (student, f"{shifted}@equal_iterations", "Teacher and student against longer training"),
        (student, "baseline_equal_cost", "The student against the conventional detector of equal inference cost"),
    ]


def _evidence(rows: list[Row], metric: str) -> str:
    seeds = min(row.estimate(metric).n for row in rows)
    if seeds < MIN_SEEDS:
        return (
            f"{'One seed' if seeds == 1 else f'{seeds} seeds'}: another seed can reverse differences of a few "
            f"{_short(metric)}. Run at least {MIN_SEEDS} before drawing conclusions."
        )
    return (
        f"Means of {seeds} seeds; differences are taken seed by seed, with their 95 % confidence intervals. One that "
        "includes 0 is not significant."
    )


def _headline(student: Row, resolution: str, full: Row | None, metric: str, percentages: bool) -> str:
    value, of = student.estimate(metric).mean, 0.0 if full is None else full.estimate(metric).mean
    text = f"The {_CALLED[resolution][0]}-resolution student ({student.name}) reaches {_number(value, metric)}"
    if of <= 0:
        return f"{text}."
    share = f"{100 * value / of:.0f} % of " if percentages else ""
    text += f", {share}{'' if percentages else 'against '}the {_number(of, metric)} of {full.name}"
    costs = [
        f"{student.total(key) / full.total(key):.2f} times its {what}"
        for key, what in (("gmacs", "multiply-adds"), ("ms", "latency"))
        if student.total(key) and full.total(key)
    ]
    return f"{text}, for {' and '.join(costs)}." if costs else f"{text}."


def _step(row: Row, other: Row, what: str, metric: str) -> str:
    change = row.minus(other, metric)
    if change is None:
        return f"{what}: {row.name} and {other.name} have no seed in common."
    text = f"{what}: {row.name} is {_relation(change, other.name, metric)}"
    factor = (row.total("gmacs") or 0) / (other.total("gmacs") or math.inf)
    return text + (f", at {factor:.2f} times the multiply-adds." if factor and abs(factor - 1) > 0.05 else ".")


def _relation(change: Estimate, other: str, metric: str) -> str:
    """How far above or below another row, and how certain it is that it is not equal."""
    size = _number(abs(change.mean), metric)
    equal = size.startswith("0.0 ")
    if change.n < MIN_SEEDS:
        certainty = "one run" if change.n == 1 else f"{change.n} seeds"
    else:
        worth = "" if equal else ", significant" if change.excludes_zero else ", not significant"
        certainty = f"± {change.half:.1f}{worth}"
    unequal = f"{size} {'above' if change.mean > 0 else 'below'}"
    return f"{f'equal, to {_number(0.1, metric)}, with' if equal else unequal} {other} ({certainty})"
