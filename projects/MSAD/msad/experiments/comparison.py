"""A comparison: variants trained with several seeds on equal terms, from shared teachers, under stated budgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from detectron2.config import CfgNode
from tqdm import tqdm

from ..config import load_config
from ..config_values import value_at
from ..distill.losses.registry import lower_keys
from ..engine.scaling import scale_to_batch
from ..engine.stages import set_total_iterations, total_iterations
from ..files import FINAL, read_json
from .costs import scale_inputs, set_equal_cost
from .data_facts import check_test_set
from .identity import check_reportable, check_same, is_finished
from .jobs import Run, Slot, error_of, run_all
from .variants import Variant, map_teachers, unique_names

TIME_TOLERANCE = 0.05  # a smaller difference in time is within what can be measured


@dataclass
class Comparison:
    """What is compared, and where the runs live: OUTPUT/seedN/NAME.

    The teachers that configs name in DISTILL.TEACHERS become variants of their own, and theirs, too; a variant that is
    such a file serves as the teacher.

    Attributes:
        variants: by name.
        output: folder of the results.
        opts: KEY VALUE overrides of every run.
        seeds: every variant runs once with each; a student learns from the teacher of its own seed.
        iterations: of every variant that is no teacher of others only, the schedule scaled alike; None: as configs say.
        teacher_iterations: the same of every such teacher.
        teacher_weights: checkpoint that takes the place of training teachers; "{seed}" in it becomes the seed.
        reference: variant to which differences refer; "" for none.
        input_scale: factor on all input sizes.
    """

    variants: dict[str, Variant]
    output: Path
    opts: list = field(default_factory=list)
    seeds: tuple[int, ...] = (0,)
    iterations: int | None = None
    teacher_iterations: int | None = None
    teacher_weights: str = ""
    reference: str = ""
    input_scale: float = 1.0

    def __post_init__(self) -> None:
        self._loaded: dict[tuple, CfgNode] = {}
        if self.reference and self.reference not in self.variants:
            raise ValueError(f"--reference {self.reference} is none of the variants {', '.join(self.variants)}")
        if self.teacher_weights and any(v.count_teachers for v in self.variants.values()):
            raise ValueError("--count-teachers: what the teacher of --teacher-weights took to train is not known")
        self.variants = dict(self.variants)
        own = {v.file.resolve(): n for n, v in self.variants.items() if not (v.overrides or v.budget)}
        found: dict[Path, None] = {}
        if not self.teacher_weights:
            for variant in self.variants.values():
                self._find_teachers(variant.file, variant.overrides, found, ())
        for name, file in unique_names([file for file in found if file not in own]).items():
            name = f"{file.parent.name}_{name}" if name in self.variants else name
            self.variants[name] = Variant(file, title="teacher", teacher=True)
            own[file] = name
        self._name_of = own

    def _find_teachers(self, file: Path, overrides: Sequence, found: dict[Path, None], path: tuple[Path, ...]) -> None:
        for teacher in self._teacher_files(self._load(file, overrides)):
            if teacher in path:
                raise ValueError(f"DISTILL.TEACHERS: {teacher} is its own teacher")
            found[teacher] = None
            self._find_teachers(teacher, (), found, (*path, teacher))

    def _load(self, file: Path, overrides: Sequence = ()) -> CfgNode:
        key = file, repr(overrides)
        if key not in self._loaded:
            cfg = load_config(file, [*self.opts, *overrides])
            check_test_set(cfg, file)
            self._loaded[key] = scale_to_batch(cfg)
        return self._loaded[key].clone()

    def _teacher_files(self, cfg: CfgNode) -> list[Path]:
        return list(dict.fromkeys(Path(entry["CONFIG"]).resolve() for entry in map_teachers(cfg)))

    def teachers(self, name: str) -> list[str]:
        """The variants that ``name`` learns from directly."""
        if self.teacher_weights:
            return []
        variant = self.variants[name]
        return [self._name_of[file] for file in self._teacher_files(self._load(variant.file, variant.overrides))]

    def all_teachers(self, name: str) -> list[str]:
        """The variants that ``name`` learns from, and those that these learn from."""
        out: list[str] = []
        for teacher in self.teachers(name):
            out += [*self.all_teachers(teacher), teacher]
        return list(dict.fromkeys(out))

    # --- a plan for run_all -------------------------------------------------------------------------------------------

    def folder(self, run: Run) -> Path:
        return self.output / f"seed{run.seed}" / run.name

    def weights(self, run: Run) -> Path:
        return self.folder(run) / FINAL

    def needs(self, run: Run) -> list[Run]:
        variant, names = self.variants[run.name], self.teachers(run.name)
        if variant.budget == "equal_time":
            names = [*names, variant.base, variant.reference]
            if variant.count_teachers:
                names += [*self.all_teachers(variant.base), *self.all_teachers(variant.reference)]
        return [Run(name, run.seed) for name in dict.fromkeys(names)]

    def prepare(self, run: Run) -> bool:
        if self._stands_for(run) != run:  # its time is that of the run without a budget
            (self.folder(run) / "failed.txt").unlink(missing_ok=True)
            return False
        return not is_finished(self.config(run), tqdm.write, timed=self.variants[run.name].budget == "equal_time")

    def config(self, run: Run) -> CfgNode:
        """The frozen config of a run; one of equal time needs finished runs, see :meth:`needs`.

        Raises:
            ValueError: what is swept is something that the comparison itself sets, as the length of the training.
        """
        variant = self.variants[run.name]
        cfg = self._load(variant.file, variant.overrides)
        cfg.merge_from_list(["SEED", run.seed, "OUTPUT_DIR", str(self.folder(run))])
        wanted = self.teacher_iterations if variant.teacher else self.iterations
        if variant.budget == "equal_iterations":
            wanted = self._iterations(run.name)
        elif variant.budget == "equal_time":
            wanted = self._kept_iterations(run, self.iterations_in_time(run))
        set_total_iterations(cfg, wanted, keep=[*self.opts[::2], *variant.overrides[::2]])
        scale_inputs(cfg, self.input_scale)
        if variant.budget == "equal_cost":
            set_equal_cost(cfg, self.config(Run(variant.reference, run.seed)))
        map_teachers(cfg, lambda entry: self._trained(entry, run.seed))
        if variant.swept and not variant.budget:
            key = variant.swept[1]
            before, now = (value_at(c, key) for c in (self._load(variant.file, variant.overrides), cfg))
            if before != now:
                raise ValueError(f"--sweep {key}: the comparison itself sets it, to {now} in place of {before}")
        cfg.freeze()
        return cfg

    def _trained(self, entry: dict, seed: int) -> dict:
        if self.teacher_weights:
            return dict(entry, WEIGHTS=self.teacher_weights.replace("{seed}", str(seed)))
        run = Run(self._name_of[Path(entry["CONFIG"]).resolve()], seed)
        return dict(entry, CONFIG=str(self.folder(run) / "config.yaml"), WEIGHTS=str(self.weights(run)))

    # --- budgets ------------------------------------------------------------------------------------------------------

    def _iterations(self, name: str) -> int:
        """Those of a variant; of equal time, those of the variant without a budget."""
        variant = self.variants[name]
        if variant.budget == "equal_iterations":
            return sum(self._iterations(n) for n in [*self.all_teachers(variant.reference), variant.reference])
        fixed = self.teacher_iterations if variant.teacher else self.iterations
        return fixed or total_iterations(self._load(variant.file, variant.overrides))

    def _step_seconds(self, run: Run) -> float:
        """What a step took in training: of the processors' time, on a GPU of the clock's."""
        result, variant = self.result(run), self.variants[run.name]
        if result is None or not result["steps"]:
            raise ValueError(f"the time that {run} took is not known")
        on_cpu = self._load(variant.file, variant.overrides).MODEL.DEVICE == "cpu"
        return result["cpu_seconds" if on_cpu else "seconds"] / result["steps"]

    def iterations_in_time(self, run: Run) -> int:
        """How many iterations of a run of equal time take the time of its reference, measured with the same seed.

        Raises:
            ValueError: its teachers alone take longer, or a run that it needs is not finished.
        """
        variant = self.variants[run.name]

        def seconds(names: Sequence[str]) -> float:
            return sum(self._iterations(n) * self._step_seconds(Run(n, run.seed)) for n in names)

        counted = self.all_teachers if variant.count_teachers else lambda name: []
        left = seconds([*counted(variant.reference), variant.reference]) - seconds(counted(variant.base))
        if left <= 0:
            raise ValueError(f"{run}: the teachers of {variant.base} take longer than {variant.reference} with its own")
        return max(1, round(left / self._step_seconds(Run(variant.base, run.seed))))

    def _kept_iterations(self, run: Run, wanted: int) -> int:
        """Those of an earlier attempt if they are the same within what can be measured."""
        earlier = self.folder(run) / "config.yaml"
        kept = total_iterations(load_config(earlier)) if earlier.is_file() else wanted
        return kept if abs(kept / wanted - 1) <= TIME_TOLERANCE else wanted

    def _stands_for(self, run: Run) -> Run:
        """The run without a budget, where a run of equal time would be the same within what can be measured."""
        variant = self.variants[run.name]
        if variant.budget != "equal_time":
            return run
        same = abs(self.iterations_in_time(run) / self._iterations(variant.base) - 1) <= TIME_TOLERANCE
        return Run(variant.base, run.seed) if same else run

    def _source(self, run: Run) -> Run | None:
        """The run whose results are those of ``run``, or None; of equal time only after the runs that it needs."""
        timed = self.variants[run.name].budget == "equal_time"
        if error_of(self.folder(run)) is not None or (timed and not all(map(self.result, self.needs(run)))):
            return None
        source = self._stands_for(run)
        return source if self.result(source) is not None else None

    # --- results ------------------------------------------------------------------------------------------------------

    def runs(self) -> list[Run]:
        """All runs, seed by seed: what learns from others, after these, then what has most iterations."""
        out: dict[Run, None] = {}

        def add(run: Run) -> None:
            for need in self.needs(run):
                add(need)
            out[run] = None

        for seed in self.seeds:
            for name in sorted(self.variants, key=lambda name: (not self.teachers(name), -self._iterations(name))):
                add(Run(name, seed))
        return list(out)

    def run(self, slots: Sequence[Slot], say: Callable[[str], None] = tqdm.write) -> list[Run]:
        """Run all that is not finished, see :func:`msad.experiments.jobs.run_all`; returns the runs that failed.

        Raises:
            KeyError, ValueError: see :meth:`check`; before anything runs.
        """
        self.check()
        return run_all(self, self.runs(), slots, say)

    def check(self, report_only: bool = False) -> None:
        """KeyError or ValueError if a config is wrong, or a folder holds a run of another one.

        Runs of equal time, whose config follows from finished ones, are checked with those without a budget.

        Args:
            report_only: nothing will be trained: results of other data, weights or measured times are errors, too.
        """
        for run in self.runs():
            timed = self.variants[run.name].budget == "equal_time"
            if report_only and self._source(run) == run:
                check_reportable(self.config(run), timed)
            elif not timed:
                check_same(self.config(run))

    def result(self, run: Run) -> dict | None:
        """What the finished run left, see :func:`msad.experiments.run.train_and_evaluate`, or None."""
        return read_json(self.folder(run) / "result.json")

    def finished(self) -> list[str]:
        """Variants that are finished with every seed and have a model of their own."""
        return [n for n in self.variants if all(self._source(Run(n, seed)) == Run(n, seed) for seed in self.seeds)]

    def models(self) -> dict[str, tuple[CfgNode, Path]]:
        """name -> config and weights, with the first seed, of the variants that :meth:`finished` names."""
        runs = {name: Run(name, self.seeds[0]) for name in self.finished()}
        return {name: (self.config(run), self.weights(run)) for name, run in runs.items()}

    def collect(self) -> dict:
        """All that is known, as plain data for :mod:`msad.experiments.rows`.

        {"seeds", "reference", "variants": {name: {"file", "title", "description", "teacher", "teachers",
        "swept", "losses": [entry of DISTILL.LOSSES]}}, "runs": [{"variant", "seed", "iterations", "warmup", "seconds",
        "cpu_seconds", "steps", "results": {name: {task: {metric: value}}}} or {"variant", "seed", "error"}]}. A run of
        equal time that would be the same as the one without a budget has that one's numbers, and its name as "same_as".
        """
        runs = []
        for run in self.runs():
            entry = {"variant": run.name, "seed": run.seed}
            error, source = error_of(self.folder(run)), self._source(run)
            if error is not None:
                runs.append({**entry, "error": error})
            elif source is not None:
                result = self.result(source)
                renamed = {n.replace(source.name, run.name, 1): r for n, r in result["results"].items()}
                same = {"same_as": source.name} if source != run else {}
                runs.append({**entry, **result, "results": renamed, **same})
        described = {}
        for name, v in self.variants.items():
            losses = self._load(v.file, v.overrides).DISTILL.LOSSES
            described[name] = {
                "file": str(v.file), "title": v.title, "description": v.description, "teacher": v.teacher,
                "budget": v.budget, "swept": v.swept and list(v.swept), "losses": [lower_keys(e) for e in losses],
                "teachers": self.teachers(name),
            }  # fmt: skip
        return {"seeds": list(self.seeds), "reference": self.reference, "variants": described, "runs": runs}
