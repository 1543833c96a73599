"""Layers, losses and box/mask operators on random inputs; weights travel through a file."""

import pathlib

import numpy as np
import torch
from detectron2.layers import (
    CNNBlockBase,
    Conv2d,
    CycleBatchNormList,
    DeformConv,
    DepthwiseSeparableConv2d,
    FrozenBatchNorm2d,
    ModulatedDeformConv,
    ROIAlign,
    ShapeSpec,
    batched_nms,
    cat,
    ciou_loss,
    cross_entropy,
    diou_loss,
    get_norm,
    nms,
    nonzero_tuple,
    paste_masks_in_image,
    roi_align,
    shapes_to_tensor,
)
from torch import nn

TOLERANCE = 1e-5
NORMS = ("BN", "SyncBN", "FrozenBN", "GN", "nnSyncBN", "LN", "naiveSyncBN", "naiveSyncBN_N")


def probe(workdir: pathlib.Path) -> dict:
    torch.set_num_threads(1)
    out = {}
    for part in (_norms, _frozen, _blocks, _nms, _losses, _roi_align, _paste, _small, _deform):
        rng = np.random.default_rng(11)
        torch.manual_seed(11)
        out.update({f"{part.__name__[1:]}.{k}": v for k, v in part(rng, workdir).items()})
    return out


def _tensor(rng, *shape, low=-2.0, high=2.0):
    return torch.from_numpy(rng.uniform(low, high, shape).astype(np.float32))


def _shared_state(module, rng, path):
    """Give the module random weights in the first run and those same weights, from a file, in the second."""
    if path.exists():
        module.load_state_dict(torch.load(path, weights_only=True))
    else:
        for value in module.state_dict().values():
            if value.is_floating_point():
                value.copy_(_tensor(rng, *value.shape, low=0.5, high=1.5))
        torch.save(module.state_dict(), path)
    return module


def _boxes(rng, count, size=60.0):
    corners = rng.uniform(0, size, (count, 2, 2))
    return torch.from_numpy(np.concatenate([corners.min(1), corners.max(1)], axis=1).astype(np.float32))


def _norms(rng, workdir):
    out = {"none": str([get_norm(n, 32) for n in ("", None)])}
    x = _tensor(rng, 2, 32, 5, 6)
    for name in NORMS:
        layer = _shared_state(get_norm(name, 32), rng, workdir / f"norm_{name}.pt")
        out[f"{name}.keys"] = list(layer.state_dict())
        out[f"{name}.eval"] = layer.eval()(x)
        out[f"{name}.train"] = layer.train()(x)
        out[f"{name}.mean_after"] = layer.state_dict().get("running_mean", torch.zeros(1))
        out[f"{name}.var_after"] = layer.state_dict().get("running_var", torch.zeros(1))
        out[f"{name}.twice"] = layer.eval()(x.double().float())
    cycle = _shared_state(CycleBatchNormList(3, num_features=32), rng, workdir / "cycle.pt")
    out["cycle.keys"] = list(cycle.state_dict())
    out["cycle.train"] = torch.stack([cycle(x + i) for i in range(4)])
    out["cycle.eval"] = torch.stack([cycle.eval()(x + i) for i in range(3)])
    return out


