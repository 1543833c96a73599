import copy
import pickle
import struct

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import detection_utils as utils
from detectron2.data import load_proposals_into_dataset
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks
from PIL import Image
from refusals import refused

PIXELS = np.random.RandomState(0).randint(0, 256, (20, 30, 3)).astype(np.uint8)
SQUARE = [1.0, 1.0, 5.0, 1.0, 5.0, 5.0, 1.0, 5.0]
FLIP_AND_DOUBLE = T.TransformList([T.HFlipTransform(30), T.ResizeTransform(20, 30, 40, 60)])


def run_lengths():
    mask = np.zeros((20, 30), np.uint8, order="F")
    mask[3:9, 5:20] = 1
    return mask, mask_util.encode(mask)


# ---------------------------------------------------------------------------------------------- images


@pytest.fixture
def save(tmp_path):
    def save_image(name, image, **options):
        Image.fromarray(image).save(tmp_path / name, **options)
        return str(tmp_path / name)

    return save_image


def test_formats(save):
    path = save("rgb.png", PIXELS)
    np.testing.assert_array_equal(utils.read_image(path, "RGB"), PIXELS)
    np.testing.assert_array_equal(utils.read_image(path, "BGR"), PIXELS[:, :, ::-1])
    grey = utils.read_image(path, "L")
    assert grey.shape == (20, 30, 1) and grey.dtype == np.uint8
    with_alpha = save("rgba.png", np.dstack([PIXELS, PIXELS[:, :, :1]]))
    np.testing.assert_array_equal(utils.read_image(with_alpha, "BGR"), PIXELS[:, :, ::-1])
    assert utils.read_image(with_alpha).shape == (20, 30, 4)
    only_grey = save("grey.png", PIXELS[:, :, 0])
    assert utils.read_image(only_grey).shape == (20, 30)
    np.testing.assert_array_equal(utils.read_image(only_grey, "BGR"), np.repeat(PIXELS[:, :, :1], 3, axis=2))


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda p: p),
        (2, lambda p: p[:, ::-1]),
        (3, lambda p: p[::-1, ::-1]),
        (4, lambda p: p[::-1]),
        (5, lambda p: p.transpose(1, 0, 2)),
        (6, lambda p: np.rot90(p, -1)),
        (7, lambda p: p[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda p: np.rot90(p)),
        (20, lambda p: p),
    ],
)
def test_exif_orientation(save, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save("turned.png", PIXELS, exif=exif)
    np.testing.assert_array_equal(utils.read_image(path, "RGB"), upright(PIXELS))


@pytest.mark.parametrize(
    ("tag", "kind", "value"),
    [(0x011A, 2, b"72 dpi\0"), (0x0128, 2, b"inch\0"), (0x8298, 5, struct.pack("<II", 1, 2)),
     (0x0131, 11, struct.pack("<f", 1.5))],
)  # fmt: skip
def test_malformed_exif_data_do_not_hinder_turning(tmp_path, tag, kind, value):
    """XResolution and ResolutionUnit as text, Copyright as a fraction, Software as a number, beside orientation 6."""
    count = {2: len(value), 5: 1, 11: 1}[kind]
    entries = [struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)]
    inline = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<I", 8 + 2 + 24 + 4)
    entries.append(struct.pack("<HHI", tag, kind, count) + inline)
    block = b"II*\0\x08\0\0\0" + struct.pack("<H", 2) + b"".join(sorted(entries)) + b"\0\0\0\0" + value
    path = str(tmp_path / "phone.jpg")
    Image.fromarray(PIXELS).save(path, exif=b"Exif\0\0" + block)
    assert utils.read_image(path, "RGB").shape == (30, 20, 3)


