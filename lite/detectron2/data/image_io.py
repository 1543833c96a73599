"""Reading images and converting between pixel formats."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from detectron2.utils.file_io import PathManager

# Y, U and V of red, green and blue in [0, 1] by ITU-R BT.601, and back, to the digits in which both are usually given.
_YUV_OF_RGB = np.array([[0.299, 0.587, 0.114], [-0.14713, -0.28886, 0.436], [0.615, -0.51499, -0.10001]])
_RGB_OF_YUV = np.array([[1.0, 0.0, 1.13983], [1.0, -0.39465, -0.58060], [1.0, 2.03211, 0.0]])

_ORIENTATION = 0x0112  # tag of EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


class SizeMismatchError(ValueError):
    """An image file does not have the size that its annotations say."""


def convert_PIL_to_numpy(image: Image.Image, format: str | None) -> np.ndarray:
    """Pixels of a PIL image as ``H x W x C`` uint8.

    Args:
        image: any PIL image.
        format: "BGR", "YUV-BT.601" (float64, Y in [0, 1]), or a mode of PIL such as "RGB" or "L" (which gives C = 1).
            None keeps the image's own mode, whose array may be ``H x W``.
    """
    if format not in (None, "BGR", "YUV-BT.601", *Image.MODES):
        raise ValueError(f"Unknown image format {format!r}; use 'BGR', 'RGB', 'L', 'YUV-BT.601' or a mode of PIL.")
    if format is not None:
        image = image.convert("RGB" if format in ("BGR", "YUV-BT.601") else format)
    pixels = np.asarray(image)
    if format == "BGR":
        return pixels[:, :, ::-1]
    if format == "YUV-BT.601":
        return pixels / 255.0 @ _YUV_OF_RGB.T
    return pixels[:, :, None] if format == "L" else pixels


def convert_image_to_rgb(image: np.ndarray | torch.Tensor, format: str) -> np.ndarray:
    """An ``H x W x C`` image in a format of :func:`read_image` as ``H x W x 3`` RGB, 0 to 255, for display.

    It is uint8; float64 if the format is "YUV-BT.601", and of the type of the input if it is "BGR".
    """
    pixels = image.cpu().numpy() if isinstance(image, torch.Tensor) else image
    if format == "BGR":
        return pixels[:, :, ::-1]
    if format == "YUV-BT.601":
        return pixels @ _RGB_OF_YUV.T * 255.0
    pixels = np.ascontiguousarray(pixels, dtype=np.uint8)
    if format == "RGB":
        return pixels
    if format == "L":
        return pixels.repeat(3, axis=2)
    if format not in Image.MODES or pixels.shape[2:] != (Image.getmodebands(format),):
        raise ValueError(f"An image of shape {pixels.shape} cannot be one of format {format!r}.")
    height, width = pixels.shape[:2]
    return np.asarray(Image.frombytes(format, (width, height), pixels.tobytes()).convert("RGB"))


def read_image(file_name: str, format: str | None = None) -> np.ndarray:
    """Read an image file, turned upright if its EXIF data asks for that.

    Args:
        file_name: path or URL.
        format: see :func:`convert_PIL_to_numpy`.

    Returns:
        ``H x W x C`` uint8; ``H x W`` for a grey image read with ``format=None``.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it is not an image, or truncated; the message names the file.
    """
    with PathManager.open(file_name, "rb") as stream:
        try:
            return convert_PIL_to_numpy(_upright(Image.open(stream)), format)
        except OSError as error:
            raise OSError(f"Cannot read image '{file_name}': {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    """``image`` turned as its EXIF orientation says; EXIF data that are malformed say nothing, and are not kept."""
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION))
    except Exception:  # of any kind, by what is wrong with them
        turn = None
    return image if turn is None else image.transpose(turn)


def check_image_size(dataset_dict: dict, image: np.ndarray) -> None:
    """Compare the size of ``image`` with "height" and "width" of its dict, or fill these in when missing.

    Raises:
        SizeMismatchError: they differ.
    """
    height, width = image.shape[:2]
    expected = (dataset_dict.get("height", height), dataset_dict.get("width", width))
    if expected != (height, width):
        raise SizeMismatchError(
            f"Image '{dataset_dict.get('file_name', dataset_dict.get('image_id', '?'))}' is {width} x {height} "
            f"(width x height) but its annotations say {expected[1]} x {expected[0]}. If the sides are "
            f"swapped, the annotations were probably made without regard to EXIF orientation."
        )
    dataset_dict.setdefault("width", width)
    dataset_dict.setdefault("height", height)
