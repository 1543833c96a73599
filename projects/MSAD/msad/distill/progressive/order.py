"""Orders of teachers for progressive distillation, from the adaptation costs between the networks.

Four rules of "Learning Lightweight Object Detectors via Progressive Knowledge Distillation" (MTPD): Algorithm 1 and the
three alternatives of its appendix A. ``costs[a][b]`` is C(a, b), how far the features of a are from those of b after
the best linear map of a (section 3.2); it is not symmetric.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

Costs = Mapping[str, Mapping[str, float]]
RULES = ("algorithm1", "sum", "max", "forward")


def check_costs(costs: Costs, student: str, teachers: Sequence[str]) -> None:
    """Check that every cost a rule may ask for is there: from the student and each teacher to each other teacher.

    Raises:
        ValueError: no teachers, a name twice, a cost that is absent, negative or not finite; names the pair.
    """
    if not teachers:
        raise ValueError("there are no teachers to put in order")
    names = [student, *teachers]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"the networks need different names, {twice!r} comes more than once")
    for a, b in itertools.product(names, teachers):
        if a == b:
            continue
        cost = costs.get(a, {}).get(b)
        if cost is None:
            raise ValueError(f"there is no adaptation cost from {a!r} to {b!r}")
        if isinstance(cost, bool) or not isinstance(cost, (int, float)) or not math.isfinite(cost) or cost < 0:
            raise ValueError(f"the adaptation cost from {a!r} to {b!r} must be a number >= 0, got {cost!r}")


def backward_greedy(costs: Costs, student: str, quality: Mapping[str, float], k: int) -> list[str]:
    """Algorithm 1: from the best teacher backwards, always the teacher that is closest to the next one.

    A teacher is a candidate only if it is closer to the next one than the student is (strictly); without a candidate
    the order ends, so it may be shorter than ``k``.

    Args:
        quality: performance of each teacher, e.g. its AP; of equally good ones the first is the last of the order.
        k: the most teachers to use, at least 1.

    Returns:
        teachers, the first to distil from first.
    """
    order = [_best(quality)]
    pool = [name for name in quality if name not in order]
    while len(order) < k:
        target = order[0]
        candidates = [name for name in pool if costs[name][target] < costs[student][target]]
        if not candidates:
            break
        nearest = min(candidates, key=lambda name: costs[name][target])
        order.insert(0, nearest)
        pool.remove(nearest)
    return order


def path_costs(costs: Costs, student: str, order: Sequence[str]) -> list[float]:
    """Costs along student -> order[0] -> ... -> order[-1]."""
    return [costs[a][b] for a, b in itertools.pairwise([student, *order])]


def shortest_path(
    costs: Costs,
    student: str,
    quality: Mapping[str, float],
    k: int,
    combine: Callable[[Iterable[float]], float] = sum,
    exactly: bool = True,
) -> list[str]:
    """Shortest path from the student to the best teacher (appendix A).

    Args:
        combine: ``sum`` or ``max`` of the costs along the path.
        exactly: over exactly ``k`` different teachers, as in table 8 (all of them if there are fewer); otherwise over
            at most ``k``.

    Returns:
        teachers, the first to distil from first. Ties: the smaller sum, then the path that comes first in the order of
        ``quality``.
    """
    last = _best(quality)
    others = [name for name in quality if name != last]
    longest = min(k, len(quality))
    lengths = [longest] if exactly else range(1, longest + 1)
    paths = ([*start, last] for length in lengths for start in itertools.permutations(others, length - 1))

    def length_of(path: list[str]) -> tuple[float, float]:
        steps = path_costs(costs, student, path)
        return combine(steps), sum(steps)

    return min(paths, key=length_of)


def forward_construction(costs: Costs, student: str, teachers: Iterable[str], k: int) -> list[str]:
    """From the student, ``k`` times the nearest unused teacher (appendix A); need not end at the best teacher."""
    pool, order = list(teachers), []
    while pool and len(order) < k:
        here = order[-1] if order else student
        nearest = min(pool, key=lambda name: costs[here][name])
        order.append(nearest)
        pool.remove(nearest)
    return order


def suggest(
    rule: str, costs: Costs, student: str, quality: Mapping[str, float], k: int, *, exactly: bool = True
) -> list[str]:
    """The order by one of RULES, after checking the costs.

    Raises:
        ValueError: an unknown rule, ``k`` below 1, or costs that are not complete.
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; known: {', '.join(RULES)}")
    if k < 1:
        raise ValueError(f"the number of teachers must be at least 1, got {k}")
    check_costs(costs, student, list(quality))
    if rule == "algorithm1":
        return backward_greedy(costs, student, quality, k)
    if rule == "forward":
        return forward_construction(costs, student, quality, k)
    return shortest_path(costs, student, quality, k, {"sum": sum, "max": max}[rule], exactly)


def all_orders(teachers: Sequence[str], longest: int) -> list[tuple[str, ...]]:
    """Every sequence of 1 to ``longest`` different teachers: 4, 16, 40, 64 of them for four teachers."""
    lengths = range(1, min(longest, len(teachers)) + 1)
    return [order for length in lengths for order in itertools.permutations(teachers, length)]


def rank(order: Sequence[str], results: Mapping[tuple[str, ...], float], longest: int) -> tuple[int, int]:
    """(rank, number) of ``order`` by its result among all sequences of at most ``longest`` teachers (table 8).

    Equal results share the best rank. KeyError if the order has no result.
    """
    pool = [value for sequence, value in results.items() if len(sequence) <= longest]
    value = results[tuple(order)]
    return 1 + sum(other > value for other in pool), len(pool)


def _best(quality: Mapping[str, float]) -> str:
    return max(quality, key=lambda name: quality[name])
