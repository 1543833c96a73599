"""tools/benchmark.py from the command line to its JSON."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from load_tool import load_tool

from msad.engine.setup import engine_name

SCRIPT = Path(__file__).parents[2] / "tools" / "benchmark.py"

DETECTOR = """
MODEL:
  META_ARCHITECTURE: FCOS
  WEIGHTS: this/file/does/not/exist.pkl
  BACKBONE: {NAME: build_level_fpn_backbone}
  FPN:
    BOTTOM_UP: build_tiny_resnet_backbone
    IN_FEATURES: [res2, res3, res4, res5]
    OUT_CHANNELS: 16
    LEVELS: [p3, p4, p5, p6, p7]
  RESNETS: {OUT_FEATURES: [res2, res3, res4, res5], STEM_OUT_CHANNELS: 8, RES2_OUT_CHANNELS: 8, NORM: BN}
  FCOS: {CONV_DIMS: [16], NORM: "", NUM_CLASSES: 3}
VERSION: 2
"""
STUDENT = """
_BASE_: detector.yaml
MODEL:
  FPN: {LEVELS: [p2, p3, p4, p5, p6]}
  FCOS: {IN_FEATURES: [p2, p3, p4, p5, p6]}
DISTILL:
  LOSSES: [{NAME: AlignedL1, WEIGHT: 0.6}]
