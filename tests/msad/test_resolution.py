"""Views, level names and padding against hand-computed values and written-out filters."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks

from msad.resolution import (
    RESOLUTIONS,
    batch_images,
    downsample,
    downsample_batch,
    downsampled_size,
    get_resolution,
    level_of,
    pad_divisibility,
    resample,
    scale_instances,
    shift_levels,
    shift_names,
)

# --- names ------------------------------------------------------------------------------------------------------------


def test_named_resolutions_halve_and_halve_again():
    assert {name: r.shift for name, r in RESOLUTIONS.items()} == {"H": 0, "L": 1, "EL": 2}
    assert get_resolution("EL") == ("EL", 2)
    with pytest.raises(ValueError, match="unknown resolution 'XL'; known: H, L, EL"):
        get_resolution("XL")


@pytest.mark.parametrize("ratio", [0.75, "2/3", 3])
def test_ratios_other_than_halvings_say_what_to_do_instead(ratio):
    with pytest.raises(ValueError, match=rf"resolution {ratio!r};.*no other ratio.*INPUT\.MIN_SIZE_TRAIN"):
        get_resolution(ratio)


def test_level_of_a_name():
    assert [level_of(name) for name in ("p1", "p3", "p12")] == [1, 3, 12]
    for name in ("res3", "p", "p3x", "P3", "xp3", "3"):
        with pytest.raises(ValueError, match=f"'{name}' is not a pyramid level"):
            level_of(name)


def test_shift_moves_names_there_and_back():
    own = ["p2", "p3", "p6"]
    assert shift_names(own, 1) == ["p3", "p4", "p7"]
    assert shift_names(own, 0) == own
    assert shift_names(shift_names(own, 2), -2) == own
    assert shift_names([], 1) == []


def test_shift_below_p1_is_refused():
    assert shift_names(["p3"], -2) == ["p1"]
    with pytest.raises(ValueError, match=r"\['p4', 'p2'\] cannot be moved by -2.*p1"):
        shift_names(["p4", "p2"], -2)


def test_shift_levels_renames_and_copies_nothing():
    features = {"p3": torch.zeros(1), "p2": torch.ones(1)}
    moved = shift_levels(features, 1)
    assert list(moved) == ["p4", "p3"]
    assert moved["p4"] is features["p3"] and moved["p3"] is features["p2"]


# --- padding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shift", "max_shift", "expected"), [(0, 0, 32), (0, 1, 64), (1, 1, 32), (0, 2, 128), (1, 2, 64), (2, 2, 32)]
)
def test_divisibility_of_each_branch(shift, max_shift, expected):
    assert pad_divisibility(32, shift, max_shift) == expected


@pytest.mark.parametrize(("shift", "max_shift"), [(2, 1), (-1, 1)])
def test_divisibility_outside_the_branches_is_refused(shift, max_shift):
    with pytest.raises(ValueError, match="shift"):
        pad_divisibility(32, shift, max_shift)


@pytest.mark.parametrize(
    ("size", "shift", "expected"),
    [((10, 7), 0, (10, 7)), ((10, 7), 1, (5, 4)), ((9, 8), 2, (3, 2)), ((1, 1), 2, (1, 1))],
)
def test_reduced_size_rounds_up(size, shift, expected):
    assert downsampled_size(size, shift) == expected


def _level_sizes(side: int, levels: range) -> dict[int, int]:
    """Cells along a padded side: every 3x3 convolution of stride 2 and padding 1 makes (n - 1) // 2 + 1 of n."""
    sizes, n = {}, side
    for level in range(1, levels.stop):
        n = (n - 1) // 2 + 1
        sizes[level] = n
    return {level: sizes[level] for level in levels}


ODD_SIDES = [1, 31, 33, 63, 64, 65, 95, 97, 127, 129, 161, 191, 255, 257, 333, 511, 799, 801, 1333]


