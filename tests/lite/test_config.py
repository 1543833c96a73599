"""Config nodes, yaml files and @configurable. Passes on detectron2 and on detectron2-lite."""

import json
import logging
import os

import detectron2
import pytest
from detectron2.config import CfgNode, configurable, get_cfg, global_cfg, set_global_cfg


@pytest.fixture
def yaml_file(tmp_path):
    def write(text, name="config.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def test_get_cfg_returns_independent_copies():
    first, second = get_cfg(), get_cfg()
    first.SOLVER.BASE_LR = 3.0
    first.MODEL.ANCHOR_GENERATOR.SIZES[0].append(1)
    assert second.SOLVER.BASE_LR == 0.001
    assert second.MODEL.ANCHOR_GENERATOR.SIZES == [[32, 64, 128, 256, 512]]
    assert isinstance(first.MODEL.RPN, CfgNode)


def test_file_overrides_its_base_which_overrides_defaults(yaml_file):
    yaml_file("VERSION: 2\nMODEL: {WEIGHTS: base, RESNETS: {DEPTH: 101}}\n", "base.yaml")
    cfg = get_cfg()
    cfg.merge_from_file(yaml_file('_BASE_: base.yaml\nMODEL: {WEIGHTS: leaf}\nSOLVER: {STEPS: "(10, 20)"}\n'))
    assert cfg.MODEL.WEIGHTS == "leaf"
    assert cfg.MODEL.RESNETS.DEPTH == 101
    assert cfg.SOLVER.STEPS == (10, 20)
    assert cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"


def test_list_of_bases_last_wins(yaml_file):
    yaml_file("VERSION: 2\nMODEL: {WEIGHTS: one, DEVICE: cpu}\n", "one.yaml")
    yaml_file("MODEL: {WEIGHTS: two}\n", "two.yaml")
    cfg = get_cfg()
    cfg.merge_from_file(yaml_file("_BASE_: [one.yaml, two.yaml]\n"))
    assert (cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE) == ("two", "cpu")


def test_dump_can_be_merged_again(yaml_file):
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.MAX_ITER", "7", "DATASETS.TRAIN", "('a', 'b')"])
    again = get_cfg()
    again.merge_from_file(yaml_file(cfg.dump()))
    assert json.dumps(again, sort_keys=True) == json.dumps(cfg, sort_keys=True)
    assert again.DATASETS.TRAIN == ("a", "b")


def test_unknown_key_is_named(yaml_file):
    with pytest.raises(KeyError, match=r"SOLVER\.STEPZ"):
        get_cfg().merge_from_file(yaml_file("VERSION: 2\nSOLVER: {STEPZ: 3}\n"))
    with pytest.raises(AssertionError, match=r"SOLVER\.STEPZ"):
        get_cfg().merge_from_list(["SOLVER.STEPZ", "3"])


def test_wrong_type_is_named(yaml_file):
    with pytest.raises(ValueError, match=r"SOLVER\.BASE_LR"):
        get_cfg().merge_from_file(yaml_file("VERSION: 2\nSOLVER: {BASE_LR: fast}\n"))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(AssertionError, match=r"nowhere\.yaml"):
        get_cfg().merge_from_file(str(tmp_path / "nowhere.yaml"))


def test_newer_version_is_refused(yaml_file):
    with pytest.raises(AssertionError, match="3"):
        get_cfg().merge_from_file(yaml_file("VERSION: 3\nMODEL: {WEIGHTS: x}\n"))


def test_file_without_version_is_read_with_a_warning(yaml_file, monkeypatch):
    records, handler = [], logging.Handler()
    handler.emit = records.append
    monkeypatch.setattr(logging.getLogger("detectron2"), "handlers", [handler])  # whatever other tests have set up
    cfg = get_cfg()
    cfg.merge_from_file(yaml_file("MODEL: {WEIGHTS: x}\n"))
    assert cfg.MODEL.WEIGHTS == "x"
    assert [record.levelname for record in records] == ["WARNING"]
    assert "VERSION" in records[0].getMessage()


def test_python_tags_need_allow_unsafe(yaml_file):
    path = yaml_file("VERSION: 2\nMODEL: {WEIGHTS: !!python/object/apply:os.getcwd []}\n")
    cfg = get_cfg()
    cfg.merge_from_file(path)
    assert os.getcwd() == cfg.MODEL.WEIGHTS
    with pytest.raises(Exception, match="python/object"):
        get_cfg().merge_from_file(path, allow_unsafe=False)


@pytest.mark.skipif("lite" not in detectron2.__version__, reason="detectron2 fails with an AttributeError")
def test_node_of_ones_own_needs_no_version(yaml_file):
    node = CfgNode({"A": {"B": 1}})
    node.merge_from_file(yaml_file("A: {B: 2}\n"))
    assert node.A.B == 2


def test_global_cfg_changes_in_place():
    before = dict(global_cfg)
    cfg = get_cfg()
    cfg.OUTPUT_DIR = "somewhere"
    set_global_cfg(cfg)
    assert global_cfg.OUTPUT_DIR == "somewhere"
    set_global_cfg(CfgNode(before))
    assert dict(global_cfg) == before


class Layer:
    @configurable
    def __init__(self, width, depth=2, *, bias=True):
        self.made_of = (width, depth, bias)

    @classmethod
    def from_config(cls, cfg, depth=5):
        return {"width": cfg.SOLVER.MAX_ITER, "depth": depth}


@pytest.mark.parametrize(
    "args, kwargs, made_of",
    [
        ((1,), {}, (1, 2, True)),
        ((1,), {"depth": 3, "bias": False}, (1, 3, False)),
        (("cfg",), {}, (40000, 5, True)),
        ((), {"cfg": "cfg"}, (40000, 5, True)),
        (("cfg",), {"depth": 9}, (40000, 9, True)),
        (("cfg",), {"width": 1, "bias": False}, (1, 5, False)),
    ],
)
def test_configurable_class(args, kwargs, made_of):
    cfg = get_cfg()
    args = [cfg if value == "cfg" else value for value in args]
    kwargs = {key: cfg if value == "cfg" else value for key, value in kwargs.items()}
    assert Layer(*args, **kwargs).made_of == made_of


def test_configurable_subclass_extends_the_arguments():
    class Named(Layer):
        @configurable
        def __init__(self, name, **kwargs):
            super().__init__(**kwargs)
            self.name = name

        @classmethod
        def from_config(cls, cfg, **kwargs):
            return {"name": cfg.MODEL.DEVICE, **super().from_config(cfg, **kwargs)}

    layer = Named(get_cfg(), depth=1)
    assert (layer.name, layer.made_of) == ("cuda", (40000, 1, True))


def test_configurable_function():
    @configurable(from_config=lambda cfg: {"width": cfg.SOLVER.MAX_ITER})
    def build(width, depth=2):
        """Docs."""
        return width, depth

    assert build(1) == (1, 2)
    assert build(get_cfg(), depth=3) == (40000, 3)
    assert build(cfg=get_cfg()) == (40000, 2)
    assert build.__doc__ == "Docs."
    assert build.from_config(get_cfg()) == {"width": 40000}


def test_configurable_explains_wrong_use():
    class Without:
        @configurable
        def __init__(self, a): ...

    class NotAClassMethod:
        @configurable
        def __init__(self, a): ...

        def from_config(self, cfg): ...

    class OtherName:
        @configurable
        def __init__(self, a): ...

        @classmethod
        def from_config(cls, config): ...

    with pytest.raises(AttributeError, match="from_config"):
        Without(get_cfg())
    with pytest.raises(TypeError, match="classmethod"):
        NotAClassMethod(get_cfg())
    with pytest.raises(TypeError, match="cfg"):
        OtherName(get_cfg())
    with pytest.raises((TypeError, AssertionError), match="configurable"):
        configurable(lambda x: x)
    with pytest.raises((TypeError, AssertionError), match="from_config"):
        configurable(from_config=3)(lambda x: x)
