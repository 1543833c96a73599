"""tools/join_reports.py: comparisons that were run apart, as one report."""

import json
import shutil

import pytest
import torch
from detectron2.modeling import build_model
from load_tool import load_tool

from msad import load_config
from msad.experiments.joining import Part, join


@pytest.fixture
def call(capsys):
    module = load_tool("join_reports")
    return lambda *args: (module.main(list(map(str, args))), capsys.readouterr())


def write_part(folder, aps, reference="", engine="detectron2 0.6", **names):
    """A comparison's report.json. ``aps``: variant -> AP of each seed from 0 on, None where it failed."""
    runs = []
    for name, values in aps.items():
        shown = names.get(name, name)
        for seed, ap in enumerate(values):
            found = {"error": "no GPU"} if ap is None else {"results": {shown: {"bbox": {"AP": ap, "AP50": 2 * ap}}}}
            runs.append({"variant": name, "seed": seed, "iterations": 6, "seconds": 3.0, **found})
    variants = {name: {"file": f"configs/{name}.yaml", "title": "", "teacher": name == "teacher", "teachers": ["elder"]}
                for name in aps}  # fmt: skip
    seeds = list(range(max(map(len, aps.values()))))
    data = {"engine": engine, "versions": {"torch": "2.12"}, "seeds": seeds, "reference": reference,
            "variants": variants, "runs": runs}  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(data))
    return folder


def test_differences_go_across_the_parts(call, tmp_path):
    """By hand: 31 - 30, 33 - 31 are 1.5 on average; the third seed of the reference has no partner."""
    students = write_part(tmp_path / "a", {"student": [31.0, 33.0, None], "teacher": [40.0]}, teacher="teacher_fused")
    alone = write_part(tmp_path / "b", {"plain": [30.0, 31.0, 34.0]}, "plain", "detectron2 0.7")
    longer = write_part(tmp_path / "c", {"plain": [35.0]})
    before = [(folder / "report.json").read_text() for folder in (students, alone, longer)]
    status, printed = call(students, alone, f"longer={longer}", "--output", tmp_path / "all")
    assert status == 0 and "student, seed 2: no GPU" in (tmp_path / "all" / "report.md").read_text()
    data = json.loads((tmp_path / "all" / "report.json").read_text())
    assert data["reference"] == "plain" and data["seeds"] == [0, 1, 2]
    assert data["engine"] == "detectron2 0.6 and detectron2 0.7" and data["versions"] == {"torch": "2.12"}
    assert {name: variant["teachers"] for name, variant in data["variants"].items()} == {
        "student": ["elder"], "teacher": ["elder"], "plain": ["elder"], "plain@longer": ["elder@longer"],
    }  # fmt: skip
    lines = {line.split()[0]: line for line in reversed(printed.out.splitlines()) if line.strip()}
    assert "+1.50" in lines["student"] and "2 of 2" in lines["student"]
    assert "+5.00" in lines["plain@longer"] and "40.0" in lines["teacher_fused"]
    assert [(folder / "report.json").read_text() for folder in (students, alone, longer)] == before
    assert "GMACs" not in printed.out and not (tmp_path / "all" / "ap_vs_cost.png").exists()


def test_costs_are_measured_together(call, project, tmp_path):
    """The same yaml at two input sizes is one network; a model whose weights are gone has no costs."""
    for part, side in (("a", 64), ("b", 128)):
        write_part(tmp_path / part, {"fcos": [20.0, 21.0], **({"gone": [22.0]} if part == "a" else {})})
        cfg = load_config(project / "fcos.yaml", ["INPUT.MIN_SIZE_TEST", side, "INPUT.MAX_SIZE_TEST", side])
        run = tmp_path / part / "seed1" / "fcos"
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(cfg.dump())
        torch.save({"model": build_model(cfg).state_dict()}, run / "model_final.pth")
    status, printed = call(tmp_path / "a", f"large={tmp_path / 'b'}", "--costs", "--output", tmp_path / "all")
    assert status == 0 and printed.err.endswith("note: no costs of gone: their weights are gone\n")
    cost = json.loads((tmp_path / "all" / "report.json").read_text())["cost"]
    assert cost.keys() == {"fcos", "fcos@large"} and cost["fcos"]["network"] == cost["fcos@large"]["network"]
    assert 3 < cost["fcos@large"]["gmacs"]["total"] / cost["fcos"]["gmacs"]["total"] < 5  # twice the side
    assert (tmp_path / "all" / "ap_vs_cost.png").stat().st_size > 5000
    assert "ap_vs_cost.png" in (tmp_path / "all" / "report.html").read_text()


