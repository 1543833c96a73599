"""Panels and charts: that they show what they were given, in the right place, with nothing cut off."""

import json
from itertools import combinations

import cv2
import numpy as np
import pytest
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, BoxMode, Instances
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from pycocotools import mask as rle

from msad.data.synthetic import make_dataset
from msad.visualization import (
    CostRow,
    IntervalRow,
    LabelMap,
    Objects,
    Panel,
    as_content,
    draw_objects,
    ground_truth,
    plot_ap_vs_cost,
    plot_curves,
    plot_intervals,
    plot_sweep_lines,
    predictions,
    save_panels,
    variant_styles,
)
from msad.visualization.colours import class_colour
from msad.visualization.costs import CURVE, ap_vs_cost_figure
from msad.visualization.intervals import intervals_figure
from msad.visualization.panels import panels_figure
from msad.visualization.plots import ap_curve, curves_figure, loss_curve, read_metrics, smooth
from msad.visualization.weights import sweep_lines_figure

NAMES = Metadata(name="shapes for drawing", thing_classes=["disc", "ring", "plus"])
BLACK = np.zeros((60, 80, 3), np.uint8)


def record(**extra):
    box = {"bbox": [10, 10, 20, 30], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}
    return {"height": 60, "width": 80, "annotations": [{**box, **extra}]}


def instances(boxes, classes, scores, size=(60, 80)):
    found = Instances(size)
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    found.pred_classes = torch.tensor(classes)
    found.scores = torch.tensor(scores)
    return found


def texts_of(figure):
    """Visible texts of a figure with their boxes in pixels."""
    FigureCanvasAgg(figure).draw()
    renderer = figure.canvas.get_renderer()
    found = [*figure.texts, *[text for legend in figure.legends for text in legend.get_texts()]]
    for axes in figure.axes:
        found += [*axes.texts, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):  # the ticks beyond the ends of an axis are not drawn
            low, high = sorted(axis.get_view_interval())
            found += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [(text.get_text(), text.get_window_extent(renderer)) for text in found if text.get_text()]


def assert_nothing_clipped(figure):
    for text, box in texts_of(figure):
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
        assert inside, f"{text!r} at {box} leaves the figure {figure.bbox}"


# --- what is in an image ----------------------------------------------------------------------------------------------


def test_ground_truth_becomes_corners_and_leaves_crowds_out():
    sample = record()
    sample["annotations"].append({**sample["annotations"][0], "iscrowd": 1})
    objects = ground_truth(sample)
    assert objects.boxes.tolist() == [[10, 10, 30, 40]]
    assert objects.classes.tolist() == [1]
    assert objects.scores is None and objects.masks is None and objects.keypoints is None


def test_ground_truth_of_an_image_without_annotations_is_empty():
    assert len(ground_truth({"height": 60, "width": 80})) == 0
    assert ground_truth({"height": 60, "width": 80, "annotations": []}).boxes.shape == (0, 4)


def test_run_lengths_and_polygons_mix():
    bitmap = np.zeros((60, 80), np.uint8)
    bitmap[10:40, 10:30] = 1
    sample = record(segmentation=[[10, 10, 30, 10, 30, 40, 10, 40]])
    assert isinstance(ground_truth(sample).masks[0], list)
    sample["annotations"] += record(segmentation=rle.encode(np.asfortranarray(bitmap)))["annotations"]
    runs = {"size": [60, 80], "counts": [10 * 60 + 10, *[30, 30] * 19, 30, 50 * 60 + 20]}
    sample["annotations"] += record(segmentation=runs)["annotations"]
    masks = ground_truth(sample).masks
    assert len(masks) == 3
    for mask in masks:
        assert np.array_equal(mask, bitmap.astype(bool))


def test_objects_without_keypoints_get_invisible_ones():
    sample = record(keypoints=[12.5, 11.5, 2, 20, 30, 1])
    sample["annotations"] += record()["annotations"]
    points = ground_truth(sample).keypoints
    assert points.shape == (2, 2, 3)
    assert points[0].tolist() == [[12.5, 11.5, 2], [20, 30, 1]] and not points[1].any()