@pytest.mark.parametrize("max_shift", [1, 2])
def test_padded_grids_are_equal_for_any_side(max_shift):
    """Of every side alone and of every pair of sides in one batch: each H level is the shifted level of each branch."""
    zero = torch.zeros(1, 1, 1)
    for sides in itertools.combinations_with_replacement(ODD_SIDES, 2):
        padded = {}
        for shift in range(max_shift + 1):
            images = [torch.zeros(1, 1, downsampled_size((1, side), shift)[1]) for side in sides]
            batch = batch_images(images, zero, zero + 1, pad_divisibility(32, shift, max_shift))
            padded[shift] = batch.tensor.shape[-1]
        step = 32 * 2**max_shift
        assert padded[0] == (max(sides) + step - 1) // step * step, "no more padding than needed"
        h_levels = _level_sizes(padded[0], range(3, 8))
        for shift in range(1, max_shift + 1):
            assert padded[shift] * 2**shift == padded[0]
            own = _level_sizes(padded[shift], range(3 - shift, 8 - shift))
            assert {level + shift: n for level, n in own.items()} == h_levels


def test_padding_to_32_alone_would_misalign():
    """Why the divisibility doubles: 800 is a multiple of 32, but 400 becomes 416."""
    assert _level_sizes(800, range(3, 4))[3] == 100
    assert _level_sizes(416, range(2, 3))[2] == 104


def test_batch_is_normalised_then_padded_with_zeros():
    mean, std = torch.tensor([10.0, 20.0]).view(2, 1, 1), torch.tensor([2.0, 4.0]).view(2, 1, 1)
    first, second = torch.full((2, 3, 5), 30, dtype=torch.uint8), torch.full((2, 4, 2), 12.0)
    batch = batch_images([first, second], mean, std, 4)
    assert batch.image_sizes == [(3, 5), (4, 2)]
    expected = torch.zeros(2, 2, 4, 8)
    expected[0, 0, :3, :5], expected[0, 1, :3, :5] = 10.0, 2.5
    expected[1, 0, :4, :2], expected[1, 1, :4, :2] = 1.0, -2.0
    assert torch.equal(batch.tensor, expected)


# --- images -----------------------------------------------------------------------------------------------------------

SIZES = [(8, 8), (9, 12), (11, 7), (1, 1), (2, 5), (13, 6)]


