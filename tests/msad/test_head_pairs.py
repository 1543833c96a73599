"""From models to pairs of head predictions: taps, the teacher's heads on the student's anchors, and what is refused."""

from __future__ import annotations

import copy
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from helpers import between, load_narrow, make_context
from torch import nn

from msad.distill.distiller import Distiller
from msad.distill.head_pairs import check_heads, check_kind, pair_heads
from msad.distill.losses import DISTILL_LOSS_REGISTRY
from msad.distill.teachers import FrozenTeacher
from msad.modeling.adapters import adapt
from msad.modeling.head_outputs import tap_heads
from msad.resolution import downsample_batch, get_resolution

DENSE = ["RetinaNet", "FCOS", "GFL"]
KINDS = ("dense", "distributions", "rcnn")
SIZES = [(64, 96), (90, 128)]


@pytest.fixture
def look(monkeypatch):
    """A registered loss that keeps the pairs it sees."""

    class Look(nn.Module):
        heads = KINDS
        seen: list = []

        def forward(self, pairs, context):
            self.seen += pairs
            return {"sum": sum(p.student_logits.sum() + p.student_boxes.sum() for p in pairs)}

    monkeypatch.setitem(DISTILL_LOSS_REGISTRY._obj_map, "Look", Look)
    return Look


@contextmanager
def counting(*modules):
    calls = [0] * len(modules)

    def count(i):
        def hook(*_):
            calls[i] += 1

        return hook

    handles = [m.register_forward_hook(count(i)) for i, m in enumerate(modules)]
    yield calls
    for handle in handles:
        handle.remove()


def step(distiller, batch):
    with EventStorage(0):
        return distiller(batch)


@pytest.mark.parametrize("arch", DENSE)
@pytest.mark.parametrize("resolution", ["H", "L"])
def test_pairs_are_what_the_heads_say(make_distiller, tiny_model, make_batch, look, arch, resolution):
    """Against a copy of the student run by hand, and the teacher's head on its maps, cut to the student's grid."""
    shift = get_resolution(resolution).shift
    sizes = [[4 * 2**level] for level in range(3 - shift, 8 - shift)]
    student = tiny_model(arch, levels=range(3 - shift, 8 - shift), seed=1, MODEL__ANCHOR_GENERATOR__SIZES=sizes)
    distiller = make_distiller(
        resolution, teacher=tiny_model(arch, resolutions=["H", "L"]), student=student, losses=[{"NAME": "Look"}]
    )
    alone, teacher = copy.deepcopy(student).train(), distiller.teacher
    batch = make_batch(SIZES, boxes=[3, 0])
    with counting(student.head, teacher.detector.head) as calls:
        step(distiller, batch)
    assert calls == [1, 1]
    (pair,) = look.seen

    reduced = downsample_batch(batch, shift, "cpu")
    images = alone.preprocess_image(reduced)
    maps = list(alone.backbone(images.tensor).values())
    own = alone.head(maps)
    names = [f"p{level}" for level in range(3, 8)]
    hers = teacher.features(batch, shift)
    cut = [hers[name][..., : m.shape[-2], : m.shape[-1]] for name, m in zip(names, maps)]
    with torch.no_grad():
        theirs = teacher.detector.head(cut)

    def rows(levels, width):
        n = len(levels[0])
        return torch.cat([x.permute(0, 2, 3, 1).reshape(n, -1, width) for x in levels], 1)

    width = 4 * 17 if arch == "GFL" else 4
    torch.testing.assert_close(pair.student_logits, rows(own[0], 3))
    torch.testing.assert_close(pair.student_boxes, rows(own[1], width))
    torch.testing.assert_close(pair.teacher_logits, rows(theirs[0], 3))
    torch.testing.assert_close(pair.teacher_boxes, rows(theirs[1], width))
    assert pair.student_logits.requires_grad and not pair.teacher_logits.requires_grad

    anchors = teacher.detector.anchor_generator(cut)
    torch.testing.assert_close(pair.anchors, torch.cat([a.tensor for a in anchors]))
    assert pair.level_sizes == [len(a) for a in anchors] and pair.name == "dense" and pair.classes == 3
    labels, targets = teacher.detector.label_anchors(anchors, [x["instances"] for x in batch])
    assert torch.equal(pair.labels, torch.stack(labels)) and (pair.labels[1] == 3).all()
    image, place = pair.positives
    assert len(place) > 0
    divisor = len(place) if arch == "GFL" else student.loss_normalizer  # RetinaNet and FCOS have a running count
    assert pair.normalizer.item() == pytest.approx(divisor) and (arch == "GFL") == (divisor == len(place))
    torch.testing.assert_close(pair.targets[image, place], torch.stack(targets)[image, place])


