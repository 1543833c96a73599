import cv2
import numpy as np
import pytest
from detectron2.data import transforms as T
from PIL import Image

RNG = np.random.RandomState(0)
IMAGE = RNG.randint(0, 256, (40, 60, 3)).astype(np.uint8)


def seeded(augmentation, seed=0, image=IMAGE, **more):
    np.random.seed(seed)
    inputs = T.AugInput(image.copy(), **more)
    return augmentation(inputs), inputs


# ------------------------------------------------------------------------------------------ transforms


def test_resizing_bytes_is_that_of_pil():
    transform = T.ResizeTransform(40, 60, 23, 31)
    expected = np.asarray(Image.fromarray(IMAGE).resize((31, 23), Image.BILINEAR))
    np.testing.assert_array_equal(transform.apply_image(IMAGE), expected)
    assert transform.apply_image(IMAGE[:, :, :1]).shape == (23, 31, 1)
    assert transform.apply_image(IMAGE[:, :, 0]).shape == (23, 31)


@pytest.mark.parametrize("shape", [(40, 60), (40, 60, 1), (40, 60, 5)])
def test_resizing_floats_keeps_type_and_mean(shape):
    image = RNG.rand(*shape).astype(np.float64)
    result = T.ResizeTransform(40, 60, 20, 30).apply_image(image)
    assert result.dtype == np.float64 and result.shape == (20, 30, *shape[2:])
    blocks = image.reshape(20, 2, 30, 2, *shape[2:]).mean(axis=(1, 3))
    np.testing.assert_allclose(result, blocks, atol=1e-12)


def test_resizing_moves_coordinates_and_keeps_labels():
    transform = T.ResizeTransform(40, 60, 20, 90)
    np.testing.assert_allclose(transform.apply_coords(np.array([[10.0, 20.0]])), [[15, 10]])
    np.testing.assert_allclose(transform.apply_box(np.array([[0.0, 0.0, 60.0, 40.0]])), [[0, 0, 90, 20]])
    labels = RNG.choice([0, 7, 200], (40, 60)).astype(np.uint8)
    assert set(np.unique(transform.apply_segmentation(labels))) <= {0, 7, 200}
    inverse = transform.inverse()
    assert (inverse.h, inverse.w, inverse.new_h, inverse.new_w) == (20, 90, 40, 60)


def test_resizing_refuses_other_images():
    with pytest.raises(AssertionError):
        T.ResizeTransform(40, 60, 20, 90).apply_image(IMAGE[:20])


def test_extent_cuts_out_a_rectangle():
    transform = T.ExtentTransform((10, 5, 30, 25), (20, 20))
    np.testing.assert_array_equal(transform.apply_image(IMAGE), IMAGE[5:25, 10:30])
    np.testing.assert_allclose(transform.apply_coords(np.array([[12.0, 6.0]])), [[2, 1]])
    outside = T.ExtentTransform((-10, 0, 10, 40), (40, 20), interp=Image.NEAREST).apply_image(IMAGE)
    assert (outside[:, :10] == 0).all()
    np.testing.assert_array_equal(outside[:, 10:], IMAGE[:, :10])


def test_quarter_turn():
    transform = T.RotationTransform(40, 60, 90)
    np.testing.assert_array_equal(transform.apply_image(IMAGE), np.rot90(IMAGE))
    corners = np.array([[0.0, 0.0], [60.0, 0.0], [60.0, 40.0]])
    np.testing.assert_allclose(transform.apply_coords(corners), [[0, 60], [0, 0], [40, 0]], atol=1e-9)


def test_rotation_keeps_points_on_their_pixels():
    image = np.zeros((41, 61), np.float32)
    image[12, 40] = 1
    for expand in (True, False):
        transform = T.RotationTransform(41, 61, 33, expand=expand, center=None if expand else (20, 25))
        row, column = np.unravel_index(transform.apply_image(image).argmax(), transform.apply_image(image).shape)
        x, y = transform.apply_coords(np.array([[40.5, 12.5]]))[0]
        assert abs(x - (column + 0.5)) < 0.8 and abs(y - (row + 0.5)) < 0.8


