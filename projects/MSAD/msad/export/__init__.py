"""Trained models for use without this project: plain detectron2 files, ONNX, and what runs it without torch."""

from .plain import export

__all__ = ["export"]
