"""VisDrone's text format, patches, ignored regions in training, and the result files."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.events import EventStorage
from torch.utils._python_dispatch import TorchDispatchMode

from msad import load_config
from msad.data.checks import load_train_dicts
from msad.data.regions import RegionMapper
from msad.data.register import register_datasets
from msad.data.visdrone import CLASSES, load_visdrone, read_rows
from msad.engine import DistillTrainer
from msad.evaluation.visdrone_evaluator import VisDroneEvaluator
from msad.modeling.detectors.dense import SURELY_BACKGROUND
from msad.modeling.ignored_regions import IgnoredRegions

LINES = """10,20,30,40,1,4,0,0
1,2,3,4,1,1,1,2,
50,10,0,12,1,4,0,0

60,5,20,10,0,0,0,0,
5,60,8,8,0,9,0,0
70,60,9,9,1,11,0,0
52,40,20,15,1,10,0,1
"""


@pytest.fixture
def folder(tmp_path):
    for name in ("images", "annotations"):
        (tmp_path / name).mkdir()
    image = np.arange(80 * 100 * 3, dtype=np.uint32).reshape(80, 100, 3).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "images" / "a.png"), image)
    (tmp_path / "annotations" / "a.txt").write_text(LINES)
    return tmp_path


def boxes_of(record):
    return [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYWH_ABS) for a in record["annotations"]]


def test_rows_with_trailing_commas_and_blank_lines(folder):
    rows = read_rows(folder / "annotations" / "a.txt")
    assert rows.shape == (7, 8) and rows[1].tolist() == [1, 2, 3, 4, 1, 1, 1, 2] and rows[3, 5] == 0
    (folder / "annotations" / "empty.txt").write_text("\n")
    assert read_rows(folder / "annotations" / "empty.txt").shape == (0, 8)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("1,2,3,4,1,4,0", "line 2: an object has 8 numbers"),
        ("1,2,3,4,1,4,0,0,7", "line 2: an object has 8 numbers"),
        ("1,2,x,4,1,4,0,0", "line 2: an object has 8 numbers"),
        ("1,2,nan,4,1,4,0,0", "line 2: an object has 8 numbers"),
        ("1,2,3,4,1,12,0,0", "line 2: category 12 is none of 0 to 11"),
    ],
)
def test_malformed_lines_are_named(tmp_path, line, words):
    (tmp_path / "a.txt").write_text(f"1,2,3,4,1,4,0,0\n{line}\n")
    with pytest.raises(ValueError, match=words) as caught:
        read_rows(tmp_path / "a.txt")
    assert "a.txt" in str(caught.value)


def test_two_images_of_one_name_are_named(folder):
    """Image ids and result files go by the name."""
    cv2.imwrite(str(folder / "images" / "a.jpg"), np.zeros((80, 100, 3), np.uint8))
    with pytest.raises(ValueError, match=r"images/a\.jpg and .*images/a\.png have one name"):
        load_visdrone(folder / "images", folder / "annotations")


def test_objects_and_regions_of_whole_images(folder):
    (record,) = load_visdrone(folder / "images", folder / "annotations")
    assert (record["height"], record["width"], record["image_id"]) == (80, 100, "a")
    # Degenerate boxes and "others" are dropped; category 0 and score 0 are regions.
    assert boxes_of(record) == [[10, 20, 30, 40], [1, 2, 3, 4], [52, 40, 20, 15]]
    assert [a["category_id"] for a in record["annotations"]] == [3, 0, 9] and len(CLASSES) == 10
    assert record["ignored_regions"] == [[60, 5, 80, 15], [5, 60, 13, 68]]
    (unlabelled,) = load_visdrone(folder / "images")
    assert "annotations" not in unlabelled and "annotation_file" not in unlabelled


def test_patches(folder):
    (folder / "annotations" / "a.txt").write_text(
        # corner in the first patch and far into the others; corner on the border; region across all patches
        "10,20,60,50,1,4,0,0\n50,40,10,10,1,1,0,0\n49,39,2,2,1,2,0,0\n40,30,20,20,0,0,0,0\n"
    )
    patches = load_visdrone(folder / "images", folder / "annotations", patches=True)
    assert [p["crop"] for p in patches] == [[0, 0, 50, 40], [50, 0, 100, 40], [0, 40, 50, 80], [50, 40, 100, 80]]
    assert [p["image_id"] for p in patches] == ["a_0", "a_1", "a_2", "a_3"]
    assert [boxes_of(p) for p in patches] == [[[10, 20, 40, 20], [49, 39, 1, 1]], [], [], [[50, 40, 10, 10]]]
    assert [p["ignored_regions"] for p in patches] == [
        [[40, 30, 50, 40]], [[50, 30, 60, 40]], [[40, 40, 50, 50]], [[50, 40, 60, 50]]
    ]  # fmt: skip


def test_missing_files_are_named(folder):
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*nowhere"):
        load_visdrone(folder / "nowhere")
    with pytest.raises(ValueError, match="no images"):
        load_visdrone(folder / "annotations")
    (folder / "annotations" / "b.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"the first is b\.txt"):
        load_visdrone(folder / "images", folder / "annotations")
    (folder / "annotations" / "b.txt").unlink()
    (folder / "annotations" / "a.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"image a\.png has no annotations"):
        load_visdrone(folder / "images", folder / "annotations")


def mapper_of(*augmentations):
    return RegionMapper(DatasetMapper(is_train=True, augmentations=list(augmentations), image_format="BGR"))


def test_the_mapper_cuts_patches_and_carries_regions(folder):
    patches = load_visdrone(folder / "images", folder / "annotations", patches=True)
    assert RegionMapper.is_needed(patches)
    sample = mapper_of()(patches[1])
    whole = cv2.imread(str(folder / "images" / "a.png"))
    assert torch.equal(sample["image"], torch.from_numpy(whole[:40, 50:].transpose(2, 0, 1).copy()))
    assert len(sample["instances"]) == 0  # only a region
    assert torch.allclose(sample["ignored_regions"], torch.tensor([[10 / 50, 5 / 40, 30 / 50, 15 / 40]]))
    # Flipped and twice as large: objects in pixels of the result, regions relative to it.
    sample = mapper_of(T.HFlipTransform(50), T.ResizeTransform(40, 50, 80, 100))(patches[1])
    assert sample["image"].shape == (3, 80, 100)
    assert torch.allclose(sample["ignored_regions"], torch.tensor([[20 / 50, 5 / 40, 40 / 50, 15 / 40]]))
    sample = mapper_of(T.ResizeTransform(40, 50, 80, 100))(patches[3])
    assert sample["instances"].gt_boxes.tensor.tolist() == [[4.0, 0.0, 44.0, 30.0]]
    assert sample["instances"].gt_classes.tolist() == [9] and len(sample["ignored_regions"]) == 0
    assert "crop" in patches[1] and len(patches[1]["annotations"]) == 0  # the dict itself is as it was


def test_the_mapper_leaves_other_dicts_alone(folder):
    (record,) = load_visdrone(folder / "images", folder / "annotations")
    del record["ignored_regions"]
    assert not RegionMapper.is_needed([record])
    mine, plain = mapper_of()(record), mapper_of().mapper(record)
    assert mine.keys() == plain.keys() and torch.equal(mine["image"], plain["image"])
    assert torch.equal(mine["instances"].gt_boxes.tensor, plain["instances"].gt_boxes.tensor)


def test_other_mappers_are_refused():
    with pytest.raises(ValueError, match="need a DatasetMapper, got function"):
        RegionMapper(lambda record: record)


# --- training without the regions ------------------------------------------------------------------------------------


def class_scores(detector):
    """The raw class scores of the next passes of the dense head or RPN, before what later hooks make of them."""
    head = detector.proposal_generator.rpn_head if hasattr(detector, "proposal_generator") else detector.head
    taken = []

    def keep(_module, _args, output):
        for scores in output[0]:
            scores.retain_grad()
            taken.append(scores)

    head.register_forward_hook(keep)
    return taken


@pytest.mark.parametrize("arch", ["FCOS", "RetinaNet", "GFL", "RepPoints", "FasterRCNN", "CascadeRCNN", "HTC"])
def test_no_gradient_from_inside_a_region(tiny_model, make_batch, arch):
    model = tiny_model(arch, levels=range(2, 7), MODEL__ANCHOR_GENERATOR__ASPECT_RATIOS=[[0.5, 2.0]]).train()
    taken = class_scores(model)
    IgnoredRegions(model)
    masked = class_scores(model)
    first, second = make_batch([(64, 96), (64, 96)], boxes=1)
    # Of stride 4, a point is 0.8 strides away: at 0, or, where it is in the middle of its cell, at 30.
    first["instances"].gt_boxes.tensor[:] = torch.tensor([[3.2, 3.2, 26.8, 26.8]])
    first["ignored_regions"] = torch.tensor([[0.5, 0.0, 1.0, 1.0], [0.0, 0.0, 0.5, 31 / 64]])
    seen = []
    if hasattr(model, "roi_heads"):
        sample = model.roi_heads.label_and_sample_proposals
        model.roi_heads.label_and_sample_proposals = lambda p, t: seen.extend(p) or sample(p, t)
    with EventStorage():
        losses = model([first, second])
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values())
    grad = taken[0].grad  # p2, stride 4: (2, A, 16, 24)
    inside = torch.zeros(16, 24, dtype=torch.bool)
    inside[:, 12:] = inside[:8, :12] = True
    generator = getattr(model, "proposal_generator", model).anchor_generator
    anchors = next(iter(generator.cell_anchors)).tolist()
    for row in range(16):  # what a stride or an anchor may bring to the object stays
        for column in range(24):
            far = [(3.2 - at, at - 26.8) for at in ((column + generator.offset) * 4, (row + generator.offset) * 4)]
            reach = [max(4, *((a[k + 2] - a[k]) / 2 for a in anchors)) for k in (0, 1)]
            if all(max(sides) <= longest for sides, longest in zip(far, reach)):
                inside[row, column] = False
    assert inside.any() and not inside[:7, :7].any()
    assert torch.equal((masked[0][0] == SURELY_BACKGROUND).all(dim=0), inside)
    assert (grad[0][:, inside] == 0).all()
    assert (grad[0][:, ~inside] != 0).any() and (grad[1][:, inside] != 0).any()
    if seen:  # proposals that the second stage may sample
        centres = seen[0].proposal_boxes.get_centers()
        object_ = (centres >= 3.2).all(dim=1) & (centres <= 26.8).all(dim=1)
        assert ((centres[:, 0] < 48) & (centres[:, 1] > 31) | object_).all()
        assert len(seen[1]) > 0 and (seen[1].proposal_boxes.get_centers()[:, 0] > 48).any()


@pytest.mark.parametrize(("arch", "first"), [("FCOS", 12), ("RetinaNet", 13), ("RepPoints", 13), ("FasterRCNN", 13)])
def test_a_location_is_where_its_anchors_are(tiny_model, make_batch, arch, first):
    """In a region from x = 49: of stride 4, the 12th point is at 48, or, where it is in the middle of its cell, 50."""
    model = tiny_model(arch, levels=range(2, 7)).train()
    taken = class_scores(model)
    IgnoredRegions(model)
    (item,) = make_batch([(64, 96)], boxes=0)
    item["ignored_regions"] = torch.tensor([[49 / 96, 0.0, 1.0, 1.0]])
    with EventStorage():
        sum(model([item]).values()).backward()
    grad = taken[0].grad[0]
    assert (grad[..., :first] != 0).all() and (grad[..., first:] == 0).all()


OF_CLASSES = {"FCOS": "loss_fcos_cls", "RetinaNet": "loss_cls", "GFL": "loss_gfl_qfl", "RepPoints": "loss_cls",
              "FasterRCNN": "loss_rpn_cls"}  # fmt: skip


@pytest.mark.parametrize("arch", OF_CLASSES)
@pytest.mark.parametrize("side", [4, 6, 8])
def test_a_region_beside_a_small_object_leaves_its_positives(tiny_model, make_batch, arch, side):
    """The best anchors of an object far smaller than they are have points in the region, and stay positive."""
    (item,) = make_batch([(128, 128)], boxes=1)
    item["instances"].gt_boxes.tensor[:] = torch.tensor([60.0, 60.0, 60.0 + side, 60.0 + side])
    nothing, beside = [0.0, 0.0, 0.0, 0.0], [(61.0 + side) / 128, 0.0, 1.0, 1.0]
    losses = []
    for region in (nothing, beside):
        item["ignored_regions"] = torch.tensor([region])
        sizes = [[8 * 2**level] for level in range(2, 7)]  # 32 px at P2: up to 16 px from their points to an object
        model = tiny_model(arch, levels=range(2, 7), MODEL__ANCHOR_GENERATOR__SIZES=sizes).train()
        IgnoredRegions(model)
        torch.manual_seed(0)  # of the RPN's sample
        with EventStorage(), torch.no_grad():
            values = model([item])
        losses.append(values[OF_CLASSES[arch]].item())
    assert 0 < losses[1] < losses[0]


def test_reppoints_that_reach_out_of_a_region_are_left_out(tiny_model, make_batch):
    """A location in a region is positive where its first stage's box, 4 strides to the left, overlaps an object."""
    (item,) = make_batch([(256, 256)], boxes=1)
    item["instances"].gt_boxes.tensor[:] = torch.tensor([40.0, 40.0, 96.0, 96.0])
    model = tiny_model("RepPoints", levels=range(3, 8)).train()
    head = model.head
    grid = head.grid.flatten().view(-1, 2)
    torch.nn.init.zeros_(head.pts_init_out.weight)
    head.pts_init_out.bias.data = torch.stack([2 * grid[:, 0], 2 * grid[:, 1] - 3.5], dim=1).flatten()
    IgnoredRegions(model)
    losses = []
    for region in ([0.0, 0.0, 0.0, 0.0], [100 / 256, 0.0, 1.0, 1.0]):
        item["ignored_regions"] = torch.tensor([region])
        with EventStorage(), torch.no_grad():
            losses.append(model([item])["loss_cls"].item())
    assert 0 < losses[1] < 5 * losses[0]  # a positive without a score would have a loss of 25


