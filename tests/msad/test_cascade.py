"""Cascade Mask R-CNN and HTC: the digits of their rules by hand, what a stage learns from, the semantic branch."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torchvision.ops import roi_align

from msad import load_config
from msad.modeling.detectors.htc import HTCMaskHead
from msad.modeling.detectors.semantic_branch import SemanticBranch

CONFIGS = Path(__file__).parents[2] / "configs"
ARCHS = ("CascadeMask", "HTC")
SEMANTIC = {"MODEL__META_ARCHITECTURE": "HTC", "MODEL__HTC__SEMANTIC_ON": True, "MODEL__HTC__SEMANTIC_CLASSES": 5}
MMDET_WEIGHTS = ((10.0, 10, 5, 5), (20.0, 20, 10, 10), (1 / 0.033, 1 / 0.033, 1 / 0.067, 1 / 0.067))


def proposals_of(boxes, size=(1000, 1000)):
    return [Instances(size, proposal_boxes=Boxes(torch.tensor(boxes)))]


def say(heads, monkeypatch, predictions):
    """Let stage t of ``heads`` predict ``predictions[t]``, (logits, deltas) of all proposals."""
    monkeypatch.setattr(heads, "classify", lambda features, proposals, stage: predictions[stage])


# --- boxes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "score"), [("logits", 0.73106), ("probs", 0.70395)])
def test_scores_by_hand(tiny_model, monkeypatch, mean, score):
    heads = tiny_model("CascadeMask", MODEL__ROI_BOX_CASCADE_HEAD__SCORE_MEAN=mean).eval().roi_heads
    say(heads, monkeypatch, [(torch.tensor([x]), torch.zeros(1, 4)) for x in ([2.0, 0], [0.0, 0], [1.0, 0])])
    found = heads.detect({}, proposals_of([[10.0, 10, 50, 50]]))[0]
    torch.testing.assert_close(found.scores, torch.tensor([score]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("delta", "expected"),
    [
        ([1.0, 0, 1, 0], [[-0.10701, 12.10701], [-0.13859, 13.36000], [-0.16083, 14.27315]]),
        ([1.0, 0, 0, 0], [[1.0, 11.0], [1.5, 11.5], [1.83, 11.83]]),
    ],
)
def test_chain_of_boxes_by_hand(tiny_model, monkeypatch, delta, expected):
    """x1 and x2 of [0, 0, 10, 10], moved by one delta in each stage; 100 is added so that nothing is cut off."""
    heads = tiny_model("CascadeMask").eval().roi_heads
    for predictor, weights in zip(heads.box_predictor, MMDET_WEIGHTS):
        predictor.box2box_transform.weights = weights
    say(heads, monkeypatch, [(torch.tensor([[3.0, 0, 0, 0]]), torch.tensor([delta]))] * 3)
    proposals = proposals_of([[100.0, 100, 110, 110]])
    for stage, ends in enumerate(expected):
        proposals = heads.refine(heads.classify({}, proposals, stage), proposals, stage)
        torch.testing.assert_close(
            proposals[0].proposal_boxes.tensor[0, ::2] - 100, torch.tensor(ends), atol=2e-5, rtol=0
        )
    found = heads.detect({}, proposals_of([[100.0, 100, 110, 110]]))[0]
    torch.testing.assert_close(found.pred_boxes.tensor[:1], proposals[0].proposal_boxes.tensor)


def test_samples_of_the_stages(tiny_model, make_batch):
    """Thresholds rise, for HTC's masks too; the ground truth joins in every stage, and none moves on to the next."""
    heads, of_masks = tiny_model("CascadeMask").roi_heads, tiny_model("HTC").roi_heads
    gt = Instances((100, 100), gt_boxes=Boxes(torch.tensor([[0.0, 0, 40, 40]])), gt_classes=torch.tensor([1]))
    # IoU .55, .65, .8 and 0 with the object.
    given = torch.tensor([[0.0, 0, 40, 22], [0, 0, 40, 26], [0, 0, 40, 32], [60, 60, 90, 90]])
    for stage, positive in enumerate((3, 2, 1)):
        with EventStorage():
            drawn = heads.sample([Instances((100, 100), proposal_boxes=Boxes(given))], [gt], stage)[0]
            objects = of_masks.mask_samples([], [Instances((100, 100), proposal_boxes=Boxes(given))], [gt], stage)[0]
        assert len(drawn) == 5 and drawn.is_ground_truth.sum() == 1
        assert (drawn.gt_classes == 1).sum() == len(objects) == positive + 1  # with itself
        moved = heads.refine((torch.zeros(5, 4), torch.zeros(5, 4)), [drawn], stage)[0]
        assert sorted(moved.proposal_boxes.tensor.tolist()) == sorted(given.tolist())


