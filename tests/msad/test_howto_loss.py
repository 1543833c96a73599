"""docs/HOWTO_add_a_loss.md does what it says: its loss, its yaml and its test are run as they are printed."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.utils.events import EventStorage

from msad.distill.losses import DISTILL_LOSS_REGISTRY

PAGE = (Path(__file__).parents[2] / "docs" / "HOWTO_add_a_loss.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def gram(monkeypatch):
    """The module of the first block, as if it lay in the package; its registration is undone."""
    monkeypatch.setattr(DISTILL_LOSS_REGISTRY, "_obj_map", dict(DISTILL_LOSS_REGISTRY._obj_map))
    name = "msad.distill.losses.gram"
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader=None))
    module.__package__ = "msad.distill.losses"
    exec(compile(blocks("python")[0], name, "exec"), vars(module))
    return module


def test_one_file_under_60_lines():
    assert 20 < len(blocks("python")[0].splitlines()) < 60
    assert len(blocks("python")) == 2 and len(blocks("yaml")) == 1


def test_the_loss_runs_in_a_step(gram, make_distiller, make_batch):
    entries = yaml.safe_load(blocks("yaml")[0])["DISTILL"]["LOSSES"]
    distiller = make_distiller(losses=entries)
    with EventStorage(0):
        losses = distiller(make_batch([(64, 96), (90, 128)]))
    value = losses["loss_distill/Gram"]
    assert value > 0 and distiller.losses[0].levels == ["p3", "p4", "p5"]
    value.backward()
    factors = distiller.losses[0].loss.factors
    assert all(p.item() == pytest.approx(0.9) and p.grad.abs() > 0 for p in factors.values())
    assert isinstance(distiller.losses[0].loss, gram.Gram) and distiller.losses[0].weight == 0.5


def test_the_tests_of_the_page_pass_and_can_fail(gram):
    def run(**names):
        space = dict(names)
        exec(compile(blocks("python")[1], "test_gram", "exec"), space)
        tests = [value for name, value in space.items() if name.startswith("test_")]
        assert len(tests) == 2
        for test in tests:
            test()

    torch.manual_seed(0)
    run(gram_loss=gram.gram_loss)
    with pytest.raises(AssertionError):
        run(gram_loss=lambda s, t: 2 * gram.gram_loss(s, t))


def test_what_the_page_refers_to_exists():
    root = Path(__file__).parents[2]
    for path in ("tools/benchmark_losses.py", "tests/msad/test_loss_properties.py", "docs/LOSSES.md"):
        assert path.removeprefix("docs/") in PAGE and (root / path).is_file()
