"""Resolutions, and everything that follows from halving an image: views, level names, padding, grids of maps.

A resolution is ``1 / 2**shift`` of the full input H. The *H frame* is the pixel grid of H. Pyramid level
``p{l}`` has stride ``2**l`` in the pixels of its own input, so ``p{l}`` of the image at shift m lies on the
grid of ``p{l+m}`` of H: alignment is a renaming of levels, and nothing is resized (MSAD, CVPR 2021, Sec. 1).
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, Boxes, ImageList, Instances, Keypoints, PolygonMasks


class Resolution(NamedTuple):
    """A named input size: the short side of H divided by ``2**shift``."""

    name: str
    shift: int


RESOLUTIONS = {r.name: r for r in (Resolution("H", 0), Resolution("L", 1), Resolution("EL", 2))}
_LEVEL = re.compile(r"^p(\d+)$")


def get_resolution(name: str) -> Resolution:
    """Look a resolution up by name ("H", "L", "EL").

    ValueError for anything else: only halvings align pyramid levels, and nothing is resized for other ratios.
    """
    if name not in RESOLUTIONS:
        raise ValueError(
            f"unknown resolution {name!r}; known: {', '.join(RESOLUTIONS)} (the whole, a half and a quarter of the "
            "image). Pyramid levels align at no other ratio: choose the size of H, INPUT.MIN_SIZE_TRAIN, so that the "
            "wanted size is a half or a quarter of it"
        )
    return RESOLUTIONS[name]


def level_of(name: str) -> int:
    """Pyramid level of a feature name: ``"p3"`` -> 3."""
    match = _LEVEL.match(name)
    if match is None:
        raise ValueError(f"feature {name!r} is not a pyramid level; aligned levels are named p1, p2, ...")
    return int(match.group(1))


def shift_names(names: list[str] | tuple[str, ...], shift: int) -> list[str]:
    """Rename levels by ``shift``: +m takes names at shift m to the H frame, -m takes them back."""
    levels = [level_of(n) + shift for n in names]
    if min(levels, default=1) < 1:
        raise ValueError(
            f"levels {list(names)} cannot be moved by {shift}: p1 (stride 2) is the finest level there is"
        )
    return [f"p{level}" for level in levels]


def shift_levels(features: dict[str, torch.Tensor], shift: int) -> dict[str, torch.Tensor]:
    """The same tensors under the names that their grids have in another frame, see :func:`shift_names`."""
    return dict(zip(shift_names(list(features), shift), features.values()))


def pad_divisibility(base: int, shift: int, max_shift: int) -> int:
    """Divisibility of the padded input at ``shift`` so that all branches up to ``max_shift`` share grids.

    If the network needs ``base`` (32 for C5) at its own input, H is padded to a multiple of
    ``base * 2**max_shift`` and the input at shift m to ``2**m`` times less: exactly the same area.
    """
    if not 0 <= shift <= max_shift:
        raise ValueError(f"shift {shift} outside [0, {max_shift}]")
    return base * 2 ** (max_shift - shift)


def downsampled_size(size: tuple[int, int], shift: int) -> tuple[int, int]:
    """(h, w) in H pixels -> (h, w) of its view at ``shift``: an odd last row or column still counts."""
    k = 2**shift
    return -(-size[0] // k), -(-size[1] // k)


def downsample(image: torch.Tensor, shift: int, mode: str = "antialias") -> torch.Tensor:
    """Reduce one image by exactly ``2**shift``.

    Args:
        image: (C, h, w) in H pixels, any dtype.
        mode: "antialias" (triangle filter; an odd side is first completed by repeating its last line, so that the
            L grid is exactly the H grid at half the density) or "nearest" (the released code's sampling).

    Returns:
        (C, ceil(h / 2^m), ceil(w / 2^m)), float for shift > 0.
    """
    if shift == 0:
        return image
    k = 2**shift
    if mode == "nearest":
        return image[:, ::k, ::k].float()
    if mode != "antialias":
        raise ValueError(f"MSAD.DOWNSAMPLE must be 'antialias' or 'nearest', not {mode!r}")
    image = image.float()[None]
    h, w = image.shape[-2:]
    if h % k or w % k:
        image = F.pad(image, (0, -w % k, 0, -h % k), mode="replicate")
        h, w = image.shape[-2:]
    return F.interpolate(image, size=(h // k, w // k), mode="bilinear", antialias=True)[0]


def downsampled_image(item: dict, shift: int, device: torch.device | str, mode: str = "antialias") -> torch.Tensor:
    """:func:`downsample` of an input dict's "image" on ``device``.

    What its entry "downsampled_images", {(shift, mode): image}, already holds is not made again.
    """
    ready = item.get("downsampled_images", {}).get((shift, mode))
    return downsample(item["image"].to(device, non_blocking=True), shift, mode) if ready is None else ready


def downsample_labels(labels: torch.Tensor, shift: int) -> torch.Tensor:
    """Label map (h, w) of H -> (ceil(h / 2^m), ceil(w / 2^m)): of each block of pixels the label at its middle."""
    k = 2**shift
    rows, columns = (
        (torch.arange(0, side, k, device=labels.device) + k // 2).clamp(max=side - 1) for side in labels.shape
    )
    return labels[rows[:, None], columns] if shift else labels


def _scale_bitmasks(masks: BitMasks, shift: int) -> BitMasks:
    # A pixel of the downsampled mask belongs to the object if at least half of its area does; of a pixel at an odd
    # border counts the area inside the image.
    return BitMasks(F.avg_pool2d(masks.tensor.float()[:, None], 2**shift, ceil_mode=True)[:, 0] >= 0.5)


def scale_instances(instances: Instances, shift: int) -> Instances:
    """Ground truth in H pixels -> the same ground truth in the pixels of the view at ``shift``.

    Boxes, masks and keypoints are scaled by exactly ``2**-shift``; other fields are shared, not copied.
    """
    if shift == 0:
        return instances
    s = 0.5**shift
    out = Instances(downsampled_size(instances.image_size, shift))
    for name, value in instances.get_fields().items():
        if isinstance(value, Boxes):
            value = Boxes(value.tensor * s)
        elif isinstance(value, PolygonMasks):
            value = PolygonMasks([[p * s for p in polygons] for polygons in value.polygons])
        elif isinstance(value, BitMasks):
            value = _scale_bitmasks(value, shift)
        elif isinstance(value, Keypoints):
            value = Keypoints(value.tensor * value.tensor.new_tensor([s, s, 1.0]))
        out.set(name, value)
    return out


def downsample_batch(
    batched_inputs: list[dict], shift: int, device: torch.device | str, mode: str = "antialias"
) -> list[dict]:
    """The batch as a model at ``1 / 2**shift`` of H sees it.

    Args:
        batched_inputs: detectron2's input dicts with "image" (C, h, w) and, in training, "instances" or "sem_seg"
            (h, w), in H pixels. An entry "low_res_image" (C, h, w), of the downsampled size, is taken in place of a
            downsampled one.
        shift: how many times the input is halved.
        device: where images are downsampled; H images are moved there first.

    Returns:
        New dicts; "image", "instances" and "sem_seg" are in the downsampled frame, every other entry is the original
        object.
        The input dicts are not modified.
    """
    out = []
    for item in batched_inputs:
        item = dict(item)
        low, size = item.pop("low_res_image", None), downsampled_size(item["image"].shape[-2:], shift)
        if low is None:
            item["image"] = downsampled_image(item, shift, device, mode)
        elif low.shape[-2:] == size:
            item["image"] = low.to(device, non_blocking=True).float()
        else:
            raise ValueError(f"low_res_image is {tuple(low.shape[-2:])} (h, w), but at shift {shift} it must be {size}")
        if "instances" in item:
            item["instances"] = scale_instances(item["instances"], shift)
        if "sem_seg" in item:
            item["sem_seg"] = downsample_labels(item["sem_seg"], shift)
        out.append(item)
    return out


def batch_images(
    images: list[torch.Tensor], pixel_mean: torch.Tensor, pixel_std: torch.Tensor, divisibility: int
) -> ImageList:
    """Normalise (C, h, w) images and pad them with zeros to one batch whose sides divide by ``divisibility``."""
    return ImageList.from_tensors([(x - pixel_mean) / pixel_std for x in images], divisibility)


def resample(x: torch.Tensor, size: tuple[int, int], ratio: float, average: bool = False) -> torch.Tensor:
    """A map on another grid; both begin at the image's corner, and beyond its border a map goes on as there.

    Positions follow from the strides: where one does not divide the other's area, maps that were resized to equal
    sizes would be up to a location apart.

    Args:
        x: (N, C, h, w).
        size: (rows, columns) of the grid.
        ratio: its stride, divided by that of ``x``.
        average: where ``ratio`` is whole, the mean of ``x`` over the area of each location in place of its value,
            bilinear, at its centre.

    Returns:
        (N, C, *size), or a view of ``x`` where the strides are equal.
    """
    if abs(ratio - 1) > 1e-6:
        whole = round(ratio)
        if average and whole > 1 and abs(ratio - whole) < 1e-6:
            x = F.avg_pool2d(x, whole, ceil_mode=True)
        else:
            missing = [
                int(new * ratio) + 2 - old if math.floor(old * (1 / ratio)) < new else 0
                for old, new in zip(x.shape[-2:], size)
            ]
            if any(missing):
                x = F.pad(x, (0, missing[1], 0, missing[0]), mode="replicate")
            x = F.interpolate(x, scale_factor=1 / ratio, mode="bilinear", align_corners=False)
    return x[..., : size[0], : size[1]]


def inside_images(x: torch.Tensor, sizes: list[tuple[int, int]]) -> torch.Tensor:
    """Which locations of ``x`` (N, C, h, w) are among the first ``sizes``, (rows, columns) of each image: bool
    (N, 1, h, w)."""
    inside = x.new_zeros(len(x), 1, *x.shape[-2:], dtype=torch.bool)
    for of_image, (rows, cols) in zip(inside, sizes):
        of_image[:, :rows, :cols] = True
    return inside


def masked_mean(x: torch.Tensor, sizes: list[tuple[int, int]] | None) -> torch.Tensor:
    """Spatial mean of each channel over the valid top-left rectangle of each image.

    Args:
        x: (N, C, h, w).
        sizes: per image, the valid (rows, columns) in locations of ``x``; None: everything is valid.

    Returns:
        (N, C). Contracts one axis after the other, so no masked copy of ``x`` is made.
    """
    if sizes is None:
        return x.mean(dim=(2, 3))
    n, _, h, w = x.shape
    extent = torch.tensor(sizes, dtype=torch.float32).to(x.device, non_blocking=True)  # (N, 2)
    rows = (torch.arange(h, device=x.device) < extent[:, :1]).to(x.dtype) / extent[:, :1].to(x.dtype)
    cols = (torch.arange(w, device=x.device) < extent[:, 1:]).to(x.dtype) / extent[:, 1:].to(x.dtype)
    per_row = torch.matmul(x, cols.view(n, 1, w, 1)).squeeze(-1)  # (N, C, h)
    return torch.matmul(per_row, rows.view(n, h, 1)).squeeze(-1)
