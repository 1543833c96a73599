"""Faster, Mask, Keypoint and Cascade R-CNN on a tiny pyramid. Passes on detectron2 and on detectron2-lite."""

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, ProposalNetwork, StandardROIHeads, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from refusals import refused
from tiny_rcnn import KINDS, NONE, NUM_CLASSES, ONE, TWO, batch, make_cfg, make_model, train

torch.set_num_threads(1)
each_kind = pytest.mark.parametrize("kind", KINDS)


class TestModels:
    @each_kind
    def test_losses_and_gradients(self, kind):
        model = make_model(kind)
        losses, logged = train(model, batch(TWO, NONE))
        expected = {"loss_rpn_cls", "loss_rpn_loc"}
        if kind == "cascade":
            expected |= {f"{name}_stage{k}" for name in ("loss_cls", "loss_box_reg") for k in range(3)}
            assert {"stage0/fast_rcnn/cls_accuracy", "stage2/roi_head/num_fg_samples"} <= set(logged)
        else:
            expected |= {"loss_cls", "loss_box_reg"}
            assert {"fast_rcnn/cls_accuracy", "fast_rcnn/fg_cls_accuracy", "fast_rcnn/false_negative"} <= set(logged)
        expected |= {"loss_mask"} if kind in ("mask", "both", "cascade") else set()
        expected |= {"loss_keypoint"} if kind in ("keypoint", "both") else set()
        assert set(losses) == expected and all(x.dim() == 0 and torch.isfinite(x) for x in losses.values())
        assert {"rpn/num_pos_anchors", "rpn/num_neg_anchors", "roi_head/num_fg_samples"} <= set(logged)
        sum(losses.values()).backward()
        assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in model.parameters())

    @each_kind
    def test_without_ground_truth_all_parameters_still_get_gradients(self, kind):
        model = make_model(kind)
        losses, logged = train(model, batch(NONE, NONE))
        sum(losses.values()).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        assert losses["loss_rpn_loc"] == 0 and logged["roi_head/num_fg_samples"] == 0
        assert "fast_rcnn/fg_cls_accuracy" not in logged

    @each_kind
    def test_detections(self, kind):
        model = make_model(kind).eval()
        inputs = batch(ONE, ONE)
        inputs[0].update(height=128, width=40)
        with torch.no_grad():
            results = [x["instances"] for x in model(inputs)]
        assert [tuple(x.image_size) for x in results] == [(128, 40), (64, 80)]
        for x, (height, width) in zip(results, [(128, 40), (64, 80)]):
            assert 0 < len(x) <= 7 and (x.scores.diff() <= 0).all()
            assert ((x.pred_classes >= 0) & (x.pred_classes < NUM_CLASSES)).all()
            boxes = x.pred_boxes.tensor
            assert (boxes >= 0).all() and (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
            assert x.has("pred_masks") == (kind in ("mask", "both", "cascade"))
            assert x.has("pred_keypoints") == (kind in ("keypoint", "both"))
            if x.has("pred_masks"):
                assert x.pred_masks.shape == (len(x), height, width) and x.pred_masks.dtype == torch.bool
            if x.has("pred_keypoints"):
                assert x.pred_keypoints.shape == (len(x), 2, 3)

    @each_kind
    def test_given_boxes(self, kind):
        """Masks and keypoints for boxes from elsewhere; those of the model itself get what they had."""
        model = make_model(kind).eval()
        inputs = batch(ONE, ONE)
        with torch.no_grad():
            found = model.inference(inputs, do_postprocess=False)
            bare = [Instances(x.image_size, pred_boxes=x.pred_boxes, pred_classes=x.pred_classes) for x in found]
            again = model.inference(inputs, detected_instances=bare, do_postprocess=False)
        for a, b in zip(found, again):
            assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
            for name in ("pred_masks", "pred_keypoints"):
                assert a.has(name) == b.has(name)
                if a.has(name):
                    torch.testing.assert_close(a.get(name), b.get(name))
        with refused("needs instances with pred_boxes and pred_classes"):
            model.roi_heads.forward_with_given_boxes({}, [Instances((64, 80), scores=torch.zeros(1))])

    def test_image_in_a_batch_gives_what_it_gives_alone(self):
        model = make_model("both").eval()
        inputs = batch(ONE, ONE)
        with torch.no_grad():
            together = [x["instances"] for x in model(inputs)]
            alone = [model([x])[0]["instances"] for x in inputs]
        for a, b in zip(together, alone):
            torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(a.scores, b.scores)
            assert torch.equal(a.pred_classes, b.pred_classes)

    def test_mixed_precision(self):
        model = make_model("both", ROI_HEADS__POSITIVE_FRACTION=1.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses, _ = train(model, batch(TWO))
            sum(losses.values()).backward()
            with torch.no_grad():
                assert model.eval()(batch(ONE))[0]["instances"].pred_boxes.tensor.dtype == torch.float32
        assert all(torch.isfinite(x) for x in losses.values())
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())

    def test_refusals(self):
        model = make_model()
        with refused("training needs 'instances' with each image; missing in inputs [0]"), EventStorage():
            model([{"image": torch.zeros(3, 64, 80)}])
        with refused("GeneralizedRCNN.inference is for inference; call eval() first"):
            model.inference(batch(ONE))

    def test_proposals_that_come_with_the_inputs(self):
        model = make_model(PROPOSAL_GENERATOR__NAME="PrecomputedProposals").eval()
        inputs = batch(ONE)
        assert model.proposal_generator is None
        with refused("needs 'proposals'; missing in inputs [0]"):
            model(inputs)
        boxes = Boxes(torch.tensor([[8.0, 8, 40, 40], [0, 0, 20, 20]]))
        inputs[0]["proposals"] = Instances((64, 80), proposal_boxes=boxes, objectness_logits=torch.zeros(2))
        with torch.no_grad():
            assert len(model(inputs)[0]["instances"]) > 0
        losses, _ = train(model.train(), inputs)
        assert set(losses) == {"loss_cls", "loss_box_reg"}

    def test_proposal_network(self):
        cfg = make_cfg(META_ARCHITECTURE="ProposalNetwork")
        model = build_model(cfg)
        assert isinstance(model, ProposalNetwork)
        losses, _ = train(model, batch(TWO, NONE))
        assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc"}
        with torch.no_grad():
            inputs = [{**batch(ONE)[0], "height": 128, "width": 160}]
            found = model.eval()(inputs)[0]["proposals"]
        assert tuple(found.image_size) == (128, 160) and 0 < len(found) <= 20
        assert sorted(found.get_fields()) == ["objectness_logits", "proposal_boxes"]

    def test_visualization(self, monkeypatch):
        model = make_model(PROPOSAL_GENERATOR__MIN_SIZE=4)
        model.vis_period, drawn = 1, []
        with EventStorage() as storage:
            monkeypatch.setattr(storage, "put_image", lambda *picture: drawn.append(picture))
            model(batch(TWO, ONE))
        # Two panels of 64 x 80 pixels; event files are compared by the tag.
        ((tag, picture),) = drawn
        assert tag == "Left: GT bounding boxes;  Right: Predicted proposals" and picture.shape == (3, 64, 160)

    def test_registered_and_configurable(self):
        cfg = make_cfg()
        model = META_ARCH_REGISTRY.get("GeneralizedRCNN")(cfg)

        class Mine(GeneralizedRCNN):
            pass

        assert isinstance(model.roi_heads, StandardROIHeads) and model.input_format == "BGR"
        mine = Mine(cfg, input_format="RGB")
        assert mine.input_format == "RGB" and list(mine.state_dict()) == list(model.state_dict())
        with refused("vis_period needs input_format"):
            Mine(cfg, input_format=None, vis_period=3)

    def test_names_of_weights(self):
        names = set(make_model("both").state_dict())
        assert {
            "proposal_generator.rpn_head.conv.weight", "proposal_generator.rpn_head.anchor_deltas.bias",
            "roi_heads.box_head.fc1.weight", "roi_heads.box_predictor.cls_score.weight",
            "roi_heads.box_predictor.bbox_pred.bias", "roi_heads.mask_head.predictor.weight",
            "roi_heads.keypoint_head.score_lowres.weight",
        } <= names
        assert not any("anchor_generator" in name or "pixel" in name for name in names)
        cascade = make_model("cascade").state_dict()
        assert cascade["roi_heads.box_predictor.2.bbox_pred.weight"].shape == (4, 8)
        assert "roi_heads.box_head.1.fc1.weight" in cascade
