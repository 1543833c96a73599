"""MEInst (Zhang et al., CVPR 2020): FCOS that also predicts, at every location, a code of the mask inside the box."""

from __future__ import annotations

import copy

import torch
from detectron2.config import configurable
from detectron2.layers import batched_nms
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import fcos
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from .fcos import FCOS
from .mask_code import IN_CHECKPOINT, MaskCode


class MEInstHead(fcos.FCOSHead):
    """FCOS's head and a third tower, of the same convolutions as the box tower, for the mask codes."""

    def __init__(self, *, input_shape: list, conv_dims: list[int], code_dim: int, **kwargs) -> None:
        super().__init__(input_shape=input_shape, conv_dims=conv_dims, **kwargs)
        self.mask_subnet = copy.deepcopy(self.bbox_subnet)
        self.mask_pred = nn.Conv2d(conv_dims[-1], code_dim, 3, padding=1)
        for module in (*self.mask_subnet, self.mask_pred):
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, features: list[torch.Tensor]) -> tuple[list[torch.Tensor], ...]:
        """Maps (N, C, h_l, w_l) -> what FCOS's head gives, and codes (N, D, h_l, w_l)."""
        return *super().forward(features), [self.mask_pred(self.mask_subnet(x)) for x in features]


@META_ARCH_REGISTRY.register()
class MEInst(FCOS):
    """FCOS with masks. The box half has the keys of MODEL.FCOS, its parameter names and its numbers.

    The paper leaves the details of training open, and so do the MSAD papers. The choices made here
    (projects/MSAD/README.md lists them too):

    - The code is a PCA of 28 x 28 masks inside their boxes, whitened (see :class:`MaskCode`), 60 numbers by default.
    - The mask tower has the box tower's shape; its last layer starts at the mean mask.
    - The loss is the squared distance of the decoded masks, which is a weighted squared distance of the codes; its unit
      is the mean squared distance of a training mask to the mean mask. It is summed over the positive locations of FCOS
      and divided by the same running number of positives as FCOS's own losses.
    - Targets are cut from the ground truth mask by the ground truth box, detections are pasted into predicted boxes.

    Args:
        mask_code: with the D of the head.
        code_loss_weight: factor on the loss of the codes.
        kwargs: FCOS's.
    """

    @configurable
    def __init__(self, *, mask_code: MaskCode, code_loss_weight: float = 1.0, **kwargs) -> None:
        super().__init__(**kwargs)
        self.mask_code = mask_code
        self.code_loss_weight = code_loss_weight

    @classmethod
    def from_config(cls, cfg) -> dict:
        options = cfg.MODEL.MEINST
        code = MaskCode.unknown(options.DIM) if options.CODE == IN_CHECKPOINT else MaskCode.load(options.CODE)
        if code.dim != options.DIM:
            raise ValueError(f"MODEL.MEINST.DIM is {options.DIM}, but codes of {options.CODE} have {code.dim} numbers")
        return {**super().from_config(cfg), "mask_code": code, "code_loss_weight": options.CODE_LOSS_WEIGHT}

    @classmethod
    def build_head(cls, cfg, **kwargs) -> MEInstHead:
        if cfg.MODEL.FCOS.SCALES or cfg.MODEL.FCOS.SCORE_RULE != "sqrt_product" or cfg.MODEL.FCOS.CLIP_BEFORE_NMS:
            raise ValueError("MODEL.FCOS: MEInst has no SCALES, one SCORE_RULE (sqrt_product) and no CLIP_BEFORE_NMS")
        return MEInstHead(code_dim=cfg.MODEL.MEINST.DIM, **kwargs)

    @torch.no_grad()
    def label_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        """FCOS's assignment, and the codes that belong to it.

        Returns:
            for each image labels (R,) and boxes (R, 4) as FCOS gives them, and rows (R,) in the codes (M, D) of the M
            instances of the batch, which are the fourth value; rows of background locations mean nothing.
        """
        for instances in gt_instances:
            if len(instances) and not instances.has("gt_masks"):
                raise ValueError("MEInst is trained on masks, but the ground truth has none; set MODEL.MASK_ON: True")
        numbered, start = [], 0
        for instances in gt_instances:
            count = len(instances)
            # FCOS copies classes to the locations: a class of its own for each instance says which one it took.
            own = -1 - torch.arange(start, start + count, device=instances.gt_boxes.device)
            numbered.append(Instances(instances.image_size, gt_boxes=instances.gt_boxes, gt_classes=own))
            start += count
        numbers, boxes = super().label_anchors(anchors, numbered)
        classes = torch.cat([instances.gt_classes for instances in gt_instances] + [numbers[0].new_zeros(1)])
        rows = [(-1 - image).clamp(min=0) for image in numbers]
        labels = [torch.where(image < 0, classes[row], image) for image, row in zip(numbers, rows)]
        return labels, boxes, rows, self._codes(gt_instances)

    def _codes(self, gt_instances: list[Instances]) -> torch.Tensor:
        """(M, D) codes of all instances of a batch, one after another; a row of zeros if there are none."""
        size = self.mask_code.mask_size
        cut = [gt.gt_masks.crop_and_resize(gt.gt_boxes.tensor, size) for gt in gt_instances if len(gt)]
        if not cut:
            return self.mask_code.variance.new_zeros(1, self.mask_code.dim)
        return self.mask_code.encode(torch.cat(cut))

    def forward_training(
        self, images: ImageList, features: list[torch.Tensor], predictions: list[list[torch.Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """FCOS's losses and "loss_meinst_code", in float32."""
        predictions = [[x.float() for x in levels] for levels in predictions]
        dims = [self.num_classes, 4, 1, self.mask_code.dim]
        logits, deltas, centerness, codes = self._transpose_dense_predictions(predictions, dims)
        anchors = self.anchor_generator(features)
        labels, boxes, rows, targets = self.label_anchors(anchors, gt_instances)
        losses = self.losses(anchors, logits, labels, deltas, boxes, centerness)
        labels = torch.stack(labels)
        positive = (labels != self.num_classes).nonzero(as_tuple=True)
        distance = self.mask_code.distance(torch.cat(codes, dim=1)[positive], targets[torch.stack(rows)[positive]])
        # FCOS has just brought its running number of positives up to date.
        losses["loss_meinst_code"] = self.code_loss_weight * distance.sum() / self.loss_normalizer
        return losses

    def forward_inference(
        self, images: ImageList, features: list[torch.Tensor], predictions: list[list[torch.Tensor]]
    ) -> list[Instances]:
        """Detections with ``pred_masks`` (N, 1, s, s) inside their boxes, which detectron2 pastes into the image."""
        dims = [self.num_classes, 4, 1, self.mask_code.dim]
        logits, deltas, centerness, codes = self._transpose_dense_predictions(predictions, dims)
        locations = self.anchor_generator(features)
        scores = [(c.sigmoid() * q.sigmoid()).sqrt() for c, q in zip(logits, centerness)]
        return [
            self._detect(locations, [s[i] for s in scores], [d[i] for d in deltas], [k[i] for k in codes], size)
            for i, size in enumerate(images.image_sizes)
        ]

    def _detect(
        self, locations: list[Boxes], scores: list[torch.Tensor], deltas: list[torch.Tensor], codes: list[torch.Tensor],
        image_size: tuple[int, int],
    ) -> Instances:  # fmt: skip
        """FCOS's candidates and suppression for one image; detectron2's own do not tell where a box came from."""
        best, places, first = [], [], 0
        for level in scores:
            value, place = level.flatten().topk(min(self.test_topk_candidates, level.numel()))
            best.append(value)
            places.append(place + first)
            first += level.numel()
        score, place = torch.cat(best), torch.cat(places)
        above = (score > self.test_score_thresh).nonzero().squeeze(1)
        score, location, label = score[above], place[above] // self.num_classes, place[above] % self.num_classes
        squares = Boxes.cat(locations).tensor[location]
        boxes = self.box2box_transform.apply_deltas(torch.cat(deltas)[location].float(), squares)
        kept = batched_nms(boxes, score, label, self.test_nms_thresh)[: self.max_detections_per_image]
        masks = self.mask_code.decode(torch.cat(codes)[location[kept]])
        return Instances(
            image_size, pred_boxes=Boxes(boxes[kept]), scores=score[kept], pred_classes=label[kept],
            pred_masks=masks[:, None],
        )  # fmt: skip
