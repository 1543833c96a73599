"""detectron2-lite: the part of detectron2's public API that box, mask and keypoint detectors need.

The version carries the detectron2 release whose behaviour is followed, then the one of this distribution.
"""

__version__ = "0.6+lite0.1.0"
