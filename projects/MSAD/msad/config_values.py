"""What stands in yaml files and overrides: checks that name file, key or entry, and values read as they are meant."""

from __future__ import annotations

import ast
import difflib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from typing import Any

import yaml
from detectron2.config import CfgNode

# Lists of entries, the keys of which each entry needs one, and an example.
ENTRIES = {
    "DISTILL.LOSSES": (("NAME",), "{NAME: AlignedL1, WEIGHT: 0.6}"),
    "DISTILL.TEACHERS": (("CONFIG", "MEAN_OF"), "{CONFIG: teacher.yaml, WEIGHTS: teacher.pth}"),
    "DISTILL.ASSISTANTS": (("NAME",), "{NAME: CrossScaleAssistant}"),
    "MSAD.FUSION_STUDENT.BRANCHES": (("RESOLUTION",), "{RESOLUTION: L, WEIGHTS: branch.pth}"),
}


def nearest(name: str, valid: list[str]) -> str:
    """A hint for error messages: '; did you mean X?' if something in ``valid`` is close, otherwise ''."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def plain(value: Any) -> Any:
    """Nested mappings and sequences as the dicts and lists that yaml makes of them."""
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def valid_keys(cfg: CfgNode, prefix: str = "") -> list[str]:
    """All keys of a config with dots between their parts, sections included."""
    keys = []
    for key, value in cfg.items():
        keys.append(prefix + key)
        if isinstance(value, CfgNode):
            keys += valid_keys(value, f"{prefix}{key}.")
    return keys


def value_at(tree: Any, key: str) -> Any:
    """The value at a key, which may have positions in lists (DISTILL.LOSSES.0.WEIGHT)."""
    return reduce(lambda node, part: node[int(part) if isinstance(node, (list, tuple)) else part], key.split("."), tree)


def set_value(cfg: CfgNode, key: str, value: Any) -> None:
    """Set a key with dots between its parts, in place."""
    sections, _, name = key.rpartition(".")
    (value_at(cfg, sections) if sections else cfg)[name] = value


def copy_with(cfg: CfgNode, values: Mapping[str, Any]) -> CfgNode:
    """A copy with other values of some keys, which have dots between their parts; frozen if ``cfg`` is."""
    copy = cfg.clone()
    copy.defrost()
    for key, value in values.items():
        set_value(copy, key, value)
    if cfg.is_frozen():
        copy.freeze()
    return copy


def read_trees(file: str) -> Iterator[tuple[str, Mapping]]:
    """(file, content) of a config file and of those that it is based on, these first.

    Files that are no local ones, and those with tags that run code, which the engine may accept, are passed over.

    Raises:
        ValueError: one is no yaml file or no mapping; names it.
        FileNotFoundError: a file that it is based on does not exist.
    """
    if "://" in file:
        return
    with open(file, encoding="utf-8-sig") as stream:
        try:
            tree = yaml.safe_load(stream)
        except yaml.constructor.ConstructorError:
            return
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is not valid yaml: {' '.join(str(error).split())}") from None
    if tree is None:
        raise ValueError(f"{file} is empty")
    if not isinstance(tree, Mapping):
        raise ValueError(f"{file} is not a config: it holds {_brief(tree)} and no KEY: value")
    bases = tree.get("_BASE_", ())
    for base in [bases] if isinstance(bases, str) else bases:
        path = os.path.join(os.path.dirname(file), os.path.expanduser(base))
        if "://" not in base and not os.path.isfile(path):
            raise FileNotFoundError(f"{file}: _BASE_: no file {path}")
        yield from read_trees(path)
    yield file, tree


def check_sections(file: str, tree: Mapping, cfg: CfgNode) -> None:
    """ValueError that names file and key where ``tree`` has a value for a section of ``cfg``."""
    for name, value in _not_sections(tree, cfg, ""):
        raise ValueError(f"{file}: {name} is a section of keys, not {_brief(value)}")


def imports_of(trees: Iterable[tuple[str, Mapping]]) -> list[str]:
    """The modules that files name in MSAD.IMPORTS, each once; ValueError that names the file if it is no such list."""
    found: dict[str, None] = {}
    for file, tree in trees:
        section = tree.get("MSAD")
        names = section.get("IMPORTS", []) if isinstance(section, Mapping) else []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{file}: MSAD.IMPORTS is a list of modules, such as [mynet], not {_brief(names)}")
        found.update(dict.fromkeys(names))
    return list(found)


def _not_sections(tree: Mapping, cfg: CfgNode, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(cfg.get(key), CfgNode):
            if isinstance(value, Mapping):
                yield from _not_sections(value, cfg[key], f"{prefix}{key}.")
            else:
                yield prefix + key, value


def _brief(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def decode(text: Any, current: Any) -> Any:
    """The value that an override means, where ``current`` is that of its key.

    Texts stay texts where the key holds one. Everything else may be written as in Python or as in yaml
    (``[{NAME: CWD}]``, ``true``); whole numbers serve where the key holds a float, and 1e4 where it holds an integer.
    """
    if not isinstance(text, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None if isinstance(current, str) else _from_yaml(text)
    if isinstance(current, str):
        return value if isinstance(value, str) else text
    if type(current) is float and type(value) is int:
        return float(value)
    if type(current) is int and type(value) is float and value.is_integer():
        return int(value)
    return value


def _from_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def check_entries(cfg: CfgNode) -> None:
    """Whether the entries of the lists in ``ENTRIES`` are mappings with what each of them needs.

    Their keys may have either case, and are in upper case afterwards.

    Raises:
        ValueError: names the entry.
    """
    for name, (keys, example) in ENTRIES.items():
        entries = []
        for position, entry in enumerate(value_at(cfg, name)):
            where = f"{name}[{position}] ({_brief(entry)})"
            if not isinstance(entry, Mapping):
                raise ValueError(f"{where}: an entry is a mapping with {keys[0]}, such as {example}")
            found = {str(k).upper(): v for k, v in entry.items()}
            if not any(found.get(key) for key in keys) or not isinstance(found.get(keys[0], ""), str):
                raise ValueError(f"{where}: an entry needs {keys[0]}, a text, such as {example}")
            if name == "DISTILL.LOSSES":
                _check_loss(where, found)
            entries.append(found)
        set_value(cfg, name, entries)


def _check_loss(where: str, entry: dict[str, Any]) -> None:
    levels = entry.get("LEVELS")
    if levels is not None and not (isinstance(levels, (list, tuple)) and all(isinstance(x, str) for x in levels)):
        raise ValueError(f"{where}: LEVELS is a list of levels, such as [p3, p4], not {levels!r}")
    if "WEIGHT" not in entry:
        return
    try:
        weight = float(entry["WEIGHT"])  # yaml reads 1e-3 as a text
    except (TypeError, ValueError):
        weight = math.nan
    if isinstance(entry["WEIGHT"], bool) or not 0 <= weight < math.inf:
        raise ValueError(f"{where}: WEIGHT is a number of at least 0, not {entry['WEIGHT']!r}")
