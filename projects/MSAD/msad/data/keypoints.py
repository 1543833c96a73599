"""detectron2's keypoint metadata, from COCO's category records and a yaml entry; which names mirror each other."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_PALETTE = ((230, 75, 53), (77, 187, 213), (0, 160, 135), (60, 84, 136), (243, 155, 127), (145, 209, 194))
_TOKENS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[^A-Za-z]+")
_SWAPPED = {"left": "right", "right": "left", "l": "r", "r": "l"}


def keypoint_metadata(entry: Mapping[str, Any], categories: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """``keypoint_names``, ``keypoint_flip_map``, ``keypoint_connection_rules`` and ``keypoint_oks_sigmas``.

    ``keypoint_flip_pairs_given`` says whether the pairs were stated; without that they come from the names.

    Args:
        entry: of DATASETS.REGISTER: JSON, KEYPOINT_FLIP_PAIRS, KEYPOINT_SIGMAS.
        categories: those of the file; {} is returned if none has keypoints.

    Raises:
        ValueError: categories with different keypoints, or pairs, sigmas or a skeleton that do not fit them.
    """
    with_points = [category for category in categories if category.get("keypoints")]
    if not with_points:
        for key in ("KEYPOINT_FLIP_PAIRS", "KEYPOINT_SIGMAS"):
            if entry.get(key):
                raise ValueError(f"{key} is given, but no category of {entry['JSON']} has keypoints")
        return {}
    first = with_points[0]
    names = first["keypoints"]
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"category {first['name']!r}: keypoints must be a list of names, got {names!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"category {first['name']!r}: two keypoints have one name: {names}")
    for other in with_points[1:]:
        if list(other["keypoints"]) != names:
            raise ValueError(
                f"the categories {first['name']!r} and {other['name']!r} have different keypoints; "
                "detectron2 supports one set of keypoints a data set"
            )
    pairs = entry.get("KEYPOINT_FLIP_PAIRS", first.get("flip_pairs"))
    given = pairs is not None
    pairs = _checked_pairs(pairs, names) if given else mirrored_pairs(names)
    out = {
        "keypoint_names": list(names),
        "keypoint_flip_map": pairs,
        "keypoint_flip_pairs_given": given,
        "keypoint_connection_rules": _connections(first, names),
    }
    sigmas = entry.get("KEYPOINT_SIGMAS", first.get("sigmas"))
    if sigmas is not None:
        if not isinstance(sigmas, list | tuple) or not all(type(s) in (int, float) for s in sigmas):
            raise ValueError(f"KEYPOINT_SIGMAS, or a category's sigmas, are {sigmas!r} instead of numbers")
        if len(sigmas) != len(names):
            raise ValueError(f"KEYPOINT_SIGMAS has {len(sigmas)} values for {len(names)} keypoints {names}")
        out["keypoint_oks_sigmas"] = [float(s) for s in sigmas]
    return out


def mirrored_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of names that differ in their side alone: "left" and "right" or "l" and "r", in any case.

    The side may be a word of its own (``left_eye``, ``eyeL``, ``R-hip``), or begin or end the name (``lefteye``,
    ``leye``). A name that would have two partners has none.
    """
    places = {name.lower(): i for i, name in enumerate(names)}
    partner = {}
    for i, name in enumerate(names):
        for spell in (_swap_words, _swap_parts, _swap_ends):
            found = {places[other.lower()] for other in spell(name) if other.lower() in places} - {i}
            if found:
                partner[i] = found.pop() if len(found) == 1 else None
                break
    return [(names[i], names[j]) for i, j in sorted(partner.items()) if j is not None and i < j and partner.get(j) == i]


def sided_without_partner(names: Sequence[str], pairs: Sequence[Sequence[str]]) -> list[str]:
    """Names that say left or right but are in no pair."""
    paired = {name for pair in pairs for name in pair}
    return [name for name in names if name not in paired and _says_side(name)]


def _says_side(name: str) -> bool:
    words = [word.lower() for word in _TOKENS.findall(name)]
    return any(word in _SWAPPED or word.startswith(("left", "right")) for word in words)


def _swap_words(name: str) -> Iterator[str]:
    """Words that are a side; all of them at once."""
    words = _TOKENS.findall(name)
    swapped = [_SWAPPED.get(word.lower(), word) for word in words]
    if swapped != words:
        yield "".join(swapped)


def _swap_parts(name: str) -> Iterator[str]:
    """ "left" and "right" anywhere in a word."""
    swapped = re.sub("left|right", lambda m: _SWAPPED[m.group().lower()], name, flags=re.IGNORECASE)
    if swapped.lower() != name.lower():
        yield swapped


def _swap_ends(name: str) -> Iterator[str]:
    """An l or r that begins or ends the name."""
    low = name.lower()
    if low[0] in "lr":
        yield _SWAPPED[low[0]] + low[1:]
    if len(low) > 1 and low[-1] in "lr":
        yield low[:-1] + _SWAPPED[low[-1]]


def _checked_pairs(pairs: Any, names: Sequence[str]) -> list[tuple[str, str]]:
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs):
        raise ValueError(f"flip_pairs must be a list of pairs of keypoint names, got {pairs!r}")
    for point in (point for pair in pairs for point in pair):
        if point not in names:
            near = difflib.get_close_matches(str(point), names, n=1, cutoff=0.0)[0]
            raise ValueError(f"KEYPOINT_FLIP_PAIRS: no keypoint {point!r}; did you mean {near!r}?")
    flat = [point for pair in pairs for point in pair]
    if len(set(flat)) < len(flat):
        twice = next(point for point in flat if flat.count(point) > 1)
        raise ValueError(f"KEYPOINT_FLIP_PAIRS: {twice!r} is named twice; each keypoint has one counterpart")
    return [tuple(pair) for pair in pairs]


def _connections(category: Mapping[str, Any], names: Sequence[str]) -> list[tuple[str, str, tuple[int, int, int]]]:
    rules = []
    skeleton = category.get("skeleton") or []
    for i, bone in enumerate(skeleton if isinstance(skeleton, list) else [skeleton]):
        good = isinstance(bone, list | tuple) and len(bone) == 2
        if not good or not all(type(end) is int and 1 <= end <= len(names) for end in bone):
            raise ValueError(
                f"category {category['name']!r}: skeleton[{i}] is {bone!r}; COCO counts the {len(names)} keypoints "
                f"from 1 to {len(names)}"
            )
        rules.append((names[bone[0] - 1], names[bone[1] - 1], _PALETTE[i % len(_PALETTE)]))
    return rules