def _frozen(rng, workdir):
    x = _tensor(rng, 2, 8, 4, 5)  # before the weights: only the first run draws those
    bn = _shared_state(nn.BatchNorm2d(8, eps=1e-3), rng, workdir / "bn.pt").eval()
    frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(bn)
    leaf = x.clone().requires_grad_()
    y = frozen(leaf)
    (y * y).sum().backward()
    net = nn.Sequential(
        nn.Conv2d(8, 8, 1), nn.Sequential(nn.BatchNorm2d(8), nn.SyncBatchNorm(8)), nn.BatchNorm1d(8)
    )
    same = FrozenBatchNorm2d.convert_frozen_batchnorm(net) is net
    old = FrozenBatchNorm2d(8)
    result = old.load_state_dict({"weight": torch.full((8,), 2.0), "bias": torch.ones(8)})
    thawed = FrozenBatchNorm2d.convert_frozenbatchnorm2d_to_batchnorm2d(net)
    return {
        "fresh": FrozenBatchNorm2d(8).running_var,
        "fresh_keys": list(FrozenBatchNorm2d(8).state_dict()),
        "version": FrozenBatchNorm2d(8).state_dict()._metadata[""]["version"],
        "keys": list(frozen.state_dict()),
        "eps": frozen.eps,
        "inference": frozen(x),
        "training": y.detach(),
        "gradient": leaf.grad,
        "repr": repr(FrozenBatchNorm2d(8)),
        "in_place": str(same),
        "net_keys": list(net.state_dict()),
        "thawed_keys": list(thawed.state_dict()),
        "thawed": type(thawed[1][1]).__name__,
        "parameters": len(list(frozen.parameters())),
        "version_1": old.running_var,
        "version_1_missing": list(result.missing_keys),
    }


class _Block(CNNBlockBase):
    def __init__(self):
        super().__init__(8, 12, 2)
        self.conv = Conv2d(
            8, 12, 3, stride=2, padding=1, bias=False, norm=get_norm("BN", 12), activation=torch.relu
        )

    def forward(self, x):
        return self.conv(x)


def _blocks(rng, workdir):
    x = _tensor(rng, 2, 8, 9, 10)
    block = _shared_state(_Block(), rng, workdir / "block.pt").eval()
    before = block(x)
    separable = DepthwiseSeparableConv2d(8, 6, norm1="BN", activation1=nn.ReLU(), norm2="BN")
    plain = DepthwiseSeparableConv2d(8, 6)
    initial = {f"separable.initial.{k}": v.clone() for k, v in plain.state_dict().items()}
    _shared_state(separable, rng, workdir / "separable.pt").eval()
    return {
        **initial,
        "conv": before,
        "conv_keys": list(block.state_dict()),
        "conv_empty": list(block(x[:0]).shape),
        "frozen": block.freeze()(x),
        "frozen_keys": list(block.state_dict()),
        "trainable": sum(p.requires_grad for p in block.parameters()),
        "facts": [block.in_channels, block.out_channels, block.stride],
        "separable": separable(x),
        "separable_keys": list(separable.state_dict()),
    }


def _nms(rng, workdir):
    boxes, scores = _boxes(rng, 300), torch.from_numpy(rng.random(300).astype(np.float32))
    groups = torch.from_numpy(rng.integers(0, 5, 300))
    many = _boxes(rng, 3000, size=900)
    return {
        "nms": nms(boxes, scores, 0.5),
        "batched": batched_nms(boxes, scores, groups, 0.4),
        "batched_half": batched_nms((boxes * 20).half(), scores, groups, 0.4),
        "batched_many": batched_nms(
            many, torch.from_numpy(rng.random(3000).astype(np.float32)), torch.arange(3000) % 80, 0.5
        ),
        "batched_none": batched_nms(boxes[:0], scores[:0], groups[:0], 0.5),
    }


def _losses(rng, workdir):
    a, b = _boxes(rng, 20), _boxes(rng, 20)
    out = {}
    for name, loss in {"diou": diou_loss, "ciou": ciou_loss}.items():
        for reduction in ("none", "mean", "sum"):
            out[f"{name}.{reduction}"] = loss(a, b, reduction=reduction)
        leaf = a.clone().requires_grad_()
        loss(leaf, b, reduction="sum").backward()
        out[f"{name}.gradient"] = leaf.grad
        out[f"{name}.empty"] = loss(a[:0], b[:0], reduction="sum")
    logits, labels = _tensor(rng, 10, 4), torch.from_numpy(rng.integers(0, 4, 10))
    out["cross_entropy"] = cross_entropy(logits, labels)
    out["cross_entropy.sum"] = cross_entropy(logits, labels, reduction="sum")
    out["cross_entropy.empty"] = cross_entropy(logits[:0], labels[:0])
    out["cross_entropy.empty_sum"] = cross_entropy(logits[:0], labels[:0], reduction="sum")
    return out


