"""Every order of the teachers of a pool: a student distilled by each, and how the rules' suggestions rank among them.

Tables 2 and 6 to 8 of "Learning Lightweight Object Detectors via Progressive Knowledge Distillation". Orders that begin
alike share these stages, so that four teachers take 64 stages and not 196.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from detectron2.config import CfgNode
from tqdm import tqdm

from ..config import load_config
from ..data.register import register_datasets
from ..distill.progressive.order import RULES, all_orders, rank, suggest
from ..engine.build import teacher_entries
from ..evaluation.coco_stats import is_number
from ..files import FINAL, read_json, write_json
from .adaptation import (
    STUDENT,
    check_levels,
    cost_record,
    finite_costs,
    measure_adaptation,
    pairing_of,
    student_scale,
)
from .comparison import Comparison
from .data_facts import check_test_set
from .identity import check_reportable, check_same, is_finished
from .jobs import Run
from .rows import AP
from .variants import Variant

Order = tuple[str, ...]
SEPARATOR = "-"


@dataclass
class OrderStudy:
    """The stages of all orders with every seed, as a plan for :func:`msad.experiments.jobs.run_all`.

    A stage is a run in OUTPUT/seedN/orders/TEACHER-TEACHER-..., which starts from the student of the order without its
    last teacher; a first stage starts from the off-the-shelf student.

    Attributes:
        config: yaml of a stage: the student, its losses and schedule, and the pool in DISTILL.TEACHERS.
        networks: the off-the-shelf student, called "student", and the teachers by name, each with every seed.
        output: folder of the results.
        longest: most teachers of an order.
        opts: KEY VALUE overrides of every run.
    """

    config: Path
    networks: Comparison
    output: Path
    longest: int
    opts: list

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.networks.seeds

    @property
    def teachers(self) -> list[str]:
        """Names of the pool, without teachers of theirs."""
        return [name for name, variant in self.networks.variants.items() if name != STUDENT and not variant.teacher]

    @property
    def orders(self) -> list[Order]:
        """All of them; a beginning comes before what it is the beginning of."""
        return all_orders(self.teachers, self.longest)

    def runs(self) -> list[Run]:
        return [Run(SEPARATOR.join(order), seed) for seed in self.seeds for order in self.orders]

    def folder(self, run: Run) -> Path:
        return self.output / f"seed{run.seed}" / "orders" / run.name

    def needs(self, run: Run) -> list[Run]:
        before, separator, _ = run.name.rpartition(SEPARATOR)
        return [Run(before, run.seed)] if separator else []

    def check(self, report_only: bool = False) -> None:
        """As :meth:`msad.experiments.comparison.Comparison.check`, of the networks and all orders."""
        self.networks.check(report_only)
        if not report_only:
            self._check_levels()
        for run in self.runs():
            finished = (self.folder(run) / "result.json").is_file()
            (check_reportable if report_only and finished else check_same)(self.stage(run))

    def _check_levels(self) -> None:
        """Costs come after training the networks; what cannot be compared then is refused before."""
        cfg = load_config(self.config, self.opts)
        scales = {entry["NAME"]: float(entry.get("SCALE", 1.0)) for entry in teacher_entries(cfg)}
        scales[STUDENT] = student_scale(cfg)
        networks = {name: (self.networks.config(Run(name, self.seeds[0])), scale) for name, scale in scales.items()}
        check_levels(networks, pairing_of(cfg))

    def prepare(self, run: Run) -> bool:
        return not is_finished(self.stage(run), tqdm.write)

    def stage(self, run: Run) -> CfgNode:
        """The frozen config of an order's last stage."""
        cfg = self.curriculum(run.seed)
        before = self.needs(run)
        start = self.folder(before[0]) / FINAL if before else self.networks.weights(Run(STUDENT, run.seed))
        last = run.name.rpartition(SEPARATOR)[2]
        cfg.DISTILL.TEACHERS = [entry for entry in cfg.DISTILL.TEACHERS if entry["NAME"] == last]
        cfg.DISTILL.INIT_STUDENT = "none"
        cfg.MODEL.WEIGHTS = str(start)
        cfg.OUTPUT_DIR = str(self.folder(run))
        cfg.freeze()
        return cfg

    def curriculum(self, seed: int) -> CfgNode:
        """The config with the trained teachers of a seed."""
        cfg = load_config(self.config, [*self.opts, "SEED", str(seed)])
        cfg.DISTILL.TEACHERS = [
            dict(entry, CONFIG=str(self.networks.folder(run) / "config.yaml"), WEIGHTS=str(self.networks.weights(run)))
            for entry in teacher_entries(cfg)
            for run in [Run(entry["NAME"], seed)]
        ]
        return cfg

    # --- results ------------------------------------------------------------------------------------------------------

    def adaptation(self, seed: int, quality: dict[str, float]) -> dict:
        """The "costs" and "normalized_costs" between the networks of a seed, noted for tools/order_teachers.py."""
        folder, cfg = self.output / f"seed{seed}" / "adaptation", self.curriculum(seed)
        register_datasets(cfg)
        teachers = [dict(entry) for entry in cfg.DISTILL.TEACHERS]
        weights = str(self.networks.weights(Run(STUDENT, seed)))
        found, _ = measure_adaptation(cfg, weights, teachers, folder)
        costs = finite_costs(found)
        about = cost_record(self.config, weights, teachers, [*self.opts, "SEED", str(seed)], quality, costs)
        write_json(folder / "costs.json", about)
        return costs

    def collect(self, metric: str = AP) -> dict:
        """All that is known: {"teachers", "metric", "seeds": {seed: {"student", "quality", "costs",
        "normalized_costs", "orders": [[order, AP]], "rules": entries of :func:`rank_rules`}}}.

        Seeds whose networks are not trained are left out; ranks are given where all orders have a result.
        """
        seeds = {}
        for seed in self.seeds:
            quality = {n: _value(self.networks.result(Run(n, seed)), metric) for n in (STUDENT, *self.teachers)}
            if None in quality.values():
                continue
            student = quality.pop(STUDENT)
            costs = self.adaptation(seed, quality)
            found = {o: _value(read_json(self.folder(Run(SEPARATOR.join(o), seed)) / "result.json"), metric)
                     for o in self.orders}  # fmt: skip
            known = {order: value for order, value in found.items() if value is not None}
            seeds[str(seed)] = {
                "student": student, "quality": quality, **costs, "orders": [[list(o), v] for o, v in known.items()],
                "rules": rank_rules(costs["costs"], quality, known, self.longest),
            }  # fmt: skip
        return {"teachers": self.teachers, "metric": metric, "seeds": seeds}


