"""Swin Transformer: names, initial weights under a seed, outputs and gradients, alone and under an FPN."""

import torch
from detectron2.modeling import FPN, SwinTransformer
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7

TINY = {"embed_dim": 8, "depths": (2, 2, 3, 1), "num_heads": (1, 2, 4, 4), "window_size": 3, "drop_path_rate": 0.0}
VARIANTS = {
    "tiny": {},
    "ape": {"ape": True, "pretrain_img_size": 48},
    "no_qkv_bias": {"qkv_bias": False, "qk_scale": 0.3, "patch_norm": False},
    "three_maps": {"out_indices": (1, 2, 3), "window_size": 7, "mlp_ratio": 2.0},
    "frozen_0": {"frozen_stages": 0},
    "frozen_1": {"frozen_stages": 1, "ape": True},
    "frozen_3": {"frozen_stages": 3},
    "checkpointed": {"use_checkpoint": True, "depths": (2, 2), "num_heads": (1, 2), "out_indices": (0, 1)},
    "patch_2": {"patch_size": 2, "depths": (1, 2), "num_heads": (2, 2), "out_indices": (1,)},
    "patch_pair": {"patch_size": (4, 2), "in_chans": 5, "norm_layer": torch.nn.LayerNorm},
}


def probe(workdir):
    out = {}
    generator = torch.Generator().manual_seed(3)
    for name, options in VARIANTS.items():
        torch.manual_seed(1)
        model = SwinTransformer(**{**TINY, **options})
        state = model.state_dict()
        out[f"{name}.state"] = [list(state), [list(v.shape) for v in state.values()]]
        out[f"{name}.initial"] = [float(v.double().sum()) for v in state.values()]
        out[f"{name}.frozen"] = [
            [n for n, p in model.named_parameters() if not p.requires_grad], not model.patch_embed.training,
            [not layer.training for layer in model.layers], not model.pos_drop.training,
        ]
        out[f"{name}.shapes"] = {k: [s.channels, s.stride] for k, s in model.output_shape().items()}
        for parameter in model.parameters():  # so that all of them matter
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        for size in ((64, 96), (45, 70)):
            x = torch.randn(2, options.get("in_chans", 3), *size, generator=generator)
            maps = model(x)
            sum(y.square().mean() for y in maps.values()).backward()
            out[f"{name}.{size}"] = maps
            out[f"{name}.{size}.grad"] = [p.grad for p in model.parameters() if p.grad is not None]

    all_maps = ["p0", "p1", "p2", "p3"]
    for top, names in ((LastLevelMaxPool, all_maps), (lambda: LastLevelP6P7(64, 8, "p3"), all_maps[1:])):
        torch.manual_seed(2)
        top = top()
        swin = SwinTransformer(**TINY, out_indices=[int(n[1]) for n in names])
        fpn = FPN(swin, names, 8, top_block=top)
        out[f"fpn.{len(names)}"] = [
            list(fpn.state_dict()), fpn.size_divisibility, {k: s.stride for k, s in fpn.output_shape().items()},
            fpn(torch.randn(1, 3, 64, 64, generator=generator)),
        ]
    return out
