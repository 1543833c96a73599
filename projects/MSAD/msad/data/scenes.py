"""Drawing one synthetic scene and its annotations."""

from collections.abc import Sequence

import cv2
import numpy as np

from . import shapes
from .shapes import SUBPIXELS

_MIN_VISIBLE = 0.35


def draw_scene(
    rng: np.random.Generator,
    size: tuple[int, int],
    objects: tuple[int, int] = (4, 10),
    min_size: float = 6.0,
    max_fraction: float = 1 / 3,
    classes: Sequence[str] = shapes.CLASSES,
) -> tuple[np.ndarray, list[dict]]:
    """One scene of ``classes``: a (H, W, 3) uint8 BGR image and its COCO annotations without ids.

    Category ids count from 1 in the order of ``classes``.
    """
    height, width = size
    image = _background(rng, height, width)
    light = rng.uniform(0, 2 * np.pi)
    # owner[y, x] = 1 + index of the object seen at a sub-pixel, 0 for the ground
    owner = np.zeros((height * SUBPIXELS, width * SUBPIXELS), np.int32)
    count = int(rng.integers(objects[0], objects[1] + 1))
    sizes = np.exp(rng.uniform(np.log(min_size), np.log(max(min_size, max_fraction * min(size))), count))
    placed: list[dict] = []
    for diameter in -np.sort(-sizes):  # large ones first: they would bury the small ones
        candidate = _find_room(rng, owner, placed, classes[rng.integers(len(classes))], diameter)
        if candidate is not None:
            placed.append(candidate)
            _paint(rng, image, candidate, light)
    return _photograph(rng, image), _annotate(owner, placed, classes)