def test_threshold_keeps_boxes_masks_and_keypoints_together():
    found = instances([[0, 0, 5, 5], [10, 10, 30, 40]], [0, 2], [0.69, 0.7])
    found.pred_masks = torch.zeros(2, 60, 80, dtype=torch.bool)
    found.pred_masks[1, 10:40, 10:30] = True
    found.pred_keypoints = torch.tensor([[[1.0, 2.0, 0.9]], [[11.0, 12.0, 0.8]]])
    objects = predictions(found).above(0.7 - 1e-6)
    assert objects.classes.tolist() == [2] and objects.boxes.tolist() == [[10, 10, 30, 40]]
    assert objects.masks[0].sum() == 600 and objects.keypoints[0, 0, 0] == 11


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_small_images_are_enlarged_before_drawing():
    assert draw_objects(BLACK, record(), NAMES).shape == (480, 640, 3)
    assert draw_objects(BLACK, record(), NAMES, width=160).shape == (120, 160, 3)
    large = np.zeros((500, 700, 3), np.uint8)
    assert draw_objects(large, record(), NAMES).shape == large.shape


def test_a_picture_without_objects_is_the_image():
    image = np.random.default_rng(0).integers(0, 256, (500, 500, 3), np.uint8)
    assert np.array_equal(draw_objects(image, instances([], [], []), NAMES), image)


@pytest.mark.parametrize("source", ["ground truth", "prediction"])
def test_a_class_has_its_colour_whoever_names_it(source):
    objects = record() if source == "ground truth" else instances([[10, 10, 30, 40]], [1], [0.9])
    picture = draw_objects(BLACK, objects, NAMES, width=320, labels=False).astype(float)
    assert not picture[:30].any() and not picture[170:].any()  # nothing outside of the box, 4 times as large
    edge = picture[60:140, 36:45].max(axis=1).mean(axis=0)  # brightest pixel across its left side
    assert edge.max() > 60
    assert np.allclose(edge / edge.max(), np.array(class_colour(1)) / max(class_colour(1)), atol=0.06)


def test_masks_are_filled_and_polygons_and_bitmaps_look_alike():
    polygon = record(segmentation=[[10.0, 10, 30, 10, 30, 40, 10, 40]])
    found = instances([[10, 10, 30, 40]], [1], [0.9])
    found.pred_masks = torch.zeros(1, 60, 80, dtype=torch.bool)
    found.pred_masks[0, 10:40, 10:30] = True
    inside = slice(60, 140), slice(60, 100)
    drawn = draw_objects(BLACK, polygon, NAMES, width=320, labels=False)[inside]
    assert drawn.min(axis=(0, 1)).max() > 40  # filled, every pixel
    assert np.array_equal(drawn, draw_objects(BLACK, found, NAMES, width=320, labels=False)[inside])


def test_keypoints_are_drawn_where_they_are():
    points = Metadata(name="points for drawing", thing_classes=["a", "b"], keypoint_names=["tip", "end"])
    points.keypoint_connection_rules = [("tip", "end", (0, 255, 0))]
    sample = record(keypoints=[15, 25, 2, 25, 25, 2])
    with_points = draw_objects(BLACK, sample, points, width=320, labels=False).astype(int)
    without = draw_objects(BLACK, record(), points, width=320, labels=False).astype(int)
    changed = np.argwhere((with_points != without).any(axis=2))
    assert len(changed) > 20
    centre = changed.mean(axis=0)
    assert abs(centre[0] - 100) < 4 and abs(centre[1] - 80) < 6
    middle = with_points[98:103, 80].max(axis=0)
    assert middle[1] > 100 and middle[1] > 2 * middle[0]  # the line is green


def test_labels_stay_inside_and_are_left_out_in_a_crowd():
    corner = instances([[70, 50, 80, 60]], [2], [0.987])
    labelled = draw_objects(BLACK, corner, NAMES, width=320)
    bare = draw_objects(BLACK, corner, NAMES, width=320, labels=False)
    changed = np.argwhere((labelled != bare).any(axis=2))
    assert len(changed) > 50
    # The text ends before the border, so the last column is as it was.
    assert changed[:, 1].max() < 319 and changed[:, 0].max() < 239
    crowd = instances([[x, 5, x + 3, 9] for x in range(0, 65, 5)], [0] * 13, [0.9] * 13)
    assert np.array_equal(
        draw_objects(BLACK, crowd, NAMES, width=320), draw_objects(BLACK, crowd, NAMES, width=320, labels=False)
    )