def test_unreadable_images(save, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.jpg"):
        utils.read_image(str(tmp_path / "absent.jpg"), "BGR")
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(OSError, match=r"text\.jpg"):
        utils.read_image(str(tmp_path / "text.jpg"), "BGR")
    whole = save("whole.jpg", PIXELS)
    with open(whole, "rb") as stream:
        (tmp_path / "half.jpg").write_bytes(stream.read()[:700])
    with pytest.raises(OSError, match="truncated"):
        utils.read_image(str(tmp_path / "half.jpg"), "BGR")


def test_back_to_rgb():
    np.testing.assert_array_equal(utils.convert_image_to_rgb(PIXELS[:, :, ::-1], "BGR"), PIXELS)
    np.testing.assert_array_equal(utils.convert_image_to_rgb(torch.from_numpy(PIXELS), "RGB"), PIXELS)
    grey = utils.convert_image_to_rgb(PIXELS[:, :, :1], "L")
    np.testing.assert_array_equal(grey, np.repeat(PIXELS[:, :, :1], 3, axis=2))


@pytest.mark.parametrize(("form", "error"), [("HSV", 12), ("YCbCr", 3), ("YUV-BT.601", 0.1), ("CMYK", 0), ("RGBX", 0)])
def test_other_formats_and_back(save, form, error):
    read = utils.read_image(save("rgb.png", PIXELS), form)
    assert read.shape[:2] == PIXELS.shape[:2] and read.dtype == (np.float64 if "YUV" in form else np.uint8)
    for image in (read, torch.from_numpy(read.copy())):
        back = utils.convert_image_to_rgb(image, form)
        assert back.shape == PIXELS.shape and np.abs(back - PIXELS.astype(float)).max() <= error


def test_luminance_and_colour_of_bt_601(save):
    """Y is 0.299 R + 0.587 G + 0.114 B; U and V are 0.492 (B - Y) and 0.877 (R - Y)."""
    luminance = PIXELS @ [0.299, 0.587, 0.114] / 255
    blue, red = (0.492 * (PIXELS[..., 2] / 255 - luminance), 0.877 * (PIXELS[..., 0] / 255 - luminance))
    read = utils.read_image(save("rgb.png", PIXELS), "YUV-BT.601")
    np.testing.assert_allclose(read, np.stack([luminance, blue, red], axis=2), atol=1e-3)


def test_unknown_formats_are_refused(save):
    with refused("XYZ"):
        utils.read_image(save("rgb.png", PIXELS), "XYZ")
    with refused("XYZ"):
        utils.convert_image_to_rgb(PIXELS, "XYZ")


def test_image_size_is_checked():
    sample = {"file_name": "f.jpg"}
    utils.check_image_size(sample, PIXELS)
    assert (sample["height"], sample["width"]) == (20, 30)
    utils.check_image_size(sample, PIXELS)
    for wrong in ({"height": 21}, {"height": 30, "width": 20}):
        with pytest.raises(utils.SizeMismatchError, match=r"f\.jpg"):
            utils.check_image_size({**sample, **wrong}, PIXELS)


# ----------------------------------------------------------------------------------------- annotations


def annotation(**more):
    return {"bbox": [1.0, 2.0, 6.0, 8.0], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1, **more}


def test_boxes_are_moved_and_clipped():
    moved = utils.transform_instance_annotations(annotation(), FLIP_AND_DOUBLE, (40, 60))
    np.testing.assert_allclose(moved["bbox"], [46, 4, 58, 20])
    assert moved["bbox_mode"] == BoxMode.XYXY_ABS
    wide = {"bbox": [-10.0, -2.0, 600.0, 800.0], "bbox_mode": BoxMode.XYXY_ABS}
    np.testing.assert_allclose(utils.transform_instance_annotations(wide, [], (20, 30))["bbox"], [0, 0, 30, 20])


def test_masks_are_moved():
    moved = utils.transform_instance_annotations(annotation(segmentation=[SQUARE, SQUARE]), FLIP_AND_DOUBLE, (40, 60))
    assert len(moved["segmentation"]) == 2
    np.testing.assert_allclose(moved["segmentation"][0], [58, 2, 50, 2, 50, 10, 58, 10])
    mask, encoded = run_lengths()
    moved = utils.transform_instance_annotations(annotation(segmentation=encoded), FLIP_AND_DOUBLE, (40, 60))
    np.testing.assert_array_equal(moved["segmentation"], mask[:, ::-1].repeat(2, 0).repeat(2, 1))
    with pytest.raises(AssertionError):
        utils.transform_instance_annotations(annotation(segmentation=encoded), T.TransformList([]), (40, 60))
    with pytest.raises(ValueError, match="str"):
        utils.transform_instance_annotations(annotation(segmentation="x"), FLIP_AND_DOUBLE, (40, 60))


def test_keypoints_are_moved_and_mirrored():
    points = [1.5, 2.5, 2, 3.5, 4.5, 0, 10, 3, 1]
    moved = utils.transform_keypoint_annotations(points, FLIP_AND_DOUBLE, (40, 60), [0, 2, 1])
    np.testing.assert_allclose(moved, [[57, 5, 2], [40, 6, 1], [0, 0, 0]])
    twice = T.TransformList([T.HFlipTransform(30), T.HFlipTransform(30)])
    moved = utils.transform_keypoint_annotations([1, 2, 2, 3, 4, 2], twice, (20, 30), [1, 0])
    np.testing.assert_allclose(moved, [[1, 2, 2], [3, 4, 2]])
    edges = [0, 0, 2, 30, 20, 2, 30.1, 5, 2, -0.1, 5, 2]
    moved = utils.transform_keypoint_annotations(edges, T.TransformList([]), (20, 30))
    assert moved[:, 2].tolist() == [2, 2, 0, 0] and not moved[2:].any()


def test_keypoints_must_fit_the_flip_indices():
    flip = T.TransformList([T.HFlipTransform(30)])
    with pytest.raises(ValueError, match="1"):
        utils.transform_keypoint_annotations([1, 2, 2], flip, (20, 30), [1, 0])
    with pytest.raises(ValueError, match="flip"):
        utils.transform_keypoint_annotations([1, 2, 2], flip, (20, 30))


def test_instances_from_annotations():
    annos = [
        utils.transform_instance_annotations(
            annotation(segmentation=[SQUARE], keypoints=[1.5, 2.5, 2]), T.TransformList([]), (20, 30)
        )
        for _ in range(2)
    ]
    instances = utils.annotations_to_instances(copy.deepcopy(annos), (20, 30))
    assert instances.image_size == (20, 30)
    assert instances.gt_boxes.tensor.tolist() == [[1, 2, 7, 10]] * 2
    assert instances.gt_boxes.tensor.dtype == torch.float32
    assert instances.gt_classes.tolist() == [1, 1] and instances.gt_classes.dtype == torch.int64
    assert isinstance(instances.gt_masks, PolygonMasks) and instances.gt_masks.area().tolist() == [16, 16]
    assert instances.gt_keypoints.tensor.tolist() == [[[1.5, 2.5, 2]]] * 2

    masks = utils.annotations_to_instances(annos, (20, 30), "bitmask").gt_masks
    assert isinstance(masks, BitMasks) and masks.tensor.dtype == torch.bool
    assert masks.tensor.shape == (2, 20, 30) and masks.tensor[0].sum() == 16


def test_bitmasks_from_every_form():
    mask, encoded = run_lengths()
    for form in (mask, encoded):
        instances = utils.annotations_to_instances([annotation(segmentation=form)], (20, 30), "bitmask")
        np.testing.assert_array_equal(instances.gt_masks.tensor[0].numpy(), mask.astype(bool))
    with pytest.raises(AssertionError):
        utils.annotations_to_instances([annotation(segmentation=mask[0])], (20, 30), "bitmask")
    with pytest.raises(ValueError, match="polygon"):
        utils.annotations_to_instances([annotation(segmentation=encoded)], (20, 30), "polygon")
    with pytest.raises(AssertionError, match="points"):
        utils.annotations_to_instances([annotation(segmentation=[SQUARE])], (20, 30), "points")


def test_no_annotations_make_empty_instances():
    instances = utils.annotations_to_instances([], (20, 30))
    assert len(instances) == 0 and instances.gt_boxes.tensor.shape == (0, 4)
    assert instances.gt_classes.dtype == torch.int64 and not instances.has("gt_masks")
    with pytest.raises(KeyError, match="segmentation"):
        utils.annotations_to_instances([annotation(segmentation=[SQUARE]), annotation()], (20, 30))


def test_empty_instances_are_dropped():
    instances = Instances((20, 30))
    instances.gt_boxes = Boxes(torch.tensor([[0, 0, 5, 5.0], [1, 1, 1, 1], [0, 0, 1e-6, 5], [0, 0, 3, 3]]))
    masks = torch.ones(4, 20, 30, dtype=torch.bool)
    masks[3] = False
    instances.gt_masks = BitMasks(masks)
    kept, mask = utils.filter_empty_instances(instances, return_mask=True)
    assert len(kept) == 1 and mask.tolist() == [True, False, False, False]
    assert len(utils.filter_empty_instances(instances, by_mask=False)) == 2
    assert len(utils.filter_empty_instances(instances, by_box=False)) == 3
    assert len(utils.filter_empty_instances(instances, box_threshold=4)) == 1
    with pytest.raises(AssertionError):
        utils.filter_empty_instances(instances, by_box=False, by_mask=False)


# ----------------------------------------------------------------------------------------- augmentations


def test_crops_contain_the_centre_of_the_instance():
    np.random.seed(0)
    starts = set()
    for _ in range(60):
        crop = utils.gen_crop_transform_with_instance((10, 12), (20, 30), annotation(bbox=[16, 4, 6, 8]))
        assert (crop.h, crop.w) == (10, 12)
        assert crop.x0 <= 19 <= crop.x0 + 12 and crop.y0 <= 8 <= crop.y0 + 10
        assert 0 <= crop.x0 <= 18 and 0 <= crop.y0 <= 10
        starts.add((int(crop.x0), int(crop.y0)))
    assert len(starts) > 20
    at_border = utils.gen_crop_transform_with_instance((10, 12), (20, 30), annotation(bbox=[28, 16, 4, 8]))
    assert (at_border.x0, at_border.y0) == (18, 10)
    for crop_size, box in (((100, 12), [1, 1, 2, 2]), ((10, 12), [35, 2, 4, 4])):
        with pytest.raises(AssertionError):
            utils.gen_crop_transform_with_instance(crop_size, (20, 30), annotation(bbox=box))


def test_augmentations_of_a_config():
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN = (30, 40)
    resize, flip = utils.build_augmentation(cfg, is_train=True)
    assert resize.short_edge_length == (30, 40) and resize.max_size == 1333 and resize.sample_style == "choice"
    assert flip.horizontal and flip.prob == 0.5
    (resize,) = utils.build_augmentation(cfg, is_train=False)
    assert resize.short_edge_length == (800, 800)
    cfg.INPUT.RANDOM_FLIP = "vertical"
    assert utils.build_augmentation(cfg, True)[1].vertical
    cfg.INPUT.RANDOM_FLIP = "none"
    assert len(utils.build_transform_gen(cfg, True)) == 1
    cfg.INPUT.RANDOM_FLIP = "diagonal"
    with pytest.raises(ValueError):
        utils.build_augmentation(cfg, True)


def test_the_last_of_equal_proposals_comes_first(tmp_path):
    """As detectron2's: a file without scores has one logit for all."""
    boxes = np.array([[4.0 * k, 0, 4 * k + 8, 8] for k in range(10)])
    content = {"ids": [7], "boxes": [boxes], "objectness_logits": [np.zeros(10)]}
    (tmp_path / "proposals.pkl").write_bytes(pickle.dumps(content))
    (sample,) = load_proposals_into_dataset([{"image_id": 7}], str(tmp_path / "proposals.pkl"))
    assert sample["proposal_boxes"][:3, 0].tolist() == [36, 32, 28]


def test_proposals_are_moved_filtered_and_cut():
    sample = {
        "proposal_boxes": np.array([[1, 2, 3, 4.0], [5, 5, 5, 5], [0, 0, 10, 12]]),
        "proposal_objectness_logits": np.array([0.9, 0.8, 0.1]),
        "proposal_bbox_mode": BoxMode.XYXY_ABS,
    }
    utils.transform_proposals(sample, (40, 60), FLIP_AND_DOUBLE, proposal_topk=5)
    proposals = sample.pop("proposals")
    assert not sample and proposals.image_size == (40, 60)
    assert proposals.proposal_boxes.tensor.tolist() == [[54, 4, 58, 8], [40, 0, 60, 24]]
    np.testing.assert_allclose(proposals.objectness_logits, [0.9, 0.1])
