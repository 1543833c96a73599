"""Decides whether lite can be compared with detectron2 here."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture(scope="session")
def reference_python() -> str:
    """Path of an interpreter that has the real detectron2."""
    import runner

    if not runner.is_lite():
        pytest.skip("the current engine is detectron2 itself; there is nothing to compare")
    python = os.environ.get("D2_PYTHON")
    if not python:
        pytest.skip("D2_PYTHON (an interpreter that has detectron2) is not set")
    return python
