"""Orders of teachers: tables 6 to 8 of the progressive distillation paper, and cases counted by hand."""

from __future__ import annotations

import itertools
import json

import pytest
import yaml

from msad.distill.progressive.order import (
    all_orders,
    backward_greedy,
    check_costs,
    forward_construction,
    path_costs,
    rank,
    shortest_path,
    suggest,
)
from msad.distill.progressive.table import dump_stages, read_costs, stages_block

# Table 6: adaptation costs of RetinaNet (S), Mask R-CNN (I), FCOS (II), HTC (III) and DetectoRS (IV).
COSTS = {
    "S": {"I": 0.939, "II": 0.060, "III": 1.568, "IV": 1.254},
    "I": {"S": 0.183, "II": 0.070, "III": 0.934, "IV": 0.963},
    "II": {"S": 0.339, "I": 1.181, "III": 1.940, "IV": 1.401},
    "III": {"S": 0.191, "I": 0.484, "II": 0.082, "IV": 0.890},
    "IV": {"S": 0.232, "I": 0.767, "II": 0.077, "III": 1.248},
}
# Table 1: AP of the teachers.
QUALITY = {"I": 38.2, "II": 38.7, "III": 42.3, "IV": 49.1}
# Table 7: AP of the student after each of the 64 sequences.
TABLE_7 = """
36.8 III | 36.7 IV | 36.4 I | 36.2 II
37.6 III IV | 37.3 IV II, III II, I IV | 37.2 IV III | 37.1 I III | 37.0 IV I, II IV, III I | 36.9 II I
36.8 II III, I II
38.0 III II IV | 37.9 I III IV, III IV II, II III IV | 37.8 III I IV | 37.7 I II IV | 37.6 I IV II
37.5 IV II III, IV III II, II I IV, I III II | 37.4 IV I III, II IV III, III IV I, III I II, I IV III
37.3 IV II I, IV III I, IV I II, I II III | 37.2 II IV I, II I III, III II I | 37.1 II III I
38.2 III II I IV | 38.1 III I II IV, I III II IV | 38.0 II III I IV, I III IV II
37.9 II I III IV, III I IV II, I II III IV | 37.7 IV I III II, II I IV III, I II IV III
37.6 IV III I II, IV I II III, III IV II I, III IV I II, III II IV I, I IV III II
37.5 IV II I III, IV III II I, II IV I III, II III IV I, I IV II III | 37.4 II IV III I | 37.3 IV II III I
"""
# Table 8: order, AP and rank of each rule for 1 to 4 teachers.
TABLE_8 = [
    (1, "algorithm1", "IV", 36.7, (2, 4)),
    (1, "sum", "IV", 36.7, (2, 4)),
    (1, "max", "IV", 36.7, (2, 4)),
    (1, "forward", "II", 36.2, (4, 4)),
    (2, "algorithm1", "III IV", 37.6, (1, 16)),
    (2, "sum", "II IV", 37.0, (7, 16)),
    (2, "max", "I IV", 37.3, (2, 16)),
    (2, "forward", "II I", 36.9, (10, 16)),
    (3, "algorithm1", "I III IV", 37.9, (2, 40)),
    (3, "sum", "II I IV", 37.5, (9, 40)),
    (3, "max", "I III IV", 37.9, (2, 40)),
    (3, "forward", "II I III", 37.2, (25, 40)),
    (4, "algorithm1", "I III IV", 37.9, (7, 64)),
    (4, "sum", "II I III IV", 37.9, (7, 64)),
    (4, "max", "II I III IV", 37.9, (7, 64)),
    (4, "forward", "II I III IV", 37.9, (7, 64)),
]


def table_7() -> dict[tuple[str, ...], float]:
    results = {}
    for group in TABLE_7.replace("\n", "|").split("|"):
        if group.strip():
            ap, orders = group.strip().split(" ", 1)
            results.update({tuple(order.split()): float(ap) for order in orders.split(",")})
    return results


def test_table_7_is_all_orders():
    assert set(table_7()) == set(all_orders(list(QUALITY), 4))
    assert [len(all_orders(list(QUALITY), k)) for k in (1, 2, 3, 4, 5)] == [4, 16, 40, 64, 64]


@pytest.mark.parametrize(("k", "rule", "order", "ap", "place"), TABLE_8)
def test_table_8(k, rule, order, ap, place):
    found = suggest(rule, COSTS, "S", QUALITY, k)
    results = table_7()
    assert found == order.split()
    assert results[tuple(found)] == ap
    assert rank(found, results, k) == place


def test_at_most_k_stops_where_exactly_k_goes_on():
    # The direct way S -> IV (1.254) is shorter than any other, and I -> III -> IV has the smallest maximum.
    for k in (1, 2, 3, 4):
        assert shortest_path(COSTS, "S", QUALITY, k, sum, exactly=False) == ["IV"]
    assert shortest_path(COSTS, "S", QUALITY, 2, max, exactly=False) == ["I", "IV"]
    assert shortest_path(COSTS, "S", QUALITY, 4, max, exactly=False) == ["I", "III", "IV"]


