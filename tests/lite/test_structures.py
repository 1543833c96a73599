"""Boxes, masks, keypoints, instances, image lists: hand-computed values."""

import copy
import pickle

import numpy as np
import pytest
import torch
from detectron2.structures import (
    BitMasks,
    Boxes,
    BoxMode,
    ImageList,
    Instances,
    Keypoints,
    PolygonMasks,
    ROIMasks,
    heatmaps_to_keypoints,
    pairwise_ioa,
    pairwise_iou,
    pairwise_point_box_distance,
    polygons_to_bitmask,
)
from detectron2.structures.boxes import matched_pairwise_iou, pairwise_intersection
from detectron2.structures.masks import polygon_area

BAD_INPUT = (AssertionError, ValueError, TypeError, IndexError)
RECTANGLE = np.array([1.0, 1, 5, 1, 5, 4, 1, 4])  # 4 wide, 3 high
TRIANGLE = np.array([6.0, 6, 9, 6, 9, 9])


@pytest.fixture
def boxes():
    return Boxes(torch.tensor([[0.0, 0, 10, 10], [5, 5, 5, 20], [-3, -4, 30, 40]]))


class TestBoxes:
    def test_measures(self, boxes):
        assert boxes.area().tolist() == [100, 0, 33 * 44]
        assert boxes.nonempty().tolist() == [True, False, True]
        assert boxes.nonempty(threshold=10).tolist() == [False, False, True]
        assert boxes.get_centers().tolist() == [[5, 5], [5, 12.5], [13.5, 18]]

    def test_inside_box_excludes_the_far_border(self, boxes):
        assert boxes.inside_box((20, 10)).tolist() == [False, False, False]
        assert boxes.inside_box((21, 11)).tolist() == [True, True, False]
        assert boxes.inside_box((38, 28), boundary_threshold=4).tolist() == [True, True, True]

    def test_clip_and_scale_work_in_place(self, boxes):
        boxes.clip((20, 25))
        assert boxes.tensor.tolist() == [[0, 0, 10, 10], [5, 5, 5, 20], [0, 0, 25, 20]]
        boxes.scale(2, 0.5)
        assert boxes.tensor[2].tolist() == [0, 0, 50, 10]

    def test_clip_refuses_nan(self):
        with pytest.raises((AssertionError, FloatingPointError)):
            Boxes(torch.tensor([[0, float("nan"), 1, 1]])).clip((5, 5))

    def test_indexing_always_gives_boxes(self, boxes):
        assert boxes[1].tensor.tolist() == [[5, 5, 5, 20]]
        assert boxes[-1].tensor.shape == (1, 4)
        assert len(boxes[1:]) == 2
        assert boxes[boxes.area() > 0].tensor[:, 2].tolist() == [10, 30]
        assert len(boxes[torch.tensor([], dtype=torch.long)]) == 0
        with pytest.raises(BAD_INPUT):
            boxes[0, 1:2]

    def test_iteration_gives_rows(self, boxes):
        assert [tuple(row.shape) for row in boxes] == [(4,)] * 3

    def test_construction(self):
        assert Boxes(torch.tensor([[1, 2, 3, 4]])).tensor.dtype == torch.float32
        assert Boxes(torch.zeros(0)).tensor.shape == (0, 4)
        with pytest.raises(BAD_INPUT):
            Boxes(torch.zeros(2, 5))

    def test_empty_boxes_keep_the_graph(self):
        leaf = torch.zeros(0, requires_grad=True)
        Boxes(leaf).tensor.sum().backward()
        assert leaf.grad is not None

    def test_clone_and_cat_own_their_memory(self, boxes):
        twice = Boxes.cat([boxes, boxes.clone()])
        boxes.tensor.zero_()
        assert len(twice) == 6 and twice.tensor[0, 2] == 10
        assert len(Boxes.cat([])) == 0
        with pytest.raises(BAD_INPUT):
            Boxes.cat([boxes, boxes.tensor])

    def test_device(self, boxes):
        assert boxes.device == torch.device("cpu")
        assert boxes.to("cpu").tensor.equal(boxes.tensor)


