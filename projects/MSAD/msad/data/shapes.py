"""The object classes of the synthetic scenes: outlines, keypoints, and their rasters at sub-pixel precision."""

import cv2
import numpy as np

CLASSES = ("disc", "ring", "square", "plus", "triangle", "star")
KEYPOINTS = ("centre", "top", "right", "bottom", "left")
FLIP_PAIRS = (("left", "right"),)
SKELETON = ((1, 2), (1, 3), (1, 4), (1, 5))  # 1-based pairs of KEYPOINTS, as COCO counts them
KEYPOINT_SIGMAS = (0.05, 0.06, 0.06, 0.06, 0.06)

# Drawing, visibility and polygons are computed on a raster this many times finer than the image.
SUBPIXELS = 4


def _circle(radius: float) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    return radius * np.stack([np.sin(angle), -np.cos(angle)], axis=1)


def _star(points: int, inner: float) -> np.ndarray:
    angle = np.arange(2 * points) * np.pi / points
    radius = np.where(np.arange(2 * points) % 2 == 0, 1.0, inner)
    return radius[:, None] * np.stack([np.sin(angle), -np.cos(angle)], axis=1)


def _plus(width: float) -> np.ndarray:
    arm = [(-width, -1.0), (width, -1.0), (width, -width)]
    quarters = [np.array(arm) @ np.array([[c, s], [-s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
    return np.concatenate(quarters)


_COMPASS = ((0, 0), (0, -1), (1, 0), (0, 1), (-1, 0))
_SIDE = 0.85  # half side of the square, so that its area is close to that of the disc
# class -> (closed outlines in the unit frame with y down, combined by the even-odd rule; keypoints in the same
# frame; largest rotation in degrees that leaves "top" the topmost of the points that look alike)
_GEOMETRY: dict[str, tuple[list[np.ndarray], np.ndarray, float]] = {
    "disc": ([_circle(1.0)], np.array(_COMPASS), 0),
    "ring": ([_circle(1.0), _circle(0.5)], np.array(_COMPASS), 0),
    "square": ([_SIDE * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])], _SIDE * np.array(_COMPASS), 30),
    "plus": ([_plus(0.33)], np.array(_COMPASS), 30),
    "triangle": (
        [np.array([(0, -1), (0.95, 0.75), (-0.95, 0.75)])],
        np.array([(0, 0), (0, -1), (0.95, 0.75), (0, 0.75), (-0.95, 0.75)]),
        35,
    ),
    "star": (
        [_star(5, 0.45)],
        np.array([(0, 0), (0, -1), (np.sin(1.2566), -np.cos(1.2566)), (0, 0.45), (-np.sin(1.2566), -np.cos(1.2566))]),
        25,
    ),
}


def max_rotation(name: str) -> float:
    """Degrees by which an object of the class may be turned with its keypoints still told apart."""
    return _GEOMETRY[name][2]


def place(name: str, centre: np.ndarray, radius: float, aspect: float, degrees: float):
    """Outlines (list of (N, 2) arrays) and keypoints ((5, 2)) in image pixels.

    The shape is stretched by ``aspect`` along its own horizontal axis, turned clockwise, scaled and moved; the
    keypoints ride along, so "left" stays on the object's own left.
    """
    outlines, keypoints, _ = _GEOMETRY[name]
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    stretch = radius * np.array([np.sqrt(aspect), 1 / np.sqrt(aspect)])
    return [(outline * stretch) @ turn + centre for outline in outlines], (keypoints * stretch) @ turn + centre


def raster(outlines: list[np.ndarray]) -> tuple[np.ndarray, tuple[int, int]]:
    """Fill the outlines on the sub-pixel raster.

    Returns a bool mask whose sides are multiples of SUBPIXELS and the image pixel (x, y) of its first corner.
    """
    points = np.concatenate(outlines)
    x0, y0 = np.floor(points.min(axis=0)).astype(int) - 1
    x1, y1 = np.ceil(points.max(axis=0)).astype(int) + 1
    # fillPoly also sets every cell that the border touches. Drawn three times finer and read at the cells' centres,
    # the shape grows by a sixth of a cell instead of half of one.
    scale = 3 * SUBPIXELS
    mask = np.zeros(((y1 - y0) * scale, (x1 - x0) * scale), np.uint8)
    # Its integer coordinates are cell centres; 4 fractional bits keep small shapes from snapping to them.
    fixed = [np.round(((o - (x0, y0)) * scale - 0.5) * 16).astype(np.int32) for o in outlines]
    cv2.fillPoly(mask, fixed, 1, shift=4)
    return mask[1::3, 1::3].astype(bool), (int(x0), int(y0))


def to_polygons(mask: np.ndarray, origin: tuple[int, int]) -> list[list[float]]:
    """Polygons in image pixels around the set part of a sub-pixel mask, each ``[x0, y0, x1, y1, ...]``.

    COCO polygons cannot have holes, so a region with a hole is cut in two through the hole. The polygons run between
    the raster cells, within a quarter of an image pixel; specks below half a pixel are left out.
    """
    halves = np.pad(mask, 1).view(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    return [((points / 2 - 1) / SUBPIXELS + origin).ravel().tolist() for points in _outlines(halves, 1)]


def _outlines(cells: np.ndarray, left: int) -> list[np.ndarray]:
    """Outlines of a raster with an empty margin, in cells; ``left`` is the x of its second column."""
    # A corner is inside if half of the four cells around it are. On a raster of doubled cells this puts the outline on
    # the edges of the cells and halfway up the steps of a stair, so that areas come out right at every slope. (The
    # contour of the cells themselves runs through their centres and is too small.)
    above = cells[1:] + cells[:-1]
    corners = (above[:, 1:] + above[:, :-1] >= 2).view(np.uint8)
    contours, tree = cv2.findContours(corners, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    tree = np.reshape(tree, (-1, 4)) if contours else ()
    for contour, (_, _, _, parent) in zip(contours, tree):
        if parent >= 0:  # the contour of a hole
            column = int(contour[..., 0].min() + contour[..., 0].max()) // 2
            before = np.pad(cells[:, : column + 1], ((0, 0), (0, 1)))
            after = np.pad(cells[:, column + 1 :], ((0, 0), (1, 0)))
            return _outlines(before, left) + _outlines(after, left + column)
    found = []
    for contour in contours:
        contour = cv2.approxPolyDP(contour, SUBPIXELS / 2, True)
        if cv2.contourArea(contour) >= 2 * SUBPIXELS**2:
            found.append(contour.reshape(-1, 2) + (left, 1))
    return found
