import json
import os
from pathlib import Path

import pytest
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator

from msad.engine.trainer import DistillTrainer
from msad.evaluation.evaluators import EVALUATOR_REGISTRY, build_evaluator


class Counting(DatasetEvaluator):
    def __init__(self, *args):
        self.args = args


@pytest.fixture
def named():
    """A data set of another type, and its evaluator."""
    EVALUATOR_REGISTRY._do_register("counting", Counting)
    MetadataCatalog.get("counted").evaluator_type = "counting"
    yield "counted"
    del EVALUATOR_REGISTRY._obj_map["counting"]
    MetadataCatalog.remove("counted")


def test_the_type_of_the_data_chooses(named, tiny_cfg, tmp_path):
    cfg = tiny_cfg(OUTPUT_DIR=str(tmp_path))
    found = DistillTrainer.build_evaluator(cfg, named)
    assert isinstance(found, Counting) and found.args == (cfg, named, str(tmp_path / "inference"))
    assert build_evaluator(cfg, named, "elsewhere").args[2] == "elsewhere"


def test_an_unknown_type_is_named(named, tiny_cfg):
    MetadataCatalog.remove(named)
    MetadataCatalog.get(named).evaluator_type = "panoptic"
    with pytest.raises(ValueError, match=r"data set 'counted' has evaluator_type 'panoptic'; there are .*coco"):
        build_evaluator(tiny_cfg(), named, "")


def test_a_set_without_a_type_has_coco_metrics(named, tiny_cfg, monkeypatch):
    seen = {}
    monkeypatch.setattr(COCOEvaluator, "__init__", lambda self, name, **kwargs: seen.update(kwargs, name=name))
    build_evaluator(tiny_cfg(TEST__DETECTIONS_PER_IMAGE=250), "untyped", "folder")
    assert seen["max_dets_per_image"] == 250 and seen["name"] == "untyped" and seen["output_dir"] == "folder"
    MetadataCatalog.remove("untyped")


def test_processes_of_one_job_do_not_read_half_a_file(tmp_path, tiny_cfg, monkeypatch):
    """Each writes Argoverse-HD's annotations: while one has only begun, another must find those of a third whole."""
    content = {"images": [], "categories": [{"id": 0, "name": "cat"}], "sequences": [], "seq_dirs": []}
    (tmp_path / "hd.json").write_text(json.dumps(content))
    MetadataCatalog.get("hd").set(evaluator_type="argoverse_hd", definition={"JSON": str(tmp_path / "hd.json")})
    read = []
    monkeypatch.setattr(COCOEvaluator, "__init__", lambda *args, **kwargs: None)
    build_evaluator(tiny_cfg(), "hd", str(tmp_path))
    replace = os.replace

    def slowly(written, file):
        read.append(json.loads(Path(MetadataCatalog.get("hd").json_file).read_text()))
        replace(written, file)

    monkeypatch.setattr(os, "replace", slowly)
    build_evaluator(tiny_cfg(), "hd", str(tmp_path))
    MetadataCatalog.remove("hd")
    assert read == [content]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["hd.json", "hd_coco.json"]
