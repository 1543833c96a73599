"""Videos of detections: frames with titles and a legend, and the file that they go to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import cv2
import numpy as np
from detectron2.data.catalog import Metadata

from .label_maps import LabelMap
from .objects import Objects
from .panels import count_text, draw_objects, legend_strip


def draw_frame(
    frame: np.ndarray,
    found: Mapping[str, Objects | LabelMap],
    metadata: Metadata,
    classes: Iterable[int],
    threshold: float,
) -> np.ndarray:
    """What each model found in a BGR frame, side by side under the titles, and a legend of ``classes``; BGR."""
    cells = []
    for title, content in found.items():
        picture = draw_objects(frame[:, :, ::-1], content, metadata, threshold=threshold)
        strip = np.full((28, picture.shape[1], 3), 255, np.uint8)
        text = f"{title}: {count_text(content)}"
        cv2.putText(strip, text, (8, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (40, 40, 40), 1, cv2.LINE_AA)
        cells.append(np.vstack([strip, picture]))
    row = np.hstack(cells)
    return np.vstack([row, legend_strip(classes, metadata, row.shape[1])])[:, :, ::-1]


class VideoWriter:
    """A video file that is made with its first frame; leaving the context closes it, also after Ctrl-C.

    Args:
        path: .avi or a container of MPEG-4; its folder is made.
        rate: frames per second.
    """

    def __init__(self, path: Path, rate: float) -> None:
        self.path, self.rate = path, rate
        self._writer: cv2.VideoWriter | None = None

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._writer is not None:
            self._writer.release()

    def write(self, picture: np.ndarray) -> None:
        """Append a BGR frame (H, W, 3); OSError if the file cannot be written."""
        # Codecs reject odd sides.
        picture = np.ascontiguousarray(picture[: len(picture) // 2 * 2, : picture.shape[1] // 2 * 2])
        if self._writer is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            code = cv2.VideoWriter_fourcc(*("mp4v" if self.path.suffix.lower() != ".avi" else "MJPG"))
            self._writer = cv2.VideoWriter(str(self.path), code, self.rate, picture.shape[1::-1])
            if not self._writer.isOpened():
                raise OSError(f"cannot write the video {self.path}")
        self._writer.write(picture)
