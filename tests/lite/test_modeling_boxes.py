"""Anchors, matching, sampling, box transforms and postprocessing against values worked out by hand."""

import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_anchor_generator, detector_postprocess
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import (
    Box2BoxTransform,
    Box2BoxTransformLinear,
    _dense_box_regression_loss,
)
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Boxes, Instances
from refusals import refused


class TestAnchors:
    def test_values_and_order(self):
        generator = DefaultAnchorGenerator(sizes=[[4.0]], aspect_ratios=[[1.0, 4.0]], strides=[8], offset=0.5)
        (boxes,) = generator([torch.zeros(1, 3, 2, 2)])
        # Ratios change fastest, then x, then y; ratio 4 is 2 wide and 8 high.
        expected = [
            [2, 2, 6, 6], [3, 0, 5, 8], [10, 2, 14, 6], [11, 0, 13, 8],
            [2, 10, 6, 14], [3, 8, 5, 16], [10, 10, 14, 14], [11, 8, 13, 16],
        ]
        torch.testing.assert_close(boxes.tensor, torch.tensor(expected, dtype=torch.float32))

    def test_offset_and_levels(self):
        generator = DefaultAnchorGenerator(sizes=[[2], [4, 8]], aspect_ratios=[1.0], strides=[4, 8], offset=0.0)
        first, second = generator([torch.zeros(2, 1, 1, 2), torch.zeros(2, 1, 1, 1)])
        assert first.tensor.tolist() == [[-1, -1, 1, 1], [3, -1, 5, 1]]
        assert second.tensor.tolist() == [[-2, -2, 2, 2], [-4, -4, 4, 4]]
        assert generator.num_anchors == generator.num_cell_anchors == [1, 2] and generator.box_dim == 4

    def test_no_state_but_follows_the_module(self):
        generator = DefaultAnchorGenerator(sizes=[[2]], aspect_ratios=[1.0], strides=[4])
        assert generator.state_dict() == {}
        generator.load_state_dict({}, strict=True)
        assert all(x.dtype == torch.float64 for x in generator.double().cell_anchors)

    def test_changing_the_result_does_not_change_the_next(self):
        generator = DefaultAnchorGenerator(sizes=[[2]], aspect_ratios=[1.0], strides=[4])
        features = [torch.zeros(1, 1, 2, 2)]
        before = generator(features)[0].tensor.clone()
        generator(features)[0].scale(3.0, 3.0)
        torch.testing.assert_close(generator(features)[0].tensor, before)

    def test_from_cfg(self):
        cfg = get_cfg()
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16, 32]]
        cfg.MODEL.ANCHOR_GENERATOR.OFFSET = 0.5
        generator = build_anchor_generator(cfg, [ShapeSpec(stride=4), ShapeSpec(stride=8)])
        assert generator.num_anchors == [3, 6] and generator.strides == [4, 8] and generator.offset == 0.5

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"sizes": []}, "sizes is empty"),
            ({"sizes": [[1], [2], [3]]}, "sizes has 3 lists for 2 feature maps"),
            ({"aspect_ratios": [[1], [1], [2]]}, "aspect_ratios has 3 lists for 2 feature maps"),
            ({"offset": 1.0}, "offset must lie in [0, 1), not 1.0"),
            ({"offset": -0.1}, "offset must lie in [0, 1), not -0.1"),
        ],
    )
    def test_refused(self, options, message):
        with refused(message):
            DefaultAnchorGenerator(**{"sizes": [[1]], "aspect_ratios": [[1.0]], "strides": [4, 8], **options})


class TestMatcher:
    quality = torch.tensor([[0.1, 0.5, 0.7, 0.4, 0.0], [0.2, 0.3, 0.6, 0.4, 0.0], [0.0, 0.2, 0.1, 0.0, 0.0]])

    def test_thresholds_are_closed_below(self):
        match, label = Matcher([0.4, 0.7], [0, -1, 1])(self.quality)
        assert match.tolist()[:4] == [1, 0, 0, 0] and label.tolist() == [0, -1, 1, -1, 0]
        assert match.dtype == torch.int64 and label.dtype == torch.int8

    def test_low_quality(self):
        # Ground truth 2 is best at prediction 1, which keeps its own match.
        match, label = Matcher([0.65], [0, 1], allow_low_quality_matches=True)(self.quality)
        assert label.tolist() == [0, 1, 1, 0, 0] and match[1] == 0

    def test_ties_all_count(self):
        _, label = Matcher([0.9], [0, 1], True)(torch.tensor([[0.3, 0.3, 0.1]]))
        assert label.tolist() == [1, 1, 0]

    def test_no_ground_truth(self):
        match, label = Matcher([0.4, 0.5], [-1, 0, 1], True)(torch.zeros(0, 3))
        assert match.tolist() == [0, 0, 0] and label.tolist() == [-1, -1, -1]

    @pytest.mark.parametrize(
        "thresholds, labels, message",
        [
            ([0.5, 0.4], [0, -1, 1], "thresholds must be positive and ascending, not [0.5, 0.4]"),
            ([0.5], [0, -1, 1], "1 thresholds need 2 labels, not 3"),
            ([0.5], [0, 2], "labels must be -1, 0 or 1, not [0, 2]"),
            ([0.0], [0, 1], "thresholds must be positive and ascending, not [0.0]"),
            ([-0.5, 0.5], [0, 0, 1], "thresholds must be positive and ascending, not [-0.5, 0.5]"),
        ],
    )
    def test_refused(self, thresholds, labels, message):
        with refused(message):
            Matcher(thresholds, labels)