def test_classes_without_a_name_are_shown_by_index():
    figure = panels_figure(
        [Panel(BLACK, {"only": instances([[1, 1, 9, 9], [9, 9, 30, 30]], [7, 2], [0.9, 0.9])})], NAMES, cell_width=200
    )
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["plus", "7"]


# --- label maps -----------------------------------------------------------------------------------------------------


def test_label_maps_paint_classes_and_leave_what_is_ignored():
    image = np.full((2, 4, 3), 100, np.uint8)
    content = LabelMap(np.array([[0, 0, 1, 255], [0, 0, 1, 255]], np.uint8))
    assert content.classes.tolist() == [0, 1] and len(content) == 2 and content.above(0.9) is content
    drawn = draw_objects(image, content, NAMES, width=4, colours={0: (1.0, 0.0, 0.0), 1: (0.0, 1.0, 0.0)})
    assert drawn[:, 0].tolist() == [[185, 45, 45]] * 2  # 45 % of the photograph, 55 % of the colour
    assert drawn[:, 2].tolist() == [[45, 185, 45]] * 2 and drawn[:, 3].tolist() == [[100] * 3] * 2
    large = content.resized((4, 8)).labels
    assert large.tolist() == np.repeat(np.repeat(content.labels, 2, axis=0), 2, axis=1).tolist()


def test_what_models_and_data_sets_give_is_told_apart(tmp_path):
    cv2.imwrite(str(tmp_path / "labels.png"), np.array([[3, 255]], np.uint8))
    read = as_content({"file_name": "a.jpg", "sem_seg_file_name": str(tmp_path / "labels.png")})
    assert read.classes.tolist() == [3] and as_content(read) is read
    best = as_content({"sem_seg": torch.tensor([[[0.0, 2.0]], [[1.0, 1.0]]])})
    assert best.labels.tolist() == [[1, 0]]
    found = instances([[1, 2, 3, 4]], [1], [0.5])
    assert as_content({"instances": found}).scores.tolist() == as_content(found).scores.tolist() == [0.5]
    assert best.as_json(["ground"]) == [
        {"category_id": 0, "category": "ground", "pixels": 1, "segmentation": {"size": [1, 2], "counts": "11"}},
        {"category_id": 1, "category": "1", "pixels": 1, "segmentation": {"size": [1, 2], "counts": "011"}},
    ]


def test_panels_of_label_maps_count_classes_and_name_them(tmp_path):
    names = Metadata(name="segments", stuff_classes=["ground", "disc"])
    content = LabelMap(np.eye(60, 80, dtype=np.uint8))
    figure = panels_figure([Panel(np.zeros((60, 80, 3), np.uint8), {"labels": content})], names, cell_width=240)
    texts = [text for text, _ in texts_of(figure)]
    assert "2 classes" in texts and {"ground", "disc"} <= set(texts) and not any("score" in text for text in texts)


# --- panels -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def panels():
    teacher = instances([[10, 10, 30, 40], [50, 20, 70, 50], [1, 1, 9, 9]], [1, 0, 2], [0.95, 0.8, 0.2])
    truth = record(segmentation=[[10, 10, 30, 10, 30, 40]])
    columns = {"Ground truth": truth, "Teacher": teacher, "Student": instances([], [], [])}
    tall = np.full((160, 80, 3), 200, np.uint8)
    return [
        Panel(BLACK, columns, "first.jpg"),
        Panel(tall, {"Teacher": instances([], [], []), "Student": teacher}, "second.jpg"),
    ]


def test_panels_have_a_row_per_image_and_a_column_per_source(panels, tmp_path):
    path = save_panels(tmp_path / "new folder" / "panels.png", panels, NAMES, cell_width=240)
    page = cv2.imread(str(path))[:, :, ::-1]
    assert page.shape[1] == 3 * (240 + 8) + 8
    assert page.shape[0] > 180 + 480
    # The cells are in the page pixel for pixel, one row below the other.
    first = draw_objects(BLACK, panels[0].columns["Teacher"], NAMES, width=240)
    assert np.array_equal(page[40 : 40 + 180, 256 : 256 + 240], first)
    boxes = draw_objects(BLACK, record(), NAMES, width=240)  # without the mask, as the models look for none
    assert np.array_equal(page[40 : 40 + 180, 8 : 8 + 240], boxes)
    below = 40 + 180 + 38
    second = draw_objects(panels[1].image, panels[1].columns["Student"], NAMES, width=240)
    assert np.array_equal(page[below : below + 480, 504 : 504 + 240], second)
    assert (page[below : below + 200, 8:248] == 255).all()  # no ground truth for the second image


