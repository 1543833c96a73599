import copy

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, BoxMode, PolygonMasks
from PIL import Image

PIXELS = np.random.RandomState(0).randint(0, 256, (20, 30, 3)).astype(np.uint8)
SQUARE = [1.0, 1.0, 5.0, 1.0, 5.0, 5.0, 1.0, 5.0]
FLIP_AND_DOUBLE = [T.RandomFlip(1.0), T.Resize((40, 60))]


@pytest.fixture
def sample(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(PIXELS).save(path)
    crowd = np.zeros((20, 30), np.uint8, order="F")
    crowd[3:9, 5:20] = 1
    annotations = [
        {
            "bbox": [1.0, 2.0, 6.0, 8.0],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": 1,
            "segmentation": [SQUARE],
            "keypoints": [1.5, 2.5, 2, 3.5, 4.5, 0, 10, 3, 1],
            "iscrowd": 0,
        },
        {
            "bbox": [5.0, 3.0, 15.0, 6.0],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": 2,
            "segmentation": mask_util.encode(crowd),
            "iscrowd": 1,
        },
    ]
    return {"file_name": str(path), "height": 20, "width": 30, "image_id": 7, "annotations": annotations}


def make(is_train=True, augmentations=FLIP_AND_DOUBLE, **options):
    return DatasetMapper(is_train, augmentations=augmentations, image_format="BGR", **options)


def test_the_sample_stays_as_it_was(sample):
    before = copy.deepcopy(sample)
    make(use_instance_mask=True)(sample)
    assert sample == before


def test_boxes_only(sample):
    mapped = make()(sample)
    assert set(mapped) == {"file_name", "height", "width", "image_id", "image", "instances"}
    assert (mapped["height"], mapped["width"]) == (20, 30)
    instances = mapped["instances"]
    assert set(instances.get_fields()) == {"gt_boxes", "gt_classes"}
    assert instances.image_size == (40, 60)
    assert instances.gt_boxes.tensor.tolist() == [[46, 4, 58, 20]] and instances.gt_classes.tolist() == [1]


def test_subclasses_see_all_that_annotations_hold(sample):
    class Mine(DatasetMapper):
        def _transform_annotations(self, dataset_dict, transforms, image_shape):
            self.seen = [set(annotation) for annotation in dataset_dict["annotations"]]
            dataset_dict["annotations"][0]["segmentation"].clear()
            super()._transform_annotations(dataset_dict, transforms, image_shape)

    before = copy.deepcopy(sample)
    mapper = Mine(True, augmentations=FLIP_AND_DOUBLE, image_format="BGR")
    mapped = mapper(sample)
    assert mapper.seen == [set(annotation) for annotation in before["annotations"]] and sample == before
    assert set(mapped["instances"].get_fields()) == {"gt_boxes", "gt_classes"}


def test_the_image_is_a_contiguous_tensor(sample):
    image = make(augmentations=[T.RandomFlip(1.0)])(sample)["image"]
    assert image.dtype == torch.uint8 and image.is_contiguous() and image.shape == (3, 20, 30)
    np.testing.assert_array_equal(image.numpy(), PIXELS[:, ::-1, ::-1].transpose(2, 0, 1))


def test_masks_and_keypoints(sample):
    instances = make(use_instance_mask=True, use_keypoint=True, keypoint_hflip_indices=np.array([0, 2, 1]))(sample)[
        "instances"
    ]
    assert isinstance(instances.gt_masks, PolygonMasks)
    np.testing.assert_allclose(instances.gt_masks.polygons[0][0], [58, 2, 50, 2, 50, 10, 58, 10])
    assert instances.gt_keypoints.tensor.tolist() == [[[57, 5, 2], [40, 6, 1], [0, 0, 0]]]


def test_boxes_from_masks(sample):
    instances = make(use_instance_mask=True, instance_mask_format="bitmask", recompute_boxes=True)(sample)["instances"]
    assert isinstance(instances.gt_masks, BitMasks) and instances.gt_masks.tensor.sum() == 64
    assert instances.gt_boxes.tensor.tolist() == [[50, 2, 58, 10]]
    with pytest.raises(AssertionError):
        make(recompute_boxes=True)


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_crops_cut_masks(sample, mask_format):
    """A square that is cut, a fork of which the crop leaves two prongs, and a triangle outside of the crop."""
    fork = [0.0, 0, 16, 0, 16, 12, 12, 12, 12, 2, 4, 2, 4, 12, 0, 12]
    shapes = [[SQUARE], [fork], [[20.0, 10, 28, 10, 24, 18]]]
    sample["annotations"] = [{**sample["annotations"][0], "segmentation": shape} for shape in shapes]
    crop = T.CropTransform(2, 4, 14, 10)
    for recompute in (False, True):
        mapper = make(
            augmentations=[crop], use_instance_mask=True, instance_mask_format=mask_format, recompute_boxes=recompute
        )
        instances = mapper(sample)["instances"]
        assert instances.image_size == (10, 14) and len(instances) == 2
        bitmaps = instances.gt_masks
        if mask_format == "polygon":
            assert [len(polygons) for polygons in bitmaps] == [1, 2] and bitmaps.area().tolist() == [3, 16 + 32]
            bitmaps = BitMasks.from_polygon_masks(bitmaps, 10, 14)
        assert bitmaps.tensor.sum(dim=(1, 2)).tolist() == [3, 48]
        assert bitmaps.tensor[1, :8, :2].all() and bitmaps.tensor[1, :8, 10:].all()
        # The annotated boxes are x 1..7, y 2..10.
        tight = [[0, 0, 3, 1], [0, 0, 14, 8]]
        assert instances.gt_boxes.tensor.tolist() == (tight if recompute else [[0, 0, 5, 6]] * 2)


def test_keypoints_in_crops_and_rotations(sample):
    sample["annotations"] = sample["annotations"][:1]
    options = {"use_keypoint": True, "keypoint_hflip_indices": np.array([0, 2, 1])}
    (cropped,) = make(augmentations=[T.CropTransform(2, 0, 12, 10)], **options)(sample)["instances"].gt_keypoints.tensor
    assert cropped.tolist() == [[0, 0, 0], [0, 0, 0], [8, 3, 1]]  # one left, one without label, one inside
    # A quarter turn counter-clockwise takes (x, y) of the 20 x 30 image to (y, 30 - x).
    turn = [T.RotationTransform(20, 30, 90)]
    (turned,) = make(augmentations=turn, **options)(sample)["instances"].gt_keypoints.tensor
    np.testing.assert_allclose(turned, [[2.5, 28.5, 2], [0, 0, 0], [3, 20, 1]], atol=1e-5)
    # Two mirrors are none; a mirror and a turn still exchange left and right.
    flip = T.HFlipTransform(30)
    (twice,) = make(augmentations=[flip, flip], **options)(sample)["instances"].gt_keypoints.tensor
    np.testing.assert_allclose(twice, [[1.5, 2.5, 2], [0, 0, 0], [10, 3, 1]])
    (both,) = make(augmentations=[flip, *turn], **options)(sample)["instances"].gt_keypoints.tensor
    np.testing.assert_allclose(both, [[2.5, 1.5, 2], [3, 10, 1], [0, 0, 0]], atol=1e-5)


def test_annotations_are_for_training_only(sample):
    mapped = make(is_train=False)(sample)
    assert set(mapped) == {"file_name", "height", "width", "image_id", "image"}
    del sample["annotations"]
    assert "instances" not in make()(sample)


def test_images_without_instances(sample):
    sample["annotations"] = []
    instances = make(use_instance_mask=True)(sample)["instances"]
    assert len(instances) == 0 and instances.gt_boxes.tensor.shape == (0, 4)
    sample["annotations"] = [{"bbox": [1, 2, 0, 8], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}]
    assert len(make()(sample)["instances"]) == 0


def test_a_wrong_size_is_refused(sample):
    sample["height"] = 31
    with pytest.raises(utils.SizeMismatchError, match=r"image\.png"):
        make()(sample)


def test_from_config(sample):
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (10,), 40
    assert make(is_train=True)(sample)["image"].shape == (3, 40, 60)
    assert DatasetMapper(cfg, is_train=True)(sample)["image"].shape == (3, 10, 15)
    assert DatasetMapper(cfg, is_train=False)(sample)["image"].shape == (3, 40, 60)
    cfg.MODEL.MASK_ON, cfg.INPUT.MASK_FORMAT, cfg.INPUT.FORMAT = True, "bitmask", "RGB"
    mapper = DatasetMapper(cfg, True)
    assert (mapper.use_instance_mask, mapper.instance_mask_format) == (True, "bitmask")
    assert mapper.image_format == "RGB" and not mapper.recompute_boxes
    cfg.INPUT.CROP.ENABLED = True
    assert DatasetMapper(cfg, True).recompute_boxes and not DatasetMapper(cfg, False).recompute_boxes
    override = DatasetMapper(cfg, True, augmentations=[T.Resize((8, 8))])
    assert override(sample)["image"].shape == (3, 8, 8)


def test_from_config_with_keypoints(sample):
    name = "mapper_test_keypoints"
    MetadataCatalog.get(name).set(keypoint_names=["a", "b", "c"], keypoint_flip_map=[("b", "c")])
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (name,)
    cfg.MODEL.KEYPOINT_ON = True
    mapper = DatasetMapper(cfg, True)
    assert list(mapper.keypoint_hflip_indices) == [0, 2, 1]
    assert mapper(sample)["instances"].gt_keypoints.tensor.shape == (1, 3, 3)
    MetadataCatalog.pop(name)
