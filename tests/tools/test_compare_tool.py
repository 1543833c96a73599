"""tools/compare.py: its command line and what it writes, from runs that are finished."""

import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from load_tool import load_tool

from msad import load_config
from msad.experiments.comparison import Comparison
from msad.experiments.identity import is_finished
from msad.experiments.jobs import Run
from msad.experiments.metrics import choose_metric
from msad.experiments.variants import Variant

SCRIPT = Path(__file__).parents[2] / "tools" / "compare.py"


@pytest.fixture
def call(capsys):
    module = load_tool("compare")
    return lambda *args: (module.main(list(map(str, args))), capsys.readouterr())


@pytest.fixture
def finished(project, tmp_path):
    """Results of two variants over three seeds, and the third's failure."""
    variants = {name: Variant(project / f"{name}.yaml") for name in ("fcos", "gfl")}
    study = Comparison(variants, tmp_path, ["SOLVER.IMS_PER_BATCH", 1], (0, 1, 2))
    for name, offset in (("fcos", 0.0), ("gfl", 2.0)):
        for seed in range(3):
            is_finished(study.config(Run(name, seed)))
            folder = study.folder(Run(name, seed))
            results = {name: {"bbox": {"AP": 20.0 + seed + offset * (1 + seed / 10), "AP50": 40.0}}}
            clock = {"iterations": 6, "warmup": 0, "seconds": 3.0, "cpu_seconds": 3.0, "steps": 6}
            (folder / "result.json").write_text(json.dumps({**clock, "results": results}))
    (tmp_path / "seed0/retinanet").mkdir(parents=True)
    (tmp_path / "seed0/retinanet/failed.txt").write_text("ValueError: no GPU")
    return tmp_path


def test_report_of_finished_runs(call, project, finished, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tools/compare.py", "a b.yaml", "DATASETS.TEST", "('x',)"])
    files = [project / f"{name}.yaml" for name in ("fcos", "gfl", "retinanet")]
    status, printed = call(*files, "--output", finished, "SOLVER.IMS_PER_BATCH", 1, "--report-only", "--equal-time")
    assert status == 0 and "+2.20 ± 0.50 *" in printed.out and "retinanet, seed 0: ValueError: no GPU" in printed.out
    data = json.loads((finished / "report.json").read_text())
    assert data["reference"] == "fcos" and shlex.split(data["command"]) == ["python", *sys.argv]
    # GFL's steps took as long as the reference's: its runs of equal time are the same.
    assert [r["variant"] for r in data["runs"]].count("gfl@equal_time") == 3
    for name in ("report.html", "report.md", "results.png", "differences.png"):
        assert (finished / name).stat().st_size > 500


def test_results_of_another_configuration_are_not_reported(call, project, finished):
    line = [project / "fcos.yaml", "--output", finished, "--report-only", "SOLVER.IMS_PER_BATCH"]
    assert call(*line, 1)[0] == 0
    before = (finished / "report.json").read_text()
    status, printed = call(*line, 2)
    assert status == 2 and "seed0/fcos holds a run of another configuration" in printed.err
    assert "SOLVER.IMS_PER_BATCH 1, now 2" in printed.err and (finished / "report.json").read_text() == before


def test_panels_of_an_earlier_call_are_not_shown(call, project, finished):
    line = [project / "fcos.yaml", "--output", finished, "SOLVER.IMS_PER_BATCH", 1]
    cv2.imwrite(str(finished / "panels.jpg"), np.zeros((9, 9, 3), np.uint8))
    assert call(*line, "--report-only")[0] == 0 and "panels.jpg" in (finished / "report.md").read_text()
    assert call(*line)[0] == 0 and "panels.jpg" not in (finished / "report.md").read_text()
    assert not (finished / "panels.jpg").exists()


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("bbox/ap", "--metric bbox/ap; did you mean bbox/AP? the models are evaluated by bbox/AP, bbox/AP50"),
        ("AP", "--metric AP"),
        ("segm/AP", "--metric segm/AP"),
        ("sem_seg/mIoU", "--metric sem_seg/mIoU"),
        ("bbox/AP-", "--metric bbox/AP-"),
        ("validation/L_detect", "--metric validation/L_detect is a loss: models are compared by metrics of which more"),
        ("bbox/AP-disc", ""),
        ("bbox/AP50", ""),
    ],
)
def test_a_metric_that_no_model_has_is_refused_before_training(project, tmp_path, metric, said):
    study = Comparison({"fcos": Variant(project / "fcos.yaml")}, tmp_path / "out")
    if said:
        with pytest.raises(ValueError, match=re.escape(said)):
            choose_metric(study, metric)
    else:
        assert choose_metric(study, metric) == metric
    assert choose_metric(study) == "bbox/AP"


def test_a_metric_of_other_models_or_evaluators(project, tmp_path):
    """Masks need MASK_ON; what an evaluator that is not known here gives is not refused."""
    fcos = Variant(project / "fcos.yaml")
    masks = replace(fcos, overrides=("MODEL.MASK_ON", True))
    study = Comparison({"fcos": fcos, "masks": masks}, tmp_path / "out")
    assert choose_metric(study, "segm/APs") == "segm/APs"
    MetadataCatalog.get("counted here").evaluator_type = "counting"
    counted = Comparison({"fcos": fcos}, tmp_path / "out", ["DATASETS.TEST", ("counted here",), "TEST.LOSS_IMAGES", 2])
    assert choose_metric(counted, "count/N") == "count/N"
    with pytest.raises(ValueError, match="--metric validation/L_detect is a loss"):
        choose_metric(counted, "validation/L_detect")


