"""TEST.LOSS_IMAGES: the detection losses alone, as a metric of every evaluation."""

from __future__ import annotations

import json

import pytest
import torch
from detectron2.data import DatasetCatalog
from runs import config

from msad.data.checks import check_test_sets
from msad.engine import DistillTrainer
from msad.evaluation.detection_loss import DetectionLoss, fixed_batches
from msad.experiments.rows import AP
from msad.modeling.ignored_regions import IgnoredRegions


def test_the_validation_loss_of_a_student_is_its_detection_loss_alone(project, teacher_weights, tmp_path):
    options = {"TEST.LOSS_IMAGES": 2, "SOLVER.MAX_ITER": 2, "DISTILL.LOSSES": [{"NAME": "AlignedL1", "WEIGHT": 1e4}]}
    cfg = config(project, teacher_weights, "student", tmp_path, **options, **{"DISTILL.WARMUP_ITERS": 0})
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(False)
    trainer.train()
    results = trainer._last_eval_results
    expected = DetectionLoss(fixed_batches(cfg, "tiny_val", 2, 4))(trainer.distiller.student)
    assert results["validation"] == {"L_detect": pytest.approx(expected, rel=1e-6)} and 0 < expected < 100
    assert AP.split("/")[0] in results
    records = list(map(json.loads, (tmp_path / "metrics.json").read_text().splitlines()))
    assert records[-1]["validation/L_detect"] == results["validation"]["L_detect"]
    assert max(record.get("total_loss", 0) for record in records) > 100, "the distillation loss is large here"


def test_each_test_set_has_its_own(project, teacher_weights, tmp_path):
    options = {"TEST.LOSS_IMAGES": 1, "DATASETS.TEST": ["tiny_val", "tiny_train"]}
    cfg = config(project, teacher_weights, "fcos", tmp_path, **options)
    model = DistillTrainer.build_model(cfg)
    results = DistillTrainer.test(cfg, model)
    losses = [results[name]["validation"]["L_detect"] for name in ("tiny_val", "tiny_train")]
    assert losses == [DetectionLoss(fixed_batches(cfg, name, 1, 4))(model) for name in ("tiny_val", "tiny_train")]
    cfg.TEST.LOSS_IMAGES = 0
    assert "validation" not in DistillTrainer.test(cfg, model)["tiny_val"]


@pytest.mark.parametrize("arch", ["FCOS", "FasterRCNN"])
def test_ignored_regions_are_left_out_whether_the_model_was_trained_so_or_not(tiny_model, make_batch, arch):
    """A loaded checkpoint has no hooks, and the model in training has them: both are the same model."""
    batch = make_batch([(64, 96), (64, 64)])
    plain, hooked = tiny_model(arch, levels=range(2, 7)), tiny_model(arch, levels=range(2, 7))
    IgnoredRegions(hooked)
    whole = DetectionLoss([batch])(plain)
    for item in batch:
        item["ignored_regions"] = torch.tensor([[0.0, 0.0, 0.7, 1.0]])
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in plain.modules()]
    value = DetectionLoss([batch])(plain)
    assert value == DetectionLoss([batch])(hooked) != whole
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in plain.modules()]


def test_a_test_set_without_labels_has_no_losses(project, teacher_weights, tmp_path):
    cfg = config(project, teacher_weights, "fcos", tmp_path)
    records = [{k: v for k, v in r.items() if k != "annotations"} for r in DatasetCatalog.get("tiny_val")]
    DatasetCatalog.register("unlabelled", lambda: records)
    try:
        cfg.DATASETS.TEST = ("unlabelled",)
        check_test_sets(cfg)
        cfg.TEST.LOSS_IMAGES = 1
        with pytest.raises(ValueError, match=r"'unlabelled'.*has no annotations.*Fix: set TEST\.LOSS_IMAGES 0"):
            check_test_sets(cfg)
    finally:
        DatasetCatalog.remove("unlabelled")