def test_other_data_and_other_configs_are_not_joined(project, tmp_path):
    """Of the same yaml's name; seeds, folders and equal times differ in what belongs together."""

    def part(name, seed, opts=(), data="1", variant="fcos", **more):
        folder = write_part(tmp_path / name, {variant: [20.0, 21.0]})
        content = json.loads((folder / "report.json").read_text())
        content["runs"] = [run for run in content["runs"] if run["seed"] == seed]
        content["variants"][variant].update(more)
        (folder / "report.json").write_text(json.dumps(content))
        home = folder / f"seed{seed}" / variant
        home.mkdir(parents=True)
        cfg = load_config(project / "fcos.yaml", ["SEED", seed, "OUTPUT_DIR", str(home), *opts])
        (home / "config.yaml").write_text(cfg.dump())
        (home / "identity.json").write_text(json.dumps({"data": {"tiny_val": {"annotations": data}}}))
        return Part(folder)

    one = part("a", 0)
    assert len(join([one, part("b", 1)])["runs"]) == 2
    with pytest.raises(ValueError, match=r"tested on other data: .*a/seed0/fcos on tiny_val, and .*c/seed1/fcos"):
        join([one, part("c", 1, data="2")])
    with pytest.raises(ValueError, match=r"fcos has SOLVER.MAX_ITER 6 in .*a/seed0/fcos and 9 in .*d/seed1/fcos"):
        join([one, part("d", 1, ["SOLVER.MAX_ITER", 9])])
    longer = part("e", 1, ["SOLVER.MAX_ITER", 9])
    assert len(join([one, longer._replace(suffix="@longer")])["runs"]) == 2
    timed = [part(name, seed, ["SOLVER.MAX_ITER", n], variant="fcos@equal_time", budget="equal_time")
             for name, seed, n in (("f", 0, 7), ("g", 1, 8))]  # fmt: skip
    assert len(join(timed)["runs"]) == 2


def test_a_run_that_failed_gives_way_to_one_that_did_not(call, tmp_path):
    """Whichever comes first; of two that failed the first is told of."""
    failed = write_part(tmp_path / "a", {"plain": [30.0, None, None]})
    finished = write_part(tmp_path / "b", {"plain": [None, 31.0, None]})
    for parts in ((failed, finished), (finished, failed)):
        runs = join([Part(folder) for folder in parts])["runs"]
        assert {run["seed"]: run.get("results", {}).get("plain", {}).get("bbox", {}).get("AP") for run in runs} == {
            0: 30.0, 1: 31.0, 2: None,
        }  # fmt: skip
        assert [run["seed"] for run in runs if "error" in run] == [2] and len(runs) == 3
    with pytest.raises(ValueError, match=rf"plain with seed 0 is in {failed} and in {tmp_path}/c"):
        join([Part(folder) for folder in (failed, finished, write_part(tmp_path / "c", {"plain": [30.0]}))])


def test_segmentors_are_joined_by_their_metric(call, tmp_path):
    part = write_part(tmp_path / "a", {"psp": [40.0]})
    data = json.loads((part / "report.json").read_text())
    data["runs"][0]["results"] = {"psp": {"sem_seg": {"mIoU": 41.5}}}
    (part / "report.json").write_text(json.dumps(data))
    status, printed = call(part, "--output", tmp_path / "all")
    assert status == 0 and "mIoU" in printed.out and "41.5" in printed.out


def test_what_cannot_be_joined_is_named(call, tmp_path):
    one, other = (write_part(tmp_path / name, {"plain": [30.0]}) for name in "ab")
    with pytest.raises(ValueError, match=rf"plain with seed 0 is in {one} and in {other}; .*SUFFIX={other}"):
        join([Part(one), Part(other)])
    data = json.loads((other / "report.json").read_text())
    data["runs"][0]["seed"] = 1
    (other / "report.json").write_text(json.dumps(data))
    assert [run["seed"] for run in join([Part(one), Part(other)])["runs"]] == [0, 1]
    data["variants"]["plain"]["file"] = "elsewhere/plainer.yaml"
    (other / "report.json").write_text(json.dumps(data))
    status, printed = call(one, other, "--output", tmp_path / "all")
    assert status == 2 and "plain is configs/plain.yaml and" in printed.err and "elsewhere/plainer.yaml" in printed.err
    status, printed = call(one, "--reference", "none", "--output", tmp_path / "all")
    assert status == 2 and "--reference none is none of the models plain" in printed.err
    status, printed = call(one, "--metric", "segm/AP", "--output", tmp_path / "all")
    assert status == 2 and "bbox/AP50" in printed.err
    status, printed = call(one, "--metric", "validation/L_detect", "--output", tmp_path / "all")
    assert status == 2 and "--metric validation/L_detect is a loss" in printed.err
    status, printed = call(one, "--output", one)
    assert status == 2 and str(one) in printed.err
    status, printed = call(one, "--output", tmp_path / "all", "SOLVER.BASE_LR", "1")
    assert status == 2 and "nothing is trained" in printed.err
    shutil.rmtree(other)
    status, printed = call(one, other, "--output", tmp_path / "all")
    assert status == 2 and f"{other} has no report.json" in printed.err and not (tmp_path / "all").exists()
