"""Pascal VOC's format: an XML file of boxes for each image, as the challenge and as Roboflow lay them out."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from .converted import SUFFIXES, CocoBuilder, text_of

_DECLARATION = re.compile(rb"""\s*<\?xml[^>]*?\sencoding\s*=\s*["'](?P<encoding>[\w.:-]+)["'][^>]*\?>""")


class _Part(NamedTuple):
    """Annotation files of a split by the stem of their images, and where images are."""

    name: str
    annotations: dict[str, Path]
    images: Path


def find_voc(folder: Path) -> dict[str, _Part] | None:
    """The splits of a folder, or None if it is in neither layout.

    Either ``Annotations/``, ``JPEGImages/`` and ``ImageSets/Main/train.txt``, ``val.txt`` (in the folder itself, or in
    one below it such as ``VOC2012`` or ``VOCdevkit/VOC2012``), or ``train/*.xml`` and ``valid/*.xml`` beside images.

    Raises:
        FileNotFoundError: a split is missing; names the file.
        ValueError: a list of images is no text, or there are several years.
    """
    below = [*sorted(folder.glob("VOC*")), *sorted(folder.glob("VOCdevkit/*"))]
    roots = [root for root in (folder, *below) if (root / "Annotations").is_dir()]
    if len(roots) > 1 and roots[0] != folder:
        names = ", ".join(str(root.relative_to(folder)) for root in roots)
        raise ValueError(f"{folder} has several data sets, {names}: name the folder of one, e.g. {roots[-1]}")
    if roots:
        return {split: _listed(roots[0], names) for split, names in
                {"train": ("train", "trainval"), "val": ("val", "test")}.items()}  # fmt: skip
    parts = {split: next((p for n in names if any((p := folder / n).glob("*.xml"))), None)
             for split, names in {"train": ("train",), "val": ("valid", "val", "test")}.items()}  # fmt: skip
    if not any(parts.values()):
        return None
    for split, place in parts.items():
        if place is None:
            raise FileNotFoundError(f"{folder}: there is no XML file in {'train/' if split == 'train' else 'valid/'}")
    return {split: _Part(place.name, {file.stem: file for file in sorted(place.glob("*.xml"))}, place)
            for split, place in parts.items()}  # fmt: skip


def _listed(root: Path, names: tuple[str, ...]) -> _Part:
    lists = [root / "ImageSets" / "Main" / f"{name}.txt" for name in names]
    file = next((file for file in lists if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{root}: there is no {lists[0].relative_to(root)}")
    if not (root / "JPEGImages").is_dir():
        raise FileNotFoundError(f"{root}: there is no JPEGImages")
    lines = [line.strip() for line in text_of(file).splitlines() if line.strip()]
    return _Part(file.name, _annotations(lines, root / "Annotations"), root / "JPEGImages")


def _annotations(lines: list[str], folder: Path) -> dict[str, Path]:
    """Annotation files by stem of an image list, whose lines are names; in a list of one class 1, 0 or -1 follows.

    As names may end in a blank and a number too, the lines are read in the way that finds more files.
    """
    names = (lines, [re.sub(r"\s+(-1|0|1)$", "", line) for line in lines])
    readings = ({stem: folder / f"{stem}.xml" for stem in map(_stem, part)} for part in names)
    return max(readings, key=lambda files: sum(file.is_file() for file in files.values()))


def _stem(name: str) -> str:
    """Of a file name, which may have blanks, dots and an ending."""
    path = PurePosixPath(name)
    return path.stem if path.suffix.lower() in SUFFIXES else name


def read_voc(parts: dict[str, _Part]) -> dict[str, tuple[Path, CocoBuilder]]:
    """{"train": ..., "val": ...}: the folder of the images, and the split.

    Classes are the names in the training split, in alphabetical order. Corners are pixel numbers from 1 on, both
    included. Objects marked as difficult become crowds, which are neither trained on nor counted as missed.
    """
    trees = {split: _parse(part) for split, part in parts.items()}
    classes = sorted({
        name for tree, _ in trees["train"].values() if tree is not None
        for item in tree.iter("object") if (name := _text(item, "name"))
    })  # fmt: skip
    if not classes:
        part, read = parts["train"], trees["train"]
        first = next((f"{part.annotations[stem]} {problem}" for stem, (_, problem) in read.items() if problem), "")
        example = f", e.g. {first}" if first else ""
        raise ValueError(f"{part.images.parent}, {part.name}: none of its {len(read)} XML files has an object with a "
                         f"name{example}")  # fmt: skip
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(classes)]
    out = {}
    for split, part in parts.items():
        builder = CocoBuilder(f"{part.images.parent}, {part.name}", categories)
        _add(builder, part, trees[split], classes)
        out[split] = part.images, builder
    return out


def _parse(part: _Part) -> dict[str, tuple[ElementTree.Element | None, str]]:
    """Stem -> (root of the XML file or None, what is wrong with it or "")."""
    out: dict[str, tuple[ElementTree.Element | None, str]] = {}
    for stem, file in part.annotations.items():
        try:
            out[stem] = _root(file.read_bytes()), ""
        except FileNotFoundError:
            out[stem] = None, "does not exist, its image is left out"
        except (LookupError, ElementTree.ParseError, ValueError) as error:
            out[stem] = None, f"is no XML ({error}), its image is left out"
    return out


def _root(content: bytes) -> ElementTree.Element:
    """The root of an XML file, whose encoding may be one that Python knows and the parser does not: gb2312, shift_jis.

    Raises:
        ElementTree.ParseError, LookupError, ValueError: it is no XML, in no encoding that is known, or in another.
    """
    try:
        return ElementTree.fromstring(content)
    except (LookupError, ValueError):
        if (declared := _DECLARATION.match(content)) is None:
            raise
        return ElementTree.fromstring(content[declared.end() :].decode(declared["encoding"].decode()))


def _add(builder: CocoBuilder, part: _Part, trees: dict, classes: list[str]) -> None:
    by_stem = {path.stem: path for path in sorted(part.images.iterdir()) if path.suffix.lower() in SUFFIXES}
    wanted = []
    for stem, (tree, problem) in trees.items():
        if tree is None:
            builder.drop(problem, str(part.annotations[stem]))
        elif stem not in by_stem:
            builder.drop("has no image, left out", str(part.annotations[stem]))
        else:
            wanted.append(by_stem[stem])
    for file, record in builder.add_images(wanted, part.images):
        tree, culprit = trees[file.stem][0], str(part.annotations[file.stem])
        _check_size(builder, tree, record, culprit)
        for item in tree.iter("object"):
            _add_object(builder, record, item, classes, culprit)


def _check_size(builder: CocoBuilder, tree: ElementTree.Element, record: dict, culprit: str) -> None:
    """Boxes that fit into another size than the image's were drawn on that: the image was resized, or turned."""
    said = tuple(_number(tree.find("size"), key) or 0 for key in ("width", "height"))
    size = record["width"], record["height"]
    if min(said) <= 0 or said == size:
        return
    ends = [_number(box, key) or 0 for box in tree.iter("bndbox") for key in ("xmax", "ymax")]
    fits = all(end <= side + 1 for end, side in zip(ends, said * (len(ends) // 2)))
    if ends and fits and max(abs(one - other) for one, other in zip(said, size)) > 2:
        turned = ", sides exchanged as by an EXIF orientation" if said == size[::-1] else ""
        builder.refuse(
            f"says another size than its image has{turned}, and its boxes fit into that", culprit,
            "correct size and boxes, or, if the boxes are right in the image as it is read, take <size> out",
        )  # fmt: skip
    else:
        builder.drop("says another size than its image has: that of the image is taken", culprit)


def _add_object(builder: CocoBuilder, image: dict, item: ElementTree.Element, classes: list[str], culprit: str) -> None:
    name = _text(item, "name")
    corners = [_number(item.find("bndbox"), key) for key in ("xmin", "ymin", "xmax", "ymax")]
    if name not in classes:
        culprit = f"{culprit} ({name or 'no name'})"
        builder.drop("has an object without a class of the training split, left out", culprit)
    elif None in corners:
        builder.drop("has an object without a box, left out", culprit)
    else:
        crowd = {"iscrowd": 1} if _text(item, "difficult") == "1" else {}
        if crowd:
            builder.drop("has an object marked as difficult: kept as a crowd", culprit)
        x0, y0, x1, y1 = corners
        builder.add_object(image, (x0 - 1, y0 - 1, x1, y1), classes.index(name), culprit, **crowd)


def _text(item: ElementTree.Element, key: str) -> str:
    return (item.findtext(key) or "").strip()


def _number(item: ElementTree.Element | None, key: str) -> float | None:
    try:
        return float(_text(item, key)) if item is not None else None
    except ValueError:
        return None
