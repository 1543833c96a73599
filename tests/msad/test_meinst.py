"""MEInst: FCOS's boxes, codes of masks against NumPy, frames of H and L, teacher and student, mask AP."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, ImageList, PolygonMasks
from detectron2.utils.events import EventStorage
from runs import assert_equal_weights, train
from test_mask_code import iou, shapes

from msad import load_config
from msad.data import register_datasets
from msad.engine.setup import evaluate, load_model
from msad.modeling.adapters import adapt
from msad.modeling.detectors.mask_code import MaskCode, MaskStatistics
from msad.modeling.detectors.meinst import MEInst
from msad.modeling.features import run_neck
from msad.resolution import downsample_batch, scale_instances

CLASSES, DIM = 3, 20
TOOL = Path(__file__).parents[2] / "tools" / "fit_mask_code.py"


@pytest.fixture(scope="module")
def code_file(tmp_path_factory):
    statistics = MaskStatistics()
    statistics.add(shapes(2000, seed=5))
    path = tmp_path_factory.mktemp("code") / "code.npz"
    statistics.fit(DIM)[0].save(path)
    return str(path)


@pytest.fixture
def meinst(tiny_model, code_file):
    def make(**options):
        keys = {"MODEL__MEINST__CODE": code_file, "MODEL__MEINST__DIM": DIM, "MODEL__MASK_ON": True}
        return tiny_model("MEInst", **{**keys, **options})

    return make


def ellipse(box, points=60):
    """Corners of the ellipse that touches the sides of a box."""
    x0, y0, x1, y1 = box
    angles = np.arange(points) / points * 2 * math.pi
    xy = np.stack([(x0 + x1) / 2 + (x1 - x0) / 2 * np.cos(angles), (y0 + y1) / 2 + (y1 - y0) / 2 * np.sin(angles)])
    return xy.T.reshape(-1).astype(np.float64)


def cut_box(box):
    """A box without its lower right corner."""
    x0, y0, x1, y1 = box
    return np.array([x0, y0, x1, y0, x1, (y0 + y1) / 2, (x0 + x1) / 2, y1, x0, y1], dtype=np.float64)


@pytest.fixture
def masked_batch(make_batch):
    """Inputs whose objects are ellipses and cut boxes in turn, as polygons or as bitmaps."""

    def make(sizes, kind="polygon", **options):
        batch = make_batch(sizes, **options)
        for item in batch:
            instances = item["instances"]
            boxes = instances.gt_boxes.tensor.tolist()
            polygons = [[(ellipse, cut_box)[i % 2](box)] for i, box in enumerate(boxes)]
            masks = PolygonMasks(polygons)
            if kind == "bitmask":
                masks = BitMasks.from_polygon_masks(polygons, *instances.image_size)
            instances.gt_masks = masks
        return batch

    return make


def maps_of(detector, batch):
    images = detector.preprocess_image(batch)
    features = run_neck(detector.backbone, images.tensor, adapt(detector).levels)
    return images, list(features.values())


# --- the box half -----------------------------------------------------------------------------------------------------


def test_boxes_and_their_losses_are_those_of_fcos(meinst, tiny_model, masked_batch, same_detections):
    ours, fcos = meinst(), tiny_model("FCOS", seed=1)
    result = fcos.load_state_dict(ours.state_dict(), strict=False)
    assert result.missing_keys == []
    assert {name.split(".")[0] + "." + name.split(".")[1] for name in result.unexpected_keys} == {
        "head.mask_subnet", "head.mask_pred", "mask_code.mean", "mask_code.components", "mask_code.variance"
    }  # fmt: skip
    batch = masked_batch([(96, 64), (50, 96)])
    with EventStorage(0):
        found, expected = ours(batch), fcos(batch)
    assert list(found) == ["loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr", "loss_meinst_code"]
    for name, value in expected.items():
        assert value > 0 and torch.equal(found[name], value), name
    with torch.no_grad():
        same_detections(ours.eval()(batch), fcos.eval()(batch), tolerance=0)


@pytest.mark.parametrize("norm", ["", "BN"])
def test_mask_tower_is_a_third_one(tiny_cfg, code_file, norm):
    options = {"MODEL__MEINST__CODE": code_file, "MODEL__MEINST__DIM": DIM, "MODEL__FCOS__CONV_DIMS": [16, 24]}
    head = build_model(tiny_cfg("MEInst", MODEL__FCOS__NORM=norm, **options)).head
    convolutions = [tuple(m.weight.shape) for m in head.mask_subnet if isinstance(m, torch.nn.Conv2d)]
    assert convolutions == [(16, 8, 3, 3), (24, 16, 3, 3)] and head.mask_pred.weight.shape == (DIM, 24, 3, 3)
    assert len(head.mask_subnet) == len(head.bbox_subnet)
    assert not {id(p) for p in head.mask_subnet.parameters()} & {id(p) for p in head.bbox_subnet.parameters()}


# --- targets and loss -------------------------------------------------------------------------------------------------


def test_cells_get_the_code_of_their_own_instance(meinst, masked_batch):
    """Also of two instances in one box, one of each class; and none in the second image."""
    detector = meinst()
    batch = masked_batch([(128, 128), (128, 128), (128, 128)], boxes=[3, 0, 2])
    gt = [item["instances"] for item in batch]
    gt[2].gt_boxes = Boxes(gt[2].gt_boxes.tensor[[0, 0]])
    gt[2].gt_masks = PolygonMasks([[shape(gt[2].gt_boxes.tensor[0].tolist())] for shape in (ellipse, cut_box)])
    gt[2].gt_classes = torch.tensor([2, 1])
    _, maps = maps_of(detector, batch)
    anchors = detector.anchor_generator(maps)
    labels, boxes, rows, codes = detector.label_anchors(anchors, gt)
    expected_labels, expected_boxes = super(MEInst, detector).label_anchors(anchors, gt)
    assert codes.shape == (5, DIM)
    everything = [(i, j) for i in range(3) for j in range(len(gt[i]))]
    for i in range(3):
        assert torch.equal(labels[i], expected_labels[i]) and torch.equal(boxes[i], expected_boxes[i])
        positive = (labels[i] != CLASSES).nonzero().squeeze(1)
        assert (len(positive) > 0) == (len(gt[i]) > 0)
        for cell in positive:
            image, j = everything[rows[i][cell]]
            assert image == i and labels[i][cell] == gt[i].gt_classes[j]
            assert torch.equal(boxes[i][cell], gt[i].gt_boxes.tensor[j])
    flat = np.stack([gt[i].gt_masks[j : j + 1].crop_and_resize(gt[i].gt_boxes.tensor[j : j + 1], 28)[0].flatten()
                     for i, j in everything]).astype(float)  # fmt: skip
    mean, components, variance = (value.numpy() for value in detector.mask_code.state_dict().values())
    np.testing.assert_allclose(codes, (flat - mean) @ components.T / np.sqrt(variance), atol=1e-4)
    assert (codes[3] - codes[4]).abs().max() > 0.5


@pytest.mark.parametrize("kind", ["polygon", "bitmask"])
def test_loss_equals_numpy(meinst, masked_batch, kind):
    detector = meinst(MODEL__MEINST__CODE_LOSS_WEIGHT=0.7)
    batch = masked_batch([(128, 96), (96, 128)], kind, boxes=[3, 1])
    gt = [item["instances"] for item in batch]
    images, maps = maps_of(detector, batch)
    predictions = detector.head(maps)
    with EventStorage(0):
        found = detector.forward_training(images, maps, predictions, gt)["loss_meinst_code"]
    anchors = detector.anchor_generator(maps)
    labels, boxes = super(MEInst, detector).label_anchors(anchors, gt)
    predicted = [x.detach().numpy() for x in predictions[3]]
    variance = detector.mask_code.variance.numpy()
    total, positives = 0.0, 0
    for i, instances in enumerate(gt):
        targets = detector.mask_code.encode(instances.gt_masks.crop_and_resize(instances.gt_boxes.tensor, 28)).numpy()
        cell = 0
        for level in predicted:
            for y in range(level.shape[2]):
                for x in range(level.shape[3]):
                    if labels[i][cell] != CLASSES:
                        (j,) = [j for j, box in enumerate(instances.gt_boxes) if torch.equal(box, boxes[i][cell])]
                        error = level[i, :, y, x] - targets[j]
                        total += sum(v * e * e for v, e in zip(variance, error)) / variance.sum()
                        positives += 1
                    cell += 1
    assert positives > 10
    normaliser = 0.9 * 300 + 0.1 * positives  # the moving average begins at 300
    assert found.item() == pytest.approx(0.7 * total / normaliser, rel=1e-4)


def test_no_object_at_all(meinst, masked_batch):
    detector = meinst()
    with EventStorage(0):
        losses = detector(masked_batch([(64, 64)], boxes=0))
    assert losses["loss_meinst_code"] == 0
    sum(losses.values()).backward()
    assert [name for name, p in detector.named_parameters() if p.grad is None] == []


def test_half_precision(meinst, masked_batch):
    detector, same = meinst(), meinst()
    batch = masked_batch([(96, 96), (64, 96)])
    with EventStorage(0):
        expected = same(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = detector(batch)
    for name, value in found.items():
        assert value.dtype == torch.float32 and value.item() == pytest.approx(expected[name].item(), rel=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert detector.eval()(batch)[0]["instances"].pred_masks.dtype == torch.bool


def test_polygons_and_bitmaps_give_nearly_the_same_code(meinst, masked_batch):
    detector = meinst()
    codes = [detector._codes([item["instances"] for item in masked_batch([(256, 256)], kind, boxes=4)])
             for kind in ("polygon", "bitmask")]  # fmt: skip
    assert float(detector.mask_code.distance(*codes).max()) < 0.05


@pytest.mark.parametrize(("kind", "tolerance"), [("polygon", 1e-6), ("bitmask", 0.05)])
def test_codes_in_the_frame_of_l_are_those_of_h(meinst, masked_batch, kind, tolerance):
    detector = meinst()
    gt = [item["instances"] for item in masked_batch([(256, 256), (128, 256)], kind, boxes=3)]
    codes = detector._codes(gt), detector._codes([scale_instances(instances, 1) for instances in gt])
    assert codes[0].abs().max() > 0.5
    assert float(detector.mask_code.distance(*codes).max()) < tolerance


def test_codes_are_learnt(meinst, masked_batch):
    """From the mean mask, a distance of about 1, towards the masks of one batch."""
    detector = meinst(MODEL__FCOS__CONV_DIMS=[32])
    torch.nn.init.zeros_(detector.head.mask_pred.weight)
    torch.nn.init.zeros_(detector.head.mask_pred.bias)
    batch = masked_batch([(64, 64), (64, 64)])
    optimizer = torch.optim.AdamW(detector.parameters(), lr=0.01)
    distances = []
    with EventStorage(0) as storage:
        for _ in range(25):
            losses = detector(batch)
            positives = storage.latest()["num_pos_anchors"][0] * len(batch)
            distances.append(losses["loss_meinst_code"].item() * detector.loss_normalizer / positives)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
    assert 0.3 < distances[0] < 3 and distances[-1] < 0.3 * distances[0]


# --- inference --------------------------------------------------------------------------------------------------------


def silent(detector, h, w):
    """Predictions that see nothing in images (h, w), and the maps they belong to."""
    maps = [torch.randn(1, 8, -(-h // s), -(-w // s)) for s in (8, 16, 32, 64, 128)]
    predictions = [[torch.zeros_like(x) for x in levels] for levels in detector.head(maps)]
    for level in predictions[0]:
        level.fill_(-30.0)
    return maps, predictions


def test_a_code_becomes_a_mask_of_the_original_image(meinst):
    """Two cells see an ellipse and a cut box; the masks are those shapes, drawn at the size of the original image."""
    detector = meinst().eval()
    maps, predictions = silent(detector, 64, 96)
    boxes = torch.tensor([[10.0, 12.0, 46.0, 40.0], [40.0, 8.0, 90.0, 60.0]])
    polygons = PolygonMasks([[ellipse(boxes[0].tolist())], [cut_box(boxes[1].tolist())]])
    codes = detector.mask_code.encode(polygons.crop_and_resize(boxes, 28))
    anchors = detector.anchor_generator(maps)
    for (level, y, x), label, box, code in zip([(0, 3, 3), (1, 2, 4)], (2, 0), boxes, codes):
        predictions[0][level][0, label, y, x] = 4.0 - level
        predictions[2][level][0, 0, y, x] = 30.0
        cell = anchors[level].tensor[y * maps[level].shape[3] + x]
        predictions[1][level][0, :, y, x] = detector.box2box_transform.get_deltas(cell[None], box[None])[0]
        predictions[3][level][0, :, y, x] = code
    images = ImageList(torch.zeros(1, 3, 64, 96), [(64, 96)])
    (found,) = detector.forward_inference(images, maps, predictions)
    assert found.pred_classes.tolist() == [2, 0] and found.pred_masks.shape == (2, 1, 28, 28)
    torch.testing.assert_close(found.pred_boxes.tensor, boxes, atol=1e-4, rtol=1e-5)
    (result,) = adapt(detector).postprocess([found], [{"height": 192, "width": 288}], images)
    masks = result["instances"].pred_masks
    assert masks.shape == (2, 192, 288) and masks.dtype == torch.bool
    drawn = np.zeros((2, 192, 288), np.uint8)
    for canvas, (polygon,) in zip(drawn, polygons.polygons):
        cv2.fillPoly(canvas, [np.round(3 * polygon.reshape(-1, 2) - 0.5).astype(np.int32)], 1)
    assert float(iou(masks, torch.from_numpy(drawn).bool()).min()) > 0.9


def test_inference_bounds(meinst, masked_batch):
    detector = meinst(MODEL__FCOS__TOPK_CANDIDATES_TEST=3, TEST__DETECTIONS_PER_IMAGE=4).eval()
    with torch.no_grad():
        found = detector(masked_batch([(96, 64)]))[0]["instances"]
        assert 0 < len(found) <= 4 and found.scores.diff().le(0).all()
        maps, predictions = silent(detector, 64, 64)
        (nothing,) = detector.forward_inference(ImageList(torch.zeros(1, 3, 64, 64), [(64, 64)]), maps, predictions)
    assert len(nothing) == 0 and nothing.pred_masks.shape == (0, 1, 28, 28)


# --- teacher and student ----------------------------------------------------------------------------------------------


def test_inside_the_teacher(meinst, masked_batch):
    teacher = meinst(resolutions=["H", "L"])
    batch = masked_batch([(96, 128), (50, 127)])
    with EventStorage(0):
        losses = teacher(batch)
    assert len(losses) == 12 and all(losses[f"{b}/loss_meinst_code"] > 0 for b in ("H", "L", "fused"))
    sum(losses.values()).backward()
    assert [name for name, p in teacher.named_parameters() if p.grad is None] == []
    teacher.eval()
    for branch in ("fused", "H", "L"):
        teacher.set_eval_branch(branch)
        with torch.no_grad():
            found = teacher(batch)[1]["instances"]
        assert found.pred_masks.shape == (len(found), 50, 127) and len(found) > 0


@pytest.mark.parametrize("kind", ["polygon", "bitmask"])
def test_student_of_its_teacher(meinst, masked_batch, make_distiller, kind):
    student = meinst(levels=range(2, 7), seed=1)
    distiller = make_distiller("L", teacher=meinst(resolutions=["H", "L"]), student=student)
    batch = masked_batch([(96, 128), (50, 127)], kind)
    with EventStorage(0):
        losses = distiller(batch)
        alone = student(downsample_batch(batch, 1, "cpu"))["loss_meinst_code"]
    assert losses["loss_distill/AlignedL1"] > 0
    # the running number of positives has moved on by one step
    assert losses["loss_meinst_code"].item() == pytest.approx(alone.item(), rel=0.1)
    sum(losses.values()).backward()
    assert [name for name, p in student.named_parameters() if p.grad is None] == []


# --- yaml, tool, training, evaluation ---------------------------------------------------------------------------------

MEINST = """
_BASE_: {base}
MODEL:
  META_ARCHITECTURE: {architecture}
  MASK_ON: True
  MEINST: {{CODE: {code}, DIM: 8}}