def test_titles_stand_once_and_counts_follow_the_threshold(panels):
    figure = panels_figure(panels, NAMES, threshold=0.7, cell_width=240)
    texts = [text.get_text() for text in figure.texts]
    assert [texts.count(title) for title in ("Ground truth", "Teacher", "Student")] == [1, 1, 1]
    assert texts.count("1 object") == 1 and texts.count("2 objects") == 2 and texts.count("0 objects") == 2
    assert "first.jpg" in texts and "not available" in texts and any("0.7" in text for text in texts)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["disc", "ring"]
    lower = [text.get_text() for text in panels_figure(panels, NAMES, threshold=0.1, cell_width=240).texts]
    assert lower.count("3 objects") == 2


def test_nothing_is_clipped_with_many_classes_and_long_captions():
    names = Metadata(name="many", thing_classes=[f"a rather long class name {i}" for i in range(30)])
    crowd = instances([[i, i, i + 9, i + 9] for i in range(30)], list(range(30)), [0.9] * 30)
    for columns in (1, 3):
        sources = {f"Model {i}": crowd for i in range(columns)}
        figure = panels_figure([Panel(BLACK, sources, "a_very_long_file_name_" * 8 + ".jpg")], names, cell_width=320)
        assert len(figure.legends[0].get_texts()) == 30
        assert_nothing_clipped(figure)
        boxes = [box for _, box in texts_of(figure)]
        assert not [1 for a, b in combinations(boxes, 2) if a.shrunk(0.98, 0.9).overlaps(b.shrunk(0.98, 0.9))]


def test_dollar_signs_are_no_formulas(tmp_path):
    names = Metadata(name="dollars", thing_classes=["$_{$"])
    panel = Panel(BLACK, {"x$_{$": instances([[1, 1, 9, 9]], [0], [0.9])}, "$_{$.jpg")
    assert save_panels(tmp_path / "a.png", [panel], names).is_file()


def test_panels_can_be_jpeg_and_need_a_column(panels, tmp_path):
    assert cv2.imread(str(save_panels(tmp_path / "a.jpg", panels, NAMES, cell_width=100))).shape[1] == 3 * 108 + 8
    with pytest.raises(ValueError, match="no panel has a column"):
        save_panels(tmp_path / "b.png", [Panel(BLACK)], NAMES)


def test_panels_of_synthetic_scenes(tmp_path):
    from detectron2.config import CfgNode
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from msad.data import register_datasets, register_entries

    make_dataset(tmp_path, 0, 1, size=(96, 128), seed=3)
    entries = register_entries(tmp_path, f"visualization_{tmp_path.name}")
    name = register_datasets(CfgNode({"DATASETS": {"REGISTER": entries}}))[1]
    scene = DatasetCatalog.get(name)[0]
    image = cv2.imread(scene["file_name"])[:, :, ::-1]
    path = save_panels(tmp_path / "p.png", [Panel(image, {"Ground truth": scene})], MetadataCatalog.get(name))
    cell = cv2.imread(str(path))[40:400, 8:488, ::-1].astype(int)
    plain = cv2.resize(image, (480, 360), interpolation=cv2.INTER_CUBIC).astype(int)
    objects = ground_truth(scene)
    assert objects.masks is not None and objects.keypoints.shape[1:] == (5, 3)
    changed = (cell != plain).any(axis=2)
    for x0, y0, x1, y1 in objects.boxes * 3.75:
        assert changed[int(y0) + 1 : int(y1), int(x0) + 1 : int(x1)].mean() > 0.2


# --- curves -----------------------------------------------------------------------------------------------------------


