"""Images and videos that a user names on a command line: which files they are, where what is made of them goes."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from detectron2.data.detection_utils import read_image
from PIL import Image

from .image_files import refused, special_pixels

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"}


class Unreadable(Exception):
    """An input that cannot be used; the message says why."""


def is_video(path: Path) -> bool:
    """Whether the file's name is that of a video."""
    return path.suffix.lower() in VIDEOS


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """Files of the patterns in order: a folder stands for the images and videos in it; a name may not exist."""
    found: list[Path] = []
    for pattern in patterns:
        if os.path.exists(pattern):
            paths = [Path(pattern)]
        else:
            paths = [Path(p) for p in sorted(glob.glob(pattern, recursive=True))] or [Path(pattern)]
        for path in paths:
            if path.is_dir():
                found += sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGES | VIDEOS)
            else:
                found.append(path)
    return list(dict.fromkeys(found))


def choose_outputs(inputs: Sequence[Path], output: Path) -> list[Path]:
    """A file for every input; ValueError if ``output`` is a file and there are several inputs."""
    if output.suffix.lower() in IMAGES | VIDEOS and not output.is_dir():
        if len(inputs) > 1:
            raise ValueError(f"--output {output} is a file, but there are {len(inputs)} inputs: name a folder")
        wanted = VIDEOS if is_video(inputs[0]) else {".jpg", ".jpeg", ".png"}
        if output.suffix.lower() not in wanted:
            raise ValueError(f"--output {output} cannot hold what is made from {inputs[0]}: use {sorted(wanted)}")
        return [output]
    taken: set[str] = set()
    outputs = []
    for path in inputs:
        suffix = ".mp4" if is_video(path) else path.suffix.lower()
        suffix = suffix if suffix in (".mp4", ".jpg", ".jpeg", ".png") else ".png"
        name, number = path.stem + suffix, 1
        while name in taken:  # images of the same name in two folders
            number += 1
            name = f"{path.stem}_{number}{suffix}"
        taken.add(name)
        outputs.append(output / name)
    return outputs


def require_bytes(source: Path) -> None:
    """Unreadable with the way out if an image has 16-bit or float pixels, which would all be white."""
    with contextlib.suppress(OSError, SyntaxError, ValueError), Image.open(source) as image:  # reading it says what
        if reason := refused(special_pixels(image)):
            raise Unreadable(reason)


def read_picture(source: Path) -> np.ndarray:
    """(H, W, 3) uint8 BGR, turned as its EXIF data say; Unreadable if it is no image, or see :func:`require_bytes`."""
    require_bytes(source)
    try:
        return read_image(str(source), format="BGR")
    except (OSError, ValueError, SyntaxError) as error:  # PIL raises SyntaxError at broken PNGs
        raise Unreadable(str(error)) from None


def open_video(source: Path) -> tuple[Iterator[np.ndarray], int | None, float]:
    """BGR frames, how many there should be if that is known, and frames per second; Unreadable if there is none."""
    capture = cv2.VideoCapture(str(source))
    good, first = capture.read()
    if not good:
        capture.release()
        raise Unreadable("no frame can be read from it")

    def frames() -> Iterator[np.ndarray]:
        good, frame = True, first
        while good:
            yield frame
            good, frame = capture.read()
        capture.release()

    count, rate = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), capture.get(cv2.CAP_PROP_FPS)
    return frames(), count if count > 0 else None, rate if 0 < rate < 1000 else 25.0
