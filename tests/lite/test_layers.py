"""Layers and operators: hand-computed values, gradients and edge cases."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.layers import (
    CNNBlockBase,
    Conv2d,
    CycleBatchNormList,
    DepthwiseSeparableConv2d,
    FrozenBatchNorm2d,
    NaiveSyncBatchNorm,
    ROIAlign,
    ShapeSpec,
    batched_nms,
    cat,
    ciou_loss,
    cross_entropy,
    diou_loss,
    get_norm,
    move_device_like,
    nms,
    nonzero_tuple,
    paste_masks_in_image,
    roi_align,
    shapes_to_tensor,
)
from torch import nn


def random_batchnorm(channels=6, eps=1e-3):
    bn = nn.BatchNorm2d(channels, eps=eps)
    with torch.no_grad():
        for value in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
            value.uniform_(0.5, 2)
    return bn.eval()


class TestFrozenBatchNorm:
    def test_fresh_layer_is_the_identity(self):
        x = torch.randn(2, 3, 4, 4)
        torch.testing.assert_close(FrozenBatchNorm2d(3)(x), x)

    def test_equals_batchnorm_in_eval_mode_with_gradient(self):
        bn = random_batchnorm()
        frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(bn)
        assert frozen.eps == bn.eps and not list(frozen.parameters())
        a, b = (torch.arange(6 * 20.0).view(1, 6, 4, 5).requires_grad_() for _ in range(2))
        torch.testing.assert_close(frozen(a), bn(b))
        with torch.no_grad():
            torch.testing.assert_close(frozen(a), bn(b))
        frozen(a).square().sum().backward()
        bn(b).square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad)

    def test_half_precision_stays_half(self):
        x = torch.randn(1, 3, 4, 4, dtype=torch.bfloat16, requires_grad=True)
        assert FrozenBatchNorm2d(3)(x).dtype == torch.bfloat16

    def test_state_dict(self):
        fresh = FrozenBatchNorm2d(3)
        assert list(fresh.state_dict()) == ["weight", "bias", "running_mean", "running_var"]
        assert fresh.state_dict()._metadata[""]["version"] == 3
        bn = random_batchnorm(3)
        converted = FrozenBatchNorm2d.convert_frozen_batchnorm(bn)
        assert list(converted.state_dict()) == list(bn.state_dict())
        bn.load_state_dict(converted.state_dict())

    def test_files_without_statistics(self):
        layer = FrozenBatchNorm2d(2)
        layer.load_state_dict({"weight": torch.ones(2) * 3, "bias": torch.ones(2)})
        assert layer.running_mean.tolist() == [0, 0] and layer.running_var.tolist() == [1, 1]
        state = FrozenBatchNorm2d(2).state_dict()
        del state["running_var"]
        with pytest.raises(RuntimeError, match="running_var"):
            layer.load_state_dict(state)

    def test_without_affine_parameters(self):
        bn = nn.BatchNorm2d(3, affine=False).eval()
        x = torch.randn(1, 3, 2, 2)
        torch.testing.assert_close(FrozenBatchNorm2d.convert_frozen_batchnorm(bn)(x), bn(x))

    def test_conversion_of_a_network_and_back(self):
        net = nn.Sequential(
            nn.Conv2d(3, 3, 1), random_batchnorm(3), nn.Sequential(nn.SyncBatchNorm(3), nn.BatchNorm1d(3))
        )
        keys = list(net.state_dict())
        x = torch.randn(2, 3, 4, 4)
        before = net[1](x)
        assert FrozenBatchNorm2d.convert_frozen_batchnorm(net) is net
        assert isinstance(net[1], FrozenBatchNorm2d) and isinstance(net[2][0], FrozenBatchNorm2d)
        assert type(net[2][1]) is nn.BatchNorm1d
        assert list(net.state_dict()) == keys
        torch.testing.assert_close(net[1](x), before)
        FrozenBatchNorm2d.convert_frozenbatchnorm2d_to_batchnorm2d(net)
        assert type(net[1]) is nn.BatchNorm2d and net[1].weight.requires_grad
        torch.testing.assert_close(net[1].eval()(x), before)


class TestNorms:
    def test_lookup(self):
        assert get_norm("", 32) is None and get_norm(None, 32) is None
        assert get_norm("GN", 64).num_groups == 32
        assert type(get_norm("BN", 8)) is nn.BatchNorm2d
        assert type(get_norm("SyncBN", 8)) is nn.SyncBatchNorm
        assert type(get_norm("FrozenBN", 8)) is FrozenBatchNorm2d
        assert type(get_norm("naiveSyncBN", 8)) is NaiveSyncBatchNorm
        assert get_norm(nn.InstanceNorm2d, 8).num_features == 8
        with pytest.raises(KeyError, match="Nope"):
            get_norm("Nope", 8)

    def test_layer_norm_is_over_channels(self):
        y = get_norm("LN", 5)(torch.randn(2, 5, 3, 4) * 4 + 7)
        torch.testing.assert_close(y.mean(dim=1), torch.zeros(2, 3, 4), atol=1e-5, rtol=0)
        torch.testing.assert_close(y.var(dim=1, unbiased=False), torch.ones(2, 3, 4), atol=1e-3, rtol=0)

    def test_naive_sync_is_batchnorm_in_one_process(self):
        x = torch.randn(4, 3, 5, 5)
        ours, theirs = NaiveSyncBatchNorm(3), nn.BatchNorm2d(3)
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(ours.running_var, theirs.running_var)

    def test_cycle_keeps_statistics_apart_and_affine_together(self):
        norm = CycleBatchNormList(2, num_features=3)
        assert sum(p.numel() for p in norm.parameters()) == 6
        for _ in range(3):
            norm(torch.full((2, 3, 2, 2), 1.0))
            norm(torch.full((2, 3, 2, 2), 5.0))
        assert norm[0].running_mean[0] < 1 < norm[1].running_mean[0]


def normalize_shares(rank, init_file, splits):
    """One process of two: normalize its share of a batch and check it against the joint batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=2)
    for sizes in splits:
        batch = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 2 + 1
        mine = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], None)
        share, whole = batch[mine].clone().requires_grad_(), batch.clone().requires_grad_()
        ours, theirs = NaiveSyncBatchNorm(3, stats_mode="N"), nn.BatchNorm2d(3)
        y, joint = ours(share), theirs(whole)
        y.pow(3).sum().backward()
        joint.pow(3).sum().backward()
        torch.testing.assert_close(y, joint[mine], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(share.grad, whole.grad[mine], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)
        biased = 0.9 + 0.1 * batch.var(dim=(0, 2, 3), unbiased=False)
        torch.testing.assert_close(ours.running_var, biased)
    dist.destroy_process_group()


def test_naive_sync_normalizes_the_joint_batch(tmp_path):
    mp.spawn(normalize_shares, (tmp_path / "init", [(3, 1), (4, 0)]), nprocs=2)


class TestConvolutions:
    def test_order_of_norm_and_activation(self):
        conv = Conv2d(1, 1, 1, bias=False, norm=random_batchnorm(1), activation=torch.relu)
        x = torch.randn(1, 1, 4, 4)
        torch.testing.assert_close(conv(x), torch.relu(conv.norm(nn.functional.conv2d(x, conv.weight))))

    def test_empty_batch(self):
        conv = Conv2d(3, 4, 3, stride=2, padding=1, norm=get_norm("BN", 4))
        out = conv.eval()(torch.zeros(0, 3, 9, 8))
        assert out.shape == (0, 4, 5, 4)

    def test_depthwise_separable(self):
        block = DepthwiseSeparableConv2d(4, 6, norm1="BN", activation1=nn.ReLU())
        assert block.depthwise.groups == 4 and block.depthwise.bias is None
        assert block.pointwise.kernel_size == (1, 1) and block.pointwise.bias is not None
        assert block(torch.zeros(1, 4, 5, 5)).shape == (1, 6, 5, 5)

    def test_freezing_a_block(self):
        class Block(CNNBlockBase):
            def __init__(self):
                super().__init__(3, 4, 2)
                self.conv = Conv2d(3, 4, 1, norm=get_norm("BN", 4))

        block = Block()
        assert block.freeze() is block
        assert not any(p.requires_grad for p in block.parameters())
        assert isinstance(block.conv.norm, FrozenBatchNorm2d)
        assert (block.in_channels, block.out_channels, block.stride) == (3, 4, 2)


class TestSmallFunctions:
    def test_cat_of_one_is_no_copy(self):
        x = torch.ones(2)
        assert cat([x]) is x and cat([x, x], dim=0).shape == (4,)

    def test_nonzero(self):
        rows, cols = nonzero_tuple(torch.tensor([[0, 1], [2, 0]]))
        assert rows.tolist() == [0, 1] and cols.tolist() == [1, 0]
        assert nonzero_tuple(torch.tensor(3))[0].tolist() == [0]

    def test_cross_entropy_of_nothing_is_zero_with_gradient(self):
        logits = torch.zeros(0, 3, requires_grad=True)
        loss = cross_entropy(logits, torch.zeros(0, dtype=torch.long))
        loss.backward()
        assert loss == 0 and logits.grad.shape == (0, 3)
        two = cross_entropy(torch.zeros(2, 4), torch.tensor([0, 1]), reduction="sum")
        torch.testing.assert_close(two, 2 * torch.tensor(4.0).log())

    def test_shape_spec(self):
        spec = ShapeSpec(channels=8, stride=4)
        assert spec == ShapeSpec(8, stride=4) and spec.height is None and spec.width is None

    def test_shapes_and_devices(self):
        assert shapes_to_tensor([3, 4]).tolist() == [3, 4]
        assert move_device_like(torch.ones(1), torch.zeros(1)).device.type == "cpu"


class TestBoxOperators:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60]])
    scores = torch.tensor([0.5, 0.9, 0.1])

    def test_nms(self):
        assert nms(self.boxes, self.scores, 0.5).tolist() == [1, 2]
        assert batched_nms(self.boxes, self.scores, torch.tensor([0, 1, 0]), 0.5).tolist() == [1, 0, 2]
        assert batched_nms(self.boxes, self.scores, torch.tensor([1, 1, 0]), 0.5).tolist() == [1, 2]

    def test_batched_nms_of_half_precision_boxes(self):
        # Offset by class, these coordinates would not fit into the 11 bits of float16.
        boxes = torch.cat([self.boxes, self.boxes]) + 900
        groups = torch.tensor([3, 3, 3, 79, 79, 79])
        keep = batched_nms(boxes.half(), torch.cat([self.scores, self.scores + 0.01]), groups, 0.5)
        assert keep.tolist() == [4, 1, 5, 2]

    def test_iou_losses(self):
        near, far = self.boxes[:1], self.boxes[2:]
        for loss in (diou_loss, ciou_loss):
            torch.testing.assert_close(loss(near, near), torch.zeros(1), atol=1e-6, rtol=0)
            # No overlap: 1 + squared distance of centers over squared diagonal of the hull.
            torch.testing.assert_close(loss(near, far), torch.tensor([1 + 5000 / 7200]))
            assert loss(near[:0], far[:0], reduction="sum") == 0

    def test_roi_align_of_a_ramp(self):
        ramp = torch.arange(8.0).expand(1, 1, 8, 8)
        rois = torch.tensor([[0, 4.0, 4, 12, 12]])
        pooled = ROIAlign(2, 0.5, 2)(ramp, rois)
        # In cells the box is [2, 6]: its halves have their centers at 3 and 5, cell i has its own at i + 0.5.
        torch.testing.assert_close(pooled, torch.tensor([[[[2.5, 4.5], [2.5, 4.5]]]]))
        torch.testing.assert_close(ROIAlign(2, 0.5, 2, aligned=False)(ramp, rois), pooled + 0.5)
        torch.testing.assert_close(roi_align(ramp, rois, 2, 0.5, 2, True), pooled)
        assert ROIAlign((3, 2), 1.0, 0)(ramp, rois[:0]).shape == (0, 1, 3, 2)
        with pytest.raises((AssertionError, ValueError)):
            ROIAlign(2, 0.5, 2)(ramp, rois[:, 1:])