def test_a_wrong_metric_trains_nothing(call, project, tmp_path):
    status, printed = call(project / "fcos.yaml", "--metric", "bbox/ap", "--output", tmp_path / "out")
    assert status == 2 and "did you mean bbox/AP" in printed.err and not (tmp_path / "out").exists()


def test_a_sweep_and_the_conventional_detector_of_equal_cost(call, project, tmp_path):
    fcos, student = project / "fcos.yaml", project / "student.yaml"
    args = ["--sweep", "DISTILL.LOSSES.0.WEIGHT=x0.1,x10", "--equal-cost", fcos, "--reference", "fcos"]
    status, printed = call(fcos, student, *args, "--output", tmp_path, "--report-only")
    assert status == 0 and "No run has finished yet" in printed.out
    data = json.loads((tmp_path / "report.json").read_text())
    swept = ["student_WEIGHT_0.06", "student_WEIGHT_6.0"]
    assert list(data["variants"]) == ["fcos", *swept, "baseline_equal_cost", "teacher"]
    assert data["variants"]["student_WEIGHT_6.0"]["losses"][0]["weight"] == 6.0
    for second in (["--sweep", "SOLVER.BASE_LR=1,2"], ["--sweep=SOLVER.BASE_LR=1,2"]):
        status, printed = call(student, *args[:2], *second, "--output", tmp_path, "--report-only")
        assert status == 2 and "--sweep takes one key" in printed.err


def test_segmentors_have_their_metric_and_panels(call, project, tmp_path):
    """The ground truth beside what an (untrained) segmentor says of every pixel."""
    psp = SCRIPT.parents[1] / "configs" / "Segmentation" / "pspnet_R_18_voc.yaml"
    sets = {"TYPE": "coco_sem_seg", "IMAGES": str(project / "data" / "images")}
    entries = [{"NAME": f"seg_{s}", "JSON": str(project / "data" / f"annotations_{s}.json"), **sets}
               for s in ("train", "val")]  # fmt: skip
    config = {
        "_BASE_": str(psp), "DATASETS": {"REGISTER": entries, "TRAIN": ["seg_train"], "TEST": ["seg_val"]},
        "MODEL": {
            "DEVICE": "cpu", "RESNETS": {"STEM_OUT_CHANNELS": 8, "RES2_OUT_CHANNELS": 8, "NORM": "BN"},
            "SEM_SEG_HEAD": {"NUM_CLASSES": 7, "CONVS_DIM": 8, "NORM": "BN"},
        },
    }  # fmt: skip
    (tmp_path / "psp.yaml").write_text(yaml.safe_dump(config))
    study = Comparison({"psp": Variant(tmp_path / "psp.yaml")}, tmp_path / "out")
    is_finished(study.config(Run("psp", 0)))
    folder = study.folder(Run("psp", 0))
    torch.save({"model": build_model(load_config(tmp_path / "psp.yaml")).state_dict()}, folder / "model_final.pth")
    metrics = {"mIoU": 40.0, "IoU-background": 80.0, "IoU-disc": 20.0, "ACC-disc": 30.0}
    clock = {"iterations": 6, "warmup": 0, "seconds": 3.0, "cpu_seconds": 3.0, "steps": 6}
    (folder / "result.json").write_text(json.dumps({**clock, "results": {"psp": {"sem_seg": metrics}}}))
    options = ["--seeds", 0, "--report-only", "--output", tmp_path / "out"]
    status, printed = call(tmp_path / "psp.yaml", *options, "--panels", "psp")
    assert status == 0 and "IoU background" in printed.out and "ACC" not in printed.out
    report = (tmp_path / "out" / "report.md").read_text()
    assert "panels.jpg" in report and "a few mIoU" in report
    page = cv2.imread(str(tmp_path / "out" / "panels.jpg"))
    assert page.shape[1] == 2 * 488 + 8 and page.shape[0] > 2 * 480
    status, printed = call(tmp_path / "psp.yaml", *options, "--panels", "teacher")
    assert status == 2 and "--panels teacher is none of the variants psp" in printed.err


def test_bad_command_lines_are_one_sentence(call, project, tmp_path, capsys):
    status, printed = call(project / "fcos.yaml", "--reference", "gfl", "--report-only", "--output", tmp_path)
    assert status == 2 and printed.err == "compare: error: --reference gfl is none of the variants fcos\n"
    status, printed = call(tmp_path / "none.yaml", "--report-only", "--output", tmp_path)
    assert status == 2 and "no config file" in printed.err
    status, printed = call(tmp_path / "Base.yaml", "--report-only")
    assert status == 2 and "no yaml file to compare" in printed.err
    status, printed = call(project / "fcos.yaml", "--devices", "gpu0", "--output", tmp_path)
    assert status == 2 and "cuda:0" in printed.err
    for option in ("--iterations", "--teacher-iterations"):
        with pytest.raises(SystemExit, match="2"):
            call(project / "fcos.yaml", option, "0", "--output", tmp_path)
        assert f"argument {option}: must be at least 1, got 0" in capsys.readouterr().err