def test_moved_boxes_end_at_the_border(tiny_model):
    """Half a width to the right; the second box then lies outside and is not learned from."""
    heads = tiny_model("CascadeMask").roi_heads
    (drawn,) = proposals_of([[60.0, 20, 90, 110], [96, 20, 112, 40]], (100, 100))
    drawn.is_ground_truth = torch.zeros(2, dtype=torch.bool)
    heads.box_predictor[0].box2box_transform.weights = (1.0, 1.0, 1.0, 1.0)
    predictions = torch.zeros(2, 4), torch.tensor([[0.5, 0, 0, 0]] * 2)
    expected = torch.tensor([[75.0, 20, 100, 100], [100, 20, 100, 40]])
    for training, left in ((True, 1), (False, 2)):
        moved = heads.train(training).refine(predictions, [drawn], 0)[0]
        torch.testing.assert_close(moved.proposal_boxes.tensor, expected[:left])


@pytest.mark.parametrize("arch", ARCHS)
def test_weights_of_the_stages(tiny_model, make_batch, arch, monkeypatch):
    """Unweighted (cls, box, mask) of (1, .4, .6), (.8, .4, .6), (.8, .2, .6) make 2 + .9 + .4."""
    heads = tiny_model(arch).roi_heads
    said = [(1, 0.4, 0.6), (0.8, 0.4, 0.6), (0.8, 0.2, 0.6)]
    gt = [Instances((100, 100), gt_boxes=Boxes(torch.tensor([[0.0, 0, 40, 40]])), gt_classes=torch.tensor([1]))]
    say(heads, monkeypatch, [(torch.zeros(2, 4), torch.zeros(2, 4))] * 3)
    for (cls, box, _), predictor in zip(said, heads.box_predictor):
        losses = {"loss_cls": torch.tensor(cls), "loss_box_reg": torch.tensor(box)}
        monkeypatch.setattr(predictor, "losses", lambda *_args, losses=losses: dict(losses))
    monkeypatch.setattr(heads, "mask_losses", lambda f, objects, stage: {"loss_mask": torch.tensor(said[stage][2])})
    with EventStorage():
        losses = heads(None, {}, proposals_of([[5.0, 0, 40, 40]], (100, 100)), gt)[1]
    assert sum(losses.values()).item() == pytest.approx(2 + 0.9 + 0.4)
    assert losses["loss_cls_stage1"].item() == pytest.approx(0.4)


def test_box_losses_equal_those_of_detectron2s_heads_of_one_stage(tiny_model, make_batch):
    """A cascade of one stage that leaves out nothing is Faster R-CNN."""
    single = {
        "MODEL__ROI_BOX_CASCADE_HEAD__IOUS": [0.5], "MODEL__ROI_BOX_CASCADE_HEAD__STAGE_LOSS_WEIGHTS": [1.0],
        "MODEL__ROI_BOX_CASCADE_HEAD__BBOX_REG_WEIGHTS": [[10.0, 10.0, 5.0, 5.0]],
    }  # fmt: skip
    ours = tiny_model("CascadeMask", **single)
    stock = tiny_model("MaskRCNN", MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG=True)
    renamed = {
        name.replace("box_head.", "box_head.0.").replace("box_predictor.", "box_predictor.0.").replace(
            "mask_head.", "mask_head.0."
        ): value
        for name, value in stock.state_dict().items()
    }
    ours.load_state_dict(renamed)
    batch = make_batch([(64, 96), (96, 64)])
    with EventStorage():
        torch.manual_seed(5)
        mine = ours(batch)
        torch.manual_seed(5)
        theirs = stock(batch)
    assert {name.replace("_stage0", "") for name in mine} == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name.replace("_stage0", "")])
    with torch.no_grad():
        for found, expected in zip(ours.eval()(batch), stock.eval()(batch)):
            found, expected = found["instances"], expected["instances"]
            assert len(found) == len(expected) > 0
            torch.testing.assert_close(found.scores, expected.scores)
            assert torch.equal(found.pred_masks, expected.pred_masks)