class TestPasteMasks:
    def test_full_mask_fills_its_box(self):
        pasted = paste_masks_in_image(
            torch.ones(2, 4, 4), torch.tensor([[1.0, 2, 5, 6], [-3, -3, 2, 3]]), (7, 8)
        )
        expected = torch.zeros(2, 7, 8, dtype=torch.bool)
        expected[0, 2:6, 1:5] = True
        expected[1, :3, :2] = True
        assert pasted.dtype == torch.bool and pasted.equal(expected)

    def test_threshold(self):
        masks, box = torch.full((1, 4, 4), 0.6), torch.tensor([[2.0, 2, 6, 6]])
        assert paste_masks_in_image(masks, box, (8, 8), threshold=0.6).sum() == 16
        assert paste_masks_in_image(masks, box, (8, 8), threshold=0.7).sum() == 0
        soft = paste_masks_in_image(masks, box, (8, 8), threshold=-1)
        assert soft.dtype == torch.uint8 and soft[0, 3, 3] == 153

    def test_nothing(self):
        assert paste_masks_in_image(torch.zeros(0, 4, 4), torch.zeros(0, 4), (5, 6)).shape == (0, 5, 6)

    def test_bad_input(self):
        with pytest.raises((AssertionError, ValueError)):
            paste_masks_in_image(torch.zeros(1, 4, 5), torch.zeros(1, 4), (5, 6))
        with pytest.raises((AssertionError, ValueError)):
            paste_masks_in_image(torch.zeros(2, 4, 4), torch.zeros(1, 4), (5, 6))