class TestSampling:
    labels = torch.tensor([0, 1, -1, 80, 80, 80, 80, -1, 2, 80])

    @pytest.mark.parametrize(
        "total, fraction, expected", [(4, 0.5, (2, 2)), (6, 0.5, (3, 3)), (100, 0.5, (3, 5)), (4, 0.1, (0, 4))]
    )
    def test_counts(self, total, fraction, expected):
        positive, negative = subsample_labels(self.labels, total, fraction, 80)
        assert (len(positive), len(negative)) == expected
        assert set(positive.tolist()) <= {0, 1, 8} and set(negative.tolist()) <= {3, 4, 5, 6, 9}

    def test_every_element_can_be_drawn(self):
        torch.manual_seed(0)
        drawn = {i for _ in range(60) for x in subsample_labels(self.labels, 2, 0.5, 80) for i in x.tolist()}
        assert drawn == {0, 1, 8, 3, 4, 5, 6, 9}


class TestTransforms:
    def test_rcnn_by_hand(self):
        transform = Box2BoxTransform((10.0, 10.0, 5.0, 5.0))
        source, target = torch.tensor([[0.0, 0, 10, 20]]), torch.tensor([[2.0, 4, 22, 14]])
        expected = torch.tensor([[10 * 7 / 10, 10 * -1 / 20, 5 * math.log(2), 5 * math.log(0.5)]])
        torch.testing.assert_close(transform.get_deltas(source, target), expected)
        torch.testing.assert_close(transform.apply_deltas(expected, source), target)

    def test_rcnn_several_classes_and_clamp(self):
        transform = Box2BoxTransform((1.0, 1.0, 1.0, 1.0), scale_clamp=math.log(3.0))
        deltas = torch.tensor([[0.0, 0, 0, 0, 1, 0, 50, 0]])
        result = transform.apply_deltas(deltas, torch.tensor([[0.0, 0, 2, 2]]))
        torch.testing.assert_close(result, torch.tensor([[0.0, 0, 2, 2, 0, 0, 6, 2]]))

    def test_linear_by_hand(self):
        source, target = torch.tensor([[0.0, 0, 8, 8]]), torch.tensor([[2.0, -4, 12, 8]])
        for normalize, unit in ((True, 8.0), (False, 1.0)):
            transform = Box2BoxTransformLinear(normalize)
            deltas = transform.get_deltas(source, target)
            torch.testing.assert_close(deltas * unit, torch.tensor([[2.0, 8, 8, 4]]))
            torch.testing.assert_close(transform.apply_deltas(deltas, source), target)
        # A negative distance is taken for 0.
        moved = transform.apply_deltas(torch.tensor([[-3.0, 1, 1, -1]]), source)
        torch.testing.assert_close(moved, torch.tensor([[4.0, 3, 5, 4]]))

    @pytest.mark.parametrize("transform", [Box2BoxTransform((1, 1, 1, 1)), Box2BoxTransformLinear()])
    def test_refused_and_empty(self, transform):
        with refused("get_deltas takes boxes as a tensor (N, 4), not a Boxes"):
            transform.get_deltas(Boxes(torch.ones(1, 4)), torch.ones(1, 4))
        assert transform.get_deltas(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 4)
        assert transform.apply_deltas(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 4)

    def test_degenerate_source_is_refused(self):
        with refused("a source box has no positive width or height"):
            Box2BoxTransform((1, 1, 1, 1)).get_deltas(torch.tensor([[1.0, 1, 1, 5]]), torch.ones(1, 4))