def _roi_align(rng, workdir):
    features, rois = _tensor(rng, 2, 3, 16, 20), _boxes(rng, 6)
    rois = torch.cat([torch.tensor([[0.0], [1], [0], [1], [1], [0]]), rois], dim=1)
    out = {"repr": repr(ROIAlign(7, 0.25, 0)), "function": roi_align(features, rois, 3, 0.25)}
    for aligned in (True, False):
        for ratio in (0, 2):
            pool = ROIAlign((5, 7), 0.25, ratio, aligned=aligned)
            out[f"{aligned}.{ratio}"] = pool(features, rois)
    out["default"] = ROIAlign(4, 0.5, 0)(features, rois)
    out["none"] = list(ROIAlign(4, 0.5, 0)(features, rois[:0]).shape)
    return out


def _paste(rng, workdir):
    masks = torch.from_numpy(rng.random((8, 28, 28)).astype(np.float32))
    masks[0] = 1
    boxes = _boxes(rng, 8, size=70) - 8  # some beyond the border
    boxes[1] = torch.tensor([-30.0, -30, 90, 80])  # larger than the image
    boxes[2] = torch.tensor([10.3, 11.7, 10.9, 12.2])  # within a pixel
    shape = (48, 55)
    return {
        "half": paste_masks_in_image(masks, boxes, shape),
        "0.7": paste_masks_in_image(masks, boxes, shape, threshold=0.7),
        "0.3": paste_masks_in_image(masks, boxes, shape, threshold=0.3),
        "soft": paste_masks_in_image(masks, boxes, shape, threshold=-1),
        "none": list(paste_masks_in_image(masks[:0], boxes[:0], shape).shape),
    }


def _small(rng, workdir):
    x = torch.from_numpy(rng.integers(0, 2, (4, 5)))
    return {
        "nonzero": torch.stack(nonzero_tuple(x)),
        "nonzero_scalar": nonzero_tuple(torch.tensor(3))[0],
        "cat_one": cat([x]),
        "cat_two": cat([x, x], dim=1),
        "shapes": shapes_to_tensor([3, 4]),
        "spec": repr(ShapeSpec(channels=3, stride=4)),
        "spec_equal": str(ShapeSpec(3) == ShapeSpec(channels=3)),
    }


def _deform(rng, workdir):
    """On a CPU detectron2's operator has no gradients, one deformable group and no modulation: only its parameters
    are compared beyond that."""
    out = {}
    for groups, deformable, stride, dilation in ((1, 1, 1, 1), (2, 1, 2, 1), (4, 1, 1, 2), (1, 2, 1, 1), (4, 4, 1, 1)):
        window = {"stride": stride, "padding": dilation, "dilation": dilation}
        layer = DeformConv(8, 12, 3, **window, groups=groups, deformable_groups=deformable, norm=nn.BatchNorm2d(12))
        modulated = ModulatedDeformConv(8, 12, 3, **window, groups=groups, deformable_groups=deformable)
        name = f"{groups}.{deformable}.{stride}.{dilation}"
        out[f"{name}.parameters"] = [list(layer.state_dict()), layer.weight]
        out[f"{name}.modulated.parameters"] = [list(modulated.state_dict()), modulated.weight, modulated.bias]
        if deformable == 1:
            x, offset = _tensor(rng, 2, 8, 9, 11), _tensor(rng, 2, 18, (9 - 1) // stride + 1, (11 - 1) // stride + 1)
            out[name] = layer(x, offset)
    out["no_image"] = DeformConv(8, 12, 3)(torch.zeros(0, 8, 9, 11), torch.zeros(0, 18, 7, 9))
    out["no_bias"] = list(ModulatedDeformConv(8, 12, 3, bias=False).state_dict())
    return out
