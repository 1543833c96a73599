"""tools/benchmark_losses.py from the command line to its JSON, and what it measures."""

from __future__ import annotations

import json

import pytest
import torch
from load_tool import load_tool

from msad.evaluation import loss_cost
from msad.evaluation.loss_cost import Setting, loss_costs, make_context, make_loss, peak_memory, step

SMALL = Setting(size=(64, 96), channels=8, student_channels=4, boxes=2)


@pytest.fixture(scope="module")
def tool():
    module = load_tool("benchmark_losses")
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_command_line_to_json(tool, tmp_path, capsys):
    arguments = ["--loss", "CWD", "--loss", "{NAME: MGD, MASK_RATIO: 0.5}", "--size", "64", "96", "--channels", "8"]
    arguments += ["--repeats", "2", "--warmup", "0", "--threads", "1", "--device", "cpu"]
    assert tool.main([*arguments, "--output", str(tmp_path / "made" / "out.json")]) == 0
    result = json.loads((tmp_path / "made" / "out.json").read_text())
    assert [row["entry"] for row in result["losses"]] == [{"NAME": "CWD"}, {"NAME": "MGD", "MASK_RATIO": 0.5}]
    assert all(row["milliseconds"] > 0 and row["peak_memory_bytes"] >= 0 for row in result["losses"])
    assert [row["parameters"] for row in result["losses"]] == [0, 5 * 2 * (8 * 8 * 9 + 8)]
    assert result["setting"]["size"] == [64, 96] and result["threads"] == 1
    table = capsys.readouterr().out
    assert "| `CWD` " in table and "| `MGD` (MASK_RATIO 0.5) " in table


def test_all_losses_by_default(tool):
    names = [entry["NAME"] for entry in tool.entries([])]
    assert len(names) == len(set(names)) >= 12 and {"AlignedL1", "FGD", "LAD"} <= set(names)
    assert not {"LD", "Chen"} & set(names), "which compare predictions"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--loss", "CWDD"], "did you mean CWD"), (["--loss", "{NAME: CWD, TAO: 2}"], "CWD has no option TAO")],
)
def test_wrong_entries(tool, capsys, arguments, message):
    assert tool.main([*arguments, "--size", "64", "96"]) == 2
    assert message in capsys.readouterr().err


def test_wrong_numbers(tool, capsys):
    with pytest.raises(SystemExit):
        tool.parse_args(["--size", "0", "96"])
    assert "argument --size: must be at least 1, got 0" in capsys.readouterr().err


def test_maps_are_those_of_a_detector():
    context = make_context(Setting(size=(800, 1333), channels=2, student_channels=1, batch=1))
    student, teacher = context.student, context.sources["teacher"]
    assert {k: tuple(v.shape) for k, v in teacher.items()} == {
        "p3": (1, 2, 104, 168), "p4": (1, 2, 52, 84), "p5": (1, 2, 26, 42), "p6": (1, 2, 13, 21), "p7": (1, 2, 7, 11)
    }  # fmt: skip
    assert all(student[k].shape[1:] == (1, *v.shape[2:]) and student[k].requires_grad for k, v in teacher.items())
    assert context.image_sizes == [(800, 1333)] and len(context.inputs[0]["instances"]) == 7


def test_a_measured_step_leaves_no_gradients():
    loss, context = make_loss({"NAME": "FGD"}, SMALL), make_context(SMALL)
    assert loss.adaptation, "from four channels to eight"
    step(loss, context)
    assert all(x.grad is None for x in (*loss.parameters(), *context.student.values()))


def test_rows_and_progress(monkeypatch):
    monkeypatch.setattr(loss_cost, "peak_memory", lambda *_: 7)
    steps = []
    entries = [{"NAME": "FGD"}, {"NAME": "PKD"}, {"NAME": "PKD", "WEIGHT": 1}]
    rows = loss_costs(entries, SMALL, repeats=2, warmup=1, on_step=lambda: steps.append(1))
    assert len(steps) == 3 * (1 + 1 + 2)
    assert [(row["entry"], row["peak_memory_bytes"]) for row in rows] == [(entry, 7) for entry in entries]
    assert rows[1]["parameters"] == 5 * (4 * 8 + 8) < rows[0]["parameters"]


def test_memory_is_what_the_step_needs():
    """Which for a fused mean squared difference is the gradient of the student's map, 16 MiB."""
    setting = Setting(size=(512, 512), channels=64, student_channels=64, levels=("p2",), batch=4)
    map_bytes = 4 * 64 * 128 * 128 * 4
    found = peak_memory({"NAME": "NaiveL2"}, setting, threads=1)
    assert 0.9 * map_bytes < found < 1.5 * map_bytes