class Copies(TorchDispatchMode):
    """Number of tensors that were moved to another device, or made of numbers on it."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("arch", ["FCOS", "FasterRCNN"])
def test_nothing_is_copied_to_the_device_inside_of_the_head(tiny_model, make_batch, arch):
    """Regions and boxes are moved once, with the batch; "meta" stands for an accelerator."""
    model = tiny_model(arch, levels=range(2, 7)).train().to("meta")
    IgnoredRegions(model)
    batch = make_batch([(64, 96), (64, 96)])
    for item in batch:
        item["ignored_regions"] = torch.tensor([[0.5, 0.0, 1.0, 1.0]])
    (take,) = model._forward_pre_hooks.values()
    head = model.proposal_generator.rpn_head if hasattr(model, "proposal_generator") else model.head
    (width,) = {shape.channels for shape in model.backbone.output_shape().values()}
    features = [torch.zeros(2, width, 16 >> level, 24 >> level, device="meta") for level in range(5)]
    with Copies() as copies:
        take(model, (batch,))
        assert copies.count == 4  # regions and boxes of each image
        head(features)
    assert copies.count == 4


def test_hooks_change_nothing_without_regions_or_in_evaluation(tiny_model, make_batch, same_detections):
    plain, hooked = tiny_model("FasterRCNN").train(), tiny_model("FasterRCNN").train()
    IgnoredRegions(hooked)
    batch = make_batch([(64, 96)])
    results = []
    for model in (plain, hooked):
        torch.manual_seed(0)
        with EventStorage():
            results.append(model(batch))
    assert results[0] == results[1]
    batch[0]["ignored_regions"] = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    with torch.no_grad():
        same_detections(plain.eval()(batch), hooked.eval()(batch))
    assert plain.state_dict().keys() == hooked.state_dict().keys()


def test_every_branch_of_a_teacher_leaves_the_regions_out(tiny_model, make_batch):
    model = tiny_model(resolutions=["H", "L"]).train()
    taken = class_scores(model.detector)
    IgnoredRegions(model)
    (item,) = make_batch([(128, 128)], boxes=0)
    item["ignored_regions"] = torch.tensor([[0.0, 0.0, 0.5, 1.0]])
    with EventStorage():
        sum(model([item]).values()).backward()
    finest = [scores.grad for scores in taken if scores.shape[-1] == max(s.shape[-1] for s in taken)]
    assert len(finest) == 3  # H, L and fused
    for grad in finest:
        half = grad.shape[-1] // 2
        assert (grad[..., :half] == 0).all() and (grad[..., half:] != 0).any()


def test_a_distilled_student_leaves_the_regions_out_in_its_own_frame(make_distiller, make_batch):
    distiller = make_distiller("L", losses=())  # p2 of L has the grid of p3 of H
    taken = class_scores(distiller.student)
    IgnoredRegions(distiller.student)
    (item,) = make_batch([(256, 256)], boxes=0)
    item["ignored_regions"] = torch.tensor([[0.0, 0.0, 0.5, 1.0]])
    with EventStorage():
        sum(distiller([item]).values()).backward()
    grad = taken[0].grad
    assert grad.shape[-2:] == (32, 32)
    assert (grad[..., :16] == 0).all() and (grad[..., 16:] != 0).any()


@pytest.mark.parametrize("arch", ["FCOS", "RetinaNet", "FasterRCNN"])
def test_predictions_in_the_regions_are_not_compared(make_distiller, tiny_model, make_batch, arch):
    """The student's scores there are a constant, which costs nothing as background but is far from the teacher's."""
    teacher, student = (tiny_model(arch, levels=range(2, 7), seed=seed) for seed in (0, 1))
    distiller = make_distiller("H", teacher=teacher, student=student, losses=[{"NAME": "Chen"}])
    IgnoredRegions(distiller.student)
    batch = make_batch([(128, 128)] * 2, boxes=0)

    def classification(region):
        regions = [{**item, "ignored_regions": torch.tensor([region])} for item in batch]
        with EventStorage():
            return {k: v.item() for k, v in distiller(regions).items() if "distill" in k and k.endswith("_cls")}

    whole, half, none = (classification([0.0, 0.0, width, 1.0]) for width in (1.0, 0.5, 0.0))
    assert set(whole.values()) == {0.0} and min(none.values()) > 0
    if arch != "FasterRCNN":  # divided by the positives, of which there are none
        assert 0 < half["loss_distill/Chen/dense_cls"] < none["loss_distill/Chen/dense_cls"]


# --- results ---------------------------------------------------------------------------------------------------------


def detections(boxes, scores, classes):
    found = Instances((80, 100))
    found.pred_boxes, found.scores = Boxes(torch.tensor(boxes)), torch.tensor(scores)
    found.pred_classes = torch.tensor(classes)
    return {"instances": found}


@pytest.fixture
def registered(folder):
    name = f"visdrone_{folder.name}"
    DatasetCatalog.register(name, lambda: load_visdrone(folder / "images", folder / "annotations"))
    yield name
    DatasetCatalog.remove(name)


def test_evaluator_scores_and_writes_what_can_be_read_again(registered, folder):
    evaluator = VisDroneEvaluator(registered, str(folder / "out"))
    # A hit on each of the three objects, best last; a false alarm in the region and one on the ignored bus.
    found = detections(
        [[1.0, 2, 4, 6], [62.0, 6, 70, 12], [10, 20, 40, 60], [52, 40, 72, 55], [6, 61, 10, 64]],
        [0.4, 0.9, 0.5, 0.6, 0.8],
        [0, 3, 3, 9, 8],
    )
    evaluator.process([{"image_id": "a"}], [found])
    metrics = evaluator.evaluate()["bbox"]
    # pedestrian and motor 100; of the two cars one has no width and cannot be found; the only bus is ignored: AP 0.
    assert metrics["AP-car"] == pytest.approx(50) and metrics["AP-motor"] == pytest.approx(100)
    assert metrics["AP-bus"] == 0.0
    assert metrics["AP"] == pytest.approx(62.5) and metrics["AP_plain"] == pytest.approx(25)
    rows = read_rows(folder / "out" / "visdrone_results" / "a.txt")
    assert rows[:, 4].tolist() == [0.9, 0.8, 0.6, 0.5, 0.4] and (rows[:, 6:] == -1).all()
    assert rows[3, :6].tolist() == [10, 20, 30, 40, 0.5, 4]


def test_a_set_without_annotations_gets_result_files_only(folder, caplog):
    DatasetCatalog.register("visdrone_unlabelled", lambda: load_visdrone(folder / "images"))
    try:
        evaluator = VisDroneEvaluator("visdrone_unlabelled", str(folder / "out"))
        evaluator.process([{"image_id": "a"}], [detections([[1.0, 2, 4, 6]], [0.4], [0])])
        assert evaluator.evaluate() == {}
    finally:
        DatasetCatalog.remove("visdrone_unlabelled")
    assert (folder / "out" / "visdrone_results" / "a.txt").read_text() == "1.00,2.00,3.00,4.00,0.400000,1,-1,-1\n"


def test_patches_cannot_be_tested_on(folder):
    DatasetCatalog.register(
        "visdrone_cut", lambda: load_visdrone(folder / "images", folder / "annotations", patches=True)
    )
    try:
        with pytest.raises(ValueError, match="test on whole images"):
            VisDroneEvaluator("visdrone_cut")
    finally:
        DatasetCatalog.remove("visdrone_cut")


# --- from yaml -------------------------------------------------------------------------------------------------------


def test_entries_are_checked(tmp_path):
    def register(**keys):
        cfg = load_config("")
        cfg.DATASETS.REGISTER = [{"NAME": "visdrone_entry", "TYPE": "visdrone", **keys}]
        register_datasets(cfg)

    with pytest.raises(ValueError, match=r"visdrone_entry.*missing key 'IMAGES'"):
        register(ANNOTATIONS="a")
    with pytest.raises(ValueError, match="PATCHES must be True or False, got 2"):
        register(IMAGES="a", PATCHES=2)


YAML = Path(__file__).parents[2] / "configs" / "ScaleKD" / "Base-VisDrone.yaml"


@pytest.mark.parametrize(("size", "expected"), [((1500, 2000), (2999, 3999)), ((1080, 1920), (2249, 3999))])
def test_tests_are_at_a_longer_side_of_3999(size, expected):
    (resize,) = build_augmentation(load_config(YAML), is_train=False)
    transform = resize.get_transform(np.zeros((*size, 3), np.uint8))
    assert (transform.new_h, transform.new_w) == expected


DATA = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).absolute() / "visdrone_format_sample"


def test_patches_without_objects_are_trained_on(folder, clean_catalogs):
    cfg = load_config(YAML)
    (entry, _) = cfg.DATASETS.REGISTER
    places = {"IMAGES": str(folder / "images"), "ANNOTATIONS": str(folder / "annotations")}
    cfg.DATASETS.REGISTER = [{**entry, **places}, {**entry, **places, "NAME": "visdrone_val", "PATCHES": False}]
    register_datasets(cfg)
    dicts = load_train_dicts(cfg)
    assert [item["image_id"] for item in dicts] == ["a_0", "a_1", "a_2", "a_3"]
    assert [len(item["annotations"]) for item in dicts] == [2, 0, 0, 1]
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
    assert len(load_train_dicts(cfg)) == 2


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no data set in {DATA}")
@pytest.mark.parametrize("arch", ["FCOS", "FasterRCNN"])
def test_from_yaml_to_metrics_on_real_images(tiny_cfg, tmp_path, clean_catalogs, arch):
    cfg = tiny_cfg(arch)
    common = {"TYPE": "visdrone", "IMAGES": str(DATA / "images"), "ANNOTATIONS": str(DATA / "annotations")}
    cfg.DATASETS.REGISTER = [
        {"NAME": "sample_patches", "PATCHES": True, **common},
        {"NAME": "sample_whole", **common},
    ]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ["sample_patches"], ["sample_whole"]
    cfg.MODEL.FCOS.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(CLASSES)
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0001
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = [64], 64, 128
    cfg.TEST.DETECTIONS_PER_IMAGE = 500
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS, cfg.SEED = 4, 2, 0, 1
    cfg.DATALOADER.NUM_WORKERS, cfg.OUTPUT_DIR = 0, str(tmp_path)
    register_datasets(cfg)
    trainer = DistillTrainer(cfg)
    batch = next(iter(trainer._trainer.data_loader))
    assert all({"ignored_regions", "instances"} <= item.keys() for item in batch)
    trainer.train()
    metrics = DistillTrainer.test(cfg, trainer.model)["bbox"]
    assert set(metrics) > {"AP", "AP50", "AR500", "AP_plain", "AP-car"} and 0 <= metrics["AP"] <= 100
    files = sorted((tmp_path / "inference" / "visdrone_results").glob("*.txt"))
    assert len(files) == 16 and sum(len(read_rows(file)) for file in files) > 0

    # The ground truth itself, through the same evaluator, is perfect, since the sample has no objects of score 0.
    evaluator = DistillTrainer.build_evaluator(cfg, "sample_whole")
    for record in DatasetCatalog.get("sample_whole"):
        found = Instances((record["height"], record["width"]))
        boxes = torch.tensor(boxes_of(record), dtype=torch.float32).reshape(-1, 4)
        found.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1))
        found.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]], dtype=torch.int64)
        found.scores = torch.ones(len(boxes))
        evaluator.process([record], [{"instances": found}])
    metrics = evaluator.evaluate()["bbox"]
    assert metrics["AP"] == pytest.approx(100) and metrics["AP_plain"] == pytest.approx(40)  # 4 of 10 classes
    assert 0 < metrics["AR1"] < metrics["AR10"] < metrics["AR100"] == pytest.approx(100)