def _find_room(
    rng: np.random.Generator, owner: np.ndarray, placed: list[dict], name: str, diameter: float
) -> dict | None:
    """Choose pose and a position that leaves every object at least 35 % visible; take it in ``owner``."""
    height, width = owner.shape[0] // SUBPIXELS, owner.shape[1] // SUBPIXELS
    aspect, degrees = rng.uniform(0.85, 1.18), rng.uniform(-1, 1) * shapes.max_rotation(name)
    for _ in range(8):
        centre = rng.uniform((0, 0), (width, height))
        if placed and rng.random() < 0.25:  # beside or over another one
            other, angle = placed[rng.integers(len(placed))], rng.uniform(0, 2 * np.pi)
            reach = rng.uniform(0.3, 1.1) * (other["diameter"] + diameter) / 2
            centre = other["keypoints"][0] + reach * np.array([np.cos(angle), np.sin(angle)])
        outlines, keypoints = shapes.place(name, centre, diameter / 2, aspect, degrees)
        mask, (x, y) = shapes.raster(outlines)
        # The part of the mask, and of the owners, that lies in the image; empty if the object lies outside.
        rows, columns = _overlap(y, mask.shape[0], owner.shape[0]), _overlap(x, mask.shape[1], owner.shape[1])
        cells = (rows, columns)
        view = owner[cells]
        top, left = rows.start - y * SUBPIXELS, columns.start - x * SUBPIXELS
        seen = mask[top : top + view.shape[0], left : left + view.shape[1]]
        area = int(mask.sum())
        remaining = np.array([p["visible"] for p in placed], int)
        lost = np.bincount(view[seen], minlength=len(placed) + 1)[1:]
        least = _MIN_VISIBLE * np.array([p["area"] for p in placed])
        if seen.sum() < _MIN_VISIBLE * area or np.any(remaining - lost < least):
            continue
        for other, hidden in zip(placed, lost):
            other["visible"] -= int(hidden)
        view[seen] = len(placed) + 1
        return {
            "name": name,
            "diameter": diameter,
            "keypoints": keypoints,
            "area": area,
            "visible": int(seen.sum()),
            "mask": seen,  # what is seen when it is laid down, cut at the image's border
            "cells": cells,  # where that is in the owners
            "corner": (columns.start // SUBPIXELS, rows.start // SUBPIXELS),  # and in the image, (x, y)
        }
    return None


def _overlap(start: int, length: int, limit: int) -> slice:
    """Sub-pixels from image pixel ``start`` on, ``length`` of them, cut to 0..limit."""
    start = start * SUBPIXELS
    return slice(min(max(start, 0), limit), min(max(start + length, 0), limit))


def _annotate(owner: np.ndarray, placed: list[dict], classes: Sequence[str]) -> list[dict]:
    annotations = []
    for index, item in enumerate(placed):
        visible = owner[item["cells"]] == index + 1
        polygons = [np.round(p, 2).tolist() for p in shapes.to_polygons(visible, item["corner"])]
        if not polygons:  # nothing but specks is left of it
            continue
        points = np.concatenate([np.reshape(p, (-1, 2)) for p in polygons])
        (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
        keypoints: list[float] = []
        for x, y in item["keypoints"]:
            keypoints += _keypoint(owner, float(x), float(y), index + 1)
        annotations.append(
            {
                "category_id": classes.index(item["name"]) + 1,
                "bbox": [round(float(v), 2) for v in (x0, y0, x1 - x0, y1 - y0)],
                "segmentation": polygons,
                "area": round(float(visible.sum()) / SUBPIXELS**2, 2),
                "iscrowd": 0,
                "keypoints": keypoints,
                "num_keypoints": sum(v > 0 for v in keypoints[2::3]),
            }
        )
    return annotations


def _keypoint(owner: np.ndarray, x: float, y: float, number: int) -> list[float]:
    """COCO's (x, y, v): pixel-centre coordinates; 0 outside the image, 1 below a later object, 2 visible."""
    row, column = int(np.floor(y * SUBPIXELS)), int(np.floor(x * SUBPIXELS))
    if not (0 <= row < owner.shape[0] and 0 <= column < owner.shape[1]):
        return [0, 0, 0]
    # Points lie on the outline, where the ground or an earlier object may show: both leave the point visible.
    return [round(max(x - 0.5, 0), 2), round(max(y - 0.5, 0), 2), 1 if owner[row, column] > number else 2]


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(H, W, 3) float32 in 0..255: two colours mixed by fractal noise, a slope of light, faint clutter."""
    noise = np.zeros((height, width), np.float32)
    cell, weight = max(height, width) / 2, 1.0
    while cell >= 2:
        grid = rng.standard_normal((int(height / cell) + 3, int(width / cell) + 3), dtype=np.float32)
        noise += weight * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
        cell, weight = cell / 2, weight * rng.uniform(0.45, 0.7)
    noise = (noise - noise.mean()) / (noise.std() + 1e-6)
    first = _colour(rng, (0, 70), (60, 215))
    second = np.clip(first + rng.normal(0, 24, 3), 20, 235)
    mix = 1 / (1 + np.exp(-1.5 * noise))[..., None]
    image = (first + (second - first) * mix).astype(np.float32)
    slope = rng.uniform(-0.25, 0.25, 2)
    ys, xs = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)
    image *= (1 + slope[0] * ys + slope[1] * xs).astype(np.float32)[..., None]
    _scribble(rng, image)
    return image


def _scribble(rng: np.random.Generator, image: np.ndarray) -> None:
    """Distractors of no class: patches, curved lines, letters, crumbs, all close to the ground's colour."""
    height, width = image.shape[:2]
    unit = min(height, width)
    layer = np.clip(image, 0, 255).astype(np.uint8)  # OpenCV smooths edges in 8-bit images only

    def spot() -> np.ndarray:
        return rng.uniform((0, 0), (width, height))

    def colour(at: np.ndarray, spread: float) -> tuple[float, ...]:
        ground = image[int(at[1]), int(at[0])]
        return tuple(float(v) for v in np.clip(ground + rng.normal(0, spread, 3), 0, 255))

    def fixed(points) -> np.ndarray:
        return np.round(np.asarray(points) * 16).astype(np.int32)

    for _ in range(rng.integers(0, 4)):
        at, length = spot(), float(rng.uniform(0.45, 0.9)) * unit
        axes = (length, length * float(rng.uniform(0.3, 0.65)))  # too long for a square
        corners = cv2.boxPoints((tuple(map(float, at)), axes, float(rng.uniform(0, 180))))
        cv2.fillConvexPoly(layer, fixed(corners), colour(at, 14), cv2.LINE_AA, 4)
    for _ in range(rng.integers(1, 5)):
        at, heading = spot(), rng.uniform(0, 2 * np.pi)
        bend = heading + np.arange(24) * np.clip(rng.normal(0, 0.08), -0.14, 0.14)  # never a closed ring
        line = at + np.cumsum(np.stack([np.cos(bend), np.sin(bend)], axis=1), axis=0) * unit * rng.uniform(0.01, 0.04)
        thickness = int(rng.integers(1, max(2, unit // 60) + 1))
        cv2.polylines(layer, [fixed(line)], False, colour(at, 25), thickness, cv2.LINE_AA, 4)
    for _ in range(rng.integers(0, 5)):
        at, scale = spot(), float(np.exp(rng.uniform(np.log(0.25), np.log(1.2))))
        letter = "AEFKLMNRTWZ2457"[rng.integers(15)]
        cv2.putText(
            layer, letter, at.astype(int).tolist(), int(rng.integers(0, 5)), scale, colour(at, 25), 1, cv2.LINE_AA
        )
    for _ in range(rng.integers(4, 20)):
        at, axes = spot(), (rng.uniform(0.6, 2.5), rng.uniform(0.4, 0.8))
        cv2.ellipse(
            layer, fixed(at).tolist(), fixed(axes).tolist(), float(rng.uniform(0, 180)), 0, 360, colour(at, 30), -1,
            cv2.LINE_AA, 4,
        )  # fmt: skip
    image += 0.8 * (layer - image)


def _colour(rng: np.random.Generator, saturation: tuple[int, int], value: tuple[int, int]) -> np.ndarray:
    """A BGR colour drawn in HSV space, where even draws look varied."""
    hsv = np.array([[[rng.integers(180), rng.integers(*saturation), rng.integers(*value)]]], np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0].astype(np.float64)


def _paint(rng: np.random.Generator, image: np.ndarray, item: dict, light: float) -> None:
    """Lay one object over the image: soft shadow, shaded fill, sometimes stripes or a rim of another tone."""
    x, y = item["corner"]
    alpha = cv2.resize(
        item["mask"].astype(np.float32), None, fx=1 / SUBPIXELS, fy=1 / SUBPIXELS, interpolation=cv2.INTER_AREA
    )
    height, width = alpha.shape
    extent = np.sqrt(item["area"]) / SUBPIXELS
    direction = np.array([np.cos(light), np.sin(light)])
    margin = int(np.ceil(1 + 0.12 * extent))
    _shade(image, alpha, (x, y), direction * 0.07 * extent, margin, rng.uniform(0.15, 0.4))

    patch = image[y : y + height, x : x + width]
    ground = (patch * alpha[..., None]).sum(axis=(0, 1)) / max(float(alpha.sum()), 1e-6)
    for _ in range(6):
        colour = _colour(rng, (40, 255), (40, 256))
        if np.abs(colour - ground).max() > 55:
            break
    ys, xs = np.mgrid[:height, :width].astype(np.float32)
    ys, xs = ys - height / 2, xs - width / 2
    slope = 1 - rng.uniform(0.05, 0.25) * (xs * direction[0] + ys * direction[1]) / (extent + 1)
    if rng.random() < 0.25:
        angle, period = rng.uniform(0, np.pi), rng.uniform(2.5, 5) + extent * 0.08
        slope *= 1 + rng.uniform(0.1, 0.25) * np.sin((xs * np.cos(angle) + ys * np.sin(angle)) * 2 * np.pi / period)
    fill = colour * slope[..., None]
    if rng.random() < 0.3:
        core = cv2.erode(np.pad(alpha, 1), np.ones((3, 3), np.uint8))[1:-1, 1:-1, None]
        fill = fill * (core + (1 - core) * rng.uniform(0.55, 0.8))
    patch += (np.clip(fill, 0, 255) - patch) * (alpha[..., None] * rng.uniform(0.88, 1.0))


def _shade(image, alpha, corner, offset, margin, strength) -> None:
    """Darken the ground around an object, as if the light came from the other side."""
    (x, y), (height, width) = corner, alpha.shape
    shadow = np.pad(alpha, margin)
    move = np.array([[1, 0, offset[0]], [0, 1, offset[1]]], np.float32)
    shadow = cv2.warpAffine(shadow, move, shadow.shape[::-1])
    shadow = cv2.GaussianBlur(shadow, (0, 0), 0.5 + margin / 4)
    top, left = max(margin - y, 0), max(margin - x, 0)
    region = image[max(y - margin, 0) : y + height + margin, max(x - margin, 0) : x + width + margin]
    region *= 1 - strength * shadow[top : top + region.shape[0], left : left + region.shape[1], None]


def _photograph(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Light blur, brightness and contrast, sensor noise; float32 image to uint8."""
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.7))
    image = (image - 128) * rng.uniform(0.8, 1.15) + 128 + rng.uniform(-12, 12)
    image += rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(1, 5))
    return np.clip(image, 0, 255).astype(np.uint8)
