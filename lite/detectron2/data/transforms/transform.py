"""Deterministic transforms that fvcore does not have.

Coordinates are ``N x 2`` arrays of (x, y) in continuous pixels: pixel (i, j) covers ``[j, j+1] x [i, i+1]``.
Images are ``H x W`` or ``H x W x C``.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import torch
from fvcore.transforms.transform import CropTransform, NoOpTransform, Transform, TransformList
from PIL import Image

# PIL's resampling codes and the mode of torch.nn.functional.interpolate that stands for each.
_TORCH_MODES = {Image.NEAREST: "nearest", Image.BILINEAR: "bilinear", Image.BICUBIC: "bicubic"}


def _through_pil(img: np.ndarray, operation: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """Run a PIL operation on an array; a trailing channel axis of length 1 survives the round trip."""
    grey_axis = img.ndim == 3 and img.shape[2] == 1
    out = np.asarray(operation(Image.fromarray(img[:, :, 0] if grey_axis else img)))
    return out[:, :, None] if grey_axis else out


def _resize_with_torch(img: np.ndarray, size: tuple[int, int], interp: int) -> np.ndarray:
    """Resize a non-uint8 ``H x W [x C ...]`` array; linear filters do not antialias on this path."""
    if interp not in _TORCH_MODES:
        raise ValueError(f"interp={interp} cannot resize a {img.dtype} image; use one of PIL's {sorted(_TORCH_MODES)}.")
    mode = _TORCH_MODES[interp]
    planes = torch.from_numpy(np.ascontiguousarray(img)).reshape(*img.shape[:2], -1).permute(2, 0, 1)
    resized = torch.nn.functional.interpolate(
        planes[None], size, mode=mode, align_corners=None if mode == "nearest" else False
    )
    return resized[0].permute(1, 2, 0).reshape(*size, *img.shape[2:]).numpy()


class ResizeTransform(Transform):
    """Resize an ``h x w`` image to ``new_h x new_w``.

    Args:
        h, w: size of the input in pixels; images of another size are refused.
        new_h, new_w: size of the output in pixels.
        interp: PIL resampling code, bilinear when not given. uint8 images go through PIL, which antialiases;
            other types go through torch.
    """

    def __init__(self, h: int, w: int, new_h: int, new_w: int, interp: int | None = None):
        super().__init__()
        interp = Image.BILINEAR if interp is None else interp
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        if img.shape[:2] != (self.h, self.w) or img.ndim > 4:
            raise AssertionError(
                f"ResizeTransform was made for {self.h} x {self.w} images, got an array of shape {img.shape}."
            )
        interp = self.interp if interp is None else interp
        if img.dtype == np.uint8:
            return _through_pil(img, lambda image: image.resize((self.new_w, self.new_h), interp))
        return _resize_with_torch(img, (self.new_h, self.new_w), interp)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        coords[:, :2] = coords[:, :2] * (self.new_w / self.w, self.new_h / self.h)
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return self.apply_image(segmentation, Image.NEAREST)

    def inverse(self) -> Transform:
        return ResizeTransform(self.new_h, self.new_w, self.h, self.w, self.interp)


class ExtentTransform(Transform):
    """Cut a rectangle out of the image, which may reach outside, and resample it to a given size.

    Args:
        src_rect: (x0, y0, x1, y1) in pixels of the input.
        output_size: (height, width) in pixels.
        interp: PIL resampling code.
        fill: without effect, as in detectron2; what lies outside the input is 0.
    """

    def __init__(
        self,
        src_rect: tuple[float, float, float, float],
        output_size: tuple[int, int],
        interp: int = Image.BILINEAR,
        fill: int = 0,
    ):
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        out_h, out_w = self.output_size
        resample = self.interp if interp is None else interp
        return _through_pil(img, lambda i: i.transform((out_w, out_h), Image.EXTENT, self.src_rect, resample))

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        rect = np.asarray(self.src_rect, dtype=np.float32)
        out_wh = np.asarray(self.output_size[::-1], dtype=np.float32)
        return (coords.astype(np.float32) - rect[:2]) * out_wh / (rect[2:] - rect[:2])

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Resamples as the image does, which suits binary masks (values are rounded) but not class labels."""
        return self.apply_image(segmentation)


