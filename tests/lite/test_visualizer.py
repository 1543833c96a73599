"""Pictures: what is painted is in the right place and nothing else changes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import Metadata as DatasetMetadata
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks
from detectron2.utils.colormap import colormap, random_color, random_colors
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import ColorMode, GenericMask, Visualizer
from PIL import Image

GRAY = 128
HEIGHT, WIDTH = 120, 160


class Metadata(SimpleNamespace):
    """The part of detectron2's metadata that drawing reads."""

    def get(self, name, default=None):
        return getattr(self, name, default)


METADATA = Metadata(
    thing_classes=["cat", "dog"],
    thing_colors=[(255, 0, 0), (0, 0, 255)],
    keypoint_names=["nose", "tail"],
    keypoint_connection_rules=[("nose", "tail", (0, 255, 0))],
)


@pytest.fixture
def canvas():
    return np.full((HEIGHT, WIDTH, 3), GRAY, dtype=np.uint8)


def changed(picture):
    return (picture.astype(int) != GRAY).any(axis=2)


def test_colormap():
    colors = colormap(rgb=True, maximum=1)
    assert colors.shape[1] == 3 and colors.min() >= 0 and colors.max() <= 1
    np.testing.assert_allclose(colormap(rgb=False), colors[:, ::-1] * 255, rtol=1e-6)
    assert random_color(rgb=True, maximum=255).shape == (3,)
    assert len(random_colors(5)) == 5


@pytest.mark.parametrize("scale, size", [(1.0, (120, 160)), (1.5, (180, 240)), (0.33, (39, 52))])
def test_picture_size(canvas, scale, size):
    picture = Visualizer(canvas, scale=scale).get_output().get_image()
    assert picture.shape == (*size, 3) and picture.dtype == np.uint8
    assert not changed(picture).any()


def test_box_outline(canvas):
    picture = Visualizer(canvas).draw_box((40, 30, 100, 90), alpha=1, edge_color="r").get_image()
    hit = changed(picture)
    assert hit[28:33, 70].any() and hit[60, 38:43].any() and hit[88:93, 70].any() and hit[60, 98:103].any()
    assert not hit[40:80, 50:90].any(), "the inside must stay"
    assert not hit[:20].any() and not hit[:, :30].any()
    assert canvas.min() == canvas.max() == GRAY, "the caller's image must stay"


def test_polygon_is_filled_and_blended(canvas):
    square = [[40, 30], [100, 30], [100, 90], [40, 90]]
    picture = Visualizer(canvas).draw_polygon(square, (1.0, 0, 0), alpha=0.5).get_image()
    np.testing.assert_allclose(picture[60, 70], [(GRAY + 255) / 2, GRAY / 2, GRAY / 2], atol=2)
    assert not changed(picture)[:, 110:].any()


def test_scaled_coordinates(canvas):
    picture = Visualizer(canvas, scale=2).draw_circle((40, 30), "b", radius=5).get_image()
    assert picture[60, 80].tolist() == [0, 0, 255]
    assert not changed(picture)[:, 120:].any()


def test_binary_mask_with_hole(canvas):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[30:90, 40:100] = True
    mask[50:70, 60:80] = False
    picture = Visualizer(canvas).draw_binary_mask(mask, "g", alpha=0.6).get_image()
    hit = changed(picture)
    assert hit[40, 50] and hit[80, 90] and not hit[60, 70] and not hit[10, 10]
    tiny = np.zeros_like(mask)
    tiny[0, :5] = True
    assert not changed(Visualizer(canvas).draw_binary_mask(tiny, "g").get_image()).any()


def test_text_and_line(canvas):
    visualizer = Visualizer(canvas)
    visualizer.draw_text("word", (80, 20), color="w")
    visualizer.draw_line([20, 140], [100, 100], "k", linewidth=3)
    hit = changed(visualizer.get_output().get_image())
    assert hit[15:45, 60:100].any()
    assert hit[100, 30:130].all() and not hit[60:90].any()


MASKS = {
    "polygons": lambda square, bitmap: PolygonMasks([[square]]),
    "bitmaps": lambda square, bitmap: BitMasks(bitmap[None]),
    "arrays": lambda square, bitmap: bitmap[None],
    "lists": lambda square, bitmap: [[square.tolist()]],
}


