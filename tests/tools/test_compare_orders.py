"""tools/compare_orders.py: every order of two teachers, with shared stages, continued after an interruption."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
import yaml
from load_tool import load_tool

from msad import load_config
from msad.distill.progressive.order import all_orders
from msad.experiments import jobs
from msad.experiments.orders import order_study


@pytest.fixture
def call(project, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # all paths of the command line are relative
    module = load_tool("compare_orders")
    for name in ("shelf", "one", "two"):
        channels = 40 if name == "two" else 32
        text = f"_BASE_: {project}/fcos.yaml\nSOLVER: {{MAX_ITER: 1}}\nMODEL: {{FPN: {{OUT_CHANNELS: {channels}}}}}\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    teachers = [{"NAME": name, "CONFIG": f"{name}.yaml", "WEIGHTS": "not_trained_yet.pth"} for name in ("one", "two")]
    distill = {"TEACHERS": teachers, "LOSSES": [{"NAME": "FitNet"}], "STUDENT_RESOLUTION": "H", "WARMUP_ITERS": 0}
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump({"_BASE_": "shelf.yaml", "DISTILL": distill}))

    def run(*args):
        line = ["pool.yaml", "--student", "shelf.yaml", "--seeds", 3, "--jobs", 0, "--output", "out", *args]
        return module.main(list(map(str, line))), capsys.readouterr()

    run.out = tmp_path / "out"
    return run


def test_all_orders_share_their_beginnings_and_resume(call, tmp_path, monkeypatch):
    done, train = [], jobs.train_and_evaluate

    def interrupted(folder):
        done.append(folder.name)
        if done.count("one-two") == 1 and folder.name == "one-two":
            raise KeyboardInterrupt
        return train(folder)

    monkeypatch.setattr(jobs, "train_and_evaluate", interrupted)
    options = ["SOLVER.BASE_LR", 0.001]
    status, printed = call(*options)
    assert status == 130 and "goes on" in printed.err, printed.err
    status, printed = call(*options)
    assert status == 0, printed.out + printed.err
    networks, stages = ["shelf", "one", "two"], ["one", "two", "one-two", "two-one"]
    assert sorted(done) == sorted(["student", *networks[1:], *stages, "one-two"]), "each once, but the interrupted one"

    def weights(name):
        return torch.load(call.out / "seed3" / name / "model_final.pth", weights_only=True)["model"]

    # A second stage begins with the student of the first: one iteration of a tiny learning rate apart.
    starts = {name: yaml.safe_load((call.out / "seed3/orders" / name / "config.yaml").read_text()) for name in stages}
    assert starts["one-two"]["MODEL"]["WEIGHTS"].endswith("seed3/orders/one/model_final.pth")
    assert starts["one"]["MODEL"]["WEIGHTS"].endswith("seed3/student/model_final.pth")
    assert [t["NAME"] for t in starts["one-two"]["DISTILL"]["TEACHERS"]] == ["two"]
    assert weights("orders/one-two").keys() == weights("student").keys()
    found = json.loads((call.out / "orders.json").read_text())["seeds"]["3"]
    assert [order for order, _ in found["orders"]] == [["one"], ["two"], ["one", "two"], ["two", "one"]]
    assert {(e["k"], e["of"]) for e in found["rules"]} == {(1, 2), (2, 4)}
    assert all(1 <= e["rank"] <= e["of"] for e in found["rules"])
    assert all(found["costs"][a][b] > 0 for a, b in itertools.permutations(("student", "one", "two"), 2))
    assert "algorithm1" in printed.out and "orders.png" in printed.out
    assert all((call.out / f).stat().st_size > 5000 for f in ("orders.png", "costs_seed3.png", "graph_seed3.png"))
    # Nothing is trained again, and results of another configuration are not reported.
    done.clear()
    assert call("--report-only", *options)[0] == 0 and not done
    status, printed = call("--report-only")
    assert status == 2 and "SOLVER.BASE_LR 0.001, now 0.002" in printed.err
    status, printed = call("--report-only", *options, "DISTILL.W_DET", 0.5)
    assert status == 2 and "DISTILL.W_DET 1.0, now 0.5" in printed.err
    status, printed = call(*options, "--metric", "bbox/ap")
    assert status == 2 and "did you mean bbox/AP" in printed.err and not done
    # From any folder, tools/order_teachers.py makes a curriculum of the costs, with the overrides of the study.
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    costs = call.out / "seed3" / "adaptation" / "costs.json"
    assert load_tool("order_teachers").main([str(costs), "--output", "stages.yaml"]) == 0
    cfg = load_config("stages.yaml")
    assert cfg.SOLVER.BASE_LR == 0.001 and Path(cfg.MODEL.WEIGHTS).samefile(call.out / "seed3/student/model_final.pth")
    assert all(Path(t[key]).is_file() for t in cfg.DISTILL.TEACHERS for key in ("CONFIG", "WEIGHTS"))


def test_a_network_that_fails_keeps_its_own_seed_alone_from_going_on(call, monkeypatch):
    train = jobs.train_and_evaluate

    def broken(folder):
        if folder.parts[-2:] == ("seed4", "two"):
            raise RuntimeError("out of memory")
        return train(folder)

    monkeypatch.setattr(jobs, "train_and_evaluate", broken)
    status, printed = call("--seeds", 4, 3, "--longest", 1)
    assert status == 1 and printed.out.endswith("FAILED: two, seed 4: out of memory\n")
    assert not (call.out / "seed4" / "orders").exists()
    found = json.loads((call.out / "orders.json").read_text())["seeds"]
    assert list(found) == ["3"] and [order for order, _ in found["3"]["orders"]] == [["one"], ["two"]]


def test_pools_that_cannot_be_ordered(call, tmp_path):
    pool = yaml.safe_load((tmp_path / "pool.yaml").read_text())
    teachers = pool["DISTILL"]["TEACHERS"]
    mean = {"NAME": "both", "MEAN_OF": ["one", "two"]}
    for entries, words in (
        (teachers[:1], "orders need two teachers or more"),
        ([*teachers, mean], "both is a mean of teachers"),
        ([dict(teachers[0], NAME="a-b"), teachers[1]], "the teacher's name 'a-b' cannot be used here"),
    ):
        pool["DISTILL"]["TEACHERS"] = entries
        (tmp_path / "pool.yaml").write_text(yaml.safe_dump(pool))
        status, printed = call()
        assert status == 2 and words in printed.err and printed.err.count("\n") == 1
    pool["DISTILL"]["TEACHERS"] = [dict(teachers[0], SCALE=0.75), teachers[1]]
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump(pool))
    status, printed = call()
    assert status == 2 and "have no level of equal stride" in printed.err and not list(call.out.glob("seed3/*/*.pth"))
    pool["DISTILL"]["LOSSES"] = [{"NAME": "FitNet", "MATCH": "by_index"}]
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump(pool))
    status, printed = call()
    assert status == 0 and json.loads((call.out / "seed3/adaptation/costs.json").read_text())["costs"]["one"]["two"] > 0
    status, printed = call("DATASETS.TEST", "('tiny_val', 'tiny_train')")
    assert status == 2 and "pool.yaml: a comparison needs one data set in DATASETS.TEST" in printed.err


def test_all_orders_of_a_study_come_after_their_beginnings(call, tmp_path):
    study = order_study(tmp_path / "pool.yaml", tmp_path / "shelf.yaml", tmp_path / "x", [0, 1])
    runs = study.runs()
    assert len(runs) == 2 * len(all_orders(["one", "two"], 2)) == 8
    assert all(runs.index(need) < runs.index(run) for run in runs for need in study.needs(run))