class RotationTransform(Transform):
    """Rotate about a point, counter-clockwise for positive angles.

    Args:
        h, w: size of the input in pixels.
        angle: degrees.
        expand: enlarge the canvas so that the whole rotated image fits; ``center`` then only matters for the
            rounding, as the result is centred anew. Otherwise the canvas stays ``h x w``.
        center: (x, y) of the fixed point in pixels, the middle of the image when not given.
        interp: OpenCV interpolation flag, bilinear when not given.
    """

    def __init__(
        self,
        h: int,
        w: int,
        angle: float,
        expand: bool = True,
        center: tuple[float, float] | None = None,
        interp: int | None = None,
    ):
        super().__init__()
        if center is None:
            center = np.array((w / 2, h / 2))
        interp = cv2.INTER_LINEAR if interp is None else interp
        self._set_attributes(locals())
        cosine, sine = abs(np.cos(np.deg2rad(angle))), abs(np.sin(np.deg2rad(angle)))
        self.bound_w, self.bound_h = w, h
        if expand:
            self.bound_w = int(np.rint(h * sine + w * cosine))
            self.bound_h = int(np.rint(h * cosine + w * sine))
        self._coords_matrix = self._affine_matrix(0.0)
        # OpenCV addresses pixels by their centres, half a pixel away from continuous coordinates.
        self._image_matrix = self._affine_matrix(-0.5)

    def _affine_matrix(self, offset: float) -> np.ndarray:
        """2x3 matrix from input to output coordinates whose origin is moved by ``offset`` pixels."""
        pivot = (float(self.center[0]) + offset, float(self.center[1]) + offset)
        matrix = cv2.getRotationMatrix2D(pivot, float(self.angle), 1.0)
        if self.expand:
            middle = np.array((self.w / 2 + offset, self.h / 2 + offset, 1.0))
            canvas_middle = np.array((self.bound_w / 2 + offset, self.bound_h / 2 + offset))
            matrix[:, 2] += canvas_middle - matrix @ middle
        return matrix

    def _is_identity(self, array: np.ndarray) -> bool:
        return len(array) == 0 or self.angle % 360 == 0

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        if self._is_identity(img):
            return img
        if img.shape[:2] != (self.h, self.w):
            raise AssertionError(
                f"RotationTransform was made for {self.h} x {self.w} images, got an array of shape {img.shape}."
            )
        flags = self.interp if interp is None else interp
        return cv2.warpAffine(img, self._image_matrix, (self.bound_w, self.bound_h), flags=flags)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        coords = np.asarray(coords, dtype=float)
        if self._is_identity(coords):
            return coords
        return coords @ self._coords_matrix[:, :2].T + self._coords_matrix[:, 2]

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return self.apply_image(segmentation, cv2.INTER_NEAREST)

    def inverse(self) -> Transform:
        """Rotate back and crop the original canvas; exact only where nothing was cut, so needs ``expand``."""
        if not self.expand:
            raise NotImplementedError("A rotation with expand=False cuts corners off and cannot be undone.")
        back = RotationTransform(self.bound_h, self.bound_w, -self.angle, True, None, self.interp)
        x0, y0 = (back.bound_w - self.w) // 2, (back.bound_h - self.h) // 2
        return TransformList([back, CropTransform(x0, y0, self.w, self.h)])


class ColorTransform(Transform):
    """Apply ``op`` (array to array) to the pixels and leave all geometry alone."""

    def __init__(self, op: Callable[[np.ndarray], np.ndarray]):
        if not callable(op):
            raise ValueError(f"{type(self).__name__} needs a function of the image, got {op!r}.")
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        return self.op(img)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return segmentation

    def inverse(self) -> Transform:
        return NoOpTransform()


class PILColorTransform(ColorTransform):
    """As :class:`ColorTransform` with an ``op`` from PIL image to PIL image."""

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        return np.asarray(self.op(Image.fromarray(img)))
