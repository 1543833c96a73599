"""Pictures of detections: one image with what is in it, and panels that compare several models on the same images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.utils.visualizer import Visualizer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..data.names import class_names
from .colours import FAINT, GREY, INK, class_colour
from .label_maps import LabelMap
from .objects import Content, Objects, as_content, resized, sought

_DPI = 100
_GAP = 8  # pixels between the images of a panel
_MAX_LABELS = 12
_FONT_SIZE = 9  # points
_PLAIN = {"text.parse_math": False}  # names of classes and files may have dollar signs
_LINE = _FONT_SIZE * _DPI / 72 * 1.5  # pixels from one label to the next


@dataclass(frozen=True)
class Panel:
    """One row: an RGB uint8 image (H, W, 3) and, by column title, what there is to show of it."""

    image: np.ndarray
    columns: Mapping[str, Content] = field(default_factory=dict)
    caption: str = ""


@matplotlib.rc_context(_PLAIN)
def draw_objects(
    image: np.ndarray,
    objects: Content,
    metadata: Metadata,
    *,
    threshold: float = 0.7,
    width: int | None = None,
    labels: bool | None = None,
    colours: Mapping[int, tuple[float, float, float]] | None = None,
) -> np.ndarray:
    """Draw boxes, masks and keypoints, whichever there are, with detectron2's Visualizer; or the classes of all pixels.

    Args:
        image: RGB uint8 (H, W, 3).
        objects: in the pixels of ``image``; those that have a score are shown from ``threshold`` on.
        metadata: ``thing_classes``, or ``stuff_classes``, name the classes, otherwise their indices do; keypoint names
            and rules are used.
        width: of the picture. Default: the image's own, enlarged if the short side is below 480 pixels, because text
            and lines do not fit into less. The image is enlarged before anything is drawn.
        labels: write class and score; default: unless there are so many objects that labels would hide them.
        colours: RGB in [0, 1] by class; default: the same for a class in every picture.

    Returns:
        RGB uint8 picture.
    """
    objects = as_content(objects).above(threshold)
    height, own_width = image.shape[:2]
    if width is None:
        width = round(own_width * max(1.0, 480 / min(height, own_width)))
    size = (max(round(height * width / own_width), 1), width)
    if size != (height, own_width):
        enlarging = width > own_width
        image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_CUBIC if enlarging else cv2.INTER_AREA)
        if isinstance(objects, Objects):
            objects = resized(objects, width / own_width, size[0] / height, size)
        else:
            objects = objects.resized(size)
    if isinstance(objects, LabelMap):
        return objects.paint(image, colours or {c: class_colour(c) for c in objects.classes.tolist()})
    canvas = Visualizer(np.ascontiguousarray(image), metadata)
    if len(objects):
        chosen = [colours[c] if colours else class_colour(c) for c in objects.classes.tolist()]
        canvas.overlay_instances(
            boxes=_visible(objects.boxes), masks=objects.masks, keypoints=objects.keypoints, assigned_colors=chosen,
            alpha=0.35,
        )  # fmt: skip
        if labels is None:
            labels = len(objects) <= _MAX_LABELS
        if labels:
            _draw_labels(canvas, objects, metadata, chosen, size)
    return np.asarray(canvas.get_output().get_image())


def _visible(boxes: np.ndarray) -> np.ndarray:
    """XYXY boxes whose sides are at least 6 pixels, grown about their centres: smaller ones are no frame."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = np.maximum(boxes[:, 2:] - boxes[:, :2], 6.0) / 2
    return np.concatenate([centres - half, centres + half], axis=1)