def order_study(
    config: Path, student: Path, output: Path, seeds: Sequence[int], longest: int | None = None, opts: Sequence = ()
) -> OrderStudy:
    """The study of the teachers that ``config`` names.

    Args:
        student: yaml of the off-the-shelf student.
        longest: most teachers of an order; None: all.

    Raises:
        ValueError: fewer than two teachers, a mean of teachers, a name that cannot be part of a folder's, or not one
            test set.
    """
    cfg = load_config(config, list(opts))
    check_test_set(cfg, config)
    entries = teacher_entries(cfg)
    for entry in entries:
        if "MEAN_OF" in entry:
            raise ValueError(f"{config}: {entry['NAME']} is a mean of teachers, which cannot be put in order")
        if SEPARATOR in entry["NAME"] or entry["NAME"] == STUDENT:
            raise ValueError(f"{config}: the teacher's name {entry['NAME']!r} cannot be used here; choose another one")
    if len(entries) < 2:
        raise ValueError(f"{config}: orders need two teachers or more in DISTILL.TEACHERS, there are {len(entries)}")
    variants = {STUDENT: Variant(student)}
    variants |= {entry["NAME"]: Variant(Path(entry["CONFIG"]).resolve()) for entry in entries}
    networks = Comparison(variants, output, list(opts), tuple(dict.fromkeys(seeds)))
    return OrderStudy(config, networks, output, min(longest or len(entries), len(entries)), list(opts))


def _value(result: dict | None, metric: str) -> float | None:
    """TASK/METRIC of a run's result: of a multi-resolution teacher that of its fused features, which students see."""
    task, name = metric.split("/", 1)
    found = {k: v[task][name] for k, v in (result or {}).get("results", {}).items() if name in (v.get(task) or {})}
    chosen = [value for key, value in found.items() if len(found) == 1 or key.endswith("_fused")]
    return (chosen[0] if is_number(chosen[0]) else 0.0) if chosen else None  # no number: it detects nothing


def rank_rules(costs: dict, quality: dict, results: dict[Order, float], longest: int) -> list[dict]:
    """What each rule suggests for 1 to ``longest`` teachers and how good it is: {"k", "rule", "order", "value", "rank",
    "of"}, the rank among all orders of at most k teachers, None while one of these has no result.
    """
    entries = []
    for k in range(1, longest + 1):
        pool = all_orders(list(quality), k)
        for rule in RULES:
            order = tuple(suggest(rule, costs, STUDENT, quality, k))
            place = rank(order, results, k)[0] if all(o in results for o in pool) else None
            value = results.get(order)
            entries.append({"k": k, "rule": rule, "order": list(order), "value": value, "rank": place, "of": len(pool)})
    return entries


def mean_ranks(data: dict) -> list[list]:
    """A row for each k and rule of :meth:`OrderStudy.collect`: k, rule, mean rank and mean value over the seeds that
    have all orders, number of orders, and the orders themselves.
    """
    rows = []
    first = next(iter(data["seeds"].values()), {"rules": []})
    for i, entry in enumerate(first["rules"]):
        found = [seed["rules"][i] for seed in data["seeds"].values() if seed["rules"][i]["rank"] is not None]
        if found:
            orders = dict.fromkeys(" -> ".join(e["order"]) for e in found)
            values = fmean(e["rank"] for e in found), fmean(e["value"] for e in found)
            rows.append([entry["k"], entry["rule"], *values, entry["of"], "; ".join(orders)])
    return rows
