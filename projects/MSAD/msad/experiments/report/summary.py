"""A few sentences on what each step of the method gave, computed from the numbers and no kinder than they are."""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

from .rows import Row, reference_of, rows_of

MIN_SEEDS = 3  # fewer are not called evidence


class Difference(NamedTuple):
    """AP of one row minus that of another: mean, spread (None if not known), seeds, seeds in which it is positive."""

    mean: float
    spread: float | None
    seeds: int
    positive: int | None

    @property
    def is_evidence(self) -> bool:
        """Beyond the spread over enough seeds, and large enough to be seen in the table."""
        if self.seeds < MIN_SEEDS or self.spread is None:
            return False
        return abs(self.mean) > self.spread and round(abs(self.mean), 1) > 0


def difference(row: Row | None, other: Row | None, seeds: int = 1) -> Difference | None:
    """``row`` minus ``other``; None if either has no AP.

    Runs of the same seeds are compared pairwise; the spread is the standard deviation of their differences. Without
    values per seed it is combined from the rows' own.

    Args:
        seeds: of the study, for rows that state only a standard deviation.
    """
    if row is None or other is None or row.ap is None or other.ap is None:
        return None
    mean = row.ap - other.ap
    if row.per_seed and len(row.per_seed) == len(other.per_seed):
        pairs = [a - b for a, b in zip(row.per_seed, other.per_seed)]
        spread = statistics.stdev(pairs) if len(pairs) > 1 else None
        return Difference(mean, spread, len(pairs), sum(d > 0 for d in pairs))
    if row.std is None or other.std is None:
        return Difference(mean, None, 1, None)
    return Difference(mean, math.hypot(row.std, other.std), min(_seeds(row, seeds), _seeds(other, seeds)), None)


def _seeds(row: Row, study: int) -> int:
    """How many seeds stand behind a row of a study with that many."""
    return len(row.per_seed) or (study if row.std is not None else 1)


def summary(metrics: dict) -> list[str]:
    """Up to five sentences: the student, the level shift, aligned training, distillation itself, the evidence."""
    rows = rows_of(metrics)
    by_name = {row.name: row for row in rows if row.ap is not None}
    if not by_name:
        return ["No model of this study has been evaluated yet."]
    seeds = len(metrics.get("seeds") or [0])
    sentences = [
        _headline(by_name.get("student_L"), reference_of(rows)),
        _level_shift(by_name, seeds),
        _aligned_training(by_name, seeds),
        _distillation(by_name, seeds),
        _evidence(by_name, seeds),
    ]
    return [sentence for sentence in sentences if sentence]


def _headline(student: Row | None, reference: Row | None) -> str:
    if student is None:
        return "This study has no student_L: what distillation gives cannot be read from it."
    if reference is None or reference.ap <= 0:
        return f"The distilled half-resolution student (student_L) reaches {student.ap:.1f} AP."
    text = (
        f"The distilled half-resolution student (student_L) reaches {student.ap:.1f} AP, "
        f"{100 * student.ap / reference.ap:.0f} % of the {reference.ap:.1f} AP of {reference.name} at full resolution"
    )
    costs = []
    if student.gmacs and reference.gmacs:
        costs.append(f"{student.gmacs / reference.gmacs:.2f} times its multiply-adds")
    if student.ms and reference.ms:
        ratio = student.ms / reference.ms
        costs.append(f"{ratio:.2f} times its latency ({student.ms:.1f} against {reference.ms:.1f} ms)")
    return text + (f", for {' and '.join(costs)}." if costs else ".")


def _level_shift(rows: dict[str, Row], seeds: int) -> str | None:
    change = difference(rows.get("baseline_L_shifted"), rows.get("baseline_L"), seeds)
    if change is None:
        return None
    before, after = rows["baseline_L"], rows["baseline_L_shifted"]
    text = (
        "Level shift: at half the resolution, pyramid levels one step finer (baseline_L_shifted, "
        f"{after.ap:.1f} AP) are {_relation(change)} the usual ones (baseline_L, {before.ap:.1f}){_worth(change)}"
    )
    if after.gmacs and before.gmacs:
        text += f" and cost {after.gmacs / before.gmacs:.2f} times the multiply-adds"
    return text + "."


def _aligned_training(rows: dict[str, Row], seeds: int) -> str | None:
    control = rows.get("student_L_control")
    change = difference(control, rows.get("baseline_L_shifted"), seeds)
    if change is None:
        return None
    text = (
        "Aligned training and initialisation: the student initialised from the multi-resolution teacher but not "
        f"distilled (student_L_control) is {_relation(change)} baseline_L_shifted{_worth(change)}"
    )
    rivals = [rows[name] for name in ("baseline_L_time", "baseline_L_2x") if name in rows]
    if rivals:
        rival = max(rivals, key=lambda row: row.ap)
        budget = difference(control, rival, seeds)
        text += (
            f" and {_relation(budget)} {rival.name}, the same model trained for the budget of "
            f"teacher and student together{_worth(budget)}"
        )
    return text + "."


def _distillation(rows: dict[str, Row], seeds: int) -> str | None:
    change = difference(rows.get("student_L"), rows.get("student_L_control"), seeds)
    if change is None:
        return None
    if change.seeds < MIN_SEEDS or change.spread is None:
        verdict = "Distillation itself" if round(change.mean, 1) > 0 else "Distillation itself did not help here"
    elif not change.is_evidence:
        verdict = "Distillation itself has no effect that this study can show"
    elif change.mean > 0:
        verdict = "Distillation itself helped"
    else:
        verdict = "Distillation itself did not help, it cost accuracy"
    return f"{verdict}: student_L is {_relation(change)} student_L_control{_worth(change)}."


def _relation(change: Difference) -> str:
    size = f"{abs(change.mean):.1f}"
    if float(size) == 0:
        return "level, to a tenth of an AP, with"
    return f"{size} AP {'above' if change.mean > 0 else 'below'}"


def _worth(change: Difference) -> str:
    """What the difference is worth, as a clause."""
    if change.seeds < 2:
        return " (one run)"
    in_seeds = "" if change.positive is None else f", higher in {change.positive} of them"
    side = "beyond" if abs(change.mean) > change.spread else "within"
    return f" ({side} the spread of ±{change.spread:.1f} over {change.seeds} seeds{in_seeds})"


def _evidence(rows: dict[str, Row], seeds: int) -> str:
    seeds = min(_seeds(row, seeds) for row in rows.values())
    if seeds == 1:
        return (
            "All of this comes from one seed, which is not evidence: another seed can turn small differences round, so "
            f"run at least {MIN_SEEDS} seeds before drawing conclusions."
        )
    if seeds < MIN_SEEDS:
        return (
            f"All of this comes from {seeds} seeds, too few to count as evidence: run at least {MIN_SEEDS} before "
            "drawing conclusions."
        )
    return (
        f"Every number is the mean of {seeds} seeds; a difference counts only where it is beyond the spread, the "
        "standard deviation of the difference over the seeds."
    )