def test_rotation_back_and_forth():
    transform = T.RotationTransform(40, 60, 25, interp=cv2.INTER_LINEAR)
    points = RNG.uniform(0, 40, (8, 2))
    back = transform.inverse().apply_coords(transform.apply_coords(points))
    assert np.abs(back - points).max() <= 1
    assert transform.inverse().apply_image(transform.apply_image(IMAGE)).shape == IMAGE.shape
    with pytest.raises(NotImplementedError):
        T.RotationTransform(40, 60, 25, expand=False).inverse()
    whole_turn = T.RotationTransform(40, 60, 360)
    assert whole_turn.apply_image(IMAGE) is IMAGE


def test_color_transforms_leave_geometry_alone():
    invert = T.ColorTransform(lambda image: 255 - image)
    np.testing.assert_array_equal(invert.apply_image(IMAGE), 255 - IMAGE)
    points = np.array([[1.0, 2.0]])
    assert invert.apply_coords(points) is points and invert.apply_segmentation(points) is points
    swap = T.PILColorTransform(lambda image: image.convert("L").convert("RGB"))
    assert (np.ptp(swap.apply_image(IMAGE), axis=2) == 0).all()
    with pytest.raises(ValueError):
        T.ColorTransform("invert")


# --------------------------------------------------------------------------------------- the interface


class NeedsBoxes(T.Augmentation):
    def __init__(self, shift, factor=2):
        self._init(locals())

    def get_transform(self, image, boxes):
        assert boxes.shape == (1, 4)
        return T.CropTransform(self.shift, 0, image.shape[1] - self.shift, image.shape[0])


def test_an_augmentation_sees_what_it_names():
    transform, inputs = seeded(NeedsBoxes(4), boxes=np.array([[10.0, 2.0, 20.0, 8.0]]))
    np.testing.assert_array_equal(inputs.image, IMAGE[:, 4:])
    np.testing.assert_array_equal(inputs.boxes, [[6, 2, 16, 8]])
    assert isinstance(transform, T.CropTransform)

    class NeedsDepth(T.Augmentation):
        def get_transform(self, image, depth):
            return T.NoOpTransform()

    with pytest.raises(AttributeError, match="depth"):
        seeded(NeedsDepth())


def test_representation_shows_what_was_set():
    assert repr(NeedsBoxes(4)) == "NeedsBoxes(shift=4)"
    assert repr(NeedsBoxes(4, factor=3)) == "NeedsBoxes(shift=4, factor=3)"
    assert str(T.RandomFlip()) == "RandomFlip()"


def test_lists_apply_in_order_and_flatten():
    augmentation = T.AugmentationList(
        [T.Resize((20, 30)), T.AugmentationList([T.HFlipTransform(30), T.RandomFlip(1.0)]), T.NoOpTransform()]
    )
    transforms, inputs = seeded(augmentation)
    assert inputs.image.shape == (20, 30, 3)
    assert [type(t) for t in transforms.transforms] == [
        T.ResizeTransform,
        T.HFlipTransform,
        T.HFlipTransform,
        T.NoOpTransform,
    ]
    expected = T.ResizeTransform(40, 60, 20, 30).apply_image(IMAGE)
    np.testing.assert_array_equal(inputs.image, expected)
    with pytest.raises(AssertionError):
        T.AugmentationList([3])


def test_inputs_change_together():
    labels = np.arange(2400).reshape(40, 60)
    inputs = T.AugInput(IMAGE, boxes=np.array([[1.0, 2.0, 3.0, 4.0]]), sem_seg=labels)
    transforms = inputs.apply_augmentations([T.RandomFlip(1.0)])
    assert len(transforms) == 1
    np.testing.assert_array_equal(inputs.image, IMAGE[:, ::-1])
    np.testing.assert_array_equal(inputs.boxes, [[57, 2, 59, 4]])
    np.testing.assert_array_equal(inputs.sem_seg, labels[:, ::-1])
    with pytest.raises(AssertionError):
        T.AugInput([1, 2])


def test_a_bare_image_can_be_augmented():
    image, transforms = T.apply_augmentations([T.Resize(10), T.RandomFlip(1.0)], IMAGE)
    assert image.shape == (10, 10, 3) and len(transforms) == 2
    held = T.AugInput(IMAGE)
    assert T.apply_transform_gens([T.Resize(10)], held)[0] is held
    assert T.StandardAugInput is T.AugInput and T.TransformGen is T.Augmentation


# --------------------------------------------------------------------------------------- augmentations