class TestDenseLoss:
    anchors = [Boxes([[0.0, 0, 10, 10]]), Boxes([[0.0, 0, 20, 20], [20, 20, 40, 40]])]

    def loss(self, deltas, gt, fg, **kwargs):
        transform = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))
        return _dense_box_regression_loss(self.anchors, transform, deltas, gt, fg, **kwargs)

    def test_counts_foreground_only(self):
        gt = [torch.tensor([[5.0, 0, 15, 10], [0, 0, 20, 20], [0, 0, 0, 0]])]
        deltas = [torch.zeros(1, 1, 4, requires_grad=True), torch.ones(1, 2, 4, requires_grad=True)]
        loss = self.loss(deltas, gt, torch.tensor([[True, True, False]]))
        assert loss.item() == pytest.approx(0.5 + 4.0)
        loss.backward()
        assert deltas[0].grad.tolist() == [[[-1, 0, 0, 0]]] and deltas[1].grad.tolist() == [[[1] * 4, [0] * 4]]

    def test_smooth(self):
        gt = [torch.tensor([[5.0, 0, 15, 10], [0, 0, 20, 20], [0, 0, 1, 1]])]
        deltas = [torch.zeros(1, 1, 4), torch.ones(1, 2, 4) * 3]
        fg = torch.tensor([[True, True, False]])
        assert self.loss(deltas, gt, fg, smooth_l1_beta=1.0).item() == pytest.approx(0.5 * 0.25 + 4 * 2.5)

    def test_giou(self):
        # Half overlap in x: IoU 1/3, hull covered.
        gt = [torch.tensor([[5.0, 0, 15, 10], [0, 0, 20, 20], [20, 20, 40, 40]])]
        deltas = [torch.zeros(1, 1, 4), torch.zeros(1, 2, 4)]
        loss = self.loss(deltas, gt, torch.ones(1, 3, dtype=torch.bool), box_reg_loss_type="giou")
        assert loss.item() == pytest.approx(2 / 3, abs=1e-5)

    @pytest.mark.parametrize("kind", ["smooth_l1", "giou", "diou", "ciou"])
    def test_no_foreground_gives_zero_with_gradient(self, kind):
        deltas = [torch.ones(1, 1, 4, requires_grad=True), torch.ones(1, 2, 4)]
        gt = [torch.zeros(3, 4)]
        loss = self.loss(deltas, gt, torch.zeros(1, 3, dtype=torch.bool), box_reg_loss_type=kind)
        loss.backward()
        assert loss.item() == 0 and deltas[0].grad.abs().sum() == 0

    def test_unknown_loss_is_refused(self):
        with pytest.raises(ValueError, match="nothing"):
            self.loss(
                [torch.ones(1, 1, 4), torch.ones(1, 2, 4)], [torch.ones(3, 4)],
                torch.zeros(1, 3, dtype=torch.bool), box_reg_loss_type="nothing",
            )


class TestPostprocess:
    def test_scaled_clipped_and_emptied(self):
        boxes = torch.tensor([[10.0, 10, 20, 20], [-5, 0, 50, 80], [120, 0, 130, 5]])
        found = Instances((50, 100), pred_boxes=Boxes(boxes), scores=torch.tensor([0.9, 0.8, 0.7]))
        found.pred_keypoints = torch.tensor([[[10.0, 20, 0.5]]] * 3)
        result = detector_postprocess(found, 100, 50)
        assert result.image_size == (100, 50)
        assert result.pred_boxes.tensor.tolist() == [[5, 20, 10, 40], [0, 0, 25, 100]]
        torch.testing.assert_close(result.scores, torch.tensor([0.9, 0.8]))
        assert result.pred_keypoints.tolist() == [[[5.0, 40.0, 0.5]]] * 2

    def test_proposals_and_tensor_sizes(self):
        found = Instances((10, 10), proposal_boxes=Boxes([[0.0, 0, 5, 5]]))
        result = detector_postprocess(found, torch.tensor(20), torch.tensor(20))
        assert result.proposal_boxes.tensor.tolist() == [[0, 0, 10, 10]]
        assert [int(x) for x in result.image_size] == [20, 20]

    def test_without_boxes_is_refused(self):
        with pytest.raises((AssertionError, ValueError), match=r"box"):
            detector_postprocess(Instances((10, 10), scores=torch.ones(1)), 10, 10)

    def test_masks_are_pasted(self):
        found = Instances((10, 10), pred_boxes=Boxes([[2.0, 2, 6, 6]]), pred_masks=torch.ones(1, 1, 4, 4))
        masks = detector_postprocess(found, 20, 10).pred_masks
        assert masks.shape == (1, 20, 10) and masks.dtype == torch.bool
        rows, columns = masks[0].nonzero().unbind(1)
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 11, 2, 5)

    def test_sem_seg_cuts_padding(self):
        scores = torch.zeros(1, 4, 4)
        scores[:, :2, :2] = 1
        assert sem_seg_postprocess(scores, (2, 2), 6, 6).unique().tolist() == [1.0]


def test_permute():
    tensor = torch.arange(2 * 6 * 2 * 3).view(2, 6, 2, 3)
    result = permute_to_N_HWA_K(tensor, 3)
    assert result.shape == (2, 12, 3)
    # Image 1, row 1, column 2, anchor 1: channels 3..5 there.
    assert torch.equal(result[1, (1 * 3 + 2) * 2 + 1], tensor[1, 3:6, 1, 2])
