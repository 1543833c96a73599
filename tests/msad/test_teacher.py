"""The multi-resolution teacher against the same computation written out with its parts."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage

from msad.modeling.adapters import adapt
from msad.modeling.teacher import MultiScaleTeacher, teacher_levels
from msad.resolution import RESOLUTIONS, downsample

H, L, EL = (RESOLUTIONS[name] for name in ("H", "L", "EL"))
SIZES = [(64, 96), (50, 127)]  # both padded to (64, 128)


def manual_branch(detector, batch, shift, padded):
    """One branch without the teacher's code: reduce, normalise, pad (``padded``: (h, w) in H pixels), rename."""
    k = 2**shift
    images = []
    for item in batch:
        x = (downsample(item["image"], shift).float() - detector.pixel_mean) / detector.pixel_std
        images.append(F.pad(x, (0, padded[1] // k - x.shape[-1], 0, padded[0] // k - x.shape[-2])))
    maps = detector.backbone(torch.stack(images))
    return {f"p{level}": maps[f"p{level - shift}"] for level in range(3, 8)}


def manual_fusion(fusion, branches, batch):
    """Gates from means over the images without padding, one image and level at a time."""
    fused = {}
    for level in range(3, 8):
        name, rows = f"p{level}", []
        for n, item in enumerate(batch):
            h, w = (-(-side // 2**level) for side in item["image"].shape[-2:])
            pooled = torch.cat([maps[name][n, :, :h, :w].mean((1, 2)) for maps in branches])
            gate = (fusion.excite.weight @ (fusion.squeeze.weight @ pooled).relu()).softmax(0)
            rows.append(sum(g * maps[name][n] for g, maps in zip(gate, branches)))
        fused[name] = torch.stack(rows)
    return fused


def manual_losses(detector, maps, batch, padded):
    images = ImageList(torch.zeros(len(batch), 3, *padded), [tuple(item["image"].shape[-2:]) for item in batch])
    values = [maps[name] for name in detector.head_in_features]
    return detector.forward_training(images, values, detector.head(values), [item["instances"] for item in batch])


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["FCOS", "RetinaNet"])
@pytest.mark.parametrize(("resolutions", "padded"), [(["H", "L"], (64, 128)), (["H", "L", "EL"], (128, 128))])
def test_losses_are_those_of_the_branches(tiny_model, make_batch, arch, resolutions, padded):
    """L_H + L_L (+ L_EL) + w_fuse L_F, each as if the detector ran on that branch alone."""
    teacher = tiny_model(arch, resolutions=resolutions, MSAD__W_FUSE=0.3)
    alone = copy.deepcopy(teacher)
    batch = make_batch(SIZES)
    with EventStorage(0):
        found = teacher(batch)
        branches = [manual_branch(alone.detector, batch, r.shift, padded) for r in alone.resolutions]
        names = [*resolutions, "fused"]
        maps = [*branches, manual_fusion(alone.fusion, branches, batch)]
        expected = {}
        for branch, features in zip(names, maps):
            weight = 0.3 if branch == "fused" else 1.0
            vars(alone.detector).pop("loss_normalizer", None)  # one running number of positives for all branches
            for name, value in manual_losses(alone.detector, features, batch, padded).items():
                expected[f"{branch}/{name}"] = weight * value
    assert list(found) == list(expected) and all(value > 0 for value in expected.values())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert teacher.detector.loss_normalizer == alone.detector.loss_normalizer
    for name, buffer in alone.state_dict().items():
        torch.testing.assert_close(teacher.state_dict()[name], buffer, msg=f"BatchNorm statistics: {name}")


def test_h_branch_is_the_plain_detector(tiny_model, make_batch):
    """On sizes that need no extra padding the first branch is detectron2's own forward."""
    teacher = tiny_model(resolutions=["H", "L"])
    plain = copy.deepcopy(teacher.detector)
    batch = make_batch([(64, 128), (128, 64)])
    with EventStorage(0):
        found, expected = teacher(batch), plain(batch)
    torch.testing.assert_close({n: found[f"H/{n}"] for n in expected}, expected)


def test_fused_weight_scales_the_fused_losses_alone(tiny_model, make_batch):
    losses = []
    for w_fuse in (0.4, 0.8):
        with EventStorage(0):
            losses.append(tiny_model(resolutions=["H", "L"], MSAD__W_FUSE=w_fuse)(make_batch(SIZES)))
    for name, value in losses[0].items():
        torch.testing.assert_close(losses[1][name], value * (2 if name.startswith("fused/") else 1))


@pytest.mark.parametrize("arch", ["FCOS", "RetinaNet"])
def test_ground_truth_is_assigned_once_a_step(tiny_model, make_batch, monkeypatch, arch):
    teacher = tiny_model(arch, resolutions=["H", "L"])
    calls, cls = [], type(teacher.detector)
    original = cls.label_anchors
    monkeypatch.setattr(cls, "label_anchors", lambda self, *a: calls.append(1) or original(self, *a))
    for step in (1, 2):
        with EventStorage(0):
            teacher(make_batch(SIZES, seed=step))
        assert len(calls) == step


def test_everything_learns(tiny_model, make_batch):
    """Also what DistributedDataParallel needs: no parameter without gradient."""
    teacher = tiny_model(resolutions=["H", "L", "EL"])
    with EventStorage(0):
        sum(teacher(make_batch(SIZES)).values()).backward()
    assert [name for name, p in teacher.named_parameters() if p.grad is None] == []
    assert teacher.fusion.squeeze.weight.grad.abs().sum() > 0 and teacher.fusion.excite.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("boxes", [0, [0, 2]])
def test_images_without_objects(tiny_model, make_batch, boxes):
    teacher = tiny_model(resolutions=["H", "L"])
    with EventStorage(0):
        losses = teacher(make_batch(SIZES, boxes=boxes))
        sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in teacher.parameters())


# --- inference --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["FCOS", "RetinaNet"])
@pytest.mark.parametrize("branch", ["fused", "H", "L"])
def test_evaluation_equals_the_manual_computation(tiny_model, make_batch, same_detections, arch, branch):
    teacher = tiny_model(arch, resolutions=["H", "L"], MSAD__EVAL_BRANCH=branch).eval()
    detector = teacher.detector
    batch = make_batch(SIZES)
    with torch.no_grad():
        maps = {"H": manual_branch(detector, batch, 0, (64, 128)), "L": manual_branch(detector, batch, 1, (64, 128))}
        maps["fused"] = manual_fusion(teacher.fusion, [maps["H"], maps["L"]], batch)
        images = ImageList(torch.zeros(2, 3, 64, 128), SIZES)
        values = [maps[branch][name] for name in detector.head_in_features]
        results = detector.forward_inference(images, values, detector.head(values))
        expected = adapt(detector).postprocess(results, batch, images)
        found = teacher(batch)
        batch[1].update(height=100, width=254)  # the original was twice as large
        resized = teacher(batch)[1]["instances"]
    same_detections(found, expected)
    assert resized.image_size == (100, 254)
    torch.testing.assert_close(resized.pred_boxes.tensor, 2 * found[1]["instances"].pred_boxes.tensor)


def test_branches_differ(tiny_model, make_batch):
    teacher = tiny_model(resolutions=["H", "L"]).eval()
    scores = {}
    for branch in teacher.branches:
        teacher.set_eval_branch(branch)
        with torch.no_grad():
            scores[branch] = teacher(make_batch([(64, 128)]))[0]["instances"].scores.max().item()
    assert len(set(scores.values())) == 3


@pytest.mark.parametrize(
    ("branch", "inputs"), [("fused", [(64, 128), (32, 64)]), ("H", [(64, 128)]), ("L", [(32, 64)])]
)
def test_evaluation_runs_nothing_that_is_not_asked_for(tiny_model, make_batch, branch, inputs):
    """The released code ran the head on H, L and fused maps to use one of them."""
    teacher = tiny_model(resolutions=["H", "L"], MSAD__EVAL_BRANCH=branch).eval()
    necks, heads = [], []
    teacher.detector.backbone.register_forward_pre_hook(lambda _m, args: necks.append(tuple(args[0].shape[-2:])))
    teacher.detector.head.register_forward_pre_hook(lambda _m, _args: heads.append(1))
    with torch.no_grad():
        teacher(make_batch(SIZES))
    assert necks == inputs and len(heads) == 1


def test_levels_nobody_reads_are_not_computed(tiny_model, make_batch):
    """P2 of H and P7 of L."""
    teacher = tiny_model(resolutions=["H", "L"]).eval()
    calls = []
    for name, module in teacher.detector.backbone.named_modules():
        if name.startswith(("fpn_output", "top_block.")):
            module.register_forward_hook(lambda _m, _i, out, name=name: calls.append((name, tuple(out.shape[-2:]))))
    with torch.no_grad():
        teacher.neck_features(make_batch([(128, 128)]))
    h = {("fpn_output3", 16), ("fpn_output4", 8), ("fpn_output5", 4), ("top_block.p6", 2), ("top_block.p7", 1)}
    low = {("fpn_output2", 16), ("fpn_output3", 8), ("fpn_output4", 4), ("fpn_output5", 2), ("top_block.p6", 1)}
    assert sorted(calls) == sorted((name, (n, n)) for name, n in [*h, *low])


@pytest.mark.parametrize("branch", ["fused", "H", "L"])
def test_a_batch_is_its_images_one_by_one(tiny_model, make_batch, same_detections, branch):
    """The released code post-processed image 0 only, and weighed all images by the gate of image 0."""
    teacher = tiny_model(resolutions=["H", "L"], MSAD__EVAL_BRANCH=branch).eval()
    batch = make_batch([(128, 128), (97, 120), (65, 127), (101, 66)])  # all padded to (128, 128)
    with torch.no_grad():
        together, alone = teacher(batch), [teacher([item])[0] for item in batch]
    assert len(together) == 4
    same_detections(together, alone, tolerance=1e-3)
    for item, result in zip(batch, together):
        assert result["instances"].image_size == tuple(item["image"].shape[-2:]) and len(result["instances"]) > 0


def test_features_of_a_batch_are_exact(tiny_model, make_batch):
    teacher = tiny_model(resolutions=["H", "L", "EL"]).eval()
    batch = make_batch([(128, 128), (97, 120), (101, 66)])
    with torch.no_grad():
        together, alone = teacher.neck_features(batch), [teacher.neck_features([item]) for item in batch]
    for name, value in together.items():
        torch.testing.assert_close(value, torch.cat([x[name] for x in alone]), rtol=0, atol=1e-5)


def test_inputs_are_not_modified(tiny_model, make_batch):
    teacher = tiny_model(resolutions=["H", "L"])
    batch, again = make_batch(SIZES), make_batch(SIZES)
    with EventStorage(0):
        teacher(batch)
    with torch.no_grad():
        teacher.eval()(batch)
    for item, fresh in zip(batch, again):
        assert item.keys() == fresh.keys() and torch.equal(item["image"], fresh["image"])
        assert torch.equal(item["instances"].gt_boxes.tensor, fresh["instances"].gt_boxes.tensor)


# --- grids and padding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[(1, 1)], [(65, 33)], [(127, 99), (90, 161)], [(130, 10), (31, 129)]])
@pytest.mark.parametrize("resolutions", [["H", "L"], ["H", "L", "EL"]])
def test_aligned_levels_have_equal_shapes(tiny_model, make_batch, sizes, resolutions):
    teacher = tiny_model(resolutions=resolutions).eval()
    batch = make_batch(sizes, boxes=0)
    with torch.no_grad():
        branches = [teacher.branch_features(batch, r) for r in teacher.resolutions]
    step = 32 * 2 ** (len(resolutions) - 1)
    least = [max(side) + -max(side) % step for side in zip(*sizes)]
    for resolution, (images, features) in zip(teacher.resolutions, branches):
        assert list(images.tensor.shape[-2:]) == [side // 2**resolution.shift for side in least]
        assert images.image_sizes == [tuple(-(-s // 2**resolution.shift) for s in size) for size in sizes]
        assert {name: tuple(x.shape) for name, x in features.items()} == {
            f"p{level}": (len(sizes), 8, *(-(-side // 2**level) for side in least)) for level in range(3, 8)
        }


def test_a_coarser_student_widens_the_padding(tiny_model, make_batch):
    teacher = tiny_model(resolutions=["H", "L"]).eval()
    batch = make_batch([(64, 64)])
    assert teacher.branch_images(batch, H).tensor.shape[-2:] == (64, 64)
    assert teacher.branch_images(batch, H, max_shift=2).tensor.shape[-2:] == (128, 128)
    assert teacher.branch_images(batch, L, max_shift=2).tensor.shape[-2:] == (64, 64)
    with torch.no_grad():
        assert teacher.neck_features(batch, max_shift=2)["p3"].shape[-2:] == (16, 16)


@pytest.mark.parametrize("mask_padding", [True, False])
def test_what_lies_in_the_padding_does_not_move_the_gate(tiny_model, mask_padding):
    """The released gate pooled over it."""
    teacher = tiny_model(resolutions=["H", "L"], MSAD__FUSION__MASK_PADDING=mask_padding)
    sizes = [(50, 100)]
    valid = {f"p{level}": tuple(-(-side // 2**level) for side in sizes[0]) for level in range(3, 8)}
    maps = [{name: torch.randn(1, 8, h + 2, w + 3) for name, (h, w) in valid.items()} for _ in range(2)]
    spoilt = [{name: x.clone() for name, x in features.items()} for features in maps]
    for features in spoilt:
        for name, (h, w) in valid.items():
            features[name][..., h:, :] = 7.0
            features[name][..., :, w:] = -9.0
    clean, dirty = teacher.fuse(maps, sizes), teacher.fuse(spoilt, sizes)
    for name, (h, w) in valid.items():
        difference = (clean[name] - dirty[name])[..., :h, :w].abs().max()
        assert (difference < 1e-6) if mask_padding else (difference > 1e-4), name


def test_l_input_is_antialiased_before_normalisation(tiny_model, make_batch):
    """The released code took every second pixel of the normalised, padded batch."""
    batch = make_batch([(63, 65)])
    for mode in ("antialias", "nearest"):
        teacher = tiny_model(resolutions=["H", "L"], MSAD__DOWNSAMPLE=mode)
        images = teacher.branch_images(batch, L)
        small = (downsample(batch[0]["image"], 1, mode) - teacher.detector.pixel_mean) / teacher.detector.pixel_std
        assert torch.equal(images.tensor[0, :, :32, :33], small)
        assert images.tensor.shape[-2:] == (32, 64) and not images.tensor[0, :, :, 33:].any()


# --- building ---------------------------------------------------------------------------------------------------------


def test_levels_a_shared_neck_must_make():
    own = ["p3", "p4", "p5", "p6", "p7"]
    assert teacher_levels(own, [H]) == own
    assert teacher_levels(own, [H, L]) == ["p2", *own]
    assert teacher_levels(own, [H, L, EL]) == ["p1", "p2", *own]
    with pytest.raises(ValueError, match="p1"):
        teacher_levels(["p2", "p3"], [H, EL])


def test_built_from_the_detectors_own_keys(tiny_cfg):
    options = {"MSAD__W_FUSE": 0.7, "MSAD__FUSION__REDUCTION": 4, "MSAD__DOWNSAMPLE": "nearest"}
    cfg = tiny_cfg(resolutions=["H", "L", "EL"], **options)
    before = cfg.dump()
    teacher = build_model(cfg)
    assert cfg.dump() == before, "the config is the user's"
    assert isinstance(teacher, MultiScaleTeacher) and type(teacher.detector).__name__ == "FCOS"
    assert teacher.resolutions == [H, L, EL] and teacher.branches == ["fused", "H", "L", "EL"]
    assert (teacher.w_fuse, teacher.eval_branch, teacher.downsample_mode) == (0.7, "fused", "nearest")
    assert list(teacher.detector.backbone.output_shape()) == [f"p{level}" for level in range(1, 8)]
    assert teacher.fusion.squeeze.weight.shape == (6, 24) and teacher.fusion.excite.weight.shape == (3, 6)
    assert {name.split(".")[0] for name in teacher.state_dict()} == {"detector", "fusion"}


def test_one_backbone_and_one_head(tiny_model):
    """What a second branch adds to a plain detector: P2 and the gate."""
    plain, teacher = tiny_model(), tiny_model(resolutions=["H", "L"])
    extra = set(teacher.state_dict()) - {f"detector.{name}" for name in plain.state_dict()}
    assert {name.rsplit(".", 1)[0] for name in extra} == {
        "fusion.squeeze", "fusion.excite", "detector.backbone.fpn_lateral2", "detector.backbone.fpn_output2"
    }  # fmt: skip


@pytest.mark.parametrize("resolutions", [[], ["L"], ["L", "H"], ["H", "L", "L"]])
def test_wrong_resolutions_are_named(tiny_cfg, resolutions):
    cfg = tiny_cfg(resolutions=["H", "L"])
    cfg.MSAD.RESOLUTIONS = resolutions
    with pytest.raises(ValueError, match=r"MSAD\.RESOLUTIONS must be distinct and start with H"):
        build_model(cfg)


def test_unknown_branch_is_named(tiny_cfg):
    with pytest.raises(ValueError, match=r"MSAD\.EVAL_BRANCH 'EL'.*'fused', 'H', 'L'"):
        build_model(tiny_cfg(resolutions=["H", "L"], MSAD__EVAL_BRANCH="EL"))


def test_a_backbone_without_the_levels_is_refused_at_once(tiny_model):
    """A stock pyramid from P3 on cannot serve an L branch."""
    plain, teacher = tiny_model(), tiny_model(resolutions=["H", "L"])
    with pytest.raises(ValueError, match=r"branches \['H', 'L'\].*need \['p2'\]"):
        MultiScaleTeacher(detector=plain, resolutions=[H, L], fusion=teacher.fusion)
