"""Decoding and suppression of whole batches in operators that ONNX has.

detectron2 goes through a batch image by image, with Instances and Python loops, which a trace turns into constants.
Here an image is a column of numbers beside the boxes, so the number of images, of boxes and the size of the images may
all differ from those at the time of tracing. N is the number of images, M a number of boxes over all of them; boxes
are (x0, y0, x1, y1) in pixels of the network's input.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms


def normalize(images: Tensor, sizes: Tensor, mean: Tensor, std: Tensor, divisibility: int) -> Tensor:
    """Pixels as they come from a decoder -> input of the backbone.

    Args:
        images: (N, H, W, 3) uint8; an image lies in the upper left corner.
        sizes: (N, 2) int64, height and width of each image; what lies beyond counts as padding.
        mean, std: (3, 1, 1) of the channels, in their order in ``images``.
        divisibility: sides of the result are multiples of this.

    Returns:
        (N, 3, H', W'), with zeros as padding.
    """
    x = (images.permute(0, 3, 1, 2).to(mean.dtype) - mean) / std
    height, width = x.shape[2], x.shape[3]
    rows = torch.arange(height, device=x.device)[None, :] < sizes[:, :1]
    columns = torch.arange(width, device=x.device)[None, :] < sizes[:, 1:]
    x = x * (rows[:, None, :, None] & columns[:, None, None, :]).to(x.dtype)
    if divisibility > 1:
        x = F.pad(x, (0, -width % divisibility, 0, -height % divisibility))
    return x


def grid_anchors(cell_anchors: Tensor, stride: int, offset: float, feature: Tensor) -> Tensor:
    """(H * W * A, 4) anchors of a map (N, C, H, W): ``cell_anchors`` (A, 4) around the points ``stride`` apart of which
    the first is at ``offset`` strides. The A anchors of a point are side by side, as in detectron2's generator."""
    height, width = feature.shape[2], feature.shape[3]
    x = ((torch.arange(width, device=feature.device) + offset) * stride)[None, :].expand(height, width)
    y = ((torch.arange(height, device=feature.device) + offset) * stride)[:, None].expand(height, width)
    points = torch.stack([x, y, x, y], dim=2).to(cell_anchors.dtype)
    return (points.reshape(-1, 1, 4) + cell_anchors).reshape(-1, 4)


