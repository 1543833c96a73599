"""What the numbers of a comparison are worth: whether training was long enough, and what each step gave, in words."""

from __future__ import annotations

import math

from .jobs import format_seconds
from .rows import AP, Row, full_resolution, rows_of, without_detections
from .statistics import Estimate

MIN_SEEDS = 3  # fewer are not called evidence
MIN_AP = 10.0  # of the full-resolution detector: below, it has hardly begun to learn
MAX_GAIN = 0.1  # of the longer training, as a share of the AP of the ordinary one
MAX_WARMUP = 0.1  # of the iterations
_LONGER = "@equal_iterations"
# (row, other row, what the difference is)
_STEPS = (
    ("baseline_L_shifted", "baseline_L", "Level shift (pyramid levels one finer at half the resolution)"),
    ("student_L_no_kd", "baseline_L_shifted", "Initialisation from the multi-resolution teacher"),
    ("teacher_fused", "student_L_no_kd", "What the teacher is ahead of the student without distillation"),
    ("student_L", "student_L_no_kd", "Distillation itself"),
    ("student_L", "baseline_L_shifted@equal_iterations", "Teacher and student against longer training"),
    ("student_L", "baseline_L_shifted@equal_time", "Teacher and student against training as long as both"),
    ("student_L", "baseline_equal_cost", "The student against the conventional detector of equal inference cost"),
)


def no_percentages(data: dict) -> list[str]:
    """Reasons why shares of the full-resolution AP would mislead: training that is far from done."""
    rows = rows_of(data)
    named = {row.name: found.mean for row in rows if (found := row.estimate(AP)) is not None}
    reasons = []
    short = [r.name for r in rows if (r.mean("warmup") or 0) > MAX_WARMUP * (r.mean("iterations") or math.inf)]
    if short:
        reasons.append(
            f"The warm-up takes more than a tenth of the iterations of {_some(short)}: these runs compare learning "
            "rates; lower SOLVER.WARMUP_ITERS or train longer."
        )
    full = full_resolution(rows)
    longer = [(name, name.removesuffix(_LONGER)) for name in named if name.endswith(_LONGER)]
    gains = [(name, base) for name, base in longer if named[name] > (1 + MAX_GAIN) * named.get(base, math.inf)]
    if full is not None and named[full.name] < MIN_AP:
        reasons.append(f"{full.name} reaches only {named[full.name]:.1f} AP: {_far(data, full)}")
    elif gains:
        name, base = gains[0]
        reasons.append(
            f"Longer training alone lifts {base} from {named[base]:.1f} to {named[name]:.1f} AP: "
            f"{_far(data, next(row for row in rows if row.name == base))}"
        )
    return reasons


def _far(data: dict, row: Row) -> str:
    text = "training is far from converged"
    if row.mean("iterations") is None:
        return f"{text}."
    took = sum(run.get("seconds", 0.0) for run in data["runs"])
    return f"{text}, try {4 * row.mean('iterations'):.0f} iterations, {format_seconds(4 * took)} of training in all."


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def summary(data: dict, metric: str = AP) -> list[str]:
    """Sentences: first what the numbers are worth, then the student, then each step of the method.

    Args:
        metric: TASK/METRIC that counts where there is no box AP, as of segmentors, which have no steps.
    """
    rows = [row for row in rows_of(data) if row.estimate(AP) is not None]
    doubts = no_percentages(data)
    empty = without_detections(data)
    said = [f"Nothing is detected by {_some(empty)}: AP counts as 0 there."] if empty else []
    if not rows:
        rows = [row for row in rows_of(data) if row.estimate(metric) is not None]
        return [*doubts, *said, _evidence(rows, metric)] if rows else ["No model has been evaluated yet."]
    named = {row.name: row for row in rows}
    sentences = [*doubts, *said, _evidence(rows)]
    if "student_L" in named:
        sentences.append(_headline(named["student_L"], full_resolution(rows), not doubts))
    for name, other, what in _STEPS:
        if name in named and other in named:
            sentences.append(_step(named[name], named[other], what))
    return sentences


def _evidence(rows: list[Row], metric: str = AP) -> str:
    seeds = min(row.estimate(metric).n for row in rows)
    if seeds < MIN_SEEDS:
        return (
            f"{'One seed' if seeds == 1 else f'{seeds} seeds'}: another seed can reverse differences of a few "
            f"{metric.split('/')[-1]}. Run at least {MIN_SEEDS} before drawing conclusions."
        )
    return (
        f"Means of {seeds} seeds; differences are taken seed by seed, with their 95 % confidence intervals. One that "
        "includes 0 is not significant."
    )


def _headline(student: Row, full: Row | None, percentages: bool) -> str:
    ap, of = student.estimate(AP).mean, 0.0 if full is None else full.estimate(AP).mean
    text = f"The half-resolution student (student_L) reaches {ap:.1f} AP"
    if of <= 0:
        return f"{text}."
    share = f"{100 * ap / of:.0f} % of " if percentages else ""
    text += f", {share}{'' if percentages else 'against '}the {of:.1f} AP of {full.name}"
    costs = [
        f"{student.total(key) / full.total(key):.2f} times its {what}"
        for key, what in (("gmacs", "multiply-adds"), ("ms", "latency"))
        if student.total(key) and full.total(key)
    ]
    return f"{text}, for {' and '.join(costs)}." if costs else f"{text}."


def _step(row: Row, other: Row, what: str) -> str:
    change = row.minus(other)
    if change is None:
        return f"{what}: {row.name} and {other.name} have no seed in common."
    text = f"{what}: {row.name} is {_relation(change)} {other.name}{_worth(change)}"
    factor = (row.total("gmacs") or 0) / (other.total("gmacs") or math.inf)
    return text + (f", at {factor:.2f} times the multiply-adds." if factor and abs(factor - 1) > 0.05 else ".")


def _relation(change: Estimate) -> str:
    size = f"{abs(change.mean):.1f}"
    if float(size) == 0:
        return "equal, to a tenth of an AP, with"
    return f"{size} AP {'above' if change.mean > 0 else 'below'}"


def _worth(change: Estimate) -> str:
    """How certain a difference is, as a clause."""
    if change.n < MIN_SEEDS:
        return " (one run)" if change.n == 1 else f" ({change.n} seeds)"
    return f" (± {change.half:.1f}, {'significant' if change.excludes_zero else 'not significant'})"