def test_costs_along_a_path():
    assert path_costs(COSTS, "S", ["II", "I", "IV"]) == [0.060, 1.181, 0.963]
    assert path_costs(COSTS, "S", []) == []


def test_algorithm_1_takes_no_teacher_that_is_as_far_as_the_student():
    costs = {"S": {"A": 1.0, "B": 1.0}, "A": {"B": 1.0}, "B": {"A": 0.5}}
    assert backward_greedy(costs, "S", {"A": 30.0, "B": 40.0}, 2) == ["B"]
    costs["A"]["B"] = 0.999
    assert backward_greedy(costs, "S", {"A": 30.0, "B": 40.0}, 2) == ["A", "B"]


def test_shortest_paths_are_the_best_of_all_paths():
    for k in (1, 2, 3, 4):
        for combine in (sum, max):
            paths = [[*p, "IV"] for p in itertools.permutations(["I", "II", "III"], k - 1)]
            best = min(combine(path_costs(COSTS, "S", path)) for path in paths)
            assert combine(path_costs(COSTS, "S", shortest_path(COSTS, "S", QUALITY, k, combine))) == best


def test_more_teachers_asked_for_than_there_are():
    assert shortest_path(COSTS, "S", QUALITY, 9) == ["II", "I", "III", "IV"]
    assert forward_construction(COSTS, "S", QUALITY, 9) == ["II", "I", "III", "IV"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["II"].pop("III"), "no adaptation cost from 'II' to 'III'"),
        (lambda c: c["S"].update(I=float("nan")), "from 'S' to 'I' must be a number >= 0, got nan"),
        (lambda c: c["S"].update(I=-1.0), "from 'S' to 'I' must be a number >= 0"),
        (lambda c: c.pop("IV"), "no adaptation cost from 'IV' to 'I'"),
    ],
)
def test_incomplete_costs_are_named(change, message):
    costs = {a: dict(row) for a, row in COSTS.items()}
    change(costs)
    with pytest.raises(ValueError, match=message):
        suggest("sum", costs, "S", QUALITY, 2)


def test_bad_requests():
    with pytest.raises(ValueError, match="unknown rule 'best'"):
        suggest("best", COSTS, "S", QUALITY, 2)
    with pytest.raises(ValueError, match="at least 1"):
        suggest("max", COSTS, "S", QUALITY, 0)
    with pytest.raises(ValueError, match="'S' comes more than once"):
        check_costs(COSTS, "S", ["I", "S"])


@pytest.fixture
def table(tmp_path):
    file = tmp_path / "costs.yaml"
    file.write_text(yaml.safe_dump({"student": "S", "quality": QUALITY, "costs": COSTS}))
    return file


def test_a_table_in_yaml_and_in_json_is_the_same(table, tmp_path):
    read = read_costs(table)
    assert read.student == "S" and read.quality == QUALITY and read.costs == COSTS
    (tmp_path / "costs.json").write_text(json.dumps({"student": "S", "quality": QUALITY, "costs": COSTS}))
    assert read_costs(tmp_path / "costs.json") == read


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "no table of costs"),
        ("student: S\ncosts: {S: {I: 1}}", "performance of teacher 'I' is not known"),
        ("student: S\nquality: {I: 1, X: 2}\ncosts: {S: {I: 1}}", "'X' has a quality but no costs"),
        ("student: S\nquality: {I: 1}\ncosts: {S: {I: much}}", "costs from 'S': 'I' must be a number, got 'much'"),
        ("student: S\nquality: {I: 1, II: 2}\ncosts: {S: {I: 1, II: 1}, I: {II: 1}}", "no adaptation cost from 'II'"),
        ("student: S\nquality: {I: .nan}\ncosts: {S: {I: 1}}", "quality: 'I' must be a number, got nan"),
        ("student: {", "neither JSON nor yaml"),
        ("costs: {}", "student must be the name"),
    ],
)
def test_bad_tables_are_named(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_costs(tmp_path / "bad.yaml")
    assert "bad.yaml" in str(caught.value)


def test_one_stage_a_teacher():
    teachers = [{"NAME": "IV", "CONFIG": "iv.yaml"}, {"NAME": "III", "CONFIG": "iii.yaml"}]
    block = stages_block(["III", "IV"], teachers, {"SOLVER": {"MAX_ITER": 90}})
    assert yaml.safe_load(dump_stages(block)) == block == {
        "DISTILL": {
            "TEACHERS": [{"NAME": "III", "CONFIG": "iii.yaml"}, {"NAME": "IV", "CONFIG": "iv.yaml"}],
            "STAGES": [
                {"TEACHERS": ["III"], "SOLVER": {"MAX_ITER": 90}},
                {"TEACHERS": ["IV"], "SOLVER": {"MAX_ITER": 90}},
            ],
        }
    }  # fmt: skip
    assert stages_block(["III"], [{"NAME": "IV"}]) == {"DISTILL": {"STAGES": [{"TEACHERS": ["III"]}]}}