"""
TEACHER = "_BASE_: detector.yaml\nMODEL: {META_ARCHITECTURE: MultiScaleTeacher}\n"
QUICK = ["--size", "100", "150", "--repeats", "1", "--warmup", "0", "--threads", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def benchmark():
    module = load_tool("benchmark")
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


@pytest.fixture
def configs(tmp_path):
    for name, text in (("detector", DETECTOR), ("student", STUDENT), ("teacher", TEACHER)):
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def test_models_and_training_step(benchmark, configs, capsys, monkeypatch):
    output = configs / "out.json"
    measured = []

    def fake_memory(cfg, *size, threads):  # the real one, a process a model, runs in test_cost.py
        measured.append((cfg.MODEL.META_ARCHITECTURE, cfg.MSAD.EVAL_BRANCH, size, threads))
        return len(measured) * 2**20

    monkeypatch.setattr(benchmark, "peak_memory", fake_memory)
    argv = [
        *("--config-file", f"{configs}/detector.yaml"),
        *("--config-file", f"{configs}/student.yaml@L"),
        *("--config-file", f"{configs}/teacher.yaml@L"),
        *("--train-step", f"{configs}/student.yaml", f"{configs}/teacher.yaml"),
        *QUICK,
        *("--output", str(output), "MODEL.FCOS.NUM_CLASSES", "5"),
    ]  # fmt: skip
    assert benchmark.main(argv) == 0
    result = json.loads(output.read_text())
    assert result["engine"] == engine_name()
    assert result["torch"] == torch.__version__
    assert (result["device"], result["threads"], result["size"]) == ("cpu", 1, [100, 150])
    assert result["command"].startswith("tools/benchmark.py --config-file ")

    detector, student, teacher = result["models"]
    assert [row["name"] for row in result["models"]] == ["detector@H", "student@L", "teacher@L"]
    assert [row["input"] for row in result["models"]] == [[100, 150], [50, 75], [100, 150]]
    for row in result["models"]:
        for key in ("parameters", "gmacs", "milliseconds"):
            assert list(row[key]) == [*benchmark.cost.PARTS, "total"]
            assert row[key]["head"] > 0
        assert row["gmacs_ratio"] == pytest.approx(row["gmacs"]["total"] / detector["gmacs"]["total"])
        latencies = row["milliseconds"]["total"], detector["milliseconds"]["total"]
        assert row["milliseconds_ratio"] == pytest.approx(latencies[0] / latencies[1])
    assert [row["peak_memory_bytes"] for row in result["models"]] == [2**20, 2 * 2**20, 3 * 2**20]
    assert measured == [
        ("FCOS", "fused", (100, 150), 1),
        ("FCOS", "fused", (50, 75), 1),
        ("MultiScaleTeacher", "L", (100, 150), 1),
    ]
    # The override reaches all: one 3x3 convolution of 16 channels to 5 classes, 4 distances and 1 centerness.
    assert detector["parameters"]["head"] == 2 * (16 * 16 * 9 + 16) + 16 * 9 * 10 + 10
    # The L branch of the teacher is a student with the teacher's padding: same grid here.
    assert teacher["gmacs"] == student["gmacs"]

    step = result["train_step"]
    assert (step["resolution"], step["batch_size"]) == ("L", 2)
    assert sorted(step["milliseconds"]) == sorted(benchmark.cost.STEPS)
    assert min(step["milliseconds"].values()) > 0 and step["ratio"] > 0

    printed = capsys.readouterr().out
    assert engine_name() in printed
    for word in ("student@L", "params (M)", "bottom-up", "peak MiB", "distillation step", f"{step['ratio']:.3f}"):
        assert word in printed


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--config-file", "{}/absent.yaml"], ["absent.yaml"]),
        (["--config-file", "{}/detector.yaml@XL"], ["detector.yaml@XL", "H, L, EL"]),
        (["--config-file", "{}/teacher.yaml@EL"], ["teacher.yaml", "EL", "fused"]),
        (["--config-file", "{}/student.yaml", "MODEL.FCOS.NUM_CLASES", "5"], ["NUM_CLASES", "NUM_CLASSES"]),
        (["--config-file", "{}/broken.yaml"], ["broken.yaml"]),
        (["--train-step", "{}/detector.yaml", "{}/teacher.yaml"], ["DISTILL.LOSSES"]),
    ],
)
def test_bad_configs_get_one_sentence(benchmark, configs, capsys, argv, words):
    (configs / "broken.yaml").write_text("MODEL: {FPN: [")
    opts = argv[2:] if argv[0] == "--config-file" else []
    argv = [a.format(configs) for a in argv if a not in opts] + QUICK + opts
    assert benchmark.main(argv) == 2
    message = capsys.readouterr().err.split("error: ")[1]
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "argv, word",
    [
        ([], "--config-file"),
        (["--config-file", "a.yaml", "--repeats", "0"], "--repeats"),
        (["--config-file", "a.yaml", "--size", "0", "5"], "--size"),
        (["--config-file", "a.yaml", "--output", "no/such/folder/x.json"], "no/such/folder"),
    ],
)
def test_bad_arguments(benchmark, capsys, argv, word):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(argv)
    assert stop.value.code == 2
    assert word in capsys.readouterr().err.splitlines()[-1]


def test_help_shows_examples(benchmark, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "examples" in text and "--train-step configs/quickstart/student_L.yaml" in text


def test_file_with_an_at_sign(benchmark, tmp_path):
    path = tmp_path / "a@L"
    assert benchmark.split_resolution(str(path)) == (str(tmp_path / "a"), "L")
    path.write_text("")
    assert benchmark.split_resolution(str(path)) == (str(path), "")
    assert benchmark.split_resolution(f"{path}@EL") == (str(path), "EL")


def test_interrupt_ends_cleanly_while_another_process_measures_memory(configs):
    output = configs / "out.json"
    argv = ["--config-file", str(configs / "detector.yaml"), *QUICK, "--output", str(output)]
    terminal, end = pty.openpty()  # progress is shown on terminals only, and as wide as they are
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([sys.executable, str(SCRIPT), *argv], stderr=end, stdout=subprocess.DEVNULL,
                               env=environment)  # fmt: skip
    os.close(end)
    seen = rest = ""
    try:
        while "memory" not in seen:
            seen += read_terminal(terminal) or pytest.fail(f"ended early: {seen}")
        process.send_signal(signal.SIGINT)
        while more := read_terminal(terminal):
            rest += more
        process.wait()
    finally:
        process.kill()
        os.close(terminal)
    assert process.returncode == 130
    assert "interrupted" in rest and "Traceback" not in seen + rest
    assert not output.exists()


def read_terminal(terminal: int) -> str:
    """What a program has written; "" where it has ended, of which Linux makes an error."""
    try:
        return os.read(terminal, 1000).decode(errors="replace")
    except OSError:
        return ""
