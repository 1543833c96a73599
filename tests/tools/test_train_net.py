"""tools/train_net.py end to end: baseline, teacher, student, evaluation, resume, errors, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.engine import default_argument_parser
from load_tool import load_tool

from msad import cli

SCRIPT = Path(__file__).parents[2] / "tools" / "train_net.py"


@pytest.fixture(scope="module")
def tool():
    return load_tool("train_net")


@pytest.fixture
def train_net(tool, project):
    """Call main() with a yaml of the project and further arguments; returns the results."""

    def call(name, *arguments):
        argv = ["--config-file", str(project / f"{name}.yaml"), *map(str, arguments)]
        return tool.work(cli.parse(default_argument_parser(), argv))

    return call


@pytest.fixture
def command(tool, capsys):
    """Call the command line: (exit code, last line of stderr)."""

    def call(*arguments):
        try:
            code = tool.main(list(map(str, arguments)))
        except SystemExit as stop:
            code = stop.code
        return code, (capsys.readouterr().err.strip().splitlines() or [""])[-1]

    return call


def scalars(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def test_baseline_teacher_and_student(train_net, project, tmp_path):
    """The three stages as a user runs them, with an evaluation of each."""
    out = {name: tmp_path / name for name in ("fcos", "teacher", "student")}
    assert train_net("fcos", "OUTPUT_DIR", out["fcos"], "SOLVER.MAX_ITER", 3, "TEST.EVAL_PERIOD", 2) is None
    produced = {p.name for p in out["fcos"].iterdir()}
    assert {"model_final.pth", "last_checkpoint", "metrics.json", "config.yaml", "log.txt", "inference"} <= produced
    assert "MAX_ITER: 3" in (out["fcos"] / "config.yaml").read_text()
    evaluated = [line["iteration"] for line in scalars(out["fcos"]) if "bbox/AP" in line]
    assert len(evaluated) >= 1
    log = (out["fcos"] / "log.txt").read_text()
    assert "Engine: detectron2" in log and "Exception" not in log

    train_net("teacher", "OUTPUT_DIR", out["teacher"], "SOLVER.MAX_ITER", 3)
    weights = out["teacher"] / "model_final.pth"
    logged = {key for line in scalars(out["teacher"]) for key in line}
    assert {"H/loss_fcos_cls", "L/loss_fcos_loc", "fused/loss_fcos_ctr", "total_loss"} <= logged
    results = {
        branch: train_net("teacher", "--eval-only", "MODEL.WEIGHTS", weights, "OUTPUT_DIR", tmp_path / branch,
                          "MSAD.EVAL_BRANCH", branch)
        for branch in ("fused", "H", "L")
    }  # fmt: skip
    assert all("AP50" in r["bbox"] for r in results.values())
    found = [(tmp_path / b / "inference" / b / "coco_instances_results.json").read_text() for b in results]
    assert len(set(found)) == 3  # every branch detects in its own way

    teachers = [{"CONFIG": str(project / "teacher.yaml"), "WEIGHTS": str(weights)}]
    options = ("DISTILL.TEACHERS", teachers, "OUTPUT_DIR", out["student"])
    train_net("student", *options)
    (last,) = [line for line in scalars(out["student"]) if "total_loss" in line]
    assert last["iteration"] == 5 and last["loss_distill/AlignedL1"] > 0 and last["loss_fcos_cls"] > 0
    # A student is evaluated without its teacher, from its own checkpoint.
    alone = train_net("student", "--eval-only", "MODEL.WEIGHTS", out["student"] / "model_final.pth",
                      "OUTPUT_DIR", tmp_path / "alone")  # fmt: skip
    assert {"AP", "AP50", "AP75"} <= alone["bbox"].keys()
    assert (tmp_path / "alone" / "inference" / "coco_instances_results.json").read_text() == (
        out["student"] / "inference" / "coco_instances_results.json"
    ).read_text()


def test_evaluation_of_the_last_checkpoint(tool, train_net, teacher_weights, tmp_path, monkeypatch):
    """--eval-only --resume is of what the run has come to, and not of the weights that it began with."""
    load, loaded = tool.load_model, []
    monkeypatch.setattr(tool, "load_model", lambda cfg, weights: loaded.append(weights) or load(cfg, weights))
    begun = ("OUTPUT_DIR", tmp_path, "MODEL.WEIGHTS", teacher_weights["teacher"])
    with pytest.raises(FileNotFoundError, match=r"--resume: .* has no checkpoint to go on with: there is no last"):
        train_net("teacher", "--eval-only", "--resume", *begun)
    train_net("teacher", *begun, "SOLVER.MAX_ITER", 1)
    assert "AP" in train_net("teacher", "--eval-only", "--resume", *begun)["bbox"]
    assert loaded == [str(tmp_path / "model_final.pth")]


def test_evaluation_alone_needs_weights(train_net, tmp_path):
    with pytest.raises(ValueError, match=r"MODEL.WEIGHTS is empty"):
        train_net("fcos", "--eval-only", "OUTPUT_DIR", tmp_path)


def test_evaluation_alone_checks_its_data(train_net, project, teacher_weights, tmp_path):
    content = json.loads((project / "data/annotations_val.json").read_text())
    content["images"][0]["file_name"] = "absent.png"
    (tmp_path / "val.json").write_text(json.dumps(content))
    entry = {"NAME": "absent_val", "JSON": str(tmp_path / "val.json"), "IMAGES": str(project / "data/images")}
    with pytest.raises(ValueError, match=r"absent\.png does not exist"):
        train_net("teacher", "--eval-only", "OUTPUT_DIR", tmp_path, "MODEL.WEIGHTS", teacher_weights["teacher"],
                  "DATASETS.REGISTER", f"[{entry}]", "DATASETS.TEST", "('absent_val',)",
                  "DATASETS.TRAIN", "('not_on_this_machine',)")  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-file", "absent.yaml"], "error: no config file absent.yaml"),
        (
            ["--config-file", "{yaml}", "MODEL.FCOS.NUM_CLASES", "3"],
            "error: command line: unknown config key MODEL.FCOS.NUM_CLASES; did you mean MODEL.FCOS.NUM_CLASSES?",
        ),
        (["--config-file", "{yaml}", "SOLVER.MAX_ITER"], "error: overrides must be KEY VALUE pairs"),
        (["--config-file", "{yaml}", "SOLVER.MAX_ITER", "many"], "error: Type mismatch"),
        (["--config-file", "{baseless}"], "nowhere.yaml"),
        (["--config-file", "{broken}"], "broken.yaml"),
        (["--config-file", "{wrong}"], "DISTILL.WARMUP_ITER; did you mean DISTILL.WARMUP_ITERS?"),
        ([], "error: --config-file is required"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(command, project, tmp_path, arguments, message):
    (tmp_path / "wrong.yaml").write_text(f"_BASE_: {project / 'fcos.yaml'}\nDISTILL: {{WARMUP_ITER: 3}}\n")
    (tmp_path / "baseless.yaml").write_text("_BASE_: nowhere.yaml\n")
    (tmp_path / "broken.yaml").write_text("MODEL: {DEVICE: cpu\n")
    files = {name: tmp_path / f"{name}.yaml" for name in ("wrong", "baseless", "broken")}
    code, said = command(*(a.format(yaml=project / "fcos.yaml", **files) for a in arguments))
    assert code == 2 and message in said


def test_interrupt_and_resume(command, project, teacher_weights, tmp_path, wait_for):
    """Ctrl-C says how to go on, and --resume does."""
    teachers = str([{"CONFIG": str(project / "teacher.yaml"), "WEIGHTS": teacher_weights["teacher"]}])
    arguments = ["--config-file", project / "student.yaml", "OUTPUT_DIR", tmp_path, "DISTILL.TEACHERS", teachers]
    line = [sys.executable, SCRIPT, *arguments, "SOLVER.MAX_ITER", 10**6]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    with subprocess.Popen(
        list(map(str, line)), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as running:
        try:
            wait_for(lambda: (tmp_path / "last_checkpoint").exists() or running.poll() is not None)
            running.send_signal(signal.SIGINT)
            _, said = running.communicate()
        finally:
            running.kill()
    assert running.returncode == 130, said
    assert "Traceback" not in said
    assert said.strip().splitlines()[-1] == (
        "train_net.py: interrupted; the same command with --resume goes on from the last checkpoint"
    )

    saved = torch.load(tmp_path / (tmp_path / "last_checkpoint").read_text(), weights_only=True)
    done = saved["iteration"] + 1
    assert done % 3 == 0
    assert command(*arguments, "SOLVER.MAX_ITER", done + 2, "--resume")[0] == 0
    final = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert final["iteration"] == done + 1
    assert any(not torch.equal(final["model"][k], v) for k, v in saved["model"].items())