def test_heads_run_for_those_who_ask(make_distiller, make_batch):
    distiller = make_distiller("L")  # AlignedL1
    with counting(distiller.student.head, distiller.teacher.detector.head) as calls:
        step(distiller, make_batch(SIZES))
    assert calls == [1, 0]
    both = make_distiller("L", losses=[{"NAME": "Chen"}, {"NAME": "Chen", "MU": 1.0}, {"NAME": "AlignedL1"}])
    with counting(both.student.head, both.teacher.detector.head) as calls:
        step(both, make_batch(SIZES))
    assert calls == [1, 1]


def test_taps_are_gone_after_the_step(make_distiller, make_batch):
    distiller = make_distiller("L", losses=[{"NAME": "Chen"}])
    student = distiller.student
    step(distiller, make_batch(SIZES))
    for fails in (False, True):
        if fails:  # in the student, after the taps are set
            with pytest.raises((ValueError, AssertionError)), EventStorage(0):
                distiller([{"image": torch.zeros(3, 64, 64)}])
        assert "label_anchors" not in vars(student) and not student.head._forward_hooks
    assert not any("heads" in name or "head_" in name for name in distiller.state_dict() if "student" not in name)


@pytest.mark.parametrize(("arch", "name"), [("GFL", "LD"), *((a, "Chen") for a in DENSE)])
@pytest.mark.parametrize("resolution", ["H", "L"])
@pytest.mark.parametrize("boxes", [[2, 0], [0, 0]])
def test_in_a_step_of_distillation(make_distiller, tiny_model, make_batch, arch, name, resolution, boxes):
    shift = get_resolution(resolution).shift
    student = tiny_model(arch, levels=range(3 - shift, 8 - shift), seed=1, MODEL__FPN__OUT_CHANNELS=4)
    distiller = make_distiller(
        resolution, student=student, teacher=tiny_model(arch, resolutions=["H", "L"]),
        losses=[{"NAME": name}, {"NAME": "FitNet"}],
    )  # fmt: skip
    losses = step(distiller, make_batch(SIZES, boxes=boxes))
    found = {k: v for k, v in losses.items() if k.startswith(f"loss_distill/{name}")}
    assert len(found) == (3 if name == "LD" else 2) and all(v.isfinite() for v in losses.values())
    assert sum(found.values()) > 0 or boxes == [0, 0]
    sum(losses.values()).backward()
    trained = [p for p in distiller.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_a_student_that_is_the_teacher_has_nothing_to_learn_from_ld(tiny_model, make_batch):
    teacher = tiny_model("GFL").eval()
    student = copy.deepcopy(teacher)
    losses = between([{"NAME": "LD"}], {}, {})
    distiller = Distiller(student, [FrozenTeacher(teacher)], losses, get_resolution("H"))
    distiller.training = True  # running statistics on both sides
    student.eval()
    student.training = True
    found = step(distiller, make_batch([(64, 96)]))
    ld = [v.item() for k, v in found.items() if "LD" in k]
    assert ld == pytest.approx([0, 0, 0], abs=1e-6) and len(ld) == 3


# --- what cannot be compared ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher", "kinds", "message"),
    [
        ({"arch": "FCOS"}, {"arch": "GFL"}, ("distributions",), r"Loss compares .* distributions heads; the student F"),
        ({"arch": "FCOS"}, {"arch": "RetinaNet"}, KINDS, r"equal box encoding in the dense heads; student: .*Linear"),
        ({"levels": range(2, 7)}, {}, KINDS, r"equal levels \(H frame\) in the dense heads; student: \['p2'"),
        ({"MODEL__FCOS__NUM_CLASSES": 4}, {}, KINDS, r"equal classes in the dense heads; student: 4, teacher: 3"),
        (
            {"arch": "GFL", "MODEL__GFL__REG_MAX": 8}, {"arch": "GFL"}, KINDS,
            r"equal box encoding .*\('DistributionTransform', 8",
        ),
        (
            {"arch": "RetinaNet", "MODEL__ANCHOR_GENERATOR__SIZES": [[32, 40], [64, 80], [128, 1], [256, 2], [512, 3]]},
            {"arch": "RetinaNet"}, KINDS, r"equal anchors \(H pixels\)",
        ),
        (
            {"arch": "RetinaNet", "MODEL__ANCHOR_GENERATOR__OFFSET": 0.5}, {"arch": "RetinaNet"}, KINDS,
            r"equal offset of the anchors in the dense heads; student: 0.5, teacher: 0",
        ),
    ],
)  # fmt: skip
def test_different_heads_are_named(tiny_model, student, teacher, kinds, message):
    with pytest.raises(ValueError, match=message):
        check_heads(tiny_model(**student), tiny_model(**teacher), 0, kinds, "Loss")


