"""The detectors that are teachers first of all, in miniature: trained, resumed, evaluated, teaching and taught."""

from __future__ import annotations

import shutil

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from runs import assert_equal_weights
from test_detectors_distributed import DCN, NARROW, SWIN, WITHOUT_C1, images
from test_every_detector import BOX_AND_MASK, losses_of, merged, model_keys, run, write

from msad.data.fingerprint import dataset_fingerprint
from msad.distill.distiller import student_shapes
from msad.engine.setup import evaluate, load_model

INPUT = {"MIN_SIZE_TRAIN": [96], "MAX_SIZE_TRAIN": 96, "MIN_SIZE_TEST": 96, "MAX_SIZE_TEST": 96}  # SAC needs over 64
KINDS = {
    "DetectoRS": merged(model_keys("HTC", 2), WITHOUT_C1, NARROW),
    "DetectoRS_cascade": merged(model_keys("CascadeMask", 2), WITHOUT_C1, NARROW),
    "Swin": merged(model_keys("MaskRCNN", 2), SWIN),
    "DCNv2": merged(model_keys("MaskRCNN", 2), DCN),
}


def alike(project, folder, name, keys):
    cfg = write(project, folder, name, merged(keys, {"INPUT": INPUT}))
    cfg.DATASETS.TEST = ()
    return cfg


@pytest.mark.parametrize("kind", KINDS)
def test_from_training_to_teaching(project, tmp_path, kind):
    whole = run(alike(project, tmp_path, "whole", KINDS[kind]), 3, resume=False)
    cfg = alike(project, tmp_path, "teacher", KINDS[kind])
    killed = tmp_path / "teacher"  # after its second iteration
    killed.mkdir()
    shutil.copy(tmp_path / "whole" / "model_0000001.pth", killed)
    (killed / "last_checkpoint").write_text("model_0000001.pth")
    resumed = run(cfg, 3, resume=True)
    assert resumed.start_iter == 2
    assert_equal_weights(resumed.model.state_dict(), whole.model.state_dict())
    weights = f"{cfg.OUTPUT_DIR}/model_final.pth"
    cfg.DATASETS.TEST = ("tiny_val",)
    assert set(evaluate(cfg, load_model(cfg, weights))) == BOX_AND_MASK

    distill = {
        "TEACHERS": [{"CONFIG": "teacher.yaml", "WEIGHTS": weights}], "INIT_STUDENT": "none", "WARMUP_ITERS": 0,
        "LOSSES": [{"NAME": "AlignedL1"}],
    }  # fmt: skip
    students = {"L": model_keys("MaskRCNN", 1), "H": KINDS[kind]}  # another detector at half the size, and its equal
    for resolution, keys in students.items():
        settings = {**distill, "STUDENT_RESOLUTION": resolution}
        student_cfg = alike(project, tmp_path, f"student_{resolution}", merged(keys, {"DISTILL": settings}))
        trained = run(student_cfg, 2, resume=False)
        assert student_shapes(trained.distiller.student, trained.distiller.resolution) == (
            trained.distiller.teacher.shapes()
        )
        assert any("loss_distill/AlignedL1" in line for line in losses_of(tmp_path / f"student_{resolution}"))


def stuff_maps(project, folder):
    """A map of five kinds for each image of tiny_train; the entry of the data set that has them."""
    folder.mkdir()
    definition = {}
    for record in DatasetCatalog.get("tiny_train"):
        name = record["file_name"].rsplit("/", 1)[-1].rsplit(".", 1)[0]
        rows = np.arange(record["height"]) * 5 // record["height"]
        cv2.imwrite(str(folder / f"{name}.png"), np.repeat(rows[:, None], record["width"], 1).astype(np.uint8))
    data = project / "data"
    definition |= {"NAME": "stuff_train", "JSON": str(data / "annotations_train.json"), "IMAGES": str(data / "images")}
    return {**definition, "STUFF": str(folder)}


def test_htc_learns_from_maps_of_things_and_stuff(project, tmp_path):
    keys = merged(model_keys("HTC", 2), {"MODEL": {"META_ARCHITECTURE": "HTC", "HTC": {"SEMANTIC_ON": True}}})
    keys["MODEL"]["HTC"]["SEMANTIC_CLASSES"] = 5
    first = write(project, tmp_path, "plain", keys)
    entry = stuff_maps(project, tmp_path / "stuff")
    data = {"REGISTER": [*map(dict, first.DATASETS.REGISTER), entry], "TRAIN": ["stuff_train"]}
    cfg = write(project, tmp_path, "htc", merged(keys, {"DATASETS": data}))
    cfg.DATASETS.TEST = ()
    run(cfg, 2, resume=False)
    resumed = run(cfg, 3, resume=True)
    assert resumed.start_iter == 2
    assert all(np.isfinite(line["loss_sem_seg"]) and line["loss_sem_seg"] > 0 for line in losses_of(tmp_path / "htc"))
    grads = [p.grad for p in resumed.model.roi_heads.semantic_head.parameters()]
    assert grads and all(grad is not None and grad.abs().max() > 0 for grad in grads)
    cfg.DATASETS.TEST = ("tiny_val",)  # which has no maps: they are for training
    assert set(evaluate(cfg, load_model(cfg, f"{cfg.OUTPUT_DIR}/model_final.pth"))) == BOX_AND_MASK


def test_missing_maps_are_named(project, tmp_path):
    write(project, tmp_path, "plain", model_keys("HTC", 2))
    entry = stuff_maps(project, tmp_path / "stuff")
    gone = min((tmp_path / "stuff").glob("*.png"))
    cfg = write(project, tmp_path, "htc", merged(model_keys("HTC", 2), {"DATASETS": {"REGISTER": [
        {**entry, "NAME": "incomplete"}], "TRAIN": ["incomplete"], "TEST": []}}))  # fmt: skip
    complete = dataset_fingerprint(cfg)["incomplete"]
    gone.unlink()
    assert {key for key, value in dataset_fingerprint(cfg)["incomplete"].items() if value != complete[key]} == {"stuff"}
    with pytest.raises(FileNotFoundError, match=rf"'incomplete'.*STUFF: 1 of 6 label maps are missing.*{gone.name}"):
        DatasetCatalog.get(cfg.DATASETS.TRAIN[0])


@pytest.mark.parametrize("kind", KINDS)
def test_batches_equal_single_images(project, tmp_path, kind):
    """Of equal size: padding is seen by global means and windows, other images are not."""
    cfg = alike(project, tmp_path, kind, KINDS[kind])
    torch.manual_seed(2)
    model = build_model(cfg).eval()
    pair = [torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8) for _ in range(2)]
    with torch.no_grad():
        together = model([{"image": x} for x in pair])
        for x, found in zip(pair, together):
            (alone,) = model([{"image": x}])
            a, b = found["instances"], alone["instances"]
            assert len(a) == len(b) > 0
            torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, rtol=1e-4, atol=1e-2)
            torch.testing.assert_close(a.scores, b.scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_precision(project, tmp_path, kind):
    """Two images, one of them without objects; gradients stay in float32."""
    torch.manual_seed(2)
    model = build_model(alike(project, tmp_path, kind, KINDS[kind])).train()
    with EventStorage(), torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(images())
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, grad in grads.items() if grad is None] == []
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads.values())
