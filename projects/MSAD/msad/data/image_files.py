"""A look at image files without decoding them: size, pixel format, and whether they are whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import NamedTuple

from detectron2.data.detection_utils import read_image
from detectron2.utils.file_io import PathManager
from PIL import Image

from ..finding import ERROR, OK, WARNING
from .cache import read_cache, write_cache
from .sampling import at_equal_distances
from .tally import Tally

_EXIF_ORIENTATION, _QUARTER_TURNS = 0x0112, (5, 6, 7, 8)
_PNG = b"\x89PNG\r\n\x1a\n"
# What stands at the end of a whole file; others are decoded to see whether they are whole.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
_TAIL = 4096
_PIXELS = {
    "I": "16-bit or float pixels", "F": "16-bit or float pixels", "RGBA": "an alpha channel", "LA": "an alpha channel",
    "PA": "an alpha channel", "P": "a palette", "CMYK": "CMYK pixels",
}  # fmt: skip

_ADVICE = {
    "16-bit or float pixels": "convert to 8 bits: values above 255 would all be white",
    "16 bits a channel": "convert to 8 bits: only the upper 8 are used",
    "an alpha channel": "remove it: it is ignored, what was transparent gets the colour underneath",
    "a palette": "see that it is a photograph and no label image; its colours are used",
    "CMYK pixels": "convert to RGB: the colours are approximated",
    "several frames": "only the first is used",
}


class ImageFile(NamedTuple):
    """What a file says about itself.

    Attributes:
        width, height: in pixels, upright as detectron2 reads it; 0 if the file cannot be read.
        pixels: what is special about its pixels, "" for 8-bit grey or colour.
        turned: EXIF exchanges width and height.
        problem: why it cannot be read, "" if it can.
    """

    width: int
    height: int
    pixels: str = ""
    turned: bool = False
    problem: str = ""


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) in pixels of an opened image as detectron2 reads it, turned as its EXIF orientation says."""
    turned = image.getexif().get(_EXIF_ORIENTATION) in _QUARTER_TURNS
    return image.size[::-1] if turned else image.size


def inspect_image(path: str) -> ImageFile:
    """Header and end of an image file; it is decoded only where these do not suffice."""
    try:
        with PathManager.open(path, "rb") as file:
            head = file.read(32)
            if head.startswith(b"version https://git-lfs"):
                return ImageFile(0, 0, problem="it is a Git LFS pointer")
            file.seek(0, os.SEEK_END)
            file.seek(max(file.tell() - _TAIL, 0))
            tail = file.read()
            file.seek(0)
            with Image.open(file) as image:
                size, stored = upright_size(image), image.size
                pixels = special_pixels(image)
                if head.startswith(_PNG) and head[24] == 16 and not pixels:
                    pixels = "16 bits a channel"
                if getattr(image, "is_animated", False) and not refused(pixels):
                    pixels = "several frames"
                end = _ENDS.get(image.format)
        if end is None or end not in tail:
            read_image(path, "RGB")
    except FileNotFoundError:
        return ImageFile(0, 0, problem="it does not exist")
    except Exception as error:  # decoders raise nearly anything at a broken file
        return ImageFile(0, 0, problem=" ".join(str(error).split()) or type(error).__name__)
    return ImageFile(*size, pixels, size != stored)


def special_pixels(image: Image.Image) -> str:
    """What is special about the pixels of an opened image, see :class:`ImageFile`."""
    return _PIXELS.get(image.mode.split(";")[0], "")


def refused(pixels: str) -> str:
    """Why an image with such pixels (of :class:`ImageFile`) is not used, and what to do about it; "" where it is."""
    return f"it has {pixels}: {_ADVICE[pixels]}" if pixels.startswith("16-bit") else ""


def inspect_images(paths: Sequence[str]) -> list[ImageFile]:
    """:func:`inspect_image` of each; what is known of a file of the same size and time is not looked at again."""
    paths = [os.fspath(path) for path in paths]
    name = f"image-files-{hashlib.sha256(os.path.dirname(paths[0]).encode()).hexdigest()[:32]}.json" if paths else ""
    known, out, changed = (name and read_cache(name)) or {}, [], False
    for path in paths:
        stamp = _stamp(path)
        if stamp is None or known.get(path, [None])[0] != stamp:
            known[path] = [stamp, *inspect_image(path)]
            changed = True
        out.append(ImageFile(*known[path][1:]))
    if changed:
        write_cache(name, known)
    return out


def _stamp(path: str) -> list[int] | None:
    try:
        status = os.stat(path)
    except OSError:  # of a remote file nothing is kept
        return None
    return [status.st_size, status.st_mtime_ns]


def name_like(path: str) -> str | None:
    """A file that is there and may be meant by ``path``, which is not: other case, other suffix, other folder."""
    folder, base = os.path.split(path)
    stem = os.path.splitext(base)[0].lower()
    for place in (folder, os.path.dirname(folder)):
        inside = os.path.join(place, base.replace("\\", "/"))
        if os.path.isfile(inside) and inside != path:
            return inside
        if os.path.isdir(place):
            for other in sorted(os.listdir(place)):
                if os.path.splitext(other)[0].lower() == stem and os.path.isfile(os.path.join(place, other)):
                    return os.path.join(place, other)
    return None


def check_image_files(tally: Tally, records: Sequence[dict], testing: bool, count: int) -> None:
    """Whether the files of dataset dicts are there, whole, of the size that the dicts say and of 8 bits.

    Args:
        testing: the images are tested on, each of them; training alone takes another one where a file is broken.
        count: so many files, taken at equal distances, are looked into; 0: all. All are looked for.
    """
    files = {record["file_name"]: record for record in records}
    of = f"{len(files)} image files"
    for path in files:
        if not PathManager.isfile(path):
            near = None if tally["does not exist"] else name_like(path)
            fix = f"there is {near}: correct file_name or IMAGES" if near else "correct file_name or IMAGES"
            tally.add(ERROR, "does not exist", path, fix, of)
    there = [path for path in files if PathManager.isfile(path)] if tally["does not exist"] else [*files]
    if count and len(there) > count:
        there = at_equal_distances(there, count)
        tally.add(OK, f"{count} of {len(files)} image files were looked into; DATASETS.CHECK_IMAGES 0: all", "", "")
    of = f"{len(there)} image files"
    found = inspect_images(there)
    broken = sum(bool(file.problem) for file in found)
    for path, file in zip(there, found):
        record = files[path]
        if file.problem:
            level = WARNING if not testing and 2 * broken < len(there) else ERROR
            use = "; training takes another image instead" if level == WARNING else ""
            tally.add(level, "cannot be read", path, "replace the file", of, f"cannot be read ({file.problem}){use}")
            continue
        said = record.get("width", file.width), record.get("height", file.height)
        if said != (file.width, file.height):
            seen = f"is {file.width} x {file.height} (width x height), but its record says {said[0]} x {said[1]}"
            fix = "write width and height of the file"
            if said == (file.height, file.width):
                seen += ", the sides are exchanged"
                fix += ", turned as its EXIF orientation says; boxes too" if file.turned else ""
            tally.add(ERROR, "has another size than its record", path, fix, of, seen)
        check_pixels(tally, file, path, of)


def check_pixels(tally: Tally, file: ImageFile, path: str, of: str) -> None:
    """Whether an image file has 8-bit grey or colour; ``of``: among what it is counted, see :meth:`Tally.add`."""
    if file.pixels:
        level = ERROR if refused(file.pixels) else WARNING
        tally.add(level, f"has {file.pixels}", path, _ADVICE[file.pixels], of)
