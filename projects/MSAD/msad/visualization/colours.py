"""Colours that colour-blind readers can tell apart."""

import colorsys
from collections.abc import Iterable
from typing import NamedTuple

# Okabe and Ito's palette; its yellow is too faint on white and its black too dark on photographs.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, GREY, FAINT = "#222222", "#6b6b6b", "#d9d9d9"
# One hue each, for the variants of a comparison.
_VARIANTS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#222222", "#8C564B", "#8A8A8A")
_LINES, _HATCHES, _MARKERS = ("-", "--", ":"), ("", "///", "..."), ("o", "s", "^")


class VariantStyle(NamedTuple):
    """How a variant looks in every chart: as a curve, as a bar and as a dot."""

    colour: str
    line: str
    hatch: str
    marker: str


def variant_styles(names: Iterable[str]) -> dict[str, VariantStyle]:
    """name -> style, all of them different for up to 24 names; with more, colours repeat with the same lines."""
    styles = {}
    for i, name in enumerate(dict.fromkeys(names)):
        again = i // len(_VARIANTS) % len(_LINES)
        styles[name] = VariantStyle(_VARIANTS[i % len(_VARIANTS)], _LINES[again], _HATCHES[again], _MARKERS[again])
    return styles


def class_colour(index: int) -> tuple[float, float, float]:
    """RGB in [0, 1] of a class, the same in every picture: bright, because it is drawn over photographs."""
    if index < len(_CLASSES):
        return _CLASSES[index]
    # The golden ratio spreads any number of further hues evenly.
    return colorsys.hsv_to_rgb((0.11 + 0.618034 * index) % 1.0, (0.9, 0.6)[index % 2], 1.0)


def _rgb(code: str) -> tuple[float, float, float]:
    return tuple(int(code[i : i + 2], 16) / 255 for i in (1, 3, 5))


_CLASSES = tuple(map(_rgb, ("#FF8C1A", "#3FB8FF", "#F0E442", "#1FD6A0", "#FF7AC6", "#B79CFF", "#FF4D4D", "#D9D9D9")))