def legend_strip(classes: Iterable[int], metadata: Metadata, width: int) -> np.ndarray:
    """RGB uint8 (28, width, 3): a patch of colour and the name of each class, as many as fit; for frames of videos."""
    strip, x = np.full((28, width, 3), 255, np.uint8), 8
    for index in sorted(classes):
        name = class_name(metadata, index)
        extent = 30 + cv2.getTextSize(name, cv2.FONT_HERSHEY_SIMPLEX, 0.5, 1)[0][0]
        if x + extent > width:
            break
        cv2.rectangle(strip, (x, 7), (x + 14, 21), [round(255 * value) for value in class_colour(index)], -1)
        cv2.putText(strip, name, (x + 20, 19), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (40, 40, 40), 1, cv2.LINE_AA)
        x += extent + 10
    return strip


def _draw_labels(
    canvas: Visualizer, objects: Objects, metadata: Metadata, colours: list, size: tuple[int, int]
) -> None:
    """Write class and score above, in or below each box, inside the picture and off the other labels if possible."""
    taken: list[tuple[float, float, float]] = []
    for i, (x0, y0, _, y1) in enumerate(objects.boxes):
        text = class_name(metadata, int(objects.classes[i]))
        if objects.scores is not None:
            text += f" {objects.scores[i]:.0%}"
        extent = 0.64 * _FONT_SIZE * _DPI / 72 * len(text)
        x = min(max(x0, 3), max(size[1] - extent - 3, 3))
        heights = [y0 - _LINE, y0 + 3, y1 + 3] if y1 - y0 > 3 * _LINE else [y0 - _LINE, y1 + 3]
        inside = [y for y in heights if 0 <= y <= size[0] - _LINE] or [0]
        free = [y for y in inside if not any(a < x + extent and x < b and abs(y - c) < _LINE for a, b, c in taken)]
        y = (free or inside)[0]
        taken.append((x, x + extent, y))
        canvas.draw_text(text, (x, y), font_size=_FONT_SIZE, color=colours[i], horizontal_alignment="left")


def class_name(metadata: Metadata, index: int) -> str:
    """Name of a class, or its index where no name is known."""
    names = class_names(metadata)
    return names[index] if index < len(names) else str(index)


def save_panels(
    path: str | Path, panels: list[Panel], metadata: Metadata, *, threshold: float = 0.7, cell_width: int = 480
) -> Path:
    """Write a picture of panels: a row per image, a column per source, e.g. ground truth | teacher | student.

    Args:
        path: PNG or JPG.
        panels: the titles of their columns, in order of first appearance, stand once on top; a cell that a panel
            lacks stays empty. Every cell says how many objects it shows.
        threshold: least score of the predictions that are shown.
        cell_width: in pixels; images are scaled to it before anything is drawn.

    Raises:
        ValueError: no panels, or none has a column.
    """
    path = Path(path)
    figure = panels_figure(panels, metadata, threshold=threshold, cell_width=cell_width)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI, pil_kwargs={"quality": 92} if path.suffix.lower() != ".png" else None)
    return path


def panels_figure(panels: list[Panel], metadata: Metadata, *, threshold: float = 0.7, cell_width: int = 480) -> Figure:
    """The figure of :func:`save_panels`, a pixel of the cells being a pixel of the figure."""
    titles = list(dict.fromkeys(title for panel in panels for title in panel.columns))
    if not titles:
        raise ValueError("nothing to draw: no panel has a column")
    rows = [_row(panel, threshold) for panel in panels]
    shown = sorted({c for row in rows for objects in row.values() for c in objects.classes.tolist()})
    # Of many classes few are shown; by rank they get colours that are easier to tell apart.
    colours = {c: class_colour(rank if max(shown) >= 8 else c) for rank, c in enumerate(shown)}
    cells = []
    for panel, row in zip(panels, rows):
        labels = max(map(len, row.values()), default=0) <= _MAX_LABELS  # in all images of a row or in none
        style = {"width": cell_width, "labels": labels, "colours": colours}
        cells.append({t: draw_objects(panel.image, o, metadata, threshold=0, **style) for t, o in row.items()})
    legend = {class_name(metadata, c): colour for c, colour in colours.items()}
    return _compose(titles, panels, rows, cells, legend, threshold, cell_width)


