"""What a module promises about a feature map."""

from dataclasses import dataclass


@dataclass
class ShapeSpec:
    """Known facts about a feature map; None where unknown."""

    channels: int | None = None
    height: int | None = None
    """Cells."""
    width: int | None = None
    """Cells."""
    stride: int | None = None
    """Pixels of the network's input between neighboring cells."""