def test_masks_are_means(tiny_model, make_batch):
    model = tiny_model("CascadeMask").eval()
    batch = make_batch([(64, 96)])
    images = model.preprocess_image(batch)
    with torch.no_grad():
        maps = model.backbone(images.tensor)
        found = model.inference(batch, do_postprocess=False)[0]
        pooled = model.roi_heads.mask_pooler([maps[f"p{k}"] for k in range(2, 6)], [found.pred_boxes])
        single = []
        for head in model.roi_heads.mask_head:
            logits = head.layers(pooled)
            single.append(logits[torch.arange(len(found)), found.pred_classes].sigmoid())
        torch.testing.assert_close(found.pred_masks[:, 0], torch.stack(single).mean(dim=0))
        model.roi_heads.mask_mean = "last"
        again = model.inference(batch, do_postprocess=False)[0]
        torch.testing.assert_close(again.pred_masks[:, 0], single[2])


# --- HTC's mask heads -------------------------------------------------------------------------------------------------


@pytest.fixture
def identity_heads(tiny_cfg):
    """HTC heads of one channel and class: convolutions are the identity, conv_res is .5, the rest is 1."""
    cfg = tiny_cfg("HTC", MODEL__FPN__OUT_CHANNELS=1, MODEL__ROI_MASK_HEAD__CONV_DIM=1)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    heads = build_model(cfg).roi_heads.eval()
    for head in heads.mask_head:
        for name, parameter in head.named_parameters():
            nn.init.zeros_(parameter)
            if name == "mask_fcn1.weight":
                parameter.data[:, :, 1, 1] = 1
            elif name.endswith("weight"):
                nn.init.constant_(parameter, 0.5 if name.startswith("conv_res") else 1)
    return heads


@pytest.mark.parametrize(("mean", "expected"), [("all", 0.80020), ("last", 0.85195)])
def test_flow_of_masks_by_hand(identity_heads, mean, expected):
    x = torch.ones(1, 1, 4, 4)
    logits = identity_heads.mask_logits(x, [0, 1, 2])
    assert [y.unique().tolist() for y in logits] == [[1.0], [1.5], [1.75]]
    assert torch.equal(identity_heads.mask_logits(x, [1])[0], logits[1])
    identity_heads.mask_mean = mean
    found = Instances((9, 9), pred_boxes=Boxes(torch.tensor([[0.0, 0, 9, 9]])), pred_classes=torch.tensor([0]))
    masks = [m[0] for m in identity_heads.masks(x, [found])]
    torch.testing.assert_close(sum(masks) / len(masks), torch.full((1, 1, 8, 8), expected), atol=1e-5, rtol=0)


def test_only_later_heads_receive(tiny_model):
    heads = tiny_model("HTC").roi_heads
    names = [{name.split(".")[0] for name, _ in head.named_parameters()} for head in heads.mask_head]
    assert names[0] == {"mask_fcn1", "deconv", "predictor"} and names[1] == names[2] == {*names[0], "conv_res"}
    shape = ShapeSpec(channels=8, height=4, width=4)
    with pytest.raises(ValueError, match=r"CONV_DIM is 16.*features of 8"):
        HTCMaskHead(shape, num_classes=2, num_conv=1, conv_dim=16)


def test_mask_heads_learn_on_moved_boxes_and_through_the_flow(tiny_model, make_batch, monkeypatch):
    model = tiny_model("HTC")
    heads, seen = model.roi_heads, []
    original = heads.mask_losses
    monkeypatch.setattr(heads, "mask_losses", lambda f, objects, t: seen.append(objects) or original(f, objects, t))
    refined = []
    refine = heads.refine
    monkeypatch.setattr(heads, "refine", lambda *args: refined.append(refine(*args)) or refined[-1])
    with EventStorage():
        losses = model(make_batch([(64, 96), (64, 96)]))
    for stage, objects in enumerate(seen):
        assert sum(map(len, objects)) > 0
        for found, moved in zip(objects, refined[stage]):
            boxes = found.proposal_boxes.tensor[~found.is_ground_truth]
            assert all((box == moved.proposal_boxes.tensor).all(dim=1).any() for box in boxes)
    first = [p for name, p in heads.mask_head[0].named_parameters() if name.startswith("mask_fcn")]
    for stage in range(3):
        grads = torch.autograd.grad(losses[f"loss_mask_stage{stage}"], first, retain_graph=True)
        assert all(g.abs().max() > 0 for g in grads)


@pytest.mark.parametrize("arch", ARCHS)
def test_images_without_objects_and_steps_without_positives(tiny_model, make_batch, arch):
    """Every parameter of the heads is part of the graph, which several processes need."""
    model = tiny_model(arch, MODEL__ROI_HEADS__PROPOSAL_APPEND_GT=False)
    for boxes in ([0, 2], 0):
        model.zero_grad()
        with EventStorage():
            losses = model(make_batch([(64, 96), (64, 96)], boxes=boxes))
        sum(losses.values()).backward()
        assert all(torch.isfinite(x) for x in losses.values())
        lacking = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert lacking == []


