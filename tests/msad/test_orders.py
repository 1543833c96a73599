"""Ranks of the suggested orders and their chart, from the paper's tables 6 to 8."""

from __future__ import annotations

import pytest
from test_progressive_order import COSTS, QUALITY, TABLE_8, table_7

from msad.experiments.orders import mean_ranks, rank_rules
from msad.visualization.orders import orders_figure

RESULTS = table_7()
OURS = {"student" if name == "S" else name: row for name, row in COSTS.items()}


def test_ranks_of_the_paper():
    """Table 8 from Tables 6 and 7, as one seed of a study."""
    rules = rank_rules(OURS, QUALITY, RESULTS, 4)
    found = [(e["k"], e["rule"], " ".join(e["order"]), e["value"], (e["rank"], e["of"])) for e in rules]
    assert found == TABLE_8
    data = {"metric": "bbox/AP", "seeds": {"0": {"rules": rules}, "1": {"rules": rules}}}
    assert mean_ranks(data)[0] == [1, "algorithm1", 2, 36.7, 4, "IV"]
    partial = {order: value for order, value in RESULTS.items() if order != ("I",)}
    assert all(e["rank"] is None for e in rank_rules(OURS, QUALITY, partial, 4))


def test_the_chart_has_every_order_and_the_suggested_ones():
    rules = rank_rules(OURS, QUALITY, RESULTS, 4)
    one = {"student": 36.5, "orders": [[list(o), v] for o, v in RESULTS.items()], "rules": rules}
    (panel,) = orders_figure({"metric": "bbox/AP", "seeds": {"0": one}}).axes
    lines = {line.get_label(): line for line in panel.lines}
    assert sorted(lines["all orders"].get_ydata()) == sorted(RESULTS.values())
    assert sorted(lines["algorithm1"].get_ydata()) == [36.7, 37.6, 37.9], "k = 3 and 4 give the same order"
    with pytest.raises(ValueError, match="nothing to plot"):
        orders_figure({"metric": "bbox/AP", "seeds": {}})