def flat_map(x: Tensor, num_anchors: int) -> Tensor:
    """(N, A * K, H, W) -> (N, H * W * A, K), A = ``num_anchors``; rows as those of :func:`grid_anchors`."""
    n, _, height, width = x.shape
    return x.reshape(n, num_anchors, -1, height, width).permute(0, 3, 4, 1, 2).flatten(1, 3)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (N, T) of each of the N tables ``x`` (N, R, K): (N, T, K)."""
    first = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1)[index + first]


def best(scores: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Values and indices (N, min(R, limit)) of the largest of each row of (N, R), in descending order."""
    count = torch.as_tensor(scores.shape[1]).clamp(max=limit)  # the builtin min() would be traced as a constant
    return scores.topk(count, dim=1)


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Limit boxes (M, ..., 4) to images of ``sizes`` (M, 2), height and width."""
    limit = sizes.flip(1).to(boxes.dtype).repeat(1, 2).reshape(-1, *(1,) * (boxes.dim() - 2), 4)
    return torch.minimum(boxes.clamp(min=0), limit)


def suppress(
    boxes: Tensor, scores: Tensor, image: Tensor, group: Tensor, num_images: Tensor | int, num_groups: int,
    iou_threshold: float, limit: int,
) -> Tensor:  # fmt: skip
    """Non-maximum suppression within every group of every image.

    All groups go through one suppression, moved so far apart that they do not meet. They are laid out on a square grid
    and not in a row, because coordinates lose precision as they grow.

    Args:
        boxes, scores: (M, 4), (M,).
        image, group: (M,) int64, below ``num_images`` and ``num_groups``. Boxes suppress those that share both.
        iou_threshold: overlap above which the box of lower score goes.
        limit: the most boxes that an image keeps over all of its groups; negative: all.

    Returns:
        int64 indices of what stays, image by image, of an image the best first.
    """
    columns = math.ceil(math.sqrt(num_groups))
    ends = torch.cat([boxes.flatten(), boxes.new_zeros(1)])  # not empty
    step = ends.max() - ends.min() + 1
    row = image * math.ceil(num_groups / columns) + group.div(columns, rounding_mode="floor")
    place = torch.stack([group % columns, row], dim=1).to(boxes.dtype) * step
    kept = nms(boxes + place.repeat(1, 2), scores, iou_threshold)
    of_image = image[kept][None, :] == torch.arange(num_images, device=image.device)[:, None]
    if limit >= 0:
        of_image = of_image & (of_image.long().cumsum(dim=1) <= limit)
    return kept[of_image.nonzero()[:, 1]]


def pool(pooler: nn.Module, maps: list[Tensor], boxes: Tensor, image: Tensor) -> Tensor:
    """What detectron2's ROIPooler gives for boxes (M, 4) of the images ``image`` (M,): (M, C, S, S)."""
    rois = torch.cat([image[:, None].to(boxes.dtype), boxes], dim=1)
    if len(maps) == 1:
        return pooler.level_poolers[0](maps[0], rois)
    extent = boxes[:, 2:] - boxes[:, :2]
    octave = torch.log2((extent[:, 0] * extent[:, 1]).sqrt() / pooler.canonical_box_size + 1e-8)
    level = (pooler.canonical_level + octave).floor().clamp(pooler.min_level, pooler.max_level) - pooler.min_level
    parts, rows = [], []
    for number, (level_pooler, features) in enumerate(zip(pooler.level_poolers, maps)):
        mine = (level == number).nonzero()[:, 0]
        parts.append(level_pooler(features, rois[mine]))
        rows.append(mine)
    order = torch.cat(rows)
    place = torch.zeros_like(order).scatter(0, order, torch.arange(order.shape[0], device=order.device))
    return torch.cat(parts)[place]


def _cubic(length: int, source: int) -> Tensor:
    """(length, source) matrix of bicubic interpolation without aligned corners, a = -0.75, borders repeated."""
    at = (torch.arange(length).float() + 0.5) * (float(source) / float(length)) - 0.5
    left = at.floor()
    cells = torch.arange(source).float()
    matrix = torch.zeros(length, source)
    for tap in range(4):
        distance = (at - left + 1.0 - float(tap)).abs()
        near = (1.25 * distance - 2.25) * distance * distance + 1.0
        far = ((-0.75 * distance + 3.75) * distance - 6.0) * distance + 3.0
        weight = torch.where(distance <= 1.0, near, far)
        cell = (left + float(tap) - 1.0).clamp(0.0, float(source) - 1.0)
        matrix = matrix + weight[:, None] * (cell[:, None] == cells[None, :]).float()
    return matrix


@torch.jit.script_if_tracing
def keypoint_peaks(maps: Tensor, boxes: Tensor) -> Tensor:
    """Keypoints (M, K, 3), x and y in pixels of ``boxes`` (M, 4) and a probability, of heatmap logits (M, K, S, S).

    As detectron2's ``heatmaps_to_keypoints``: a map is stretched bicubically to the whole pixels of its box, where its
    peak is taken. Scripted, because the stretched sizes differ: a trace would unroll this loop. float32 on a CPU.
    """
    found = torch.zeros(0, maps.size(1), 3)
    for i in range(maps.size(0)):
        extent = (boxes[i, 2:] - boxes[i, :2]).clamp(min=1.0)
        whole = extent.ceil().long()
        width, height = int(whole[0]), int(whole[1])
        tall = torch.matmul(_cubic(height, maps.size(2)), maps[i])
        stretched = torch.matmul(tall, _cubic(width, maps.size(3)).t()).flatten(1)
        peak, where = stretched.max(dim=1)
        across = where % width
        cell = torch.stack([across.float(), ((where - across) // width).float()], dim=1)
        point = (cell + 0.5) * (extent / whole) + boxes[i, :2]
        probability = 1.0 / (maps[i].flatten(1) - peak[:, None]).exp().sum(dim=1)
        found = torch.cat([found, torch.cat([point, probability[:, None]], dim=1)[None]])
    return found
