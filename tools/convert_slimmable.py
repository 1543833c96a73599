#!/usr/bin/env python
"""Make pretrained weights of one width out of a public slimmable checkpoint (JiahuiYu/slimmable_networks).

    tools/convert_slimmable.py --weights s_resnet50_0.25_0.5_0.75_1.0.pt \\
        --config-file configs/MSAD/fcos_SLR025_50_T_1x.yaml

takes the part of the bottom-up network that the yaml describes, and writes it to the yaml's MODEL.WEIGHTS. The file
fits any detector on such a network: baseline, teacher or student.
"""

import argparse
import os
import pickle
import sys

import torch
from detectron2.modeling import build_backbone

from msad import cli, load_config
from msad.engine.slimmable import PIXEL_MEAN, PIXEL_STD, from_slimmable
from msad.files import atomic_write


def convert(weights: str, config_file: str, output: str = "", opts: tuple = ()) -> str:
    """Convert and say what was done; errors are ValueError, KeyError or FileNotFoundError."""
    cfg = load_config(config_file, opts)
    output = output or cfg.MODEL.WEIGHTS
    if not output.endswith(".pkl") or "://" in output:
        raise ValueError(f"cannot write to {output!r}: --output or MODEL.WEIGHTS must be a local file .pkl")
    found = (cfg.INPUT.FORMAT, *(tuple(map(float, cfg.MODEL[key])) for key in ("PIXEL_MEAN", "PIXEL_STD")))
    expected = ("RGB", PIXEL_MEAN, PIXEL_STD)
    if found != expected:
        raise ValueError(
            f"{config_file}: INPUT.FORMAT, MODEL.PIXEL_MEAN and MODEL.PIXEL_STD are {found}; "
            f"slimmable networks were trained with {expected}"
        )
    if not os.path.isfile(weights):  # read here, and by no checkpointer
        raise FileNotFoundError(f"no checkpoint {weights}")
    cli.refuse_overwriting([output], [weights, config_file])
    backbone = build_backbone(cfg)
    network = getattr(backbone, "bottom_up", backbone)
    state = from_slimmable(torch.load(weights, map_location="cpu", weights_only=True), network)
    # detectron2 matches the names in such a file by their ends, behind whatever prefix the network has in a detector.
    content = {
        "model": {name: value.numpy() for name, value in state.items()},
        "__author__": "slimmable_networks",
        "matching_heuristics": True,
    }
    os.makedirs(os.path.dirname(output) or ".", exist_ok=True)
    with atomic_write(output) as file:
        pickle.dump(content, file)
    return f"{len(state)} tensors of a {type(network).__name__} written to {output}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, metavar="FILE", help="the public checkpoint")
    parser.add_argument("--config-file", required=True, metavar="FILE", help="yaml of a detector of the wanted width")
    parser.add_argument("--output", default="", metavar="FILE", help="default: the yaml's MODEL.WEIGHTS")
    args = cli.parse(parser, argv)
    return cli.run(parser.prog, lambda: print(convert(args.weights, args.config_file, args.output, args.opts)))


if __name__ == "__main__":
    sys.exit(main())
