"""Adaptation costs between a trained student and its teachers, measured on their data, with resume."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from tqdm import tqdm

from ..config import find_config, load_config
from ..config_values import copy_with
from ..data.cache import checkpoint_id
from ..data.fixed import FixedInputs
from ..distill.losses.registry import compares_necks, lower_keys
from ..distill.progressive.cost import AdaptationCosts, Maps, common_levels, image_maps
from ..distill.progressive.least_squares import SGDOptions
from ..distill.teachers import FrozenTeacher
from ..engine.build import load_teacher
from ..engine.provenance import fingerprint
from ..engine.setup import load_model
from ..files import atomic_write, local_file
from ..resolution import get_resolution

STUDENT = "student"
SAVE_SECONDS = 60


def student_scale(cfg: CfgNode) -> float:
    """Size of the student's input relative to H."""
    return 0.5 ** get_resolution(cfg.DISTILL.STUDENT_RESOLUTION).shift


def networks_of(cfg: CfgNode, weights: str, entries: list[dict]) -> list[FrozenTeacher]:
    """The student at its resolution and its teachers at their scales, all frozen."""
    student = FrozenTeacher(
        load_model(cfg, weights), name=STUDENT, scale=student_scale(cfg), downsample_mode=cfg.MSAD.DOWNSAMPLE
    )
    return [student, *(load_teacher(entry, cfg) for entry in entries)]


def pairing_of(cfg: CfgNode) -> str:
    """How adaptation costs pair levels: "by_index" if all of DISTILL.LOSSES between pyramids do, else "by_stride"."""
    between = filter(compares_necks, map(lower_keys, cfg.DISTILL.LOSSES))
    return "by_index" if {entry.get("match") for entry in between} == {"by_index"} else "by_stride"


def check_levels(networks: Mapping[str, tuple[CfgNode, float]], pairing: str) -> None:
    """Build networks, by name, with the size of their input relative to H, and look whether they can be compared.

    Raises:
        ValueError: two have no levels in common, or one has none.
    """
    sources = []
    for name, (cfg, scale) in networks.items():
        cfg = copy_with(cfg, {"MODEL.DEVICE": "cpu"})
        with torch.random.fork_rng(devices=[]):
            shapes = FrozenTeacher(build_model(cfg), name=name, scale=scale).shapes()
        sources.append(SimpleNamespace(name=name, shapes=lambda shapes=shapes: shapes))
    for pair in itertools.permutations(sources, 2):
        common_levels(*pair, pairing)


class Progress:
    """Sums and the number of images in them, kept in a file from which the same measurement goes on."""

    def __init__(self, file: Path, of: str, study: AdaptationCosts) -> None:
        self._file, self._of, self._study = file, of, study
        self.done = {"train": 0, "val": 0}
        self._saved, self._is_whole = time.monotonic(), True
        if file.is_file():
            kept = torch.load(file, map_location="cpu", weights_only=True)
            if kept["of"] == of:
                self.done = kept["done"]
                study.load_state_dict(kept["study"])

    def add(self, split: str, maps: Mapping[str, Maps]) -> None:
        """:meth:`AdaptationCosts.add`; after an interruption within, in some of the sums only, nothing is saved."""
        self._is_whole = False
        self._study.add(split, maps)
        self.done[split] += 1
        self._is_whole = True
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        if not self._is_whole:
            return
        with atomic_write(self._file) as stream:
            torch.save({"of": self._of, "done": self.done, "study": self._study.state_dict()}, stream)
        self._saved = time.monotonic()


