"""tools/flatness.py: two models side by side, interrupted and continued."""

from __future__ import annotations

import json

import pytest
import torch
from detectron2.modeling import build_model
from load_tool import load_tool

from msad import load_config


@pytest.fixture
def call(project, tmp_path, capsys):
    module = load_tool("flatness")
    models = []
    for name in ("fcos", "gfl"):
        torch.manual_seed(2)
        torch.save({"model": build_model(load_config(project / f"{name}.yaml")).state_dict()}, tmp_path / f"{name}.pth")
        models += ["--model", project / f"{name}.yaml", tmp_path / f"{name}.pth"]

    def run(*args, models=models):
        line = [*models, "--output", tmp_path / "out", "--images", 2, "--distances", 0.1, 0.5, *args]
        return module.main([str(a) for a in line]), capsys.readouterr()

    run.module, run.out = module, tmp_path / "out"
    return run


def test_lines_surfaces_and_the_gap_of_two_models(call, monkeypatch):
    # Ctrl-C after the two losses and one of the directions of the first model.
    explore, asked = call.module._evaluate, []

    def interrupted(key, *args):
        asked.append(key)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return explore(key, *args)

    monkeypatch.setattr(call.module, "_evaluate", interrupted)
    status, printed = call("--directions", 2, "--surface", 3)
    assert status == 130 and "the same command goes on" in printed.err
    status, printed = call("--directions", 2, "--surface", 3)
    assert status == 0, printed.err
    assert len(asked) == 4 + 1 + 3 + (2 + 2 + 3)  # nothing of the first part is evaluated again
    found = json.loads((call.out / "flatness.json").read_text())
    assert set(found["models"]) == {"fcos", "gfl"} and found["datasets"] == {"TRAIN": "tiny_train", "TEST": "tiny_val"}
    for model in found["models"].values():
        assert model["steps"] == [-0.5, -0.1, 0.0, 0.1, 0.5]
        assert [len(line) for line in model["lines"]] == [5, 5] and [len(row) for row in model["surface"]] == [3] * 3
        assert model["gap"] == pytest.approx(model["val"] - model["train"]) and model["train"] > 0
        for line in model["lines"]:
            assert line[2] == pytest.approx(model["train"], rel=1e-6)  # the middle is the model itself
        assert model["surface"][1][1] == pytest.approx(model["train"], rel=1e-6)
        rise = sum(line[i] - line[2] for line in model["lines"] for i in (0, 4)) / 4
        assert model["sharpness"]["0.5"] == pytest.approx(rise, rel=1e-5)
    assert all((call.out / f).stat().st_size > 5000 for f in ("flatness.png", "surface.png"))
    before = len(asked)
    assert call("--directions", 1)[0] == 0 and len(asked) == before  # fewer directions need nothing new


def test_errors_are_one_sentence(call, tmp_path, project):
    one = ["--model", project / "fcos.yaml", tmp_path / "fcos.pth"]
    for models, args, words in (
        (one + one, [], "have the same name"),
        (one, ["DATASETS.TEST", "()"], "one and the same DATASETS.TEST"),
        ([*one[:2], tmp_path / "none.pth"], [], "no checkpoint"),
    ):
        status, printed = call(*args, models=models)
        assert status == 2 and words in printed.err and len(printed.err.strip().splitlines()) == 1, printed.err
    with pytest.raises(SystemExit):
        call("--directions", 0)
    with pytest.raises(SystemExit):
        call("--surface", 1)
