"""Augmentations under seeds: the same draws, transforms and results for images, boxes, labels and points."""

import numpy as np
from detectron2.data import transforms as T

TOLERANCE = 1e-4
SEEDS = range(6)
HEIGHT, WIDTH = 37, 53


def _inputs():
    rng = np.random.RandomState(7)
    image = rng.randint(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    corners = rng.uniform((0, 0), (WIDTH - 12, HEIGHT - 12), (4, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(3, 12, (4, 2))], axis=1)
    labels = rng.randint(0, 5, (HEIGHT, WIDTH)).astype(np.uint8)
    points = rng.uniform((0, 0), (WIDTH, HEIGHT), (9, 2))
    return image, boxes, labels, points


def _augmentations():
    flip = T.RandomFlip(prob=0.6)
    return {
        "flip": flip,
        "flip_vertical": T.RandomFlip(prob=0.5, horizontal=False, vertical=True),
        "resize": T.Resize((24, 61)),
        "resize_square_bicubic": T.Resize(33, interp=3),
        "shortest_edge_choice": T.ResizeShortestEdge((20, 31, 48), 70, "choice"),
        "shortest_edge_range": T.ResizeShortestEdge((20, 60), 64, "range"),
        "resize_scale": T.ResizeScale(0.5, 2.0, 40, 40),
        "random_resize": T.RandomResize([(20, 30), (41, 33), (64, 64)]),
        "fixed_crop": T.FixedSizeCrop((30, 60)),
        "fixed_crop_without_pad": T.FixedSizeCrop((20, 20), pad=False),
        "crop_absolute": T.RandomCrop("absolute", (20, 90)),
        "crop_absolute_range": T.RandomCrop("absolute_range", (10, 45)),
        "crop_relative": T.RandomCrop("relative", (0.55, 0.7)),
        "crop_relative_range": T.RandomCrop("relative_range", (0.3, 0.6)),
        "brightness": T.RandomBrightness(0.4, 1.7),
        "contrast": T.RandomContrast(0.4, 1.7),
        "saturation": T.RandomSaturation(0.4, 1.7),
        "lighting": T.RandomLighting(20.0),
        "rotation": T.RandomRotation((-70, 110)),
        "rotation_choice": T.RandomRotation([0, 90, 180, 33.3], sample_style="choice"),
        "rotation_in_place": T.RandomRotation((-40, 40), expand=False, center=((0.3, 0.3), (0.7, 0.7))),
        "extent": T.RandomExtent((0.4, 1.6), (0.5, 0.3)),
        "iou_crop": T.MinIoURandomCrop(crop_trials=15),
        "category_crop": T.RandomCrop_CategoryAreaConstraint("absolute", (14, 20), 0.4, ignored_category=2),
        "category_crop_range": T.RandomCrop_CategoryAreaConstraint("relative_range", (0.3, 0.3), 0.3),
        "category_crop_any": T.RandomCrop_CategoryAreaConstraint("absolute", (14, 20)),
        "apply_sometimes": T.RandomApply(T.AugmentationList([flip, T.RandomContrast(0.5, 1.5)]), 0.6),
        "apply_transform": T.RandomApply(T.HFlipTransform(WIDTH), 0.5),
        "chain": T.AugmentationList(
            [T.RandomCrop("relative_range", (0.7, 0.7)), T.ResizeShortestEdge((30, 40), 60, "choice"), flip]
        ),
    }


def _run(augmentation, seed):
    image, boxes, labels, points = _inputs()
    np.random.seed(seed)
    inputs = T.AugInput(image, boxes=boxes, sem_seg=labels)
    transform = augmentation(inputs)
    following_draw = np.random.rand()
    moved = transform.apply_coords(points)
    polygon = transform.apply_polygons([_inputs()[3][:5]]) if "Crop" not in repr(transform) else []
    return inputs, [np.ravel(moved), *(np.ravel(p) for p in polygon), np.array([following_draw])]


def _resize_of_other_types(out):
    rng = np.random.RandomState(1)
    transform = T.ResizeTransform(12, 17, 21, 9)
    for dtype in ("uint8", "float32", "float64"):
        for shape in ((12, 17), (12, 17, 1), (12, 17, 2), (12, 17, 4)):
            image = (rng.rand(*shape) * 255).astype(dtype)
            for interp in (0, 2, 3):
                result = transform.apply_image(image, interp=interp)
                out[f"resize/{dtype}/{len(shape)}d/{shape[-1]}/{interp}"] = result
                out[f"resize/{dtype}/{len(shape)}d/{shape[-1]}/{interp}/type"] = str(result.dtype)
    out["resize/inverse"] = repr(transform.inverse())


def _sizes(out):
    rng = np.random.RandomState(2)
    rows = rng.randint(1, 2000, (300, 2)).tolist()
    edges, limits = rng.randint(1, 1000, 300).tolist(), rng.randint(300, 2000, 300).tolist()
    shapes = [T.ResizeShortestEdge.get_output_shape(h, w, e, m) for (h, w), e, m in zip(rows, edges, limits)]
    out["shortest_edge/output_shapes"] = np.array(shapes)


def probe(workdir):
    out = {}
    for name, augmentation in _augmentations().items():
        for seed in SEEDS:
            inputs, vectors = _run(augmentation, seed)
            key = f"{name}/{seed}"
            out[f"{key}/image"] = inputs.image
            out[f"{key}/boxes"] = inputs.boxes
            out[f"{key}/labels"] = inputs.sem_seg
            out[f"{key}/points"] = np.concatenate(vectors)
    _resize_of_other_types(out)
    _sizes(out)
    rotation = T.RotationTransform(HEIGHT, WIDTH, 25)
    undone = rotation.inverse().apply_coords(rotation.apply_coords(_inputs()[3]))
    out["rotation/inverse"] = undone
    return out
