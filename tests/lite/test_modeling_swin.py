"""Swin Transformer. Passes on detectron2 and on detectron2-lite."""

import detectron2
import pytest
import torch
import torchvision
from detectron2.modeling import FPN, SwinTransformer
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from torch import nn

lite_only = pytest.mark.skipif(
    "lite" not in detectron2.__version__, reason="detectron2 needs timm for this, or has no such message"
)
TINY = {"embed_dim": 4, "depths": (2, 1), "num_heads": (1, 2), "window_size": 2, "out_indices": (0, 1)}


def tiny(**options):
    torch.manual_seed(0)
    return SwinTransformer(**{**TINY, "drop_path_rate": 0.0, **options})


def torchvision_names(model):
    """Our state_dict key -> torchvision's key, for the keys that both have."""
    names = {"patch_embed.proj": "features.0.0", "patch_embed.norm": "features.0.2"}
    for s, stage in enumerate(model.layers):
        for b in range(len(stage.blocks)):
            ours, theirs = f"layers.{s}.blocks.{b}", f"features.{2 * s + 1}.{b}"
            for part in ("norm1", "norm2", "attn.qkv", "attn.proj"):
                names[f"{ours}.{part}"] = f"{theirs}.{part}"
            names[f"{ours}.mlp.fc1"], names[f"{ours}.mlp.fc2"] = f"{theirs}.mlp.0", f"{theirs}.mlp.3"
            names[f"{ours}.attn"] = f"{theirs}.attn"
        names[f"layers.{s}.downsample"] = f"features.{2 * s + 2}"
    found = {}
    for key in model.state_dict():
        owner = max((n for n in names if key.startswith(n + ".")), key=len, default=None)
        if owner is not None and "index" not in key:
            found[key] = names[owner] + key[len(owner) :]
    return found


def test_equals_torchvision():
    """On sides of which torchvision, too, shifts every map: none is a single window."""
    torch.manual_seed(0)
    theirs = torchvision.models.swin_t(weights=None).eval()
    ours = SwinTransformer(drop_path_rate=0.0).eval()
    state = theirs.state_dict()
    names = torchvision_names(ours)
    assert {k for k in state if "index" not in k and not k.startswith(("norm.", "head."))} == set(names.values())
    ours.load_state_dict({key: state[name] for key, name in names.items()}, strict=False)
    x = torch.randn(1, 3, 256, 288)
    with torch.no_grad():
        maps = ours(x)
        y = x
        for i, part in enumerate(theirs.features):
            y = part(y)
            if i % 2:  # the blocks of a stage
                normed = nn.functional.layer_norm(y, y.shape[-1:]).permute(0, 3, 1, 2)
                torch.testing.assert_close(maps[f"p{i // 2}"], normed, atol=2e-5, rtol=2e-5)


def test_shapes_are_as_announced():
    model = SwinTransformer(embed_dim=8, num_heads=(1, 1, 2, 2), out_indices=(1, 3), drop_path_rate=0.0)
    maps = model(torch.zeros(2, 3, 65, 90))
    assert {k: tuple(v.shape) for k, v in maps.items()} == {"p1": (2, 16, 9, 12), "p3": (2, 64, 3, 3)}
    assert {k: (s.channels, s.stride) for k, s in model.output_shape().items()} == {"p1": (16, 8), "p3": (64, 32)}
    assert all(v.is_contiguous() for v in maps.values())
    assert not any(k.startswith(("norm0", "norm2")) for k in model.state_dict())


def test_relative_positions_worked_by_hand():
    index = tiny().state_dict()["layers.0.blocks.0.attn.relative_position_index"]
    assert index.tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]


def test_order_of_neighbours_in_a_merge_worked_by_hand():
    """Columns of the reduction: token (0, 0), the one below, the one to the right, the one across."""
    model = tiny(embed_dim=2, num_heads=(1, 1), depths=(1, 1))
    seen = []
    model.layers[0].downsample.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    position = torch.arange(16.0).view(4, 4)
    tokens = torch.stack([10 * position, 10 * position + 1])  # channels first
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        # Patches whose embedding is, without normalisation, what we want: blocks of zero weights are identities.
        model.patch_embed.norm = None
        model.patch_embed.proj.weight[0, 0, 0, 0] = model.patch_embed.proj.weight[1, 1, 0, 0] = 1.0
        image = torch.zeros(1, 3, 16, 16)
        image[0, :2, ::4, ::4] = tokens
        model(image)
    merged = seen[0].reshape(-1, 8)
    assert merged[0].tolist() == [0, 1, 40, 41, 10, 11, 50, 51]
    assert merged[3].tolist() == [100, 101, 140, 141, 110, 111, 150, 151]