@pytest.mark.parametrize("arch", ARCHS)
def test_mixed_precision(tiny_model, make_batch, arch):
    model, batch = tiny_model(arch), make_batch([(64, 96)])
    with EventStorage(), torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(batch)
        sum(losses.values()).backward()
    assert all(torch.isfinite(x) for x in losses.values())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.eval()(batch)[0]["instances"]
    assert len(found) > 0 and found.pred_masks.shape[1:] == (64, 96)


# --- the semantic branch ----------------------------------------------------------------------------------------------


def test_branch_equals_a_slow_computation():
    shapes = {f"p{k}": ShapeSpec(channels=4, stride=2**k) for k in range(2, 5)}
    branch = SemanticBranch(shapes, in_features=["p2", "p3", "p4"], fusion_level="p3", num_classes=6)
    features = {name: torch.randn(2, 4, 64 // 2**k, 96 // 2**k) for k, name in enumerate(shapes, start=2)}
    embedding, logits = branch(features)
    total = torch.zeros(2, 4, 8, 12)
    for name, conv in zip(shapes, branch.lateral_convs):
        x = features[name]
        h, w = x.shape[-2:]
        resized = torch.zeros(2, 4, 8, 12)
        for i, j in itertools.product(range(8), range(12)):
            y, z = i * (h - 1) / 7, j * (w - 1) / 11
            a, b = min(int(y), h - 2), min(int(z), w - 2)
            top = x[:, :, a, b] * (b + 1 - z) + x[:, :, a, b + 1] * (z - b)
            low = x[:, :, a + 1, b] * (b + 1 - z) + x[:, :, a + 1, b + 1] * (z - b)
            resized[:, :, i, j] = top * (a + 1 - y) + low * (y - a)
        total = total + F.conv2d(resized, conv.weight, conv.bias).relu()
    for conv in branch.convs:
        total = F.conv2d(total, conv.weight, conv.bias, padding=1).relu()
    one = F.conv2d(total, branch.conv_embedding.weight, branch.conv_embedding.bias).relu()
    torch.testing.assert_close(embedding, one, rtol=1e-4, atol=1e-5)
    other = F.conv2d(total, branch.conv_logits.weight, branch.conv_logits.bias)
    torch.testing.assert_close(logits, other, rtol=1e-4, atol=1e-5)
    assert branch.eval()(features)[1] is None


def test_semantic_loss_by_hand():
    """A map of 20 x 17 pixels at stride 8: rows 0, 8, 16 and columns 0, 8, 16; the rest of the batch does not count."""
    shapes = {"p3": ShapeSpec(channels=4, stride=8)}
    branch = SemanticBranch(shapes, in_features=["p3"], fusion_level="p3", num_classes=3)
    labels = torch.full((20, 17), 2)
    labels[::8, ::8] = torch.tensor([[0, 1, 0], [255, 1, 0], [0, 0, 0]])
    logits = torch.zeros(1, 3, 4, 4)
    logits[0, 1, :3, 1] = 2.0
    z = 2 + torch.tensor(2.0).exp()
    right, wrong, other = (z.log() - 2).item(), z.log().item(), torch.tensor(3.0).log().item()
    expected = 0.2 * (2 * right + wrong + 5 * other) / 8
    assert branch.losses(logits, [labels])["loss_sem_seg"].item() == pytest.approx(expected, rel=1e-5)
    ignored = branch.losses(logits.requires_grad_(), [torch.full((20, 17), 255)])["loss_sem_seg"]
    assert ignored == 0 and ignored.requires_grad


def with_maps(batch):
    for item in batch:
        item["sem_seg"] = torch.randint(0, 5, item["image"].shape[-2:])
    return batch


def test_htc_with_the_branch_trains_and_detects(tiny_model, make_batch, same_detections):
    model = tiny_model("HTC", **SEMANTIC)
    batch = with_maps(make_batch([(64, 96), (50, 70)]))
    with EventStorage():
        losses = model(batch)
        sum(losses.values()).backward()
    assert losses["loss_sem_seg"] > 0 and model.roi_heads.semantic_targets is None
    assert all(p.grad is not None for p in model.roi_heads.semantic_head.parameters())
    embedding = model.roi_heads.semantic_head.conv_embedding.weight
    model.zero_grad()
    with EventStorage():
        model(batch)["loss_cls_stage0"].backward()
    assert embedding.grad.abs().max() > 0  # boxes learn from it too
    model.eval()
    equal = make_batch([(64, 96), (64, 96)])
    with torch.no_grad():
        same_detections(model(equal), [model([item])[0] for item in equal])
        embedding.zero_()
        blind = model(equal)
    assert not torch.equal(blind[0]["instances"].scores, model(equal)[0]["instances"].scores * 0)


def test_fusion_equals_a_slow_computation(tiny_model):
    heads = tiny_model("HTC", **SEMANTIC).roi_heads.eval()
    features = {f"p{k}": torch.randn(1, 8, 128 // 2**k, 128 // 2**k) for k in range(2, 7)}
    boxes = [Boxes(torch.tensor([[10.0, 20, 70, 60], [30, 2, 100, 120]]))]
    semantic = torch.randn(1, 8, 16, 16)
    plain = [heads.box_pooler([features[f"p{k}"] for k in range(2, 6)], boxes)]
    plain.append(heads.mask_pooler([features[f"p{k}"] for k in range(2, 6)], boxes))
    cut = roi_align(semantic, [boxes[0].tensor], 4, 1 / 8, -1, True)
    given = {**features, "semantic": semantic}
    torch.testing.assert_close(heads.pool_masks(given, boxes), plain[1] + cut)
    torch.testing.assert_close(heads.pool_boxes(given, boxes), plain[0] + F.adaptive_avg_pool2d(cut, 3))


@pytest.mark.parametrize(("shape", "text"), [(None, "has none"), ((64, 95), r"has one of \(64, 95\)")])
def test_inputs_without_maps_are_named(tiny_model, make_batch, shape, text):
    model = tiny_model("HTC", **SEMANTIC)
    batch = make_batch([(64, 96)])
    if shape:
        batch[0]["sem_seg"] = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"'sem_seg' of \(64, 96\) with image 0 \(0.png\), which {text}"):
        model(batch)


def test_the_plain_architecture_says_what_the_branch_needs(tiny_model, make_batch):
    model = tiny_model("HTC", **{**SEMANTIC, "MODEL__META_ARCHITECTURE": "GeneralizedRCNN"})
    with pytest.raises(ValueError, match=r"MODEL.META_ARCHITECTURE: HTC"), EventStorage():
        model(make_batch([(64, 96)]))


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "options", "text"),
    [
        ("CascadeMask", {"MODEL__ROI_BOX_CASCADE_HEAD__SCORE_MEAN": "mean"}, "SCORE_MEAN must be.*'mean'"),
        ("CascadeMask", {"MODEL__ROI_BOX_CASCADE_HEAD__MASK_MEAN": "first"}, "MASK_MEAN must be.*'first'"),
        ("CascadeMask", {"MODEL__ROI_BOX_CASCADE_HEAD__STAGE_LOSS_WEIGHTS": [1.0]}, "STAGE_LOSS_WEIGHTS has 1.*3"),
        ("CascadeMask", {"MODEL__KEYPOINT_ON": True}, "KEYPOINT_ON"),
        ("HTC", {"MODEL__MASK_ON": False}, "MASK_ON"),
        ("HTC", {"MODEL__ROI_MASK_HEAD__NAME": "MaskRCNNConvUpsampleHead"}, "HTCMaskHead, not MaskRCNNConvUpsample"),
        ("HTC", {**SEMANTIC, "MODEL__HTC__SEMANTIC_FEATURES": ["p3", "p9"]}, "SEMANTIC_FEATURES"),
    ],
)
def test_wrong_settings_are_named(tiny_model, arch, options, text):
    with pytest.raises(ValueError, match=text):
        tiny_model(arch, **options)


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("cascade_mask_rcnn_R_50", [], 77324606),
        ("htc_R_50", ["MODEL.HTC.SEMANTIC_ON", False], 77456190),
        ("htc_R_50", [], 80258293),
    ],
)
def test_number_of_parameters(name, options, parameters):
    """Those of the models that mmdetection publishes, counted there."""
    cfg = load_config(CONFIGS / "Teachers" / f"{name}.yaml", ["MODEL.DEVICE", "meta", "MODEL.RESNETS.NORM", "BN"])
    cfg.merge_from_list(["MODEL.BACKBONE.FREEZE_AT", 0, *options])  # frozen normalisation has no parameters
    with torch.device("meta"):
        assert sum(p.numel() for p in build_model(cfg).parameters()) == parameters
