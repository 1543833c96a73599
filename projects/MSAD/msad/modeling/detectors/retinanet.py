"""RetinaNet as mmdetection runs it."""

from __future__ import annotations

from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet

from .candidates import ClipsBeforeNMS


@META_ARCH_REGISTRY.register()
class RetinaNetClippedFirst(ClipsBeforeNMS, RetinaNet):
    """detectron2's RetinaNet with its keys, that cuts candidates to the image before it suppresses them."""