@pytest.mark.parametrize("kind", MASKS)
def test_overlay_takes_every_kind_of_mask(canvas, kind):
    bitmap = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    bitmap[30:90, 40:100] = 1
    masks = MASKS[kind](np.array([40.0, 30, 100, 30, 100, 90, 40, 90]), bitmap)
    picture = Visualizer(canvas).overlay_instances(masks=masks, assigned_colors=["r"], alpha=0.5).get_image()
    np.testing.assert_allclose(picture[60, 70], [(GRAY + 255) / 2, GRAY / 2, GRAY / 2], atol=3)
    assert not changed(picture)[:, 110:].any()


def test_overlay_of_nothing(canvas):
    visualizer = Visualizer(canvas)
    visualizer.overlay_instances()
    visualizer.overlay_instances(boxes=Boxes(torch.zeros(0, 4)))
    visualizer.draw_dataset_dict({"file_name": "x.jpg"})
    visualizer.draw_dataset_dict({"annotations": []})
    assert not changed(visualizer.get_output().get_image()).any()


def test_overlay_refuses_different_numbers(canvas):
    with pytest.raises((AssertionError, ValueError)):
        Visualizer(canvas).overlay_instances(boxes=np.zeros((1, 4)), labels=["a", "b"])


def test_overlay_reaches_over_the_border(canvas):
    boxes = np.array([[-20.0, -10, 30, 30], [150, 110, 400, 300]])
    picture = Visualizer(canvas).overlay_instances(boxes=boxes, labels=["left", "right"]).get_image()
    assert changed(picture).any()


def test_keypoints_are_drawn_and_connected(canvas):
    keypoints = np.array([[[40.0, 60, 2], [120, 60, 2]], [[40, 100, 2], [120, 100, 0]]])
    picture = Visualizer(canvas, METADATA).overlay_instances(keypoints=keypoints).get_image()
    np.testing.assert_allclose(picture[60, 80], [0, 255, 0], atol=60)
    hit = changed(picture)
    assert hit[100, 40] and not hit[100, 60:].any(), "an unlabeled keypoint has no dot and no line"


def predictions():
    mask = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.bool)
    mask[0, 30:90, 40:100] = mask[1, 60:80, 120:150] = True
    return Instances(
        (HEIGHT, WIDTH),
        pred_boxes=Boxes(torch.tensor([[40.0, 30, 100, 90], [120, 60, 150, 80]])),
        scores=torch.tensor([0.9, 0.8]),
        pred_classes=torch.tensor([0, 1]),
        pred_masks=mask,
    )


@pytest.mark.parametrize("mode", ColorMode)
def test_predictions(mode):
    image = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    image[:] = (200, 40, 40)
    visualizer = Visualizer(image, METADATA, instance_mode=mode)
    picture = visualizer.draw_instance_predictions(predictions(), jittering=False).get_image()
    assert (picture[70, 70] != image[70, 70]).any()
    outside = picture[5, 150]
    assert (np.ptp(outside) == 0) if mode == ColorMode.IMAGE_BW else outside.tolist() == [200, 40, 40]
    if mode == ColorMode.SEGMENTATION:
        assert picture[70, 70, 0] > 200 and picture[66, 135, 2] > 120, "colors follow the metadata"


def test_predictions_with_boxes_only(canvas):
    instances = Instances((HEIGHT, WIDTH), pred_boxes=Boxes(torch.tensor([[40.0, 30, 100, 90]])))
    picture = Visualizer(canvas).draw_instance_predictions(instances).get_image()
    assert changed(picture)[60, 38:43].any()


def test_annotations(canvas):
    annotation = {
        "bbox": [40, 30, 60, 60],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 1,
        "segmentation": [[40, 30, 100, 30, 100, 90, 40, 90]],
        "keypoints": [50, 50, 2, 90, 80, 2],
    }
    picture = Visualizer(canvas, METADATA).draw_dataset_dict({"annotations": [annotation]}).get_image()
    hit = changed(picture)
    assert hit[60, 98:103].any() and hit[40, 60] and not hit[110:].any()


STUFF = Metadata(stuff_classes=["sky", "grass"], stuff_colors=[(255, 0, 0), (0, 0, 255)])


@pytest.fixture
def labels():
    """Sky and grass, and 255 for unlabeled."""
    labels = np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)
    labels[20:60, 20:80], labels[70:100, 20:140] = 0, 1
    return labels


