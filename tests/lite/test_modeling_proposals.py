"""Region proposal network and RoI pooler. Passes on detectron2 and on detectron2-lite."""

import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import RPN_HEAD_REGISTRY, build_proposal_generator
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.proposal_generator.proposal_utils import (
    add_ground_truth_to_proposals,
    find_top_rpn_proposals,
)
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from refusals import refused

torch.set_num_threads(1)


def boxes(*rows):
    return Boxes(torch.tensor(rows, dtype=torch.float32).reshape(-1, 4))


def make_rpn(**kwargs):
    """One level of stride 16; anchors of 16 px that tile the image: one a cell."""
    torch.manual_seed(0)
    options = {
        "in_features": ["p4"],
        "head": StandardRPNHead(in_channels=4, num_anchors=1),
        "anchor_generator": DefaultAnchorGenerator(sizes=[16], aspect_ratios=[1.0], strides=[16], offset=0.5),
        "anchor_matcher": Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True),
        "box2box_transform": Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
        "batch_size_per_image": 8, "positive_fraction": 0.5,
        "pre_nms_topk": (50, 40), "post_nms_topk": (20, 10),
    }
    return RPN(**{**options, **kwargs})


IMAGES = ImageList(torch.zeros(2, 3, 64, 80), [(64, 80), (60, 70)])


def features():
    return {"p4": torch.randn(2, 4, 4, 5, generator=torch.Generator().manual_seed(1))}


def ground_truth(*images):
    return [Instances(size, gt_boxes=boxes(*rows)) for size, rows in zip(IMAGES.image_sizes, images)]


TWO_CELLS = [[0, 0, 16, 16], [32, 16, 48, 32]]


