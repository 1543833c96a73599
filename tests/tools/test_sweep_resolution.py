"""tools/sweep_resolution.py: sizes, numbers, resuming, the table and the plot."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import build_model
from load_tool import load_tool
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import nn

from msad import load_config
from msad.engine.setup import evaluate, load_model, prepare
from msad.evaluation.sweep import at_size, default_sizes, evaluate_size, format_sweep
from msad.visualization.sweep import sweep_figure


@pytest.fixture(scope="module")
def tool():
    return load_tool("sweep_resolution")


@pytest.fixture(scope="module")
def weights(project, tmp_path_factory):
    torch.manual_seed(5)
    file = tmp_path_factory.mktemp("sweep") / "fcos.pth"
    torch.save({"model": build_model(load_config(project / "fcos.yaml")).state_dict()}, file)
    return file


@pytest.mark.parametrize(
    ("trained", "paper"),
    [
        (800, [800, 768, 736, 704, 672, 640]),
        (400, [400, 384, 368, 352, 336, 320]),
        (200, [200, 192, 184, 176, 168, 160]),
    ],
)
def test_default_sizes_are_those_of_table_2(trained, paper):
    cfg = load_config("")
    cfg.INPUT.MIN_SIZE_TEST = trained
    assert default_sizes(cfg) == paper


def test_files_that_are_not_resized_have_no_sizes():
    cfg = load_config("", ["INPUT.MIN_SIZE_TEST", 0])
    for ask in (default_sizes, lambda cfg: at_size(cfg, 100)):
        with pytest.raises(ValueError, match=r"INPUT\.MIN_SIZE_TEST is 0"):
            ask(cfg)


def test_the_longest_side_is_scaled_alike():
    cfg = load_config("")
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 800, 1333
    sized = at_size(cfg, 640)
    assert (sized.INPUT.MIN_SIZE_TEST, sized.INPUT.MAX_SIZE_TEST) == (640, 1066)
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (800, 1333)
    with pytest.raises(ValueError, match="must be positive, got 0"):
        at_size(cfg, 0)


class _Sum(DatasetEvaluator):
    def reset(self):
        self.seen = 0

    def process(self, inputs, outputs):
        self.seen += sum(outputs)

    def evaluate(self):
        return {"bbox": {"AP": self.seen, "APl": math.nan}}


def test_every_batch_is_evaluated_and_announced(monkeypatch):
    calls = []
    monkeypatch.setattr(time, "perf_counter", lambda: 1.5 * len(calls))
    entry = evaluate_size(nn.Identity(), [[1], [2, 3], [4]], _Sum(), lambda: calls.append(1))
    assert entry["results"] == {"bbox": {"AP": 10.0, "APl": None}}
    assert len(calls) == 3 and entry["seconds"] == 4.5
    monkeypatch.setattr(_Sum, "evaluate", lambda self: {"bbox": {"AP": math.nan, "APl": math.nan}})
    entry = evaluate_size(nn.Identity(), [[1]], _Sum())
    assert entry["results"] == {"bbox": {"AP": 0.0, "APl": None}}, "nothing is detected"


def test_sizes_that_are_padded_alike_have_one_latency(tool, project, weights, tmp_path, capsys):
    argv = ["--config-file", str(project / "fcos.yaml"), "--weights", str(weights), "--output", str(tmp_path)]
    assert tool.main([*argv, "--sizes", "64", "48", "32"]) == 0
    found = {e["short_side"]: e for e in json.loads((tmp_path / "sweep.json").read_text())["sizes"]}
    assert [found[side]["input"] for side in (64, 48, 32)] == [[64, 64], [64, 64], [32, 32]]
    assert found[64]["milliseconds"] == found[48]["milliseconds"] != found[32]["milliseconds"]
    rows = {line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert rows["48"] == '"' and float(rows["64"]) > 0 and float(rows["32"]) > 0


def test_sweep_resumes_and_agrees_with_evaluation(tool, project, weights, tmp_path, capsys):
    file = tmp_path / "out" / "sweep.json"
    argv = ["--config-file", str(project / "fcos.yaml"), "--weights", str(weights), "--output", str(file.parent)]
    assert tool.main([*argv, "--sizes", "64", "48"]) == 0
    told = capsys.readouterr().out
    assert "bbox" in told and "short side" in told and "ms" in told
    found = json.loads(file.read_text())
    assert {"model", "engine", "torch", "device", "config", "weights", "dataset"} <= found.keys()
    assert found["branch"] is None and found["dataset"] == "tiny_val"
    assert [(e["short_side"], e["max_size"], e["images"]) for e in found["sizes"]] == [(64, 64, 2), (48, 48, 2)]
    assert all(e["milliseconds"] > 0 and e["seconds"] > 0 for e in found["sizes"])
    assert (file.parent / "sweep.png").stat().st_size > 1000
    cfg = load_config(project / "fcos.yaml", ["OUTPUT_DIR", str(tmp_path / "alone")])
    prepare(cfg)
    for entry in found["sizes"]:
        sized = at_size(cfg, entry["short_side"])
        expected = evaluate(sized, load_model(sized, str(weights)))["bbox"]
        assert entry["results"]["bbox"].keys() == expected.keys()
        for name, value in entry["results"]["bbox"].items():
            assert math.isnan(expected[name]) if value is None else value == pytest.approx(expected[name])

    # Finished sizes are kept, another one joins them, and the latencies of all are measured in turns.
    assert tool.main([*argv, "--sizes", "64", "56", "48"]) == 0
    again = json.loads(file.read_text())["sizes"]
    assert [e["short_side"] for e in again] == [64, 56, 48]
    kept = [{**e, "milliseconds": None} for e in found["sizes"]]
    assert [{**e, "milliseconds": None} for e in (again[0], again[2])] == kept

    # Without them those of before go: they may be of another machine than the file's head says.
    assert tool.main([*argv, "--no-latency", "--sizes", "40"]) == 0
    assert [e["milliseconds"] for e in json.loads(file.read_text())["sizes"]] == [None] * 4

    # Other options are other numbers, and so are corrected labels.
    labels = project / "data" / "annotations_val.json"
    text = labels.read_text()
    labels.write_text(text + "\n")
    assert tool.main([*argv, "--sizes", "64"]) == 2
    labels.write_text(text)
    assert "data set, or of these before they changed" in capsys.readouterr().err
    capsys.readouterr()
    assert tool.main([*argv, "MODEL.FCOS.NMS_THRESH_TEST", "0.5"]) == 2
    assert "is of another model" in capsys.readouterr().err


def test_interruption_keeps_what_is_finished(tool, project, weights, tmp_path, capsys, monkeypatch):
    argv = ["--config-file", str(project / "fcos.yaml"), "--weights", str(weights), "--output", str(tmp_path)]
    real, sizes = tool.evaluate_size, []

    def stop_at_the_second(*args, **kwargs):
        sizes.append(1)
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(tool, "evaluate_size", stop_at_the_second)
    assert tool.main([*argv, "--no-latency", "--sizes", "64", "48"]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert [e["short_side"] for e in json.loads((tmp_path / "sweep.json").read_text())["sizes"]] == [64]
    assert tool.main([*argv, "--no-latency", "--sizes", "64", "48"]) == 0
    found = json.loads((tmp_path / "sweep.json").read_text())["sizes"]
    assert [e["milliseconds"] for e in found] == [None, None] and len(sizes) == 3
    assert " ms" not in capsys.readouterr().out


def test_branch_of_a_teacher(tool, project, teacher_weights, tmp_path, capsys):
    argv = ["--config-file", str(project / "teacher.yaml"), "--weights", teacher_weights["teacher"], "--sizes", "64"]
    assert tool.main([*argv, "--branch", "L", "--output", str(tmp_path / "L")]) == 0
    assert json.loads((tmp_path / "L" / "sweep.json").read_text())["branch"] == "L"
    assert tool.main([*argv, "--branch", "EL", "--output", str(tmp_path / "EL")]) == 2
    assert "'EL' is not one of this teacher's branches" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--branch", "L"], "FCOS is no teacher"),
        (["DATASETS.TEST", "()"], "one data set in DATASETS.TEST"),
        (["MODEL.FCOS.NUM_CLASES", "3"], "did you mean MODEL.FCOS.NUM_CLASSES?"),
        (["--weights", "absent.pth"], "no checkpoint absent.pth"),
    ],
)
def test_errors_are_one_line(tool, project, weights, tmp_path, capsys, arguments, message):
    argv = ["--config-file", str(project / "fcos.yaml"), "--weights", str(weights), "--output", str(tmp_path / "o")]
    assert tool.main([*argv, *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line and not (tmp_path / "o").exists()


def test_weights_that_do_not_fit_are_not_measured(tool, project, weights, tmp_path, capsys):
    argv = ["--config-file", str(project / "fcos.yaml"), "--weights", str(weights)]
    assert tool.main([*argv, "--output", str(tmp_path / "o"), "MODEL.FCOS.CONV_DIMS", "[32, 32]"]) == 2
    assert "is not a checkpoint of this config" in capsys.readouterr().err
    assert not (tmp_path / "o" / "sweep.json").exists()
    before = sorted(path.name for path in weights.parent.iterdir())
    assert tool.main([*argv, "--output", str(weights.parent)]) == 2
    assert "would overwrite an input" in capsys.readouterr().err
    assert sorted(path.name for path in weights.parent.iterdir()) == before


# --- table and plot ---------------------------------------------------------------------------------------------------


def entry(side, ms=None, **ap):
    return {
        "short_side": side, "max_size": 2 * side, "input": ms and [side, side], "milliseconds": ms,
        "results": {t: {"AP": v} for t, v in ap.items()},
    }  # fmt: skip


def test_table_has_a_row_a_size():
    text = format_sweep([entry(400, 9.04, bbox=39.71, segm=35.0), entry(320, 7.0, bbox=37.4, segm=None)])
    box, mask = text.split("\n\n")
    assert box.splitlines()[0] == "bbox" and mask.splitlines()[0] == "segm"
    assert box.splitlines()[1].split() == ["short", "side", "longest", "AP", "padded", "input", "ms"]
    assert box.splitlines()[3].split() == ["400", "800", "39.7", "400", "x", "400", "9.0"]
    assert mask.splitlines()[4].split() == ["320", "640", "-", "320", "x", "320", "7.0"]


def test_plot_shows_every_number():
    sizes = [entry(400, 9.0, bbox=39.7, segm=35.0), entry(320, 7.0, bbox=37.4, segm=None)]
    figure = sweep_figure(sizes)
    by_size, by_time = figure.axes
    assert [list(zip(*line.get_data())) for line in by_size.lines] == [[(320, 37.4), (400, 39.7)], [(400, 35.0)]]
    assert [list(zip(*line.get_data())) for line in by_time.lines] == [[(7.0, 37.4), (9.0, 39.7)], [(9.0, 35.0)]]
    assert [t.get_text() for t in by_time.texts] == ["320", "400"]  # the first task's, which stand for all
    assert len(sweep_figure([entry(400, bbox=39.7)]).axes) == 1
    with pytest.raises(ValueError, match="no size has an AP or mIoU"):
        sweep_figure([entry(400, bbox=None)])


def test_a_segmentor_has_a_line_of_mious(tool, project, tmp_path, capsys):
    """Every pixel of an untrained one, at two sizes."""
    psp = Path(__file__).parents[2] / "configs" / "Segmentation" / "pspnet_R_18_voc.yaml"
    sets = {"TYPE": "coco_sem_seg", "IMAGES": str(project / "data" / "images")}
    entries = [{"NAME": f"swept_{s}", "JSON": str(project / "data" / f"annotations_{s}.json"), **sets}
               for s in ("train", "val")]  # fmt: skip
    config = {
        "_BASE_": str(psp), "DATASETS": {"REGISTER": entries, "TRAIN": ["swept_train"], "TEST": ["swept_val"]},
        "MODEL": {
            "DEVICE": "cpu", "RESNETS": {"STEM_OUT_CHANNELS": 8, "RES2_OUT_CHANNELS": 8, "NORM": "BN"},
            "SEM_SEG_HEAD": {"NUM_CLASSES": 7, "CONVS_DIM": 8, "NORM": "BN"},
        },
    }  # fmt: skip
    (tmp_path / "psp.yaml").write_text(yaml.safe_dump(config))
    weights = tmp_path / "psp.pth"
    torch.save({"model": build_model(load_config(tmp_path / "psp.yaml")).state_dict()}, weights)
    output = tmp_path / "out"
    argv = ["--config-file", str(tmp_path / "psp.yaml"), "--weights", str(weights), "--output", str(output)]
    assert tool.main([*argv, "--sizes", "96", "64"]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]  # a logger may print, too
    (header,) = (i for i, words in enumerate(printed) if words[:4] == ["short", "side", "longest", "mIoU"])
    assert [words[0] for words in printed[header + 2 : header + 4]] == ["96", "64"]
    sizes = json.loads((output / "sweep.json").read_text())["sizes"]
    (line,) = sweep_figure(sizes).axes[0].lines
    assert list(line.get_ydata()) == [e["results"]["sem_seg"]["mIoU"] for e in reversed(sizes)]
    assert sweep_figure(sizes).axes[0].get_ylabel() == "mIoU" and all(e["milliseconds"] > 0 for e in sizes)


def test_texts_of_the_plot_do_not_overlap_or_leave_it():
    paper = {800: 42.3, 768: 42.4, 736: 42.2, 704: 42.1, 672: 41.9, 640: 41.7}
    figure = sweep_figure([entry(s, s**2 / 8e3, bbox=ap, segm=ap - 4) for s, ap in paper.items()], "a student")
    FigureCanvasAgg(figure).draw()
    boxes = []
    for axes in figure.axes:
        low, high = axes.get_xlim()
        ticks = [t for x, t in zip(axes.get_xticks(), axes.get_xticklabels()) if low <= x <= high]
        texts = [axes.xaxis.label, axes.yaxis.label, *axes.texts, *ticks]
        boxes += [t.get_window_extent() for t in texts if t.get_text()]
    assert all(figure.bbox.x0 <= b.x0 and b.x1 <= figure.bbox.x1 and figure.bbox.y0 <= b.y0 for b in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
