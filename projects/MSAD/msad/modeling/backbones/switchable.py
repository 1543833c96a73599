"""Convolutions of DetectoRS (CVPR 2021): standardised weights (ConvAWS) and switchable atrous convolution (SAC)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_resnet_backbone
from torch import nn

from ..deformable import deform_conv

EPSILON = 1e-5
ATROUS = 3  # dilation of the second convolution of SAC, relative to the first


class ConvAWS(Conv2d):
    """detectron2's convolution with each filter brought to a mean ``weight_beta`` and a deviation ``weight_gamma``.

    The two are buffers (O, 1, 1, 1), fixed when a plain network is loaded: a checkpoint without them sets them to the
    moments of its own filters, so that the network computes what it did before.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        shape = (self.out_channels, 1, 1, 1)
        self.register_buffer("weight_gamma", torch.ones(shape))
        self.register_buffer("weight_beta", torch.zeros(shape))
        self.keep_filters()

    @classmethod
    def of(cls, conv: Conv2d, **kwargs) -> ConvAWS:
        """One that has the parameters, the normalisation and the activation of ``conv``, and computes the same."""
        made = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            conv.groups, conv.bias is not None, norm=conv.norm, activation=conv.activation, **kwargs,
        )  # fmt: skip
        made.weight, made.bias = conv.weight, conv.bias
        made.keep_filters()
        return made if conv.weight.requires_grad else made.requires_grad_(False)

    @torch.no_grad()
    def keep_filters(self) -> None:
        """Set the moments to those of the filters."""
        self.weight_beta.copy_(self.weight.mean(dim=(1, 2, 3), keepdim=True))
        self.weight_gamma.copy_((self.weight.var(dim=(1, 2, 3), keepdim=True) + EPSILON).sqrt())

    def filters(self) -> torch.Tensor:
        """The filters that convolve, in the type of the parameters: mixed precision does not touch them here."""
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return self.weight_gamma * (self.weight - mean) / (variance + EPSILON).sqrt() + self.weight_beta

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        filters = self.filters()
        return self.finish(F.conv2d(x, filters, self.bias, self.stride, self.padding, self.dilation, self.groups))

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        """Normalisation and activation."""
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *others) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *others)
        moments = [f"{prefix}weight_gamma", f"{prefix}weight_beta"]
        if f"{prefix}weight" in state_dict and not any(name in state_dict for name in moments):
            self.keep_filters()
            missing_keys[:] = [name for name in missing_keys if name not in moments]


class SwitchableAtrousConv(ConvAWS):
    """A 3x3 convolution that is a mixture of two, of different dilation, and sees a global context (Sec. 3.3).

    Starts as the convolution that it is made of. Needs maps of at least 3 x 3 locations.

    Args:
        deform: both convolutions are deformable.
        args, kwargs: those of :class:`ConvAWS`; square kernels without bias.
    """

    def __init__(self, *args, deform: bool = True, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.bias is not None:
            raise ValueError("SwitchableAtrousConv has no bias")
        self.deform = deform
        self.weight_diff = nn.Parameter(torch.zeros_like(self.weight))
        self.switch = nn.Conv2d(self.in_channels, 1, 1, stride=self.stride)
        self.pre_context = nn.Conv2d(self.in_channels, self.in_channels, 1)
        self.post_context = nn.Conv2d(self.out_channels, self.out_channels, 1)
        neutral = [self.switch, self.pre_context, self.post_context]
        if deform:
            offsets = 2 * self.kernel_size[0] * self.kernel_size[1]
            self.offset_s = nn.Conv2d(self.in_channels, offsets, 3, stride=self.stride, padding=1)
            self.offset_l = nn.Conv2d(self.in_channels, offsets, 3, stride=self.stride, padding=1)
            neutral += [self.offset_s, self.offset_l]
        for layer in neutral:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.ones_(self.switch.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, O, H', W')."""
        if min(x.shape[-2:]) < 3:
            raise ValueError(
                f"a switchable atrous convolution needs maps of at least 3 x 3 locations, not {tuple(x.shape[-2:])}: "
                "the sides of images must be over 64 pixels at stride 32"
            )
        x = x + self.pre_context(x.mean(dim=(2, 3), keepdim=True))
        around = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel_size=5, stride=1)
        switch = self.switch(around)
        filters = self.filters()
        offset_s, offset_l = (self.offset_s(around), self.offset_l(around)) if self.deform else (None, None)
        small = self._convolve(x, filters, offset_s, 1)
        large = self._convolve(x, filters + self.weight_diff, offset_l, ATROUS)
        y = switch * small + (1 - switch) * large
        return self.finish(y + self.post_context(y.mean(dim=(2, 3), keepdim=True)))

    def _convolve(
        self, x: torch.Tensor, filters: torch.Tensor, offset: torch.Tensor | None, factor: int
    ) -> torch.Tensor:
        stride = self.stride[0]
        padding, dilation = self.padding[0] * factor, self.dilation[0] * factor
        if offset is None:
            return F.conv2d(x, filters, None, stride, padding, dilation, self.groups)
        return deform_conv(x, offset, filters, None, stride, padding, dilation)


def standardise_convolutions(network: nn.Module) -> None:
    """Turn every convolution of ``network`` that is not yet one into a ConvAWS, in place."""
    for name, child in list(network.named_children()):
        if not isinstance(child, Conv2d):
            standardise_convolutions(child)
        elif not isinstance(child, ConvAWS):
            setattr(network, name, ConvAWS.of(child))


def switch_convolutions(stage: nn.Sequential, deform: bool) -> None:
    """Turn the second convolution of each residual block of ``stage`` into a switchable one, in place."""
    for block in stage:
        if not isinstance(getattr(block, "conv2", None), Conv2d):
            raise ValueError(
                f"MODEL.RESNETS.SAC_ON_PER_STAGE: the second convolution of a {type(block).__name__} cannot be "
                "replaced; leave DEFORM_ON_PER_STAGE off"
            )
        block.conv2 = SwitchableAtrousConv.of(block.conv2, deform=deform)


@BACKBONE_REGISTRY.register()
def build_sac_resnet_backbone(cfg, input_shape: ShapeSpec) -> Backbone:
    """detectron2's ResNet of MODEL.RESNETS with standardised weights and, by stage, switchable convolutions."""
    options = cfg.MODEL.RESNETS
    resnet = build_resnet_backbone(cfg, input_shape)
    for name, switchable in zip(("res2", "res3", "res4", "res5"), options.SAC_ON_PER_STAGE):
        if switchable and name in resnet.stage_names:
            switch_convolutions(getattr(resnet, name), options.SAC_DEFORM)
    if options.CONV_AWS:
        standardise_convolutions(resnet)
    return resnet