class TestPooler:
    def test_level_of_a_box(self):
        squares = boxes(*[[5, 5, 5 + s, 5 + s] for s in (0, 111, 112, 223, 224, 447, 448, 5000)])
        assert assign_boxes_to_levels([squares], 2, 5, 224, 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        # Area decides, not the longer side; levels count from the finest one.
        assert assign_boxes_to_levels([boxes([0, 0, 448, 112])], 3, 5, 224, 4).tolist() == [1]

    def test_half_the_size_is_one_level_finer(self):
        g = torch.Generator().manual_seed(0)
        corner, size = torch.rand(100, 2, generator=g) * 50, torch.rand(100, 2, generator=g) * 400 + 60
        full = torch.cat((corner, corner + size), dim=1)
        levels = assign_boxes_to_levels([Boxes(full)], 0, 9, 224, 4)
        assert torch.equal(levels - 1, assign_boxes_to_levels([Boxes(full / 2)], 0, 9, 224, 4))

    @pytest.mark.parametrize("kind, shift", [("ROIAlignV2", 0.5), ("ROIAlign", 0.0)])
    def test_pooling_a_ramp_gives_positions(self, kind, shift):
        """A map whose value is the x index, and 1000 more a level: the mean over a cell is the place of its middle."""
        ramps = [
            (torch.arange(256.0 / s).expand(2, 1, 256 // s, 256 // s) + 1000 * i).contiguous()
            for i, s in enumerate((4, 8))
        ]
        pooler = ROIPooler(2, [1 / 4, 1 / 8], 2, kind, canonical_box_size=64, canonical_level=3)
        lists = [boxes([64, 64, 128, 128], [40, 40, 56, 56]), boxes([32, 96, 48, 112])]
        pooled = pooler(ramps, lists)
        assert pooled.shape == (3, 1, 2, 2)
        expected = [
            [(64 + 16) / 8 + 1000, (64 + 48) / 8 + 1000], [(40 + 4) / 4, (40 + 12) / 4], [(32 + 4) / 4, (32 + 12) / 4],
        ]
        torch.testing.assert_close(pooled[:, 0, 0], torch.tensor(expected) - shift)
        torch.testing.assert_close(pooled[:, 0, 0], pooled[:, 0, 1])

    def test_boxes_of_many_levels_keep_their_order_and_gradients_return(self):
        g = torch.Generator().manual_seed(3)
        maps = [torch.randn(1, 2, 128 // s, 128 // s, generator=g).requires_grad_() for s in (4, 8, 16)]
        side = torch.tensor([100.0, 6, 50, 8, 30, 60])[:, None]
        rois = Boxes(torch.cat((torch.full((6, 2), 4.0), 4 + side.expand(6, 2)), dim=1))
        pooler = ROIPooler(3, [1 / 4, 1 / 8, 1 / 16], 2, "ROIAlignV2", canonical_box_size=64)
        together = pooler(maps, [rois])
        alone = torch.cat([pooler(maps, [rois[i]]) for i in range(6)])
        torch.testing.assert_close(together, alone)
        weight = torch.randn(together.shape, generator=g)
        for a, b in zip(*(torch.autograd.grad((x * weight).sum(), maps) for x in (together, alone))):
            assert a.abs().sum() > 0
            torch.testing.assert_close(a, b)

    def test_no_boxes(self):
        pooler = ROIPooler(7, [1 / 4, 1 / 8], 0, "ROIPool")
        maps = [torch.rand(2, 3, 8, 8), torch.rand(2, 3, 4, 4)]
        assert pooler(maps, [boxes(), boxes()]).shape == (0, 3, 7, 7)

    @pytest.mark.parametrize("bad, message", [
        ({"scales": [1 / 4, 1 / 16]}, "strides must be powers of two that double each time, not 4, 16"),
        ({"scales": [1 / 8, 1 / 4]}, "strides must be powers of two that double each time, not 8, 4"),
        ({"scales": [0.3]}, "strides must be powers of two that double each time, not 3.3"),
        ({"pooler_type": "Max"}, "unknown pooler_type 'Max'"),
        ({"output_size": (1, 2, 3)}, "output_size must be one or two numbers, not (1, 2, 3)"),
        ({"canonical_box_size": 0}, "canonical_box_size must be positive, not 0"),
    ])
    def test_bad_arguments(self, bad, message):
        good = {"output_size": 7, "scales": [1 / 4], "sampling_ratio": 0, "pooler_type": "ROIAlign"}
        with refused(message):
            ROIPooler(**{**good, **bad})

    def test_inputs_that_do_not_fit(self):
        pooler = ROIPooler(7, [1 / 4, 1 / 8], 0, "ROIAlignV2")
        maps = [torch.rand(2, 3, 8, 8), torch.rand(2, 3, 4, 4)]
        with refused("got 1 feature maps for 2 scales"):
            pooler(maps[:1], [boxes(), boxes()])
        with refused("got boxes of 1 images for a batch of 2"):
            pooler(maps, [boxes([0, 0, 4, 4])])


class TestHead:
    def test_names_and_shapes(self):
        one = StandardRPNHead(in_channels=4, num_anchors=3)
        many = StandardRPNHead(in_channels=4, num_anchors=3, conv_dims=[-1, 6])
        assert [k for k in one.state_dict() if k.endswith("weight")] == [
            "conv.weight", "objectness_logits.weight", "anchor_deltas.weight"
        ]
        assert many.conv.conv1.weight.shape == (6, 4, 3, 3) and many.anchor_deltas.weight.shape == (12, 6, 1, 1)
        alike = StandardRPNHead(in_channels=4, num_anchors=3, conv_dims=[6, -1])  # as many as come in
        assert alike.conv.conv1.weight.shape == (6, 6, 3, 3) and alike.anchor_deltas.weight.shape == (12, 6, 1, 1)
        logits, deltas = many([torch.rand(2, 4, 5, 6), torch.rand(2, 4, 3, 3)])
        assert [tuple(x.shape) for x in (*logits, *deltas)] == [
            (2, 3, 5, 6), (2, 3, 3, 3), (2, 12, 5, 6), (2, 12, 3, 3)
        ]

    def test_levels_must_be_alike(self):
        cfg = get_cfg()
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64, 128]]
        shapes = [ShapeSpec(channels=4, stride=4), ShapeSpec(channels=4, stride=8)]
        with refused("got channels [4], anchors [3, 6]"):
            RPN_HEAD_REGISTRY.get("StandardRPNHead")(cfg, shapes)


class TestRPN:
    def test_from_config(self):
        cfg = get_cfg()
        cfg.MODEL.RPN.LOSS_WEIGHT, cfg.MODEL.RPN.BBOX_REG_LOSS_WEIGHT = 2.0, 0.25
        rpn = build_proposal_generator(cfg, {"res4": ShapeSpec(channels=8, stride=16)})
        assert isinstance(rpn, RPN) and rpn.in_features == ["res4"] and rpn.anchor_generator.num_anchors == [15]
        assert rpn.pre_nms_topk == {True: 12000, False: 6000} and rpn.post_nms_topk == {True: 2000, False: 1000}
        assert rpn.loss_weight == {"loss_rpn_cls": 2.0, "loss_rpn_loc": 0.5}
        cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PrecomputedProposals"
        assert build_proposal_generator(cfg, {}) is None

    def test_labels(self):
        rpn = make_rpn(batch_size_per_image=100, positive_fraction=1.0)
        gt = ground_truth([*TWO_CELLS, [48, 32, 64, 42]], [])
        labels, matched = rpn.label_and_sample_anchors(rpn.anchor_generator([features()["p4"]]), gt)
        # Cell (2, 3) overlaps the third box by 0.625: best for that box, so an object all the same.
        expected = torch.zeros(20, dtype=torch.int8)
        expected[[0, 7, 13]] = 1
        assert torch.equal(labels[0], expected) and torch.equal(labels[1], torch.zeros(20, dtype=torch.int8))
        assert torch.equal(matched[0][[0, 7, 13]], gt[0].gt_boxes.tensor) and matched[1].shape == (20, 4)

    def test_sample_size(self):
        rpn = make_rpn(batch_size_per_image=3, positive_fraction=0.34)
        for _ in range(5):
            labels, _ = rpn.label_and_sample_anchors(
                rpn.anchor_generator([features()["p4"]]), ground_truth(TWO_CELLS, [])
            )
            assert [((x == 1).sum().item(), (x == 0).sum().item()) for x in labels] == [(1, 2), (0, 3)]

    def test_anchors_beyond_the_border_do_not_count(self):
        rpn = make_rpn(batch_size_per_image=100, anchor_boundary_thresh=0)
        labels, _ = rpn.label_and_sample_anchors(rpn.anchor_generator([features()["p4"]]), ground_truth([], []))
        # 4 rows of 5 cells; the far border is exclusive, and the second image is 70 x 60.
        assert [(x == 0).sum().item() for x in labels] == [3 * 4, 3 * 4]

    def test_losses_by_hand(self):
        rpn = make_rpn(loss_weight={"loss_rpn_cls": 1.0, "loss_rpn_loc": 10.0})
        anchors = rpn.anchor_generator([features()["p4"]])
        labels = torch.full((2, 20), -1, dtype=torch.int8)
        labels[0, 0], labels[0, 1], labels[1, 5] = 1, 0, 0
        logits = torch.full((2, 20), 50.0)
        logits[0, 0], logits[0, 1], logits[1, 5] = 0.0, 0.0, math.log(3.0)
        target = anchors[0].tensor.clone()
        target[0] += 4.0  # a quarter of the anchor
        deltas = torch.zeros(2, 20, 4)
        deltas[0, 0, 3] = 0.125
        with EventStorage() as storage:
            losses = rpn.losses(anchors, [logits], list(labels), [deltas], [target, target])
        assert losses["loss_rpn_cls"].item() == pytest.approx((2 * math.log(2) + math.log(4)) / (8 * 2), rel=1e-5)
        assert losses["loss_rpn_loc"].item() == pytest.approx(10 * (0.25 + 0.25 + 0.125) / (8 * 2), rel=1e-5)
        logged = {name: value for name, (value, _) in storage.latest().items()}
        assert logged == {"rpn/num_pos_anchors": 0.5, "rpn/num_neg_anchors": 1.0}

    @pytest.mark.parametrize("gt", [(TWO_CELLS, []), ([], [])])
    def test_training_step(self, gt):
        rpn = make_rpn()
        maps = {k: x.requires_grad_() for k, x in features().items()}
        with EventStorage():
            proposals, losses = rpn(IMAGES, maps, ground_truth(*gt))
        assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc"}
        sum(losses.values()).backward()
        assert all(torch.isfinite(p.grad).all() for p in (*rpn.parameters(), maps["p4"]))
        moved = rpn.rpn_head.anchor_deltas.weight.grad.abs().sum() > 0
        assert moved == bool(gt[0]) and rpn.rpn_head.conv.weight.grad.abs().sum() > 0
        for found, size in zip(proposals, IMAGES.image_sizes):
            assert 0 < len(found) <= 20 and found.image_size == size
            assert not found.proposal_boxes.tensor.requires_grad and not found.objectness_logits.requires_grad
            assert (found.objectness_logits.diff() <= 0).all() and found.proposal_boxes.inside_box(
                (size[0] + 1, size[1] + 1)
            ).all()

    def test_inference_decodes_the_best_cells(self):
        rpn = make_rpn(post_nms_topk=(20, 3)).eval()
        logits = torch.arange(20.0).view(1, 20).repeat(2, 1)
        logits[1, 0] = 99.0
        deltas = torch.zeros(2, 20, 4)
        deltas[1, 0, 0] = 0.5
        anchors = rpn.anchor_generator([features()["p4"]])
        first, second = rpn.predict_proposals(anchors, [logits], [deltas], IMAGES.image_sizes)
        assert first.objectness_logits.tolist() == [19, 18, 17]
        assert first.proposal_boxes.tensor.tolist() == [[64, 48, 80, 64], [48, 48, 64, 64], [32, 48, 48, 64]]
        assert second.proposal_boxes.tensor[:2].tolist() == [[8, 0, 24, 16], [64, 48, 70, 60]]
        proposals, losses = rpn(IMAGES, features())
        assert losses == {} and [len(x) for x in proposals] == [3, 3]

    def test_training_needs_ground_truth(self):
        with refused("RPN: training needs ground truth"):
            make_rpn()(IMAGES, features())


class TestSelection:
    rows = torch.tensor([
        [0.0, 0, 20, 20], [1, 0, 21, 20], [40, 40, 60, 60], [-9, -9, 5, 5], [70, 0, 200, 9], [3, 3, 3, 9]
    ])
    scores = torch.tensor([3.0, 2, 1, 4, 0, 9])

    def find(self, splits=(6,), pre=10, post=10, min_size=0.0, training=False, rows=None, scores=None):
        rows, scores = self.rows if rows is None else rows, self.scores if scores is None else scores
        return find_top_rpn_proposals(
            [x[None] for x in rows.split(splits)], [x[None] for x in scores.split(splits)], [(64, 80)], 0.7, pre, post,
            min_size, training,
        )[0]

    def test_by_hand(self):
        found = self.find()
        # The second box overlaps the first by 0.905; the last one has no width; the others are clipped.
        assert found.objectness_logits.tolist() == [4, 3, 1, 0]
        assert found.proposal_boxes.tensor.tolist() == [[0, 0, 5, 5], [0, 0, 20, 20], [40, 40, 60, 60], [70, 0, 80, 9]]
        assert torch.equal(self.rows[3], torch.tensor([-9.0, -9, 5, 5]))  # the input is not clipped in place

    def test_levels_do_not_suppress_each_other(self):
        assert self.find(splits=(1, 5)).objectness_logits.tolist() == [4, 3, 2, 1, 0]

    def test_numbers(self):
        assert self.find(post=2).objectness_logits.tolist() == [4, 3]
        # 9, 4 and 3 enter, the first of them has no area.
        assert self.find(pre=3).objectness_logits.tolist() == [4, 3]
        assert self.find(min_size=9.0).objectness_logits.tolist() == [3, 1]
        assert len(self.find(min_size=500.0)) == 0

    def test_not_finite(self):
        rows, scores = self.rows.clone(), self.scores.clone()
        rows[0, 2], scores[2] = float("nan"), float("inf")
        assert self.find(rows=rows, scores=scores).objectness_logits.tolist() == [4, 2, 0]
        with pytest.raises(FloatingPointError):
            self.find(rows=rows, training=True)

    def test_add_ground_truth(self):
        gt = Instances((64, 80), gt_boxes=boxes([1, 2, 3, 4], [5, 6, 7, 8]), gt_classes=torch.tensor([3, 4]))
        for truth in (gt, gt.gt_boxes):
            (joined,) = add_ground_truth_to_proposals([truth], [self.find()])
            assert joined.proposal_boxes.tensor[-2:].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
            assert sorted(joined.get_fields()) == ["objectness_logits", "proposal_boxes"] and len(joined) == 6
            torch.testing.assert_close(joined.objectness_logits[-2:].sigmoid(), torch.ones(2))
            assert joined.objectness_logits[-1].isfinite()

    def test_add_ground_truth_that_lacks_a_field(self):
        proposals = self.find()
        proposals.colour = torch.zeros(len(proposals))
        with refused("it has no colour"):
            add_ground_truth_to_proposals([boxes([1, 2, 3, 4])], [proposals])
        with refused("got ground truth of 0 and proposals of 1 images"):
            add_ground_truth_to_proposals([], [proposals])
