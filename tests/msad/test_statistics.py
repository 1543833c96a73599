"""Confidence intervals of few runs, against published quantiles and a worked example."""

import math

import pytest

from msad.experiments.report.statistics import estimate, t_quantile


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (5, 2.57058), (9, 2.26216), (30, 2.04227), (120, 1.97993)],
)  # fmt: skip
def test_quantiles_are_those_of_the_tables(freedom, expected):
    assert t_quantile(freedom) == pytest.approx(expected, abs=2e-5)


def test_other_confidence():
    assert t_quantile(9, 0.99) == pytest.approx(3.24984, abs=1e-5)
    assert t_quantile(1000) == pytest.approx(1.96234, abs=1e-5)


def test_interval_by_hand():
    found = estimate([30.0, 32.0, 31.0])
    assert found.mean == 31.0 and found.std == 1.0 and found.n == 3
    assert found.half == pytest.approx(4.30265 / math.sqrt(3), abs=1e-4)
    assert found.excludes_zero


def test_zero_inside_and_one_value():
    assert not estimate([1.0, -0.5, 0.4]).excludes_zero
    alone = estimate([3.0])
    assert (alone.mean, alone.std, alone.half, alone.n) == (3.0, None, None, 1) and not alone.excludes_zero
