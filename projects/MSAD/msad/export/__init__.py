"""Trained models for use without this project."""

from .plain import export

__all__ = ["export"]