@pytest.mark.parametrize("form", [np.asarray, torch.from_numpy])
def test_label_maps(canvas, labels, form):
    picture = Visualizer(canvas, STUFF).draw_sem_seg(form(labels)).get_image()
    np.testing.assert_allclose(picture[25, 25], [0.8 * 255 + 0.2 * GRAY, 0.2 * GRAY, 0.2 * GRAY], atol=3)
    np.testing.assert_allclose(picture[95, 25], [0.2 * GRAY, 0.2 * GRAY, 0.8 * 255 + 0.2 * GRAY], atol=3)
    assert not changed(picture)[:15].any() and not changed(picture)[105:].any()
    plain = Visualizer(canvas, STUFF).draw_sem_seg(form(labels), draw_text=False).get_image()
    assert len(np.unique(plain[25:55, 25:75].reshape(-1, 3), axis=0)) == 1, "no name"
    assert (plain != picture)[35:55, 30:70].any(), "the name is in the middle"


def test_small_parts_are_left_out(canvas, labels):
    """60 x 40 pixels are sky and, elsewhere, 50 x 5; 120 x 30 are grass."""
    labels[5:10, 100:150] = 0
    for limit, expected in ((None, [1, 1, 1]), (1000, [0, 1, 1]), (3000, [0, 0, 1]), (9999, [0, 0, 0])):
        hit = changed(Visualizer(canvas, STUFF).draw_sem_seg(labels, area_threshold=limit).get_image())
        assert [hit[7, 105], hit[25, 25], hit[95, 25]] == expected


def test_label_maps_of_samples(canvas, labels, tmp_path):
    Image.fromarray(labels).save(tmp_path / "labels.png")
    square = [20, 20, 80, 20, 80, 60, 20, 60]
    annotation = {"bbox": [20, 20, 80, 60], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "segmentation": [square]}
    for sample in ({"sem_seg": labels}, {"sem_seg_file_name": str(tmp_path / "labels.png")}):
        picture = Visualizer(canvas, STUFF).draw_dataset_dict(sample).get_image()
        np.testing.assert_allclose(picture[95, 25], [GRAY / 2, GRAY / 2, (GRAY + 255) / 2], atol=3)
        both = Visualizer(canvas, STUFF).draw_dataset_dict({**sample, "annotations": [annotation]}).get_image()
        assert (both[30, 30] != picture[30, 30]).any() and (both[95, 25] == picture[95, 25]).all()


def test_label_maps_of_videos(canvas, labels):
    video = VideoVisualizer(STUFF)
    frames = [video.draw_sem_seg(canvas, labels).get_image() for _ in range(2)]
    assert (frames[0] == frames[1]).all() and changed(frames[0])[95, 25] and not changed(frames[0])[:15].any()


def test_metadata_is_empty_by_default(canvas):
    metadata = Visualizer(canvas).metadata
    assert isinstance(metadata, DatasetMetadata) and metadata.get("thing_classes") is None
    assert set(metadata.as_dict()) <= {"name"}


def test_save(canvas, tmp_path):
    path = tmp_path / "picture.png"
    output = Visualizer(canvas).draw_box((40, 30, 100, 90))
    output.save(str(path))
    assert np.abs(np.asarray(Image.open(path).convert("RGB")).astype(int) - output.get_image()).max() <= 1


def test_generic_mask():
    mask = GenericMask([[1, 1, 8, 1, 8, 8, 1, 8.0]], 10, 12)
    assert mask.mask.shape == (10, 12) and mask.area() == 49
    again = GenericMask(mask.mask, 10, 12)
    assert len(again.polygons) == 1 and again.area() == 49
    runs = GenericMask({"size": [10, 12], "counts": [3, 5, 112]}, 10, 12)
    assert runs.area() == 5
    with pytest.raises((AssertionError, ValueError)):
        GenericMask(mask.mask[:5], 10, 12)


def test_video_keeps_colors(canvas):
    video = VideoVisualizer(METADATA)
    first, second = predictions(), predictions()
    second.pred_boxes.tensor += 2
    pictures = [video.draw_instance_predictions(canvas, p).get_image() for p in (first, second)]
    inside = [p[70, 70].astype(int) for p in pictures]
    np.testing.assert_allclose(inside[0], inside[1], atol=2)
    assert changed(pictures[1])[70, 70]