def test_anchors_may_differ_by_rounding(tiny_model):
    """Sides of 32 to 512 px: half a percent is none of their differences, three percent are."""
    def anchors(factor):
        sizes = [[factor * 4 * 2**level] for level in range(3, 8)]
        return tiny_model("RetinaNet", MODEL__ANCHOR_GENERATOR__SIZES=sizes)

    check_heads(anchors(1.005), anchors(1.0), 0, KINDS, "Loss")
    with pytest.raises(ValueError, match=r"equal anchors \(H pixels\) in the dense heads"):
        check_heads(anchors(1.03), anchors(1.0), 0, KINDS, "Loss")


def test_the_distiller_checks_when_it_is_built(make_distiller, tiny_model):
    with pytest.raises(ValueError, match="LD compares the predictions of distributions heads"):
        make_distiller("L", losses=[{"NAME": "LD"}])
    with pytest.raises(ValueError, match="Chen needs equal box encoding"):
        make_distiller("L", teacher=tiny_model("GFL", resolutions=["H", "L"]), losses=[{"NAME": "Chen"}])


HEADS = re.compile(r"NAME: (LD|Chen)\b")
YAMLS = [p for p in (Path(__file__).parents[2] / "configs").rglob("*.yaml") if HEADS.search(p.read_text())]


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_yaml_files_pair_heads_that_compare(path):
    cfg = load_narrow(path)
    student, teacher = (build_model(c) for c in (cfg, load_narrow(cfg.DISTILL.TEACHERS[0]["CONFIG"])))
    compared = [dict(entry) for entry in cfg.DISTILL.LOSSES if entry["NAME"] in ("LD", "Chen")]
    assistants = {entry["NAME"] for entry in cfg.DISTILL.ASSISTANTS}
    of_assistant = [entry.pop("SOURCE", "") in assistants for entry in compared]
    losses = between(compared, {}, {})
    assert len(losses) == len(compared) > 0
    for loss, of_students_head in zip(losses, of_assistant):
        if of_students_head:
            check_kind(student, "student", loss.heads, loss.name)
        else:
            shift = get_resolution(cfg.DISTILL.STUDENT_RESOLUTION).shift
            check_heads(student, getattr(teacher, "detector", teacher), shift, loss.heads, loss.name)


def test_a_module_without_heads():
    with pytest.raises(TypeError, match="Linear cannot be run from features"):
        adapt(nn.Linear(1, 1)).heads()


