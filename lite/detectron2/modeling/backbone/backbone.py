"""The contract between a feature extractor and the detector that uses it."""

from abc import ABCMeta, abstractmethod

from torch import nn

from detectron2.layers import ShapeSpec

__all__ = ["Backbone"]


class Backbone(nn.Module, metaclass=ABCMeta):
    """Turns a batch of images (N, C, H, W) into a dict of named feature maps.

    A subclass implements :meth:`forward` and fills three attributes, which :meth:`output_shape` reads:
    ``_out_features`` (names, in the order of the output), ``_out_feature_channels`` and
    ``_out_feature_strides`` (dicts that may also know names beyond those given out).
    """

    @abstractmethod
    def forward(self, *args):
        """Compute ``{name: (N, C_name, H_name, W_name)}``."""

    @property
    def size_divisibility(self) -> int:
        """Height and width of the input must be multiples of this number of pixels; 0: anything goes."""
        return 0

    @property
    def padding_constraints(self) -> dict[str, int]:
        """Demands on the padding of a batch beyond :attr:`size_divisibility`.

        Keys understood by ``ImageList.from_tensors``: ``size_divisibility`` and ``square_size`` (pixels).
        """
        return {}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride (input pixels per cell) of every feature map that ``forward`` returns."""
        channels, strides = self._out_feature_channels, self._out_feature_strides
        return {n: ShapeSpec(channels=channels[n], stride=strides[n]) for n in self._out_features}