class TestPairwise:
    a = Boxes(torch.tensor([[0.0, 0, 4, 4], [0, 0, 2, 2]]))
    b = Boxes(torch.tensor([[2.0, 2, 6, 6], [0, 0, 4, 4], [9, 9, 9, 9]]))

    def test_values(self):
        assert pairwise_intersection(self.a, self.b).tolist() == [[4, 16, 0], [0, 4, 0]]
        torch.testing.assert_close(pairwise_iou(self.a, self.b), torch.tensor([[4 / 28, 1, 0], [0, 0.25, 0]]))
        torch.testing.assert_close(pairwise_ioa(self.a, self.b), torch.tensor([[0.25, 1, 0], [0, 0.25, 0]]))
        torch.testing.assert_close(matched_pairwise_iou(self.a, self.b[:2]), torch.tensor([4 / 28, 0.25]))

    def test_empty_sides(self):
        nothing = Boxes(torch.zeros(0, 4))
        assert pairwise_iou(nothing, self.b).shape == (0, 3)
        assert pairwise_ioa(self.a, nothing).shape == (2, 0)

    def test_matched_needs_equal_numbers(self):
        with pytest.raises(BAD_INPUT):
            matched_pairwise_iou(self.a, self.b)

    def test_point_distance(self):
        distance = pairwise_point_box_distance(torch.tensor([[1.0, 3.0]]), self.a)
        assert distance.tolist() == [[[1, 3, 3, 1], [1, 3, 1, -1]]]