@pytest.mark.parametrize("far, reached", [((0, 0), False), ((3, 3), True)])
def test_who_attends_to_whom(far, reached):
    """A 6x6 map in 2x2 windows, one block and then a shifted one: information spreads by a window at most."""
    model = tiny(depths=(2, 1), out_indices=(0,))
    for p in model.parameters():
        p.data += 0.3 * torch.randn(p.shape)
    x = torch.randn(1, 3, 24, 24)
    moved = x.clone()
    moved[0, :, 4 * far[0], 4 * far[1]] += 5.0
    with torch.no_grad():
        change = (model(x)["p0"] - model(moved)["p0"]).abs().sum(dim=1)[0]
    # Corner (5, 5) shares a shifted window with (0, 0) only by wrapping around, which is masked. (3, 3) reaches it in
    # neither block: its windows are {2, 3} and then {3, 4}; (4, 4) hears of it.
    assert change[5, 5] == pytest.approx(0.0, abs=1e-5)
    assert bool(change[4, 4] > 1e-4) is reached


def test_p3_of_the_bottom_up_is_not_that_of_the_pyramid():
    """Both have a "p3", of stride 32 and of stride 8; P6 comes from the former."""
    swin = SwinTransformer(embed_dim=4, depths=(1,) * 4, num_heads=(1,) * 4, out_indices=(1, 2, 3), drop_path_rate=0.0)
    fpn = FPN(swin, ["p1", "p2", "p3"], 6, top_block=LastLevelP6P7(32, 6, "p3"))
    x = torch.randn(1, 3, 64, 96)
    maps = fpn(x)
    assert {k: tuple(v.shape[2:]) for k, v in maps.items()} == {
        "p3": (8, 12), "p4": (4, 6), "p5": (2, 3), "p6": (1, 2), "p7": (1, 1)
    }
    torch.testing.assert_close(maps["p6"], fpn.top_block.p6(swin(x)["p3"]))


@pytest.mark.parametrize(
    "frozen, prefixes", [(-1, ()), (0, ("patch_embed",)), (1, ("patch_embed",)), (2, ("patch_embed", "layers.0"))]
)
def test_frozen_stages(frozen, prefixes):
    model = tiny(frozen_stages=frozen)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(prefixes or "-"), name


def test_every_weight_learns():
    model = tiny()
    sum(y.square().sum() for y in model(torch.randn(1, 3, 20, 20)).values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_recomputing_activations_changes_nothing():
    x = torch.randn(1, 3, 20, 20)
    gradients = []
    for use_checkpoint in (False, True):
        model = tiny(use_checkpoint=use_checkpoint)
        model(x)["p1"].square().sum().backward()
        gradients.append(model.patch_embed.proj.weight.grad)
    torch.testing.assert_close(*gradients)


@lite_only
def test_drop_path_rises_linearly_and_drops_whole_branches():
    model = tiny(depths=(2, 3), out_indices=(1,), drop_path_rate=0.4)
    rates = [getattr(b.drop_path, "p", 0.0) for stage in model.layers for b in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    drop = model.layers[1].blocks[2].drop_path
    torch.manual_seed(0)
    kept = drop(torch.ones(4000, 2, 2, 3)).flatten(1)
    assert ((kept == 0) | (kept == 1 / 0.6)).all() and (kept == kept[:, :1]).all()
    assert kept[:, 0].mean() == pytest.approx(1.0, abs=0.05)
    model.eval()
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(model(x)["p1"], model(x)["p1"])


@lite_only
@pytest.mark.parametrize(
    "options, message",
    [
        ({"out_indices": (0, 3)}, "out_indices"), ({"num_heads": (1, 3)}, "4|8"), ({"num_heads": (1,)}, "num_heads"),
        ({"frozen_stages": 5}, "frozen_stages"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


@pytest.mark.parametrize(
    "options, parameters",
    [({}, 27520698), ({"depths": (2, 2, 18, 2)}, 48838602)],
    ids=["Swin-T", "Swin-S"],
)
def test_numbers_of_parameters(options, parameters):
    """Of the backbones with four normalised outputs, counted in mmdetection."""
    model = SwinTransformer(drop_path_rate=0.0, **options)
    assert sum(p.numel() for p in model.parameters()) == parameters
