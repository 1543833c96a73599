"""docs/HOWTO_add_a_loss.md does what it says: its loss, its yaml and its test are run as they are printed."""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from detectron2.utils.events import EventStorage

import msad.distill.losses as package
from msad import load_config
from msad.distill.losses import DISTILL_LOSS_REGISTRY

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "HOWTO_add_a_loss.md").read_text()
NAME = "msad.distill.losses.gram"


def file(number: int) -> tuple[Path, str]:
    """Path, from the root of the repository, and content of the file that a section prints."""
    section = re.search(rf"^## {number}\. .*?(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE)[0]
    return Path(re.search(r"`(.+?)`", section)[1]), re.search(r"```\w+\n(.*?)```", section, flags=re.DOTALL)[1]


@pytest.fixture
def gram(monkeypatch, tmp_path):
    """The module of the first section, found beside the package's own; its registration is undone."""
    path, text = file(1)
    assert (ROOT / path.parent).samefile(Path(package.__file__).parent)
    (tmp_path / path.name).write_text(text)
    monkeypatch.setattr(DISTILL_LOSS_REGISTRY, "_obj_map", dict(DISTILL_LOSS_REGISTRY._obj_map))
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    yield importlib.import_module(NAME)
    del sys.modules[NAME], package.gram


@pytest.fixture
def cfg(tmp_path):
    """The yaml of the second section, loaded where it belongs in a copy of configs/."""
    path, text = file(2)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    assert not (tmp_path / path).exists()
    (tmp_path / path).write_text(text)
    return load_config(tmp_path / path)


def test_one_file_under_60_lines():
    assert 20 < len(file(1)[1].splitlines()) < 60
    assert [file(number)[0].suffix for number in (1, 2, 3)] == [".py", ".yaml", ".py"]


def test_the_yaml_is_complete(cfg):
    """It trains the student that it is based on, under the same teacher, whose own yaml is found."""
    base = load_config(ROOT / "configs/nuclei/student_L.yaml")
    assert load_config(cfg.DISTILL.TEACHERS[0]["CONFIG"]).MODEL.META_ARCHITECTURE == "MultiScaleTeacher"
    assert cfg.MODEL == base.MODEL and cfg.DISTILL.LOSSES != base.DISTILL.LOSSES


def test_the_loss_runs_in_a_step(gram, cfg, make_distiller, make_batch):
    distiller = make_distiller(losses=cfg.DISTILL.LOSSES)
    with EventStorage(0):
        losses = distiller(make_batch([(64, 96), (90, 128)]))
    value = losses["loss_distill/Gram"]
    assert value > 0 and distiller.losses[0].levels == ["p3", "p4", "p5"]
    value.backward()
    factors = distiller.losses[0].loss.factors
    assert all(p.item() == pytest.approx(0.9) and p.grad.abs() > 0 for p in factors.values())
    assert isinstance(distiller.losses[0].loss, gram.Gram) and distiller.losses[0].weight == 0.5


def test_the_tests_of_the_page_pass_and_can_fail(gram, monkeypatch):
    path, text = file(3)
    assert (ROOT / path.parent).samefile(Path(__file__).parent) and path.name.startswith("test_")

    def run():
        space = {"__name__": path.stem}
        exec(compile(text, path.name, "exec"), space)
        tests = [value for name, value in space.items() if name.startswith("test_")]
        assert len(tests) == 2
        for test in tests:
            test()

    torch.manual_seed(0)
    run()
    right = gram.gram_loss
    monkeypatch.setattr(gram, "gram_loss", lambda s, t: 2 * right(s, t))
    with pytest.raises(AssertionError):
        run()


def test_what_the_page_refers_to_exists():
    for path in ("tools/benchmark_losses.py", "tests/msad/test_loss_properties.py", "docs/LOSSES.md"):
        assert path.removeprefix("docs/") in PAGE and (ROOT / path).is_file()
