"""Weights of slimmable networks (Yu et al., ICLR 2019) for ordinary networks of one width.

A public slimmable checkpoint has full-width convolutions, of which a narrower network uses the leading channels, and
one BatchNorm for each width. The detectors here are not slimmable: they are as wide as their yaml says, and start from
the part of the checkpoint that belongs to that width (MSAD supplementary, footnote 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..modeling.backbones.mobilenetv2 import MobileNetV2

# Of the images that slimmable networks were trained on: RGB, 0-255.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


def _resnet_names(modules: Iterable[str]) -> dict[str, str]:
    blocks: list[str] = []
    names = {}
    for module in modules:  # "stem.conv1", "stem.conv1.norm", "res2.0.conv1", "res2.0.shortcut.norm", ...
        parts = module.split(".")
        norm = int(parts[-1] == "norm")
        if parts[0] == "stem":
            names[module] = f"features.0.{norm}"
            continue
        block, layer = ".".join(parts[:2]), parts[2]
        if block not in blocks:
            blocks.append(block)
        part = f"shortcut.{norm}" if layer == "shortcut" else f"body.{3 * int(layer[-1]) - 3 + norm}"
        names[module] = f"features.{len(blocks)}.{part}"
    return names


def _mobilenetv2_names(modules: Iterable[str]) -> dict[str, str]:
    counts: dict[str, int] = {}
    names = {}
    for module in modules:  # "features.0.0", "features.0.1", "features.1.conv.0.0", "features.1.conv.2", ...
        block, inside, _ = module.partition(".conv.")
        if not inside:
            names[module] = module
            continue
        layer = counts[block] = counts.get(block, -1) + 1  # convolution, norm, convolution, ...
        names[module] = f"{block}.body.{3 * (layer // 2) + layer % 2}"  # there an activation follows each norm
    return names


def _norm_set(state: Mapping[str, torch.Tensor], norms: Mapping[str, int]) -> int:
    """Index of the BatchNorm set in which every norm has the wanted number of channels."""
    found = {}
    for name in state:
        head, inside, tail = name.partition(".bn.")
        if inside and tail.endswith(".weight"):
            found.setdefault(int(tail.split(".")[0]), {})[head] = len(state[name])
    for index, sizes in sorted(found.items()):
        if all(sizes.get(name, channels) == channels for name, channels in norms.items()):
            return index
    if not found:
        return 0
    offered = {name: [sizes[name] for _, sizes in sorted(found.items()) if name in sizes] for name in norms}
    worst = next((name for name in norms if offered[name] and norms[name] not in offered[name]), next(iter(norms)))
    raise ValueError(
        "no set of BatchNorms in the checkpoint has the network's channels: "
        f"{worst} has {offered[worst]}, the network {norms[worst]}"
    )


def from_slimmable(checkpoint: Mapping, network: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of ``network`` out of a slimmable checkpoint.

    Args:
        checkpoint: content of a public file: a state dict, alone or under "model", whose names may begin with
            "module.". Its classifier is ignored.
        network: detectron2's ResNet of bottleneck blocks (or ResNetC1 around one) or a MobileNetV2. Its channels say
            which width is taken.

    Raises:
        ValueError: the checkpoint is of another network, or has no set of BatchNorms for this width.
    """
    state = {name.removeprefix("module."): value for name, value in checkpoint.get("model", checkpoint).items()}
    wanted = network.state_dict()
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in wanted))
    names = (_mobilenetv2_names if isinstance(network, MobileNetV2) else _resnet_names)(modules)
    norms = {
        names[name.removesuffix(".running_mean")]: len(value)
        for name, value in wanted.items()
        if name.endswith(".running_mean")
    }
    chosen = _norm_set(state, norms)
    result = {}
    for name, value in wanted.items():
        module, _, tensor = name.rpartition(".")
        source = f"{names[module]}.{tensor}"
        # Only a norm that all widths share is not in a list: MobileNetV2's last.
        full = state.get(f"{names[module]}.bn.{chosen}.{tensor}", state.get(source))
        if full is None:
            raise ValueError(f"the checkpoint has no {source}: it is not of a slimmable {type(network).__name__}")
        part = full[tuple(slice(n) for n in value.shape)]
        if full.dim() != value.dim() or part.shape != value.shape:
            raise ValueError(
                f"{source} has shape {tuple(full.shape)}, too small for {name} of shape {tuple(value.shape)}"
            )
        result[name] = part.clone()
    return result
