"""A small data set on disk whose annotation and image files a test spoils."""

from __future__ import annotations

import json

import numpy as np
from detectron2.config import get_cfg
from PIL import Image

from msad.config import add_msad_config
from msad.data import check_data, register_datasets, register_entries

POINTS = ["nose", "left_eye", "right_eye"]
WIDTH, HEIGHT = 60, 40


class Data:
    """A data set of 4 + 2 images of 60 x 40 pixels with 3 objects each, to be spoiled."""

    def __init__(self, root):
        self.root = root
        (root / "images").mkdir()
        self.splits = {"train": self._split("train", 4), "val": self._split("val", 2)}
        self.entry = {}
        self.cfg = add_msad_config(get_cfg())
        self.cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
        self.cfg.DATALOADER.NUM_WORKERS = 0
        self.cfg.DATASETS.TRAIN, self.cfg.DATASETS.TEST = ("d_train",), ("d_val",)
        self.cfg.SOLVER.IMS_PER_BATCH = 2

    def _split(self, split, count):
        rng = np.random.default_rng(len(split))
        content = {"info": {}, "images": [], "annotations": [], "categories": [
            {"id": i + 1, "name": name, "keypoints": list(POINTS), "sigmas": [0.1, 0.1, 0.1]}
            for i, name in enumerate(("cat", "dog"))
        ]}  # fmt: skip
        for i in range(count):
            name = f"{split}_{i}.png"
            pixels = rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(self.root / "images" / name)
            content["images"].append({"id": i + 1, "file_name": name, "height": HEIGHT, "width": WIDTH})
            for j in range(3):
                # Far enough to the right and down that corners could not be taken for a size.
                x, y, w, h = 30 + 4 * j + i, 20 + 3 * j, 10 + j, 8 + j
                content["annotations"].append({
                    "id": len(content["annotations"]) + 1, "image_id": i + 1, "category_id": 1 + j % 2,
                    "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                    "keypoints": [x + 1, y + 1, 2, x + 2, y + 1, 1, 0, 0, 0], "num_keypoints": 2,
                })  # fmt: skip
        return content

    def image(self, name):
        return self.root / "images" / name

    def each(self, change, split="val", start=0):
        for a in self.splits[split]["annotations"][start:]:
            change(a)

    def register(self):
        for split, content in self.splits.items():
            (self.root / f"annotations_{split}.json").write_text(json.dumps(content))
        self.cfg.DATASETS.REGISTER = [{**entry, **self.entry} for entry in register_entries(self.root, "d")]
        register_datasets(self.cfg)

    def check(self):
        self.register()
        return check_data(self.cfg)[1]

    def texts(self, level):
        return [f"{finding.text}. {finding.fix}" for finding in self.check() if finding.level == level]
