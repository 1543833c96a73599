"""tools/adaptation_cost.py: a student and two teachers of other kinds and scales, interrupted and continued."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.modeling import build_model
from load_tool import load_tool

from msad import load_config
from msad.distill.progressive.table import read_costs
from msad.experiments import adaptation


@pytest.fixture
def call(project, tmp_path, capsys):
    module = load_tool("adaptation_cost")
    for name, source in (("student", "retinanet_student"), ("multi", "teacher"), ("wide", "gfl")):
        text = f"_BASE_: {project}/{source}.yaml\nDISTILL: {{TEACHERS: [], LOSSES: []}}\n"
        text += "MODEL: {FPN: {OUT_CHANNELS: 48}}\n" if name == "wide" else ""
        (tmp_path / f"{name}.yaml").write_text(text)
        torch.manual_seed(4)
        model = build_model(load_config(tmp_path / f"{name}.yaml"))
        torch.save({"model": model.state_dict()}, tmp_path / f"{name}.pth")
    entries = [
        {"NAME": "multi", "CONFIG": str(tmp_path / "multi.yaml"), "WEIGHTS": str(tmp_path / "multi.pth")},
        {"NAME": "wide", "CONFIG": str(tmp_path / "wide.yaml"), "WEIGHTS": str(tmp_path / "wide.pth"), "SCALE": 0.75},
    ]
    config = {"_BASE_": str(tmp_path / "student.yaml"), "DISTILL": {"TEACHERS": entries}}
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(config))

    def run(*args):
        line = ["--config-file", tmp_path / "all.yaml", "--weights", tmp_path / "student.pth"]
        line += ["--output", tmp_path / "out", "--pairing", "by_index", *args]
        return module.main([str(a) for a in line]), capsys.readouterr()

    run.module, run.out = module, tmp_path / "out"
    return run


def test_costs_order_and_stages(call, tmp_path, monkeypatch):
    maps_of, calls = adaptation.image_maps, []

    def interrupted(network, item):
        calls.append(network.name)
        if len(calls) == 7:  # the third image
            raise KeyboardInterrupt
        return maps_of(network, item)

    monkeypatch.setattr(adaptation, "image_maps", interrupted)
    quality = ["--quality", "wide=30", "multi=40"]
    status, printed = call(*quality)
    assert status == 130 and "goes on with the other images" in printed.err
    status, printed = call(*quality)
    assert status == 0, printed.err
    # 6 images to train on and 2 to validate, each once through each of the three networks, but for the one interrupted.
    assert len(calls) == 3 * 8 + 1 and calls.count("wide") == 8
    found = json.loads((call.out / "costs.json").read_text())
    assert found["images"] == {"train": 6, "val": 2} and found["quality"] == {"multi": 40.0, "wide": 30.0}
    assert len(found["levels"]["wide"]["student"]) == 5
    for costs in (found["costs"], found["normalized_costs"]):
        assert all(costs[a][b] > 0 for a in costs for b in costs if a != b)
    assert all((call.out / name).stat().st_size > 5000 for name in ("costs.png", "graph.png"))
    stages = yaml.safe_load((call.out / "stages.yaml").read_text())["DISTILL"]
    assert found["order"][-1] == "multi" and [s["TEACHERS"][0] for s in stages["STAGES"]] == found["order"]
    assert [entry["NAME"] for entry in stages["TEACHERS"]] == found["order"]
    assert read_costs(call.out / "costs.json").teachers == found["teachers"]

    # Without the interruption the numbers are the same.
    (call.out / "progress.pt").unlink()
    assert call(*quality)[0] == 0
    assert json.loads((call.out / "costs.json").read_text())["costs"] == found["costs"]


def tool(name):
    return load_tool(name)


@pytest.mark.parametrize("by", ["adaptation_cost", "order_teachers"])
def test_train_net_runs_the_suggested_stages_as_they_are(call, tmp_path, monkeypatch, by):
    monkeypatch.chdir(tmp_path)  # where OUTPUT_DIR is
    config = yaml.safe_load((tmp_path / "all.yaml").read_text())
    config["DISTILL"] |= {"LOSSES": [{"NAME": "FitNet", "MATCH": "by_index"}], "INIT_STUDENT": "full"}
    config |= {"OUTPUT_DIR": "runs/student", "SOLVER": {"MAX_ITER": 1}, "DATASETS": {"TEST": ["tiny_val"]}}
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(config))
    assert call("--quality", "wide=40", "multi=30")[0] == 0
    file = call.out / "stages.yaml"
    if by == "order_teachers":
        file = tmp_path / "else" / "where.yaml"
        line = [call.out / "costs.json", "--rule", "sum", "--output", file]
        assert tool("order_teachers").main(list(map(str, line))) == 0
    order = [stage["TEACHERS"] for stage in yaml.safe_load(file.read_text())["DISTILL"]["STAGES"]]
    assert tool("train_net").main(["--config-file", str(file)]) == 0
    runs = tmp_path / "runs" / "student_progressive"
    rows = (runs / "stages.md").read_text().replace(" ", "").splitlines()[2:]
    assert [row.split("|")[2:4] for row in rows] == [[*teachers, "1"] for teachers in order] and order[-1] == ["wide"]
    # It began with the trained student, and not with what the yaml's INIT_STUDENT would have copied from a teacher.
    first = load_config(runs / "config.yaml")
    assert first.DISTILL.INIT_STUDENT == "none" and Path(first.MODEL.WEIGHTS).samefile(tmp_path / "student.pth")


def test_overrides_are_those_of_the_curriculum_too(call, tmp_path, monkeypatch):
    """From any folder, and never over what is read."""
    monkeypatch.chdir(tmp_path)
    opts = ["SOLVER.MAX_ITER", 77, "DISTILL.W_DET", 0.5, "INPUT.MIN_SIZE_TRAIN", "(64,)", "OUTPUT_DIR", "o p"]
    opts += ["MODEL.WEIGHTS", "nowhere.pth"]
    assert call("--quality", "wide=40", "multi=30", *opts)[0] == 0
    measured = (call.out / "stages.yaml").read_text()
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    line = [call.out / "costs.json", "--rule", "algorithm1", "--output", tmp_path / "out/other.yaml"]
    assert tool("order_teachers").main(list(map(str, line))) == 0
    assert (tmp_path / "out/other.yaml").read_text() == measured
    cfg = load_config(call.out / "stages.yaml")
    assert (cfg.SOLVER.MAX_ITER, cfg.DISTILL.W_DET, cfg.INPUT.MIN_SIZE_TRAIN) == (77, 0.5, (64,))
    assert cfg.OUTPUT_DIR == "o p_progressive" and Path(cfg.MODEL.WEIGHTS).samefile(tmp_path / "student.pth")


def test_what_is_read_is_not_overwritten(call, tmp_path, capsys):
    assert call("--quality", "wide=40", "multi=30")[0] == 0
    before = (tmp_path / "all.yaml").read_text()
    line = [str(call.out / "costs.json"), "--output", str(tmp_path / "all.yaml")]
    assert tool("order_teachers").main(line) == 2 and "would overwrite an input" in capsys.readouterr().err
    status, printed = call("--config-file", call.out / "stages.yaml")
    assert status == 2 and "stages.yaml would overwrite an input" in printed.err
    assert (tmp_path / "all.yaml").read_text() == before
    (tmp_path / "all.yaml").unlink()
    assert tool("order_teachers").main([line[0]]) == 2
    assert "costs.json: its student's config" in capsys.readouterr().err


def test_a_network_adapts_to_itself_at_no_cost(call, tmp_path):
    config = yaml.safe_load((tmp_path / "all.yaml").read_text())
    twin = {"CONFIG": str(tmp_path / "wide.yaml"), "WEIGHTS": str(tmp_path / "wide.pth")}
    config["DISTILL"]["TEACHERS"] = [{"NAME": name, **twin} for name in ("one", "two")]
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(config))
    status, printed = call("--ridge", 1e-12)
    assert status == 0 and "order_teachers.py" in printed.out  # no --quality, no order
    found = json.loads((call.out / "costs.json").read_text())
    same, other = found["levels"]["one"]["two"]["p3>p3"], found["levels"]["student"]["one"]["p3>p3"]
    assert same["cost"] < 1e-6 * same["variance"] and other["cost"] > 1e-3 * other["variance"]
    # A map of the coarsest level has 48 weights and a bias for every channel, and six images of one location each.
    assert found["levels"]["one"]["two"]["p7>p7"]["locations"] == 6
    assert "fewer locations than they have unknowns (at worst 6 for " in printed.out
    assert found["order"] == [] and not (call.out / "stages.yaml").exists()


def test_what_was_measured_is_kept_where_no_order_follows(call, monkeypatch):
    def no_order(*_):
        raise ValueError("no order")

    monkeypatch.setattr(call.module, "suggest", no_order)
    status, printed = call("--quality", "multi=30", "wide=40")
    assert status == 2 and "no order" in printed.err
    costs = json.loads((call.out / "costs.json").read_text())
    assert costs["costs"]["student"]["wide"] > 0 and costs["order"] == []


def test_maps_that_say_little_are_warned_of(call):
    def level(**changes):
        entry = {"train_cost": 1.0, "train_variance": 2.0, "locations": 9, "unknowns": 3} | changes
        return {"a": {"b": {"p3>p3": entry, "p4>p4": entry | {"locations": 8}}}}

    assert call.module.doubts(level()) == ""
    few = call.module.doubts(level(unknowns=10))
    assert few.startswith("Warning: 2 linear maps are fitted on fewer locations than") and "8 for 10, p4>p4)" in few
    slow = call.module.doubts(level(train_cost=5.0))
    assert slow.startswith("Warning: 2 linear maps are worse than a constant") and "(at worst 2.5 times, p4>p4)" in slow


def test_errors_are_one_sentence(call, tmp_path):
    for args, words in (
        (["--quality", "wide=30"], "the performance of teacher 'multi' is missing"),
        (["--quality", "htc=30"], "no teacher 'htc'; the teachers are multi, wide"),
        (["DISTILL.TEACHERS", "[]"], "has no DISTILL.TEACHERS"),
        (["--weights", tmp_path / "none.pth"], "no checkpoint"),
        (["--pairing", "by_stride"], "no level of equal stride"),
    ):
        status, printed = call(*args)
        assert status == 2 and words in printed.err and len(printed.err.strip().splitlines()) == 1, printed.err