# --- R-CNN ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_faster(tiny_cfg):
    def make(levels=range(3, 7), seed=0, **options):
        names = [f"p{level}" for level in levels]
        keys = {
            "RPN.IN_FEATURES": names, "ROI_HEADS.IN_FEATURES": names[:-1], "ROI_HEADS.NAME": "StandardROIHeads",
            "ROI_HEADS.NUM_CLASSES": 3, "ROI_HEADS.BATCH_SIZE_PER_IMAGE": 32, "RPN.BATCH_SIZE_PER_IMAGE": 64,
            "ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead", "ROI_BOX_HEAD.NUM_FC": 1, "ROI_BOX_HEAD.FC_DIM": 16,
            "ROI_BOX_HEAD.POOLER_RESOLUTION": 3, "MASK_ON": False, "RPN.POST_NMS_TOPK_TRAIN": 50,
        }  # fmt: skip
        options = {**{f"MODEL__{k.replace('.', '__')}": v for k, v in keys.items()}, **options}
        torch.manual_seed(seed)
        cfg = tiny_cfg("GeneralizedRCNN", levels=levels, **options)
        model = build_model(cfg)
        with torch.no_grad():
            for parameter in model.roi_heads.parameters():
                parameter.normal_(0, 0.2)
            for parameter in model.proposal_generator.parameters():
                parameter.normal_(0, 0.2)
        return model

    return make