def write_run(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_metrics_of_a_resumed_and_killed_run(tmp_path):
    path = write_run(tmp_path / "metrics.json", [{"iteration": i, "total_loss": float(i)} for i in (19, 39, 59)])
    with open(path, "a") as file:
        file.write('{"iteration": 39, "total_loss": 7.0}\n{"iteration": 59, "bbox/AP": 3.0}\n{"iteration": 79, "tot')
    assert read_metrics(path) == [
        {"iteration": 19, "total_loss": 19.0},
        {"iteration": 39, "total_loss": 7.0},
        {"iteration": 59, "total_loss": 59.0, "bbox/AP": 3.0},
    ]
    with open(path, "a") as file:  # a resumed run goes on in the line that was cut off
        file.write('{"iteration": 79, "total_loss": 1.0}\n{"iteration": 99, "total_loss": 2.0}\n')
    found = {record["iteration"]: record["total_loss"] for record in read_metrics(path)}
    assert found == {19: 19.0, 39: 7.0, 59: 59.0, 79: 1.0, 99: 2.0}
    nested = '{"iteration": %d, "levels": {"p3": {"angle": %d}}}'
    path.write_text(f"{nested % (9, 1)}\n{(nested % (19, 2))[:-9]}{nested % (29, 3)}\n")
    assert [(r["iteration"], r["levels"]["p3"]["angle"]) for r in read_metrics(path)] == [(9, 1), (29, 3)]
    path.write_text("garbage\n7\n")
    with pytest.raises(ValueError, match=r"metrics\.json is no metrics\.json: no line"):
        read_metrics(path)
    path.write_text("\n")
    assert read_metrics(path) == []


def test_loss_curve_is_the_detection_loss_alone():
    student = [{"iteration": 9, "loss_cls": 1.0, "loss_box": 0.5, "loss_distill_p3": 9.0, "total_loss": 10.5, "lr": 1}]
    x, y = loss_curve(student)
    assert x.tolist() == [10] and y.tolist() == [1.5]
    teacher = [{"iteration": 9, "H/loss_cls": 1.0, "H/loss_box": 0.25, "L/loss_cls": 4.0, "fused/loss_cls": 0.4}]
    assert loss_curve(teacher)[1].tolist() == [1.25]
    assisted = [{"assistant/CrossScaleAssistant/loss_cls": 7.0, **student[0]}]
    assert loss_curve(assisted)[1].tolist() == [1.5]
    assert loss_curve([{"iteration": 9, "loss_cls": float("nan")}])[1].size == 0


def test_smoothing_keeps_level_and_length():
    assert np.allclose(smooth(np.full(100, 3.0)), 3.0)
    noisy = np.random.default_rng(0).normal(size=400)
    assert smooth(noisy).shape == (400,) and smooth(noisy).std() < 0.3 * noisy.std()
    assert smooth(np.array([2.0])).tolist() == [2.0]


def test_curves_show_ap_if_there_is_a_curve_and_the_loss_otherwise(tmp_path):
    losses = [{"iteration": i, "loss_cls": 10.0 - i / 100} for i in range(19, 400, 20)]
    scores = [{"iteration": 199, "bbox/AP": 4.0}, {"iteration": 399, "bbox/AP": 9.0}]
    evaluated = write_run(tmp_path / "a.json", losses + scores)
    once = write_run(tmp_path / "b.json", [*losses, {"iteration": 399, "bbox/AP": 7.0}])
    unfinished = write_run(tmp_path / "c.json", losses)
    figure = curves_figure({"evaluated": evaluated, "once": once, "unfinished": unfinished})
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert set(lines) == {"evaluated", "once"}
    assert lines["evaluated"].get_xdata().tolist() == [200, 400] and lines["evaluated"].get_ydata().tolist() == [4, 9]
    assert lines["once"].get_ydata().tolist() == [7]
    figure = curves_figure({"once": once, "unfinished": unfinished})
    assert "loss" in figure.axes[0].get_ylabel()
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [20, 20]
    assert ap_curve(read_metrics(unfinished))[0].size == 0
    (dot,) = curves_figure({"short": write_run(tmp_path / "d.json", losses[:1])}).axes[0].lines
    assert dot.get_marker() == "o" and len(dot.get_xdata()) == 1  # a line through one point would not be seen


def test_curves_of_many_runs_fit_and_differ(tmp_path):
    records = [{"iteration": i, "bbox/AP": i / 10} for i in (99, 199)]
    runs = {f"a_rather_long_name_{i}": write_run(tmp_path / f"{i}.json", records) for i in range(14)}
    figure = curves_figure(runs)
    assert len({(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}) == 14
    assert_nothing_clipped(figure)
    image = cv2.imread(str(plot_curves(runs, tmp_path / "sub" / "curves.png")))
    assert image.shape[1] > 800 and image.min() < 100
    empty = write_run(tmp_path / "empty.json", [])
    with pytest.raises(ValueError, match=r"empty\.json"):
        plot_curves({"empty": empty}, tmp_path / "no.png")


# --- charts -----------------------------------------------------------------------------------------------------------

COSTS = [
    CostRow(IntervalRow("baseline_H", 38.2, 0.4, [37.8, 38.2, 38.6]), {"GMACs": 10.4, "ms": 40.0}, "stock", 256),
    CostRow(IntervalRow("baseline_L", 29.8, 0.3), {"GMACs": 2.6, "ms": 15.0}, "stock", 128),
    CostRow(IntervalRow("baseline_L_multiscale", 30.1), {"GMACs": 2.6, "ms": 16.0}, "stock", 128),
    CostRow(IntervalRow("baseline_L_shifted@equal_iterations", 33.4), {"GMACs": 5.1, "ms": 22.0}, "shifted", 128),
    CostRow(IntervalRow("teacher_H", 39.2, variant="teacher"), {"GMACs": 10.4}, "teacher H", 256),
    CostRow(IntervalRow("teacher_fused", 40.1, 0.4, variant="teacher"), {"GMACs": 15.8}, "teacher fused", 256),
    CostRow(IntervalRow("student_L", 35.2, 0.3), {"GMACs": 5.1, "ms": 21.0}, "shifted", 128),
]
STUDY = [row.row for row in COSTS]
STYLES = variant_styles(row.variant or row.name for row in STUDY)


def test_styles_are_distinct_and_the_same_in_curves_and_bars(tmp_path):
    names = [f"variant {i}" for i in range(24)]
    styles = variant_styles(names)
    for look in ("line", "hatch", "marker"):
        assert len({(style.colour, getattr(style, look)) for style in styles.values()}) == 24
    colours = {tuple(int(style.colour[i : i + 2], 16) for i in (1, 3, 5)) for style in styles.values()}
    nearest = min(np.linalg.norm(np.subtract(a, b)) for a, b in combinations(colours, 2))
    assert len(colours) == 8 and nearest > 60, nearest
    run = write_run(tmp_path / "a.json", [{"iteration": i, "bbox/AP": i / 10} for i in (99, 199)])
    (curve,) = curves_figure({"student_L": run}, STYLES).axes[0].lines
    bar = intervals_figure(STUDY, "AP", STYLES, bars=True).axes[0].patches[-1]
    assert curve.get_color() == STYLES["student_L"].colour and to_hex(bar.get_edgecolor()) == curve.get_color().lower()


def test_every_dot_is_named_and_has_its_interval(tmp_path):
    rows = [*COSTS, CostRow(IntervalRow("costless", 20.0), {}), CostRow(IntervalRow("failed", float("nan")), {"ms": 3})]
    figure = ap_vs_cost_figure(rows, STYLES)
    order = sorted(COSTS, key=lambda row: -row.row.mean)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*(row.row.name for row in order), CURVE]
    for axes, cost in zip(figure.axes, ("GMACs", "ms"), strict=True):
        dots = [(c.lines[0].get_xdata()[0], c.lines[0].get_ydata()[0]) for c in axes.containers]
        assert dots == [(row.costs[cost], row.row.mean) for row in order if cost in row.costs]
        assert axes.get_xlabel() == cost
    axes = figure.axes[0]
    bars = [c.get_segments()[0] for container in axes.containers for c in container.lines[2]]
    assert len(bars) == 4 and np.allclose(bars[0], [[15.8, 39.7], [15.8, 40.5]])
    # Two branches of a teacher have one colour and other fillings.
    one, other = (c.lines[0] for c in axes.containers if c.get_label().startswith("teacher"))
    assert one.get_color() == other.get_color() and one.get_markerfacecolor() != other.get_markerfacecolor()
    assert_nothing_clipped(figure)
    with pytest.raises(ValueError, match="no model"):
        plot_ap_vs_cost([CostRow(IntervalRow("costless", 20.0), {})], tmp_path / "no.png", STYLES)
    assert cv2.imread(str(plot_ap_vs_cost(COSTS[:1], tmp_path / "one.png", STYLES))) is not None


def test_many_models_and_long_names_fit_into_charts():
    rows = [IntervalRow(f"a_model_{i}", float(i)) for i in range(30)]
    styles = variant_styles(row.name for row in rows)
    assert_nothing_clipped(ap_vs_cost_figure([CostRow(row, {"ms": 1}) for row in rows], styles))
    assert_nothing_clipped(intervals_figure([IntervalRow("long" * 30, 3.0)], "AP", variant_styles(["long" * 30])))


def test_a_line_joins_a_network_at_several_input_sizes():
    """Of two trainings at one size the better one; networks with one size have none."""
    figure = ap_vs_cost_figure(COSTS, STYLES)
    for axes, ends in zip(figure.axes, ([2.6, 10.4], [16.0, 40.0]), strict=True):
        (curve,) = (line for line in axes.lines if line.get_label() == CURVE)
        assert list(curve.get_xdata()) == ends and list(curve.get_ydata()) == [30.1, 38.2]
        assert [text.get_text() for text in axes.texts] == ["128 px", "256 px"]
    alone = [row._replace(network="") for row in COSTS]
    assert not any(line.get_label() == CURVE for axes in ap_vs_cost_figure(alone, STYLES).axes for line in axes.lines)


def test_results_chart_shows_every_value(tmp_path):
    figure = intervals_figure(STUDY, "AP", STYLES, 38.2, "baseline_H", bars=True)
    axes = figure.axes[0]
    assert [bar.get_width() for bar in axes.patches] == [row.mean for row in STUDY]
    assert [label.get_text() for label in axes.get_yticklabels()] == [row.name for row in STUDY]
    assert axes.texts[0].get_text() == "38.2 ± 0.4" and axes.texts[2].get_text() == "30.1"
    assert any(set(line.get_xdata()) == {38.2} and line.get_linestyle() == "--" for line in axes.lines)
    assert_nothing_clipped(figure)
    assert all(text.get_window_extent().x1 <= axes.bbox.x1 for text in axes.texts[: len(STUDY)])
    assert cv2.imread(str(plot_intervals(STUDY, tmp_path / "x/r.png", "AP", STYLES, bars=True))).shape[1] > 800


def test_intervals_show_every_seed():
    rows = [IntervalRow("a", 31.0, 2.5, (30.0, 31.0, 32.0)), IntervalRow("b", 33.0, None, (33.0,))]
    axes = intervals_figure(rows, "AP", variant_styles("ab"), 0.0).axes[0]
    dots = [line.get_xdata() for line in axes.lines if line.get_marker() == "o"]
    assert [list(x) for x in dots] == [[30.0, 31.0, 32.0]]
    segments = [c.get_segments()[0] for c in axes.collections if len(c.get_segments())]
    assert [(s[0][0], s[1][0]) for s in segments] == [(28.5, 33.5)]
    with pytest.raises(ValueError, match="nothing to plot"):
        intervals_figure([], "AP", {})


def test_a_swept_parameter_is_an_axis(tmp_path):
    points = [(3.0, IntervalRow("b", 32.0, 1.2, (31.0, 32.5, 32.5))), (0.3, IntervalRow("c", 29.0, None, (29.0,)))]
    axes = sweep_lines_figure({"LAD": points}, "WEIGHT", "AP", 31.0, "no_kd").axes[0]
    (curve,) = [line for line in axes.lines if line.get_marker() == "o"]
    assert axes.get_xscale() == "log" and axes.get_xlabel().startswith("WEIGHT")
    assert list(curve.get_xdata()) == [0.3, 3.0] and list(curve.get_ydata()) == [29.0, 32.0]
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"LAD", "no_kd"}
    (bars,) = [c for c in axes.collections if len(c.get_segments()) == 2]
    assert np.allclose(bars.get_segments()[1], [[3.0, 30.8], [3.0, 33.2]])
    zero = [(0.0, IntervalRow("b", 32.0)), (0.3, IntervalRow("c", 29.0))]
    assert sweep_lines_figure({"LAD": zero}, "WEIGHT", "AP").axes[0].get_xscale() == "linear"
    assert plot_sweep_lines({"LAD": points}, tmp_path / "s.png", "WEIGHT", "AP").stat().st_size > 1000


def test_objects_have_a_length():
    assert len(Objects(np.zeros((3, 4)), np.zeros(3, int))) == 3
