"""The parts that all command lines share."""

from __future__ import annotations

import argparse
import ast
import os
import shlex
import sys

import pytest
import torch
from detectron2.engine import default_argument_parser

from msad import cli, load_config
from msad.engine.provenance import command_line


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser("tool")
    parser.add_argument("--sizes", nargs="+", type=int)
    parser.add_argument("--input", nargs="+")
    parser.add_argument("--jobs", type=cli.positive)
    parser.add_argument("--rates", nargs="+", type=cli.positive_float)
    parser.add_argument("--resume", action="store_true")
    return parser


@pytest.mark.parametrize(
    "line",
    [
        "--sizes 4 5 --resume MODEL.DEVICE cpu SEED 3",
        "--resume --sizes 4 5 MODEL.DEVICE cpu SEED 3",  # the option of many values does not take them
        "MODEL.DEVICE cpu --sizes 4 5 SEED 3 --resume",
        "--sizes 4 5 --resume -- MODEL.DEVICE cpu SEED 3",
        "--sizes 4 5 --resume --opts MODEL.DEVICE cpu SEED 3",
    ],
)
def test_overrides_stand_anywhere(parser, line):
    args = cli.parse(parser, line.split())
    assert (args.sizes, args.resume, args.opts) == ([4, 5], True, ["MODEL.DEVICE", "cpu", "SEED", "3"])


@pytest.mark.parametrize("program", [["msad", "train"], ["python", "tools/train net.py"]])
def test_the_command_of_a_report_can_be_pasted(monkeypatch, program):
    args = ["DATASETS.TEST", "('my val',)"]
    monkeypatch.setattr(sys, "argv", [" ".join(program) if program[0] == "msad" else program[1], *args])
    assert shlex.split(command_line()) == [*program, *args]


def test_detectron2s_own_parser_takes_options_after_overrides():
    args = cli.parse(default_argument_parser(), ["--config-file", "a", "SOLVER.BASE_LR", "-1", "--resume"])
    assert args.resume and args.opts == ["SOLVER.BASE_LR", "-1"]


def test_files_that_look_like_keys_are_inputs(parser, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "TEST.PNG").touch()
    args = cli.parse(parser, ["--input", "TEST.PNG", "IMG_0001.JPG", "TEST.AUG.FLIP", "False"])
    assert args.input == ["TEST.PNG", "IMG_0001.JPG"] and args.opts == ["TEST.AUG.FLIP", "False"]
    args = cli.parse(parser, ["--input", "TEST", "SEED", "3"])  # a folder that is still to be written
    assert args.input == ["TEST"] and args.opts == ["SEED", "3"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("SOLVER.MAX_ITER", "SOLVER.MAX_ITER has no value"),
        ("SOLVER.MAX_ITER --resume", "SOLVER.MAX_ITER has no value"),
        ("SOLVER.MAX_ITER MODEL.DEVICE cpu", "SOLVER.MAX_ITER has no value"),
        ("SOLVER.MAX_ITER=3", "SOLVER.MAX_ITER=3: overrides are written KEY VALUE"),
        ("--reusme", "did you mean --resume?"),
        ("model.device cpu", "did you mean MODEL.DEVICE?"),
        ("--sizes 4 -5", "argument --sizes: -5 is negative"),
        ("--jobs 0", "argument --jobs: must be at least 1, got 0"),
        ("--jobs -5", "argument --jobs: must be at least 1, got -5"),
        ("--jobs 1.5", "argument --jobs: must be at least 1, got 1.5"),
        ("--rates 0.5 0", "argument --rates: must be above 0, got 0"),
        ("--rates -2", "argument --rates: must be above 0, got -2"),
        ("--rates nan", "argument --rates: must be above 0, got nan"),
    ],
)
def test_wrong_calls_name_what_is_wrong(parser, capsys, line, said):
    with pytest.raises(SystemExit) as stop:
        cli.parse(parser, line.split())
    assert stop.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]


def test_a_slip_in_the_section_is_an_unknown_key(parser):
    args = cli.parse(parser, ["--input", "a.png", "SOLVR.MAX_ITER", "3"])
    assert args.input == ["a.png"]
    with pytest.raises(KeyError, match=r"SOLVR.MAX_ITER; did you mean SOLVER.MAX_ITER\?"):
        load_config("", args.opts)


@pytest.mark.parametrize("how", ["same", "symlink", "hard link", "other spelling"])
def test_inputs_are_not_overwritten(tmp_path, how):
    source = tmp_path / "a.png"
    source.write_text("photograph")
    target = tmp_path / "b.png"
    if how == "symlink":
        target.symlink_to(source)
    elif how == "hard link":
        os.link(source, target)
    else:
        target = source if how == "same" else tmp_path / "x" / ".." / "a.png"
    with pytest.raises(ValueError, match=r"would overwrite an input: .*a\.png"):
        cli.refuse_overwriting([target], [source])
    cli.refuse_overwriting([tmp_path / "c.png"], [source, "https://host/a.png", ""])


def test_a_folder_is_not_output_and_input(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="would overwrite an input"):
        cli.refuse_overwriting([tmp_path / "link"], [tmp_path])


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyError("no key X"), 2, "tool: error: no key X"),
        (FileNotFoundError(2, "No such file", "a.json"), 2, "tool: error: [Errno 2] No such file: 'a.json'"),
        (KeyboardInterrupt(), 130, "\ntool: interrupted"),
    ],
)
def test_bad_input_is_one_line(capsys, error, status, said):
    def work():
        raise error

    assert cli.run("tool", work) == status
    assert capsys.readouterr().err == said + "\n"
    with pytest.raises(ZeroDivisionError):  # a defect keeps its traceback
        cli.run("tool", lambda: 1 // 0)
    assert cli.run("tool", lambda: None) == 0 and cli.run("tool", lambda: 1) == 1


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"add MODEL\.DEVICE cpu"):
        cli.require_device("cuda:0")
    with pytest.raises(ValueError, match=r"--device is cuda, .* add --device cpu"):
        cli.require_device("cuda", "--device")
    cli.require_device("cpu")


def test_the_command_lists_its_tools_and_runs_them(capsys):
    assert cli.main([]) == 0
    listed = capsys.readouterr().out
    assert "train " in listed and "Train and evaluate" in listed and "plot-features" in listed
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", "--help"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("usage: msad export ")
    assert cli.main(["tain"]) == 2
    assert "no command 'tain'; did you mean train?" in capsys.readouterr().err


def test_every_tool_can_be_called_from_python():
    """msad and tests call ``main(argv)``; without it, what is on the command line counts."""
    for name, file in cli.commands().items():
        (main,) = [n for n in ast.parse(file.read_text()).body if isinstance(n, ast.FunctionDef) and n.name == "main"]
        names = [argument.arg for argument in main.args.args]
        assert names == ["argv"] and len(main.args.defaults) == 1, name