def rcnn_pairs(student, teacher, shift, boxes=(3, 0)):
    """Pairs of a step on random maps, P3-P6 of an H image of 128x192, which the student takes as its own."""
    h, w = 128, 192
    maps = {level: torch.randn(2, 8, -(-h // 2**level), -(-w // 2**level)) for level in range(3, 7)}
    scale = 2**shift
    gt = []
    for count in boxes:
        corner = torch.rand(count, 2) * torch.tensor([w / 2, h / 2])
        gt.append(Instances((h // scale, w // scale)))
        gt[-1].gt_boxes = Boxes(torch.cat([corner, corner + 50.0], 1) / scale)
        gt[-1].gt_classes = torch.arange(count) % 3
    own = {f"p{level - shift}": x for level, x in maps.items()}
    images = ImageList(torch.zeros(2, 3, h // scale, w // scale), [(h // scale, w // scale)] * 2)
    rpn, roi = student.proposal_generator, student.roi_heads
    heads = adapt(student.train()).heads()
    with EventStorage(0), tap_heads(heads) as record, counting(rpn.rpn_head, roi.box_predictor) as calls:
        proposals, losses = rpn(images, own, gt)
        losses.update(roi(images, own, proposals, gt)[1])
    assert calls == [1, 1]
    named = {f"p{level}": x for level, x in maps.items()}
    return pair_heads(record, student, teacher, adapt(teacher.eval()).run_head, named, shift), record, losses, named


@pytest.mark.parametrize("shift", [0, 1])
def test_rcnn_of_equal_heads_and_maps_says_the_same_in_both_frames(tiny_faster, shift):
    """Anchors, proposals and pooled regions of L are those of H: equal weights give equal predictions."""
    teacher, student = tiny_faster(), tiny_faster(levels=range(3 - shift, 7 - shift), seed=1)
    for part in ("proposal_generator", "roi_heads"):
        getattr(student, part).load_state_dict(getattr(teacher, part).state_dict(), strict=True)
    check_heads(student, teacher, shift, KINDS, "Loss")
    (rpn, roi), record, _, named = rcnn_pairs(student, teacher, shift)
    assert (rpn.name, roi.name, rpn.classes, roi.classes) == ("rpn", "roi", 1, 3)
    for pair in (rpn, roi):
        torch.testing.assert_close(pair.student_logits, pair.teacher_logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(pair.student_boxes, pair.teacher_boxes, rtol=1e-4, atol=1e-4)
        assert pair.student_logits.requires_grad and not pair.teacher_logits.requires_grad
    anchors = teacher.proposal_generator.anchor_generator(list(named.values()))
    torch.testing.assert_close(rpn.anchors, torch.cat([a.tensor for a in anchors]))
    assert rpn.student_logits.shape == (2, len(rpn.anchors), 1) and set(rpn.labels.unique().tolist()) == {-1, 0, 1}
    assert (rpn.labels >= 0).sum(dim=1).tolist() == [64, 64] and (rpn.labels[1] != 0).all()

    (_, proposals), _ = record.assigned["roi"]
    assert roi.student_logits.shape == (1, sum(map(len, proposals)), 4)
    assert torch.equal(roi.labels[0], torch.cat([p.gt_classes for p in proposals]))
    torch.testing.assert_close(roi.anchors, 2.0**shift * torch.cat([p.proposal_boxes.tensor for p in proposals]))
    with torch.no_grad():
        again = adapt(teacher).run_head("roi", named, [Boxes(roi.anchors), Boxes(roi.anchors[:0])])
    torch.testing.assert_close(again[0][: len(proposals[0])], roi.teacher_logits[0, : len(proposals[0])])


def test_chen_on_an_rcnn(tiny_faster):
    teacher, student = tiny_faster(), tiny_faster(levels=range(2, 6), seed=1)
    (loss,) = between([{"NAME": "Chen", "MARGIN": 10.0}], {}, {})
    for boxes in ((3, 0), (0, 0)):
        pairs, _, detection, _ = rcnn_pairs(student, teacher, 1, boxes)
        found = loss(make_context([], pair_heads=lambda source, pairs=pairs: pairs))
        assert list(found) == [f"loss_distill/Chen/{k}" for k in ("rpn_cls", "rpn_reg", "roi_cls", "roi_reg")]
        student.zero_grad()
        sum([*found.values(), *detection.values()]).backward()
        assert all(v.isfinite() for v in found.values()) and found["loss_distill/Chen/roi_cls"] > 0
        assert (found["loss_distill/Chen/rpn_reg"] > 0) == (boxes == (3, 0))
        heads = [*student.proposal_generator.parameters(), *student.roi_heads.parameters()]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in heads)
        assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"MODEL__ROI_HEADS__NUM_CLASSES": 4}, r"equal classes in the roi heads; student: 4, teacher: 3"),
        ({"MODEL__RPN__BBOX_REG_WEIGHTS": (2.0, 2.0, 1.0, 1.0)}, r"equal box encoding in the rpn heads"),
        ({"MODEL__ANCHOR_GENERATOR__SIZES": [[16], [32], [64], [128]]}, r"equal anchors \(H pixels\) in the rpn heads"),
    ],
)
def test_different_rcnn_heads_are_named(tiny_faster, options, message):
    with pytest.raises(ValueError, match=message):
        check_heads(tiny_faster(**options), tiny_faster(), 0, KINDS, "Chen")


def test_dense_and_rcnn_do_not_compare(tiny_faster, tiny_model):
    with pytest.raises(ValueError, match=r"Chen needs heads of one kind, not those of a GeneralizedRCNN student and a"):
        check_heads(tiny_faster(), tiny_model("RetinaNet"), 0, KINDS, "Chen")


def test_the_stages_of_a_cascade(tiny_faster):
    """A head a stage with a code of its own, and no comparison with a detector of one stage."""
    cascade = {"MODEL__ROI_HEADS__NAME": "CascadeROIHeads", "MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG": True}
    student, teacher = tiny_faster(**cascade), tiny_faster(seed=1, **cascade)
    assert list(adapt(student).heads()) == ["rpn", "roi0", "roi1", "roi2"]
    check_heads(student, teacher, 0, KINDS, "Chen")
    with pytest.raises(ValueError, match="Chen needs heads of one kind"):
        check_heads(student, tiny_faster(), 0, KINDS, "Chen")
    student.roi_heads.box_predictor[1].box2box_transform.weights = (1.0, 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="Chen needs equal box encoding in the roi1 heads"):
        check_heads(student, teacher, 0, KINDS, "Chen")


def test_htc_with_its_semantic_branch_is_refused(tiny_model):
    htc = tiny_model("HTC", MODEL__META_ARCHITECTURE="HTC", MODEL__HTC__SEMANTIC_ON=True)
    with pytest.raises(TypeError, match="HTC with HTCROIHeads cannot be compared"):
        adapt(htc).heads()


@pytest.mark.parametrize("on_predictions", [False, True])
def test_proposals_are_those_that_the_heads_saw(tiny_model, make_batch, look, on_predictions):
    """With TRAIN_ON_PRED_BOXES a box head replaces them, for the mask head, before the teacher's heads run."""
    teacher = tiny_model("FasterRCNN", MODEL__ROI_BOX_HEAD__TRAIN_ON_PRED_BOXES=on_predictions).eval()
    nn.init.normal_(teacher.roi_heads.box_predictor.bbox_pred.weight, std=0.5)
    losses = between([{"NAME": "Look"}], {}, {})
    distiller = Distiller(copy.deepcopy(teacher), [FrozenTeacher(teacher)], losses, get_resolution("H")).train()
    for module in distiller.student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    step(distiller, make_batch(SIZES))
    roi = look.seen[-1]
    assert roi.name == "roi"
    torch.testing.assert_close(roi.student_logits, roi.teacher_logits)
    torch.testing.assert_close(roi.student_boxes, roi.teacher_boxes)
    *_, target = roi.matched_deltas()
    image, anchor = roi.positives
    decoded = roi.decode(target, roi.anchors[anchor])
    assert len(image)
    torch.testing.assert_close(decoded, roi.targets[image, anchor], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("resolution", ["H", "L"])
@pytest.mark.parametrize("boxes", [[2, 0], [0, 0]])
def test_chen_in_a_step_of_an_rcnn(make_distiller, tiny_model, make_batch, resolution, boxes):
    """Faster R-CNN under a multi-resolution teacher, whose heads see its fused maps."""
    shift = get_resolution(resolution).shift
    sizes = [[4 * 2**level] for level in range(2 - shift, 7 - shift)]
    student = tiny_model("FasterRCNN", levels=range(2 - shift, 7 - shift), seed=1, MODEL__ANCHOR_GENERATOR__SIZES=sizes)
    distiller = make_distiller(
        resolution, student=student, teacher=tiny_model("FasterRCNN", resolutions=["H", "L"]),
        losses=[{"NAME": "Chen", "MARGIN": 10.0}, {"NAME": "FitNet"}],
    )  # fmt: skip
    theirs = distiller.teacher.detector
    counted = [student.proposal_generator.rpn_head, student.roi_heads.box_predictor]
    with counting(*counted, theirs.proposal_generator.rpn_head, theirs.roi_heads.box_predictor) as calls:
        losses = step(distiller, make_batch(SIZES, boxes=boxes))
    assert calls == [1, 1, 1, 1]
    found = {k: v for k, v in losses.items() if "Chen" in k}
    assert len(found) == 4 and all(v.isfinite() for v in losses.values())
    assert all(v > 0 for k, v in found.items() if boxes == [2, 0] or k.endswith("_cls"))
    sum(losses.values()).backward()
    trained = [p for p in distiller.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_losses_of_reppoints_are_divided_by_one_positive_an_image_at_least(make_distiller, make_batch, tiny_model):
    """Detection losses count so, and losses between predictions are divided as they are."""
    student, teacher = tiny_model("RepPoints", levels=range(2, 7)), tiny_model("RepPoints")
    distiller = make_distiller("L", teacher=teacher, student=student, losses=[{"NAME": "Chen"}])
    for boxes, least in (([0, 0, 0, 0], 4), ([0, 0, 3, 0], 4)):
        batch = make_batch([(96, 128)] * 4, boxes=boxes)
        with EventStorage(0):
            context = distiller.observe(batch)
            (pair,) = context.heads("teacher")
        positives = ((pair.labels >= 0) & (pair.labels < pair.classes)).sum(dim=1)
        assert pair.count == positives.clamp(min=1).sum() and pair.count >= least


def test_point_sets_say_what_their_own_scale_makes_of_them(make_distiller, make_batch, tiny_model):
    """RepPoints learn it; the teacher's points under the student's scale are not the teacher's boxes."""
    student, teacher = tiny_model("RepPoints", levels=range(2, 7), seed=1), tiny_model("RepPoints", seed=3)
    with torch.no_grad():
        student.head.transform.moment_transfer.fill_(0.0)
        teacher.head.transform.moment_transfer.fill_(0.7)
    distiller = make_distiller("L", teacher=teacher, student=student, losses=[{"NAME": "Chen"}])
    with EventStorage(0):
        (pair,) = distiller.observe(make_batch([(96, 128)] * 2)).heads("teacher")
    s, t, _ = pair.matched_deltas()
    assert len(s) > 0
    torch.testing.assert_close(t, teacher.head.transform.corners(pair.teacher_boxes[pair.positives]).detach())
    torch.testing.assert_close(s, student.head.transform.corners(pair.student_boxes[pair.positives]))
