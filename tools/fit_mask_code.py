#!/usr/bin/env python
"""Fit MEInst's mask code: the principal components of the masks of a training set.

    tools/fit_mask_code.py --config-file configs/MSAD/meinst_R_50_T_1x.yaml

reads DATASETS.TRAIN and writes the file that the yaml's MODEL.MEINST.CODE names, with MODEL.MEINST.DIM numbers a mask.
Teacher and student of one experiment share the file.
"""

import argparse
import os
import sys

from detectron2.config import CfgNode
from detectron2.data.detection_utils import annotations_to_instances, filter_empty_instances
from tqdm import tqdm

from msad import cli, load_config
from msad.config_values import copy_with
from msad.data.checks import load_train_dicts
from msad.data.register import register_datasets
from msad.modeling.detectors.mask_code import MASK_SIZE, MaskStatistics

FIELDS = ("bbox", "bbox_mode", "category_id", "segmentation")


def fit(cfg: CfgNode, output: str = "", mask_size: int = MASK_SIZE) -> str:
    """Fit, write, and say what was done; errors are ValueError or FileNotFoundError."""
    output = output or cfg.MODEL.MEINST.CODE
    if not output.endswith(".npz"):
        raise ValueError(f"cannot write to {output!r}: --output or MODEL.MEINST.CODE must be a file .npz")
    cfg = copy_with(cfg, {"MODEL.MASK_ON": True})  # the data are checked for masks
    register_datasets(cfg)
    statistics = MaskStatistics(mask_size)
    for record in tqdm(load_train_dicts(cfg), desc="images", disable=None):
        objects = [a for a in record["annotations"] if a.get("segmentation") and not a.get("iscrowd", 0)]
        objects = [{key: a[key] for key in FIELDS} for a in objects]
        if objects:
            size = record["height"], record["width"]
            instances = filter_empty_instances(annotations_to_instances(objects, size, cfg.INPUT.MASK_FORMAT))
            statistics.add(instances.gt_masks.crop_and_resize(instances.gt_boxes.tensor, mask_size))
    code, kept = statistics.fit(cfg.MODEL.MEINST.DIM)
    code.save(output)
    return (
        f"{statistics.count} masks of {mask_size} x {mask_size}: {code.dim} components keep {kept:.1%} of their "
        f"variance; written to {output}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="yaml of the detector")
    parser.add_argument("--output", default="", metavar="FILE", help="default: the yaml's MODEL.MEINST.CODE")
    parser.add_argument("--mask-size", type=int, default=MASK_SIZE, help="rows of a mask (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    args = cli.parse(parser, argv)

    def work() -> None:
        cfg = load_config(args.config_file, args.opts)
        output = args.output or cfg.MODEL.MEINST.CODE
        if os.path.exists(output) and not args.overwrite:
            raise ValueError(
                f"{output} exists, and models trained with it need it: choose another --output, or add --overwrite"
            )
        print(fit(cfg, output, args.mask_size))

    return cli.run(parser.prog, work)


if __name__ == "__main__":
    sys.exit(main())
