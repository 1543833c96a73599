"""Helpers shared by the other packages."""