class TestBoxMode:
    @pytest.mark.parametrize("make", [list, tuple])
    def test_sequences(self, make):
        box = make((1.5, 2, 10, 20))
        there = BoxMode.convert(box, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
        assert type(there) is make and list(there) == [1.5, 2, 8.5, 18]
        assert list(BoxMode.convert(there, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)) == list(box)

    @pytest.mark.parametrize("make", [np.array, torch.tensor])
    def test_matrices(self, make):
        box = make([[1.0, 2, 10, 20], [0, 0, 5, 5]])
        there = BoxMode.convert(box, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
        assert type(there) is type(box) and there.dtype == box.dtype
        assert there.tolist() == [[1, 2, 9, 18], [0, 0, 5, 5]]
        assert box.tolist()[0] == [1, 2, 10, 20], "the input must not change"

    def test_same_mode_is_the_same_object(self):
        box = [1, 2, 3, 4]
        assert BoxMode.convert(box, BoxMode.XYWH_ABS, BoxMode.XYWH_ABS) is box

    def test_values_are_those_of_data_set_dicts(self):
        assert (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS, BoxMode.XYXY_REL, BoxMode.XYWH_REL) == (0, 1, 2, 3)

    def test_bad_input(self):
        with pytest.raises((AssertionError, NotImplementedError)):
            BoxMode.convert([0, 0, 1, 1], BoxMode.XYXY_REL, BoxMode.XYXY_ABS)
        with pytest.raises(BAD_INPUT):
            BoxMode.convert([0, 0, 1], BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)


class TestInstances:
    def make(self):
        x = Instances((10, 20), scores=torch.tensor([0.1, 0.2, 0.3]))
        x.names = ["a", "b", "c"]
        return x

    def test_fields(self):
        x = self.make()
        assert len(x) == 3 and x.image_size == (10, 20)
        assert x.has("names") and not x.has("boxes")
        assert list(x.get_fields()) == ["scores", "names"]
        assert x.get("names") is x.names
        x.remove("names")
        assert not x.has("names")
        with pytest.raises(AttributeError, match="names"):
            x.names  # noqa: B018
        with pytest.raises(KeyError):
            x.get("names")

    def test_length_mismatch_is_an_error(self):
        with pytest.raises(BAD_INPUT, match="2"):
            self.make().boxes = Boxes(torch.zeros(2, 4))

    def test_without_fields_there_is_no_length(self):
        with pytest.raises(NotImplementedError):
            len(Instances((1, 1)))

    def test_indexing(self):
        x = self.make()
        assert x[1].names == ["b"] and x[-1].scores.shape == (1,)
        assert x[1:].names == ["b", "c"]
        x.remove("names")
        assert x[x.scores > 0.15].scores.tolist() == pytest.approx([0.2, 0.3])
        assert x[torch.tensor([2, 0])].scores.tolist() == pytest.approx([0.3, 0.1])
        assert x[0].image_size == (10, 20)
        with pytest.raises(IndexError):
            x[3]

    def test_cannot_be_iterated(self):
        with pytest.raises(NotImplementedError):
            iter(self.make())

    def test_cat(self):
        x = self.make()
        x.boxes = Boxes(torch.zeros(3, 4))
        y = Instances.cat([x, x[:1]])
        assert y.names == ["a", "b", "c", "a"] and len(y.boxes) == 4 and y.scores.shape == (4,)
        assert y.image_size == (10, 20)
        for bad in ([], [x, 3], [x, Instances((9, 9))]):
            with pytest.raises(BAD_INPUT):
                Instances.cat(bad)
        with pytest.raises(ValueError):
            Instances.cat([Instances((1, 1), f=np.zeros(1))] * 2)

    def test_to_moves_what_can_move(self):
        y = self.make().to("cpu")
        assert y.names == ["a", "b", "c"] and y.scores.device.type == "cpu"

    def test_copies(self):
        x = self.make()
        for y in (copy.deepcopy(x), pickle.loads(pickle.dumps(x))):
            assert y.names == x.names and y.scores.equal(x.scores) and y.image_size == x.image_size

    def test_text_names_all(self):
        assert "num_instances=3, image_height=10, image_width=20, fields=[scores: " in str(self.make())


class TestImageList:
    images = [torch.ones(3, 5, 7), torch.full((3, 6, 4), 2.0)]

    def test_padding_is_at_the_far_sides(self):
        batch = ImageList.from_tensors(self.images, pad_value=9.0)
        assert batch.tensor.shape == (2, 3, 6, 7) and batch.image_sizes == [(5, 7), (6, 4)]
        assert batch[0].equal(self.images[0]) and batch[1].equal(self.images[1])
        assert (batch.tensor[0, :, 5:] == 9).all() and (batch.tensor[1, :, :, 4:] == 9).all()
        assert len(batch) == 2

    @pytest.mark.parametrize(
        "kwargs, side",
        [
            ({"size_divisibility": 4}, (8, 8)),
            ({"size_divisibility": 5}, (10, 10)),
            ({"size_divisibility": 1}, (6, 7)),
            ({"size_divisibility": 4, "padding_constraints": {"size_divisibility": 16}}, (16, 16)),
            ({"padding_constraints": {"square_size": 12}}, (12, 12)),
            ({"padding_constraints": {"square_size": 12, "size_divisibility": 8}}, (16, 16)),
        ],
    )
    def test_size(self, kwargs, side):
        assert ImageList.from_tensors(self.images, **kwargs).tensor.shape[-2:] == side

    def test_the_batch_is_a_copy(self):
        image = torch.zeros(1, 4, 4)
        ImageList.from_tensors([image]).tensor.fill_(1)
        assert image.sum() == 0

    def test_dtype_and_gradient(self):
        assert ImageList.from_tensors([torch.ones(3, 4, 4, dtype=torch.uint8)], 5).tensor.dtype == torch.uint8
        leaf = torch.ones(1, 3, 3, requires_grad=True)
        ImageList.from_tensors([leaf * 2, torch.ones(1, 4, 4)]).tensor.sum().backward()
        assert leaf.grad.eq(2).all()
        assert ImageList.from_tensors(self.images).to(torch.float16).tensor.dtype == torch.float16

    def test_bad_input(self):
        for bad in ([], torch.zeros(3, 4, 4), [torch.zeros(3, 4, 4), torch.zeros(1, 4, 4)]):
            with pytest.raises(BAD_INPUT):
                ImageList.from_tensors(bad)
        with pytest.raises((ValueError, RuntimeError)):
            ImageList.from_tensors(self.images, padding_constraints={"square_size": 4})


class TestBitMasks:
    def make(self):
        return BitMasks.from_polygon_masks([[RECTANGLE], [RECTANGLE, TRIANGLE], []], 12, 10)

    def test_rasterization(self):
        mask = polygons_to_bitmask([RECTANGLE], 6, 8)
        expected = np.zeros((6, 8), dtype=bool)
        expected[1:4, 1:5] = True
        assert mask.dtype == bool and (mask == expected).all()
        assert not polygons_to_bitmask([], 6, 8).any()

    def test_boxes_and_emptiness(self):
        masks = self.make()
        assert masks.image_size == (12, 10) and len(masks) == 3
        assert masks.nonempty().tolist() == [True, True, False]
        assert masks.get_bounding_boxes().tensor.tolist() == [[1, 1, 5, 4], [1, 1, 9, 8], [0, 0, 0, 0]]

    def test_indexing_keeps_three_axes(self):
        masks = self.make()
        assert masks[0].tensor.shape == masks[-1].tensor.shape == (1, 12, 10)
        assert len(masks[masks.nonempty()]) == 2
        assert [m.shape for m in masks] == [(12, 10)] * 3
        with pytest.raises(BAD_INPUT):
            masks[0, 0]

    def test_crop_and_resize(self):
        masks = self.make()
        crops = masks.crop_and_resize(torch.tensor([[1.0, 1, 5, 4], [0, 0, 10, 12], [0, 0, 4, 4]]), 6)
        assert crops.dtype == torch.bool and crops.shape == (3, 6, 6)
        assert crops[0].all() and not crops[2].any()
        assert masks[:0].crop_and_resize(torch.zeros(0, 4), 6).shape == (0, 6, 6)
        with pytest.raises(BAD_INPUT):
            masks.crop_and_resize(torch.zeros(2, 4), 6)

    def test_cat_and_to(self):
        masks = BitMasks.cat([self.make(), self.make()[:1]])
        assert len(masks) == 4 and masks.to("cpu").tensor.equal(masks.tensor)
        with pytest.raises(BAD_INPUT):
            BitMasks.cat([])

    def test_from_masks_in_boxes(self):
        soft = torch.zeros(1, 4, 4)
        soft[:, :2] = 1  # the upper half
        pasted = ROIMasks(soft).to_bitmasks(Boxes(torch.tensor([[2.0, 2, 6, 10]])), 12, 10)
        expected = torch.zeros(12, 10, dtype=torch.bool)
        expected[2:6, 2:6] = True
        assert pasted.tensor[0].equal(expected)


class TestPolygonMasks:
    def make(self):
        return PolygonMasks([[RECTANGLE], [RECTANGLE, TRIANGLE], []])

    def test_measures(self):
        masks = self.make()
        assert masks.area().tolist() == [12, 16.5, 0]
        assert polygon_area(np.array([0.0, 4, 4, 0]), np.array([0.0, 0, 3, 3])) == 12
        assert masks.nonempty().tolist() == [True, True, False]
        assert masks.get_bounding_boxes().tensor[:2].tolist() == [[1, 1, 5, 4], [1, 1, 9, 9]]

    @pytest.mark.parametrize("corner, box", [((-2, -3), [-9, -8, 0, 0]), ((5, -3), [-9, -8, 5, 0])])
    def test_boxes_of_polygons_left_of_and_above_the_image(self, corner, box):
        x, y = corner
        polygon = np.array([-9.0, -8, x, -8, x, y])
        assert PolygonMasks([[polygon]]).get_bounding_boxes().tensor.tolist() == [box]

    @pytest.mark.parametrize(
        "index, kept",
        [
            (1, [1]),
            (-3, [0]),
            (slice(0, 2), [0, 1]),
            ([1, 0], [1, 0]),
            (torch.tensor([0, 1]), [0, 1]),
            (torch.tensor([False, True, False]), [1]),
            (torch.tensor([False, False, False]), []),
        ],
    )
    def test_indexing(self, index, kept):
        masks = self.make()
        assert masks[index].area().tolist() == masks.area()[kept].tolist()

    def test_crop_agrees_with_bitmaps(self):
        polygons, box = PolygonMasks([[RECTANGLE]]), torch.tensor([[0.0, 0, 6, 6]])
        crop = polygons.crop_and_resize(box, 12)
        expected = torch.zeros(12, 12, dtype=torch.bool)
        expected[2:8, 2:10] = True
        assert crop.dtype == torch.bool and crop[0].equal(expected)
        assert PolygonMasks([]).crop_and_resize(torch.zeros(0, 4), 5).shape == (0, 5, 5)

    def test_the_caller_s_polygons_stay(self):
        polygon = RECTANGLE.copy()
        PolygonMasks([[polygon]]).crop_and_resize(torch.tensor([[1.0, 1, 3, 3]]), 8)
        assert (polygon == RECTANGLE).all()

    def test_accepts_lists_and_tensors(self):
        masks = PolygonMasks([[RECTANGLE.tolist(), torch.tensor(TRIANGLE)]])
        assert masks.polygons[0][1].dtype == np.float64 and masks.area().tolist() == [16.5]

    @pytest.mark.parametrize("bad", [3, [RECTANGLE], [[[1, 2, 3, 4]]], [[[1, 2, 3, 4, 5, 6, 7]]]])
    def test_bad_polygons(self, bad):
        with pytest.raises(BAD_INPUT):
            PolygonMasks(bad)

    def test_cat_and_iteration(self):
        masks = PolygonMasks.cat([self.make(), self.make()[:1]])
        assert [len(instance) for instance in masks] == [1, 2, 0, 1]
        assert masks.to("cpu").device.type == "cpu"


class TestKeypoints:
    def test_heatmap_cells(self):
        # A box 10 x 20 on 8 x 8 cells of 1.25 x 2.5 pixels.
        points = [[0, 0, 2], [10, 20, 2], [5, 5, 1], [3, 3, 0], [11, 3, 2], [-1, 3, 2], [10, 3, 2]]
        cells, valid = Keypoints([points]).to_heatmap(torch.tensor([[0, 0, 10, 20.0]]), 8)
        assert cells.tolist() == [[0, 63, 2 * 8 + 4, 0, 0, 0, 1 * 8 + 7]]
        assert valid.tolist() == [[1, 1, 1, 0, 0, 0, 1]]
        assert cells.dtype == valid.dtype == torch.int64

    def test_container(self):
        keypoints = Keypoints(np.arange(18.0).reshape(2, 3, 3))
        assert len(keypoints) == 2 and keypoints.tensor.dtype == torch.float32
        assert keypoints[[1]].tensor.shape == (1, 3, 3)
        assert len(Keypoints.cat([keypoints, keypoints])) == 4
        assert keypoints.to("cpu").device.type == "cpu"
        for bad in (np.zeros((2, 3)), np.zeros((1, 2, 4))):
            with pytest.raises(BAD_INPUT):
                Keypoints(bad)

    def test_decoding_finds_the_peak(self):
        maps = torch.full((2, 1, 8, 8), -10.0)
        maps[0, 0, 2, 5] = maps[1, 0, 7, 0] = 10
        boxes = torch.tensor([[10.0, 20, 18, 28], [0, 0, 16, 32]])
        decoded = heatmaps_to_keypoints(maps, boxes)
        assert decoded[0, 0, :2].tolist() == [15.5, 22.5]
        assert decoded[0, 0, 2] == 10 and decoded[0, 0, 3] > 0.99
        # Cell (7, 0) covers columns 0..2 and rows 28..32 of the second box.
        x, y = decoded[1, 0, :2].tolist()
        assert 0 < x < 2 and 28 < y < 32
        assert heatmaps_to_keypoints(maps[:0], boxes[:0]).shape == (0, 1, 4)

    def test_decoding_inverts_encoding(self):
        boxes = torch.tensor([[3.0, 5, 43, 65]])
        point = torch.tensor([[[20.3, 41.7, 2]]])
        cell, _ = Keypoints(point).to_heatmap(boxes, 56)
        maps = torch.nn.functional.one_hot(cell, 56 * 56).float().reshape(1, 1, 56, 56) * 20
        error = (heatmaps_to_keypoints(maps, boxes)[..., :2] - point[..., :2]).abs()
        assert (error <= torch.tensor([40 / 56, 60 / 56])).all()
