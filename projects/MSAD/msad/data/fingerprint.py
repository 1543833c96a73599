"""By what a run recognises that its data are still the same."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from .cache import file_sha256
from .register import register_datasets

# Keys of records that name files of annotations.
ANNOTATION_FILES = ("sem_seg_file_name", "annotation_file")


def dataset_fingerprint(cfg: CfgNode) -> dict[str, dict[str, str]]:
    """What DATASETS.TRAIN and DATASETS.TEST consist of, equal on every machine that has the same files.

    Returns:
        name -> {"annotations": sha256 of the annotation file, "images": sha256 of the images' names and sizes in
        bytes}; "low_res_images" and "stuff" likewise where the entry has LOW_RES_IMAGES and STUFF. A file that is not
        there is "missing", and a data set that no entry or engine declares is {"annotations": "unknown"}. Images are
        not opened.
    """
    register_datasets(cfg)
    return {name: _fingerprint(name) for name in dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))}


def _fingerprint(name: str) -> dict[str, str]:
    if name not in DatasetCatalog.list():
        return {"annotations": "unknown"}
    metadata = MetadataCatalog.get(name)
    # The file that the entry names: the one in the metadata may be a completed copy of it.
    entry = metadata.get("definition") or {}
    file, root = entry.get("JSON", metadata.get("json_file")), entry.get("IMAGES", metadata.get("image_root"))
    try:
        is_coco = file and root and entry.get("TYPE", "coco") in ("coco", "coco_sem_seg")
        annotations, images = _from_json(file) if is_coco else _from_records(name, root or "")
    except FileNotFoundError:
        return {"annotations": "missing"}
    out = {"annotations": annotations, "images": _listing(root or "", images)}
    if entry.get("LOW_RES_IMAGES"):
        out["low_res_images"] = _listing(entry["LOW_RES_IMAGES"], images)
    if entry.get("STUFF"):
        out["stuff"] = _listing(entry["STUFF"], (os.path.splitext(name)[0] + ".png" for name in images))
    return out


def _from_json(file: str) -> tuple[str, list[str]]:
    digest = file_sha256(file)
    try:
        with PathManager.open(file, "r", encoding="utf-8-sig") as stream:
            return digest, [str(image.get("file_name")) for image in json.load(stream)["images"]]
    except (AttributeError, KeyError, TypeError, ValueError):  # not in COCO's format: the checks say so
        return digest, []


def _from_records(name: str, root: str) -> tuple[str, list[str]]:
    """Of data sets in another format: from what detectron2 gets to see."""
    records = DatasetCatalog.get(name)
    images = [os.path.relpath(r["file_name"], root) if root else str(r["file_name"]) for r in records]
    plain: list[Any] = [{k: v for k, v in r.items() if not k.endswith(("file_name", "_file"))} for r in records]
    files = dict.fromkeys(r[key] for key in ANNOTATION_FILES for r in records if key in r)
    plain += map(file_sha256, files)
    text = json.dumps(plain, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest(), images


def _listing(root: str, images: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for image in sorted(images):
        try:
            size = os.stat(os.path.join(root, image)).st_size
        except OSError:
            size = -1
        digest.update(f"{image}\0{size}\n".encode())
    return digest.hexdigest()