def _row(panel: Panel, threshold: float) -> dict[str, Objects | LabelMap]:
    row = {title: as_content(content).above(threshold) for title, content in panel.columns.items()}
    detected = [content for content in row.values() if isinstance(content, Objects) and content.scores is not None]
    return {t: sought(o, detected) if isinstance(o, Objects) and o.scores is None else o for t, o in row.items()}


@matplotlib.rc_context(_PLAIN)
def _compose(titles, panels, rows, cells, legend, threshold, cell_width) -> Figure:
    """The picture of all cells with titles, captions and legend, pixel for pixel as they were drawn."""
    title_height, caption_height = 40, 30
    heights = [max(picture.shape[0] for picture in row.values()) if row else 0 for row in cells]
    width = len(titles) * (cell_width + _GAP) + _GAP
    handles, columns = _legend(legend, width)
    legend_height = 34 + 22 * -(-len(handles) // columns)
    height = title_height + sum(heights) + (caption_height + _GAP) * len(rows) + legend_height

    # A hundredth of a pixel more, as matplotlib rounds down.
    figure = Figure(figsize=((width + 0.01) / _DPI, (height + 0.01) / _DPI), dpi=_DPI, facecolor="white")
    page = np.full((height, width, 3), 255, np.uint8)

    def text(x: float, y: float, content: str, **style) -> None:  # x and y in pixels from the upper left corner
        figure.text(x / width, 1 - y / height, content, **{"fontsize": 10, "va": "center", "color": INK, **style})

    for column, title in enumerate(titles):
        centre = _GAP + column * (cell_width + _GAP) + cell_width / 2
        text(centre, title_height / 2, title, ha="center", fontsize=14, fontweight="bold")
    y = title_height
    for panel, found, row, row_height in zip(panels, rows, cells, heights):
        for column, title in enumerate(titles):
            x = _GAP + column * (cell_width + _GAP)
            if title not in row:
                text(x + cell_width / 2, y + row_height / 2, "not available", ha="center", color=GREY)
                continue
            picture = row[title]
            page[y : y + picture.shape[0], x : x + cell_width] = picture
            below = y + picture.shape[0] + caption_height / 2
            text(x + cell_width, below, count_text(found[title]), ha="right", color=GREY)
            if column == 0 and panel.caption:
                text(x, below, _shorten(panel.caption, cell_width), ha="left", color=GREY)
        y += row_height + caption_height + _GAP
    if any(isinstance(content, Objects) for found in rows for content in found.values()):
        note = f"Predictions with a score of {threshold:g} or more."
        text(_GAP, height - legend_height + 10, note, color=GREY)
    if handles:
        figure.legend(
            handles=handles, ncols=columns, loc="lower left", bbox_to_anchor=(0, 0, 1, 1), fontsize=10, frameon=False,
            handlelength=1.0, handletextpad=0.5, columnspacing=1.6, borderaxespad=0.4, borderpad=0.3,
        )  # fmt: skip
    figure.figimage(page, zorder=-1)
    return figure


def _legend(colours: Mapping[str, tuple], width: int) -> tuple[list[Line2D], int]:
    """A patch of colour per name, and in how many columns they fit."""
    handles = [
        Line2D([], [], marker="s", linestyle="", markersize=9, color=c, markeredgecolor=FAINT, label=name)
        for name, c in colours.items()
    ]
    longest = max(map(len, colours), default=0)
    return handles, max(1, min(len(handles), int(width / (60 + 9.0 * longest))))


def count_text(content: Objects | LabelMap) -> str:
    """How much is shown: "3 objects", or of a label map "3 classes"."""
    one, several = ("class", "classes") if isinstance(content, LabelMap) else ("object", "objects")
    return f"{len(content)} {one if len(content) == 1 else several}"


def _shorten(caption: str, width: int) -> str:
    most = max(int((width - 110) / 8.5), 8)
    return caption if len(caption) <= most else "..." + caption[3 - most :]