def measure_adaptation(
    cfg: CfgNode,
    weights: str,
    entries: list[dict],
    output: Path,
    *,
    images: int | None = None,
    pairing: str = "",
    ridge: float = 1e-6,
    sgd: SGDOptions | None = None,
    seed: int = 0,
) -> tuple[dict, dict[str, int]]:
    """Fit linear maps between all networks on DATASETS.TRAIN and judge them on DATASETS.TEST, both registered.

    Args:
        weights: checkpoint of the student that ``cfg`` describes.
        entries: teachers, of :func:`msad.engine.build.teacher_entries`, without means.
        output: folder in which progress is kept.
        images: of each data set, drawn at random; None: all.
        pairing, ridge, sgd: see :class:`AdaptationCosts` and its ``result``; no pairing: that of :func:`pairing_of`.
        seed: of the drawn images and of the maps that SGD begins with.

    Returns:
        costs as :meth:`AdaptationCosts.result` gives them, the student being called "student", and the number of
        images of each split.

    Raises:
        ValueError: a data set has LOW_RES_IMAGES: all networks are measured on views of the same H images.
    """
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        if "LOW_RES_IMAGES" in (MetadataCatalog.get(name).get("definition") or {}):
            raise ValueError(f"adaptation costs are measured on images made from H, but {name} has LOW_RES_IMAGES")
    pairing = pairing or pairing_of(cfg)
    options = [images, pairing, sgd is not None and sgd.lr, seed]
    used = [[entry, checkpoint_id(entry["WEIGHTS"]), load_config(entry["CONFIG"]).dump()] for entry in entries]
    networks = networks_of(cfg, weights, entries)
    study = AdaptationCosts(networks, pairing, sgd=sgd, seed=seed)
    output.mkdir(parents=True, exist_ok=True)
    progress = Progress(output / "progress.pt", fingerprint(cfg, weights, used, options), study)
    size = {"short_side": max(cfg.INPUT.MIN_SIZE_TRAIN), "longest": cfg.INPUT.MAX_SIZE_TRAIN, "seed": seed}
    inputs = {
        split: [FixedInputs(cfg, name, images, **size) for name in names]
        for split, names in (("train", cfg.DATASETS.TRAIN), ("val", cfg.DATASETS.TEST))
    }
    total = {split: sum(map(len, parts)) for split, parts in inputs.items()}
    try:
        with tqdm(total=sum(total.values()), initial=sum(progress.done.values()), unit="img", disable=None) as bar:
            for split, parts in inputs.items():
                for item in _from(parts, progress.done[split]):
                    progress.add(split, {network.name: image_maps(network, item) for network in networks})
                    bar.update()
    finally:
        progress.save()
    return study.result(ridge), total


def _from(parts: list[FixedInputs], start: int) -> Iterator[dict]:
    """Inputs of all parts from position ``start`` on; those before are not read."""
    places = [(part, index) for part in parts for index in range(len(part))]
    return (part[index] for part, index in itertools.islice(places, start, None))


def finite_costs(found: dict) -> dict[str, dict[str, dict[str, float]]]:
    """"costs" and "normalized_costs" of :meth:`AdaptationCosts.result`, without those that are not finite."""
    return {
        key: {a: {b: value for b, value in row.items() if math.isfinite(value)} for a, row in found[key].items()}
        for key in ("costs", "normalized_costs")
    }


def cost_record(
    config: str | os.PathLike, weights: str, entries: list[dict], opts: Sequence, quality: dict, costs: dict
) -> dict:
    """What a costs.json says for tools/order_teachers.py, which makes a curriculum of it from any folder.

    Args:
        config, weights: yaml and checkpoint of the student.
        entries: its teachers, as :func:`measure_adaptation` takes them.
        opts: KEY, VALUE, ... overrides of the yaml, with which the costs were measured.
        quality: performance of each teacher, empty if not known.
        costs: of :func:`finite_costs`.
    """

    def absolute(path: str) -> str:
        return os.path.abspath(path) if os.path.isfile(local_file(path)) else path

    teachers = [
        {key: absolute(value) if key in ("CONFIG", "WEIGHTS") else value for key, value in entry.items()}
        for entry in entries
    ]
    return {
        "student": STUDENT, "config": os.path.abspath(find_config(config)), "weights": absolute(weights),
        "opts": list(opts), "teachers": teachers, "quality": quality, **costs,
    }  # fmt: skip