def test_flip_follows_the_draw():
    draws = np.random.RandomState(0).uniform(0, 1, 20)
    np.random.seed(0)
    augmentation = T.RandomFlip(0.4)
    made = [isinstance(augmentation(T.AugInput(IMAGE)), T.HFlipTransform) for _ in draws]
    assert made == (draws < 0.4).tolist()
    transform, _ = seeded(T.RandomFlip(1.0, horizontal=False, vertical=True))
    assert isinstance(transform, T.VFlipTransform)
    for both in (True, False):
        with pytest.raises(ValueError):
            T.RandomFlip(horizontal=both, vertical=both)


@pytest.mark.parametrize(
    ("size", "edge", "limit", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),
        ((427, 640), 800, 1333, (800, 1199)),
        ((333, 500), 800, 1333, (800, 1201)),
        ((1000, 101), 800, 1333, (1333, 135)),
        ((61, 83), 30, 37, (27, 37)),
        ((50, 50), 25, 1333, (25, 25)),
    ],
)
def test_shortest_edge(size, edge, limit, expected):
    assert T.ResizeShortestEdge.get_output_shape(*size, edge, limit) == expected
    image = np.zeros((*size, 3), np.uint8)
    _, inputs = seeded(T.ResizeShortestEdge(edge, limit, "choice"), image=image)
    assert inputs.image.shape[:2] == expected


def test_shortest_edge_sampling():
    heights = {seeded(T.ResizeShortestEdge((10, 12), 99), seed)[1].image.shape[0] for seed in range(40)}
    assert heights == {10, 11, 12}
    heights = {seeded(T.ResizeShortestEdge((10, 12), 99, "choice"), seed)[1].image.shape[0] for seed in range(40)}
    assert heights == {10, 12}
    transform, _ = seeded(T.ResizeShortestEdge(0, 99, "choice"))
    assert isinstance(transform, T.NoOpTransform)
    with pytest.raises(AssertionError):
        T.ResizeShortestEdge((10, 11, 12), 99, "range")
    with pytest.raises(AssertionError):
        T.ResizeShortestEdge((10, 12), 99, "guess")


def test_resize_scale_fits_the_target():
    for seed in range(10):
        _, inputs = seeded(T.ResizeScale(0.5, 2.0, 50, 50), seed)
        np.random.seed(seed)
        factor = np.random.uniform(0.5, 2.0)
        assert inputs.image.shape[1] == round(50 * factor)
        assert inputs.image.shape[0] == pytest.approx(50 * factor * 40 / 60, abs=0.51)


def test_fixed_size_crop_pads_to_size():
    _, inputs = seeded(T.FixedSizeCrop((30, 80), pad_value=7), sem_seg=IMAGE[:, :, 0])
    assert inputs.image.shape == (30, 80, 3)
    assert (inputs.image[:, 60:] == 7).all() and (inputs.sem_seg[:, 60:] == 255).all()
    top = round(10 * np.random.RandomState(0).uniform())
    np.testing.assert_array_equal(inputs.image[:, :60], IMAGE[top : top + 30])
    _, inputs = seeded(T.FixedSizeCrop((30, 80), pad=False))
    assert inputs.image.shape == (30, 60, 3)


@pytest.mark.parametrize(
    ("kind", "size", "low", "high"),
    [
        ("absolute", (20, 90), (20, 60), (20, 60)),
        ("relative", (0.5, 0.7), (20, 42), (20, 42)),
        ("relative_range", (0.5, 0.7), (20, 42), (40, 60)),
        ("absolute_range", (10, 50), (10, 10), (40, 50)),
    ],
)
def test_crop_sizes(kind, size, low, high):
    seen = set()
    for seed in range(40):
        transform, inputs = seeded(T.RandomCrop(kind, size), seed)
        height, width = inputs.image.shape[:2]
        assert low[0] <= height <= high[0] and low[1] <= width <= high[1]
        rows = slice(transform.y0, transform.y0 + height)
        np.testing.assert_array_equal(inputs.image, IMAGE[rows, transform.x0 : transform.x0 + width])
        seen.add((height, width))
    assert len(seen) == 1 if low == high else len(seen) > 10


def test_fractions_are_not_rounded_before_they_are_taken():
    """0.7 of 45 is a little less than 31.5, which is rounded down; that of a 0.7 in single precision is not."""
    sizes = {side: T.RandomCrop("relative", (0.7, 0.7)).get_crop_size((side, side))[0] for side in (45, 85, 165, 325)}
    assert sizes == {side: int(side * 0.7 + 0.5) for side in sizes}


