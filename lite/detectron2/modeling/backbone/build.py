"""From ``cfg.MODEL.BACKBONE.NAME`` to a backbone."""

from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry

from .backbone import Backbone

__all__ = ["BACKBONE_REGISTRY", "build_backbone"]

BACKBONE_REGISTRY = Registry("BACKBONE")
BACKBONE_REGISTRY.__doc__ = """
Constructors of backbones by name; each is called as ``constructor(cfg, input_shape)``, where ``input_shape`` is a
:class:`ShapeSpec` of the image, and must return a :class:`Backbone`.
"""


def build_backbone(cfg, input_shape: ShapeSpec | None = None) -> Backbone:
    """Build the backbone that ``cfg.MODEL.BACKBONE.NAME`` names.

    ``input_shape`` defaults to an image with as many channels as ``cfg.MODEL.PIXEL_MEAN`` has entries.
    Raises TypeError if the registered constructor returns something that is not a :class:`Backbone`.
    """
    name = cfg.MODEL.BACKBONE.NAME
    if input_shape is None:
        input_shape = ShapeSpec(channels=len(cfg.MODEL.PIXEL_MEAN))
    built = BACKBONE_REGISTRY.get(name)(cfg, input_shape)
    if not isinstance(built, Backbone):
        raise TypeError(f"MODEL.BACKBONE.NAME '{name}' made a {type(built).__name__}, which is no Backbone")
    return built