MSAD: {{DETECTOR: MEInst}}
SOLVER: {{MAX_ITER: 2}}
"""


def test_from_data_to_mask_ap(project, tmp_path):
    """Fit the code with the tool; train and evaluate detector, teacher and student; weights load strictly again."""
    spec = importlib.util.spec_from_file_location("fit_mask_code", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    files = {}
    for name, base, architecture in (("meinst", "fcos", "MEInst"), ("teacher", "fcos", "MultiScaleTeacher"),
                                     ("student", "student", "MEInst")):  # fmt: skip
        files[name] = tmp_path / f"{name}.yaml"
        text = MEINST.format(base=project / f"{base}.yaml", architecture=architecture, code=tmp_path / "code.npz")
        files[name].write_text(text)
    with pytest.raises(FileNotFoundError, match=r"MODEL\.MEINST\.CODE: no file .*code\.npz; tools/fit_mask_code\.py"):
        build_model(load_config(files["meinst"]))
    said = tool.fit(load_config(files["meinst"]))
    assert "masks of 28 x 28: 8 components keep " in said and said.endswith(f"written to {tmp_path}/code.npz")
    code = MaskCode.load(tmp_path / "code.npz")
    count = int(said.split()[0])
    assert code.dim == 8 and 12 <= count <= 24
    np.testing.assert_allclose(code.components @ code.components.T, np.eye(8), atol=1e-5)

    def run(name, **options):
        cfg = load_config(files[name], [x for key, value in options.items() for x in (key.replace("__", "."), value)])
        cfg.OUTPUT_DIR = str(tmp_path / name)
        if name == "student":
            cfg.DISTILL.TEACHERS = [{"CONFIG": str(files["teacher"]), "WEIGHTS": f"{tmp_path}/teacher/model_final.pth"}]
        register_datasets(cfg)
        Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
        trainer, trace, _ = train(cfg)
        results = evaluate(cfg, load_model(cfg, f"{cfg.OUTPUT_DIR}/model_final.pth"))
        assert set(results) == {"bbox", "segm"} and "AP50" in results["segm"]
        return trainer, trace, results

    _, trace, _ = run("meinst")
    assert all(step["losses"]["loss_meinst_code"] > 0 for step in trace.steps)
    run("teacher")
    student, trace, _ = run("student")
    assert trace.steps[-1]["losses"]["loss_distill/AlignedL1"] > 0
    saved = torch.load(tmp_path / "student" / "model_final.pth", weights_only=True)["model"]
    assert_equal_weights(saved, student.distiller.student.state_dict())
    assert torch.equal(saved["mask_code.components"], code.components)


def test_errors(tiny_model, tiny_cfg, code_file, make_batch):
    with pytest.raises(FileNotFoundError, match=r"MODEL\.MEINST\.CODE is empty: .*tools/fit_mask_code\.py"):
        build_model(tiny_cfg("MEInst"))
    with pytest.raises(ValueError, match=rf"MODEL\.MEINST\.DIM is 60, but codes of .* have {DIM} numbers"):
        build_model(tiny_cfg("MEInst", MODEL__MEINST__CODE=code_file))
    detector = tiny_model("MEInst", MODEL__MEINST__CODE=code_file, MODEL__MEINST__DIM=DIM)
    batch = make_batch([(64, 64)])
    batch[0]["instances"].remove("gt_masks")
    with pytest.raises(ValueError, match=r"MODEL\.MASK_ON: True"), EventStorage(0):
        detector(batch)


def test_head_predictions_can_be_distilled(make_distiller, meinst, masked_batch):
    """Chen et al. compare its boxes and classes; its codes do not take part."""
    distiller = make_distiller("H", teacher=meinst(), student=meinst(seed=1), losses=[{"NAME": "Chen"}])
    with EventStorage(0):
        losses = distiller(masked_batch([(64, 96), (90, 128)]))
    assert losses["loss_distill/Chen/dense_cls"] > 0 and all(v.isfinite() for v in losses.values())
