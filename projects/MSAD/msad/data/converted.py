"""Annotations of other formats, gathered into COCO's, with a count of everything that was left out or changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..finding import ERROR, WARNING, Finding
from .image_files import inspect_images
from .tally import Tally

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def text_of(file: Path) -> str:
    """The text of a file; ValueError with its name if it is not in UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8: {error.reason} at byte {error.start}") from None


class CocoBuilder:
    """One split of a data set: images and objects are added one by one, boxes in pixels.

    Args:
        check: what the findings are about, e.g. the path of the annotations.
        categories: COCO's category records, their ids from 1 on in the order of the classes.
    """

    def __init__(self, check: str, categories: Sequence[dict]) -> None:
        self.tally = Tally(check)
        self.categories = list(categories)
        self.images: list[dict] = []
        self.annotations: list[dict] = []

    def drop(self, reason: str, culprit: str) -> None:
        """Count something that is left out or changed; ``reason`` says which."""
        self.tally.add(WARNING, reason, culprit, "")

    def refuse(self, reason: str, culprit: str, fix: str) -> None:
        """Count something that the split cannot be used with."""
        self.tally.add(ERROR, reason, culprit, fix)

    def add_images(self, files: Iterable[Path], root: Path) -> list[tuple[Path, dict]]:
        """(file, its record) of every image that can be read; file names are relative to ``root``."""
        files, added = list(files), []
        for file, found in zip(files, inspect_images([str(file) for file in files])):
            if found.problem:
                self.drop(f"cannot be read ({found.problem}), left out", str(file))
                continue
            record = {
                "id": len(self.images) + 1, "file_name": file.relative_to(root).as_posix(),
                "width": found.width, "height": found.height,
            }  # fmt: skip
            self.images.append(record)
            added.append((file, record))
        return added

    def add_object(self, image: dict, corners: Sequence[float], label: int, culprit: str, **more: Any) -> None:
        """Add an object; one without area in the image is left out, one that reaches out of it is cut.

        Args:
            image: its record.
            corners: x0, y0, x1, y1 in pixels of the image.
            label: position of its class.
            culprit: where it is written, for the report.
            more: further fields of the annotation.
        """
        x0, y0, x1, y1 = corners
        left, top = max(x0, 0.0), max(y0, 0.0)
        right, bottom = min(x1, image["width"]), min(y1, image["height"])
        if right <= left or bottom <= top:
            self.drop("has a box without area in the image, left out", culprit)
            return
        if max(left - x0, top - y0, x1 - right, y1 - bottom) > 1:  # less is a matter of rounding
            self.drop("has a box that reaches out of the image, cut off", culprit)
        box = [round(value, 3) for value in (left, top, right - left, bottom - top)]
        self.annotations.append({
            "id": len(self.annotations) + 1, "image_id": image["id"], "category_id": label + 1, "bbox": box,
            "area": round(box[2] * box[3], 3), "iscrowd": 0, **more,
        })  # fmt: skip

    def content(self) -> dict[str, list[dict]]:
        """The split in COCO's format."""
        return {"images": self.images, "annotations": self.annotations, "categories": self.categories}

    def findings(self) -> tuple[Finding, ...]:
        """What was refused, left out or changed: one finding a reason, with how often and the first culprit."""
        return tuple(
            finding._replace(text=f"{finding.text} ({self.tally[reason]} in all)")
            for reason, finding in zip(self.tally.reasons(), self.tally.findings())
        )
