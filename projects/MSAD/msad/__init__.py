"""Low-resolution detection by distillation on detectron2's registries, configs and trainer.

Importing the package registers its meta-architectures, backbones and distillation losses.
"""

from .config import add_msad_config, load_config
from .distill import cross_scale as _cross_scale  # noqa: F401  (fills DISTILL_ASSISTANT_REGISTRY)
from .distill import losses as _losses  # noqa: F401  (fills DISTILL_LOSS_REGISTRY)
from .modeling import backbones as _backbones  # noqa: F401  (fills BACKBONE_REGISTRY)
from .modeling import detectors as _detectors  # noqa: F401  (fills META_ARCH_REGISTRY)
from .modeling import fusion_student as _fusion_student  # noqa: F401
from .modeling import own_adapters as _own_adapters  # noqa: F401
from .modeling import segmentation as _segmentation  # noqa: F401  (fills SEM_SEG_HEADS_REGISTRY)
from .modeling import teacher as _teacher  # noqa: F401

__all__ = ["__version__", "add_msad_config", "load_config"]
__version__ = "0.2.0"
