"""What lite and detectron2 both refuse, each in its own words."""

import re

import detectron2
import pytest

LITE = "lite" in detectron2.__version__
ANY = (AssertionError, ValueError, KeyError, TypeError, IndexError, RuntimeError)


def refused(message):
    """Lite's error says ``message``, so that no other mistake is taken for it; detectron2's may say nothing."""
    return pytest.raises(ANY, match=re.escape(message) if LITE else None)