@pytest.mark.parametrize("mode", ["antialias", "nearest"])
@pytest.mark.parametrize("shift", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_constant_image_stays_constant(size, shift, mode):
    image = torch.tensor([7, 100, 255], dtype=torch.uint8).view(3, 1, 1).expand(3, *size)
    small = downsample(image, shift, mode)
    assert small.shape == (3, *downsampled_size(size, shift)) and small.dtype == torch.float32
    torch.testing.assert_close(small, image[:, :1, :1].float().expand_as(small), rtol=0, atol=1e-4)


def _filtered(image: np.ndarray, taps: list[float], k: int) -> np.ndarray:
    """Separable filter of 2k taps around each block of k x k pixels; NaN where it would leave the image."""
    for axis in (-2, -1):
        n = image.shape[axis]
        rows = []
        for i in range(n // k):
            first = i * k - k // 2
            inside = first >= 0 and first + len(taps) <= n
            terms = (w * image.take(first + j, axis) for j, w in enumerate(taps))
            rows.append(sum(terms) if inside else np.full_like(image.take(0, axis), np.nan))
        image = np.stack(rows, axis)
    return image


@pytest.mark.parametrize(
    ("shift", "taps"), [(1, np.array([1, 3, 3, 1]) / 8), (2, np.array([1, 3, 5, 7, 7, 5, 3, 1]) / 32)]
)
def test_antialias_is_the_triangle_filter(shift, taps):
    image = torch.randint(0, 256, (3, 24, 40), dtype=torch.uint8)
    expected = _filtered(image.double().numpy(), list(taps), 2**shift)
    interior = ~np.isnan(expected)
    assert interior[:, 1:-1, 1:-1].all() and not interior[:, 0].any()
    small = downsample(image, shift).double().numpy()
    np.testing.assert_allclose(small[interior], expected[interior], rtol=0, atol=1e-3)


def test_antialias_at_the_border_uses_what_is_inside():
    ramp = torch.tensor([0.0, 8.0, 16.0, 24.0]).view(1, 1, 4).expand(1, 4, 4)
    # Left: (3 * 0 + 3 * 8 + 1 * 16) / 7; right by symmetry.
    expected = torch.tensor([40 / 7, 24 - 40 / 7]).expand(1, 2, 2)
    torch.testing.assert_close(downsample(ramp, 1), expected)


def test_pixels_keep_their_place():
    """Pixel j of L covers pixels 2j and 2j+1 of H: a ramp in x has the mean of both. "nearest" is half a pixel off."""
    ramp = torch.arange(32.0).expand(1, 32, 32)
    torch.testing.assert_close(downsample(ramp, 1)[0, 5, 1:-1], torch.arange(1.0, 15.0) * 2 + 0.5)
    torch.testing.assert_close(downsample(ramp, 2)[0, 3, 1:-1], torch.arange(1.0, 7.0) * 4 + 1.5)
    assert torch.equal(downsample(ramp, 1, "nearest")[0, 5], torch.arange(0.0, 32.0, 2))


def test_antialias_averages_what_nearest_aliases():
    board = (torch.arange(16)[:, None] + torch.arange(16)).remainder(2).float()[None] * 200
    torch.testing.assert_close(downsample(board, 1)[:, 1:-1, 1:-1], torch.full((1, 6, 6), 100.0))
    assert torch.equal(downsample(board, 1, "nearest"), torch.zeros(1, 8, 8))


@pytest.mark.parametrize("shift", [1, 2])
def test_odd_sides_are_completed_by_their_last_line(shift):
    image = torch.randint(0, 256, (3, 13, 10), dtype=torch.uint8)
    h, w = (side * 2**shift for side in downsampled_size((13, 10), shift))
    completed = image[:, torch.arange(h).clamp(max=12)][:, :, torch.arange(w).clamp(max=9)]
    assert torch.equal(downsample(image, shift), downsample(completed, shift))


@pytest.mark.parametrize("shift", [1, 2])
def test_an_odd_image_is_the_corner_of_a_larger_one(shift):
    """The grid is anchored at the corner: what is cut off at the right and below changes nothing further away."""
    k = 2**shift
    image = torch.rand(3, 64, 64)
    small, cut = downsample(image, shift), downsample(image[:, :41, :43], shift)
    assert torch.equal(cut[:, : 32 // k, : 32 // k], small[:, : 32 // k, : 32 // k])


def test_nearest_takes_every_second_pixel():
    image = torch.arange(35, dtype=torch.uint8).view(1, 5, 7)
    assert torch.equal(downsample(image, 1, "nearest"), image[:, [0, 2, 4]][:, :, [0, 2, 4, 6]].float())


def test_full_resolution_is_the_image_itself():
    image = torch.zeros(3, 5, 5, dtype=torch.uint8)
    assert downsample(image, 0) is image


def test_unknown_mode_names_the_key():
    with pytest.raises(ValueError, match=r"MSAD\.DOWNSAMPLE.*'bicubic'"):
        downsample(torch.zeros(3, 4, 4), 1, "bicubic")


# --- ground truth -----------------------------------------------------------------------------------------------------


def _instances(size, **fields):
    instances = Instances(size)
    for name, value in fields.items():
        instances.set(name, value)
    return instances


def test_boxes_are_scaled_exactly():
    boxes = Boxes(torch.tensor([[1.0, 2.0, 33.0, 17.5], [0.0, 0.0, 99.0, 75.0]]))
    classes, names = torch.tensor([4, 2]), ["a", "b"]
    full = _instances((75, 99), gt_boxes=boxes, gt_classes=classes, tags=names)
    quarter = scale_instances(full, 2)
    assert quarter.image_size == (19, 25)
    assert quarter.gt_boxes.tensor.tolist() == [[0.25, 0.5, 8.25, 4.375], [0.0, 0.0, 24.75, 18.75]]
    assert quarter.gt_classes is classes and quarter.tags is names
    assert full.image_size == (75, 99) and full.gt_boxes.tensor.tolist()[0] == [1.0, 2.0, 33.0, 17.5]


def test_polygons_are_scaled_exactly():
    polygons = [[np.array([0.0, 0.0, 10.0, 0.0, 10.0, 6.0])], [np.array([1.0, 1.0, 5.0, 1.0, 5.0, 7.0])] * 2]
    full = _instances((20, 20), gt_masks=PolygonMasks(polygons))
    half = scale_instances(full, 1)
    assert isinstance(half.gt_masks, PolygonMasks) and [len(p) for p in half.gt_masks.polygons] == [1, 2]
    assert half.gt_masks.polygons[0][0].tolist() == [0.0, 0.0, 5.0, 0.0, 5.0, 3.0]
    assert half.gt_masks.polygons[1][1].tolist() == [0.5, 0.5, 2.5, 0.5, 2.5, 3.5]
    assert full.gt_masks.polygons[0][0].tolist() == [0.0, 0.0, 10.0, 0.0, 10.0, 6.0]
    torch.testing.assert_close(half.gt_masks.area(), full.gt_masks.area() / 4)


def test_bitmask_pixels_belong_to_the_object_from_half_their_area_on():
    mask = torch.tensor(
        [
            [1, 1, 1, 0, 0],
            [1, 0, 1, 0, 1],
            [0, 0, 1, 0, 1],
            [0, 1, 0, 0, 0],
            [1, 0, 0, 1, 1],
        ],
        dtype=torch.bool,
    )
    half = scale_instances(_instances((5, 5), gt_masks=BitMasks(mask[None])), 1)
    # Border pixels count the area inside the image: (0, 2) is 1 of 2 pixels, (2, 2) is 1 of 1.
    expected = torch.tensor([[1, 1, 1], [0, 0, 1], [1, 1, 1]], dtype=torch.bool)
    assert half.image_size == (3, 3) and torch.equal(half.gt_masks.tensor[0], expected)
    assert half.gt_masks.tensor.dtype == torch.bool


@pytest.mark.parametrize("shift", [1, 2])
@pytest.mark.parametrize("size", [(8, 12), (9, 13), (5, 7), (11, 6)])
def test_a_mask_of_the_whole_image_stays_whole(size, shift):
    full = _instances(size, gt_masks=BitMasks(torch.ones(2, *size, dtype=torch.bool)))
    reduced = scale_instances(full, shift)
    assert reduced.gt_masks.tensor.shape == (2, *downsampled_size(size, shift)) and reduced.gt_masks.tensor.all()


def test_keypoints_move_and_keep_their_visibility():
    points = torch.tensor([[[10.0, 21.0, 2.0], [0.0, 0.0, 0.0], [3.0, 4.0, 1.0]]])
    full = _instances((30, 30), gt_keypoints=Keypoints(points))
    half = scale_instances(full, 1)
    assert isinstance(half.gt_keypoints, Keypoints)
    assert half.gt_keypoints.tensor.tolist() == [[[5.0, 10.5, 2.0], [0.0, 0.0, 0.0], [1.5, 2.0, 1.0]]]
    assert torch.equal(full.gt_keypoints.tensor, points)


def test_an_image_without_objects():
    full = _instances((9, 9), gt_boxes=Boxes(torch.zeros(0, 4)), gt_masks=BitMasks(torch.zeros(0, 9, 9)))
    half = scale_instances(full, 1)
    assert len(half) == 0 and half.gt_boxes.tensor.shape == (0, 4) and half.gt_masks.tensor.shape == (0, 5, 5)


def test_full_resolution_shares_the_ground_truth():
    full = _instances((9, 9), gt_boxes=Boxes(torch.ones(1, 4)))
    assert scale_instances(full, 0) is full


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_view_does_not_modify_its_input(make_batch, shift):
    batch = make_batch([(33, 47), (40, 30)])
    before = [dict(item) for item in batch]
    pixels = [item["image"].clone() for item in batch]
    boxes = [item["instances"].gt_boxes.tensor.clone() for item in batch]
    seen = downsample_batch(batch, shift, "cpu")
    for i, (item, out) in enumerate(zip(batch, seen)):
        assert item is not out and item.keys() == before[i].keys()
        assert all(item[key] is before[i][key] for key in item)
        assert torch.equal(item["image"], pixels[i]) and torch.equal(item["instances"].gt_boxes.tensor, boxes[i])
        assert all(out[key] is item[key] for key in ("file_name", "height", "width"))
        assert torch.equal(out["image"], downsample(pixels[i], shift))
        assert out["instances"].image_size == tuple(out["image"].shape[-2:])
        assert torch.equal(out["instances"].gt_boxes.tensor, boxes[i] * 0.5**shift)


def test_view_without_ground_truth():
    (out,) = downsample_batch([{"image": torch.zeros(3, 6, 6), "image_id": 5}], 1, "cpu", "nearest")
    assert out["image"].shape == (3, 3, 3) and out["image_id"] == 5 and "instances" not in out


# --- grids ------------------------------------------------------------------------------------------------------------


def centres(rows, cols, stride, dtype=torch.float64):
    """(1, 2, rows, cols): y and x of each location's centre."""
    y, x = ((torch.arange(n, dtype=dtype) + 0.5) * stride for n in (rows, cols))
    return torch.stack(torch.meshgrid(y, x, indexing="ij"))[None]


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize(
    ("old", "new"), [(32, 32 / 3), (32, 16), (8, 4), (8, 16 / 3), (8, 16), (8, 24), (8, 8 / 0.75), (8, 20), (8, 64)]
)
def test_a_map_keeps_its_positions_on_another_grid(old, new, average):
    """A linear map stays itself, away from the border, whether or not a stride divides the image."""
    height, width = 200, 334
    rows, cols = (-(-side // old) for side in (height, width))
    size = tuple(int(np.ceil(side / new)) for side in (height, width))
    found, wanted = resample(centres(rows, cols, old), size, new / old, average), centres(*size, new)
    reach = max(old, new) / 2
    inside = (wanted >= reach) & (wanted <= torch.tensor([rows, cols]).view(1, 2, 1, 1) * old - reach)
    assert found.shape == wanted.shape and inside.any()
    torch.testing.assert_close(found[inside], wanted[inside], rtol=0, atol=1e-6)


def test_borders_and_means_of_a_resampled_map():
    x = torch.tensor([[[[1.0, 3.0, 5.0]]]])
    assert resample(x, (2, 6), 0.5)[0, 0].tolist() == [[1.0, 1.5, 2.5, 3.5, 4.5, 5.0]] * 2
    assert resample(x, (1, 7), 0.5)[0, 0, 0, -1] == 5.0  # beyond the border
    assert resample(x, (1, 2), 2.0)[0, 0].tolist() == [[2.0, 5.0]]
    assert resample(x, (1, 1), 3.0).item() == 3.0 and resample(x[..., :1], (1, 1), 4.0).item() == 1.0
    y = torch.randn(1, 2, 5, 4)
    assert resample(y, (4, 4), 1.0).data_ptr() == y.data_ptr()
    means = resample(y, (2, 1), 3.0, average=True)  # over what there is of a cell
    torch.testing.assert_close(means[..., 0, 0], y[..., :3, :3].mean(dim=(2, 3)))
    torch.testing.assert_close(means[..., 1, 0], y[..., 3:, :3].mean(dim=(2, 3)))