def test_impossible_crops_are_refused():
    with pytest.raises(AssertionError):
        T.RandomCrop("sideways", (1, 1))
    with pytest.raises(AssertionError):
        seeded(T.RandomCrop("absolute_range", (50, 30)))
    with pytest.raises(AssertionError):
        seeded(T.RandomCrop("relative", (1.2, 1.0)))


def test_min_iou_crop_keeps_boxes():
    boxes = np.array([[5.0, 5.0, 35.0, 30.0], [20.0, 10.0, 55.0, 38.0]])
    cropped = 0
    for seed in range(30):
        transform, inputs = seeded(T.MinIoURandomCrop(min_ious=(0.5,)), seed, boxes=boxes)
        assert isinstance(transform, (T.CropTransform, T.NoOpTransform))
        if isinstance(transform, T.CropTransform):
            cropped += 1
            height, width = inputs.image.shape[:2]
            assert height >= 11 and width >= 17 and 0.45 < height / width < 2.1
    assert cropped > 5


def test_intensity_augmentations():
    _, inputs = seeded(T.RandomBrightness(0.5, 0.5))
    np.testing.assert_array_equal(inputs.image, (IMAGE * 0.5).astype(np.uint8))
    _, inputs = seeded(T.RandomContrast(0.0, 0.0))
    assert (inputs.image == int(IMAGE.mean())).all()
    _, inputs = seeded(T.RandomSaturation(0.0, 0.0))
    grey = IMAGE.dot([0.299, 0.587, 0.114])
    assert np.abs(inputs.image - grey[:, :, None]).max() <= 1
    _, inputs = seeded(T.RandomLighting(0.0))
    np.testing.assert_array_equal(inputs.image, IMAGE)
    for augmentation in (T.RandomSaturation(0.5, 1.5), T.RandomLighting(1.0)):
        with pytest.raises(AssertionError):
            seeded(augmentation, image=IMAGE[:, :, :1])


def test_rotation_augmentation():
    angles = [seeded(T.RandomRotation((-20, 20)), seed)[0].angle for seed in range(20)]
    assert min(angles) < -10 and max(angles) > 10
    turns = {int(seeded(T.RandomRotation([90, 180], sample_style="choice"), seed)[0].angle) for seed in range(20)}
    assert turns == {90, 180}
    assert isinstance(seeded(T.RandomRotation(0))[0], T.NoOpTransform)
    transform, inputs = seeded(T.RandomRotation(30, expand=False, center=((0.25, 0.5), (0.25, 0.5))))
    assert inputs.image.shape == IMAGE.shape
    np.testing.assert_allclose(transform.apply_coords(np.array([[15.0, 20.0]])), [[15, 20]], atol=1e-9)


def test_extent_augmentation():
    transform, inputs = seeded(T.RandomExtent((1.0, 1.0), (0.0, 0.0)))
    np.testing.assert_array_equal(inputs.image, IMAGE)
    np.random.seed(5)
    scale, x, y = np.random.uniform(0.5, 1.5), np.random.rand() - 0.5, np.random.rand() - 0.5
    transform, inputs = seeded(T.RandomExtent((0.5, 1.5), (0.2, 0.4)), seed=5)
    center = (30 + 60 * 0.2 * x, 20 + 40 * 0.4 * y)
    x0, y0, x1, y1 = transform.src_rect
    np.testing.assert_allclose(((x0 + x1) / 2, (y0 + y1) / 2), center)
    assert inputs.image.shape[:2] == (int(40 * scale), int(60 * scale))


def test_random_apply_and_resize():
    made = [type(seeded(T.RandomApply(T.HFlipTransform(60), 0.3), seed)[0]) for seed in range(40)]
    assert 4 <= made.count(T.HFlipTransform) <= 20 and made.count(T.NoOpTransform) >= 20
    _, inputs = seeded(T.RandomApply(T.AugmentationList([T.Resize(8), T.RandomFlip(1.0)]), 1.0))
    assert inputs.image.shape == (8, 8, 3)
    with pytest.raises(AssertionError):
        T.RandomApply(T.RandomFlip(), 1.5)
    sizes = {seeded(T.RandomResize([(8, 9), (10, 11)]), seed)[1].image.shape[:2] for seed in range(20)}
    assert sizes == {(8, 9), (10, 11)}
