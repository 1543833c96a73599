"""From a folder of data to a student that ships, in steps that go on where they were."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from .. import __version__
from ..config import load_config
from ..data.checks import check_data
from ..data.layouts import entries_of, find_splits, read_contents
from ..data.register import registered
from ..data.tally import raise_errors
from ..engine.provenance import fingerprint, machine
from ..engine.setup import engine_name, evaluate, load_model
from ..experiments.comparison import Comparison
from ..experiments.costs import measure_costs
from ..experiments.jobs import Run, device_opts, error_of, make_slots
from ..experiments.pictures import describe_data, draw_panels
from ..experiments.report import write_report
from ..experiments.run import log_to
from ..experiments.variants import Variant, equal_cost
from ..export import export
from ..export.onnx import export_onnx
from ..finding import WARNING
from .advice import describe, measure_objects, recommend
from .backbones import choose_backbone
from .card import model_card, read_licences
from .plan import STEPS, Plan, measured_once
from .recipe import BASELINE, STUDENT, TEACHER, Choices, make_configs, write_configs
from .steps import kept

FINAL = "model_final.pth"
PANELS = {TEACHER: "teacher (H + L)", BASELINE: "full resolution", "baseline_L": "conventional, L"}


class Result(NamedTuple):
    """What a distillation leaves.

    Attributes:
        config, weights: the student for detectron2, see docs/USING.md.
        onnx, runner: the student without torch, see docs/SHIPPING.md; None if it could not be written.
        card: README.md of the student, with data, accuracy, cost and licences.
        report: report.html.
        metrics: {model: {task: {metric: value}}}; the student is the first.
        cost: {model: {"input", "parameters", "gmacs", "ms"}}, see :func:`msad.experiments.costs.measure_costs`.
    """

    config: Path
    weights: Path
    onnx: Path | None
    runner: Path | None
    card: Path
    report: Path
    metrics: dict[str, dict[str, dict[str, float]]]
    cost: dict[str, dict[str, Any]]


class Project:
    """The configs and the comparison of one call; raises what is wrong with data and choices before anything runs."""

    def __init__(self, data: Path, output: Path, choices: Choices, seed: int, devices: Sequence[str]) -> None:
        choices.check()
        if output.resolve() in (data.resolve(), *data.resolve().parents):
            raise ValueError(f"--output {output} would write into the data: choose another folder")
        self.output, self.choices, self.seed = output, choices, seed
        self.student = f"student_{choices.resolution}"
        splits = find_splits(data, output / "data")
        self.changes = [str(finding) for split in splits.values() for finding in split.changes]
        # No data set of the engine's own is called so, whatever the folder's name is.
        self.entries = entries_of(splits, f"data_{data.resolve().stem}")
        content = read_contents(self.entries)
        names = tuple((entry["NAME"],) for entry in self.entries)
        sets = CfgNode({"DATASETS": {"REGISTER": self.entries, "TRAIN": names[0], "TEST": names[1]}})
        with registered(sets):
            train, val = (DatasetCatalog.get(entry["NAME"]) for entry in self.entries)
            self.objects = measure_objects(train, content["classes"])
        self.test_images = len(val)
        short = choices.short_side or (load_config(choices.config).INPUT.MIN_SIZE_TEST if choices.config else
                                       recommend(self.objects))  # fmt: skip
        self.configs = make_configs(choices, self.entries, content, self.objects, short)
        device = device_opts(devices) or ["MODEL.DEVICE", "cuda" if torch.cuda.is_available() else "cpu"]
        for cfg in self.configs.values():
            if "MODEL.DEVICE" not in choices.opts[::2]:
                cfg.MODEL.DEVICE = device[1]
        self.short = self.configs[STUDENT].INPUT.MIN_SIZE_TEST * self.divisor
        self.warnings = self._check()
        self.files = write_configs(self.configs, output / "configs")
        self.study = Comparison(self._variants(), output / "runs", [], (seed,), teacher_weights=choices.checkpoint)

    @property
    def divisor(self) -> int:
        """H over the student's input."""
        return int(self.choices.scale[2:])

    def _check(self) -> list[str]:
        """Look at data and image files; ValueError with all errors, returns the warnings."""
        with registered(self.configs[STUDENT]):
            findings = check_data(self.configs[STUDENT])[1]
        raise_errors(findings)
        return [str(finding) for finding in findings if finding.level == WARNING]

    def _variants(self) -> dict[str, Variant]:
        student = Variant(self.files[STUDENT], title=f"student ({self.choices.method})")
        variants = {self.student: student}
        if self.choices.controls:
            no_kd = ("DISTILL.LOSSES", [], "DISTILL.ASSISTANTS", [])
            if self.configs[STUDENT].DISTILL.LOSSES:
                variants[f"{self.student}_no_kd"] = Variant(self.files[STUDENT], no_kd, title="student, not distilled")
            for name, title in ((BASELINE, "full resolution"), ("baseline_L", "the student's input, stock levels")):
                if name != BASELINE or not self.choices.checkpoint:
                    variants[name] = Variant(self.files[name], title=title)
            if not self.choices.checkpoint:
                variants |= equal_cost(self.files[BASELINE], self.student)
        return variants

    def config(self, name: str) -> CfgNode:
        return self.study.config(Run(name, self.seed))

    def weights(self, name: str) -> Path:
        return self.study.folder(Run(name, self.seed)) / FINAL

    def pending(self) -> list[Run]:
        return [run for run in self.study.runs() if self.study.result(run) is None]

    def plan(self, steps: int) -> Plan:
        """Measure a few steps of every training; what is finished is not counted."""
        of = {variant: v.file.stem for variant, v in self.study.variants.items()}
        configs = {name: load_config(file) for name, file in self.files.items() if name in of.values()}
        measured = measured_once(configs, self.output / "measured.json", steps)
        data = describe(self.objects, self.short, self.divisor)
        data += [f"warning: {text}" for text in self.warnings]
        runs = {run.name: measured[of[run.name]] for run in self.pending()}
        return Plan(data, self.changes, runs, self.test_images, shutil.disk_usage(self.output).free)

    # --- after training -----------------------------------------------------------------------------------------------

    def given_results(self) -> dict[str, dict]:
        """{task: {metric: value}} of the user's own model, under BASELINE; {} without one."""
        if not self.choices.checkpoint:
            return {}
        cfg = self._given()
        folder = self.output / "given"

        def make() -> dict:
            folder.mkdir(parents=True, exist_ok=True)
            with registered(cfg), log_to(folder / "log.txt"):
                return evaluate(cfg, load_model(cfg))

        return {BASELINE: kept(folder / "result.json", fingerprint(cfg, self.choices.checkpoint), make)}

    def _given(self) -> CfgNode:
        cfg = load_config(self.files[BASELINE], ["OUTPUT_DIR", str(self.output / "given")])
        cfg.freeze()
        return cfg

    def models(self) -> dict[str, tuple[CfgNode, Path]]:
        """name -> (config, weights) of all that is finished, and of the user's own model."""
        found = {name: (self.config(name), self.weights(name)) for name in self.study.finished()}
        if self.choices.checkpoint:
            found[BASELINE] = self._given(), Path(self.choices.checkpoint)
        return found

    def report(self) -> dict:
        """Measure costs, draw pictures, write the report; returns its data."""
        folder = self.output / "report"
        data = {
            "command": " ".join(sys.argv), "engine": engine_name(), "versions": {"torch": torch.__version__,
            "python": sys.version.split()[0]}, **self.study.collect(),
        }  # fmt: skip
        for name, result in self.given_results().items():
            data["runs"].append({"variant": name, "seed": self.seed, "results": {name: result}})
            data["variants"][name] = {"file": self.choices.checkpoint, "title": "the given model", "teacher": False}

        def make() -> dict:
            models = self.models()
            cost = measure_costs({name: (cfg, load_model(cfg, str(file))) for name, (cfg, file) in models.items()})
            titles = {**{name: title for name, title in PANELS.items() if name in models}, self.student: "student"}
            with registered(self.config(self.student)):
                about = describe_data(self.config(self.student))
                draw_panels({titles[name]: models[name] for name in titles}, _made(folder) / "panels.jpg")
            return {"cost": cost, "data": about}

        page = folder / "report.html"
        key = [data["runs"], data["variants"], engine_name()]
        data |= kept(folder / "made.json", key, make, [folder / "panels.jpg"])
        curves = {name: self.study.folder(Run(name, self.seed)) / "metrics.json" for name in self.study.finished()}
        write_report(data, page.parent, "A low-resolution detector by distillation", curves=curves)
        return data

    def export(self) -> dict[str, str]:
        """Write the student for detectron2 and as ONNX; returns what each says of itself, "" for no ONNX."""
        cfg, weights = self.config(self.student), self.weights(self.student)
        folder = self.output / "student"

        def make() -> dict[str, str]:
            said = {"detectron2": export(cfg, str(weights), folder / "detectron2"), "onnx": "", "no_onnx": ""}
            try:
                said["onnx"] = export_onnx(cfg, str(weights), folder / "onnx")
            except ValueError as error:  # packages that are not there, or a detector that has no such form
                said["no_onnx"] = str(error)
            return said

        packages = [name for name in ("onnx", "onnxruntime") if find_spec(name)]
        key = [fingerprint(cfg, weights), engine_name(), __version__, torch.__version__, packages]
        return kept(folder / "made.json", key, make, [folder / "detectron2" / "model.pth"])

    def card(self, data: dict, said: dict[str, str]) -> Path:
        """Write README.md of the student."""
        cfg, student = self.config(self.student), self.output / "student"
        metrics = all_metrics(data, self.student)
        choice = choose_backbone(self.choices.backbone)
        given = self.choices.checkpoint
        start = given or (cfg.MODEL.WEIGHTS or self.configs.get(TEACHER, self.configs.get(BASELINE, cfg)).MODEL.WEIGHTS)
        licence = (choice.licence or "none used") if start == choice.weights else "not known here; that of this file"
        files = [("detectron2/", said["detectron2"])]
        files.append(("onnx/", said["onnx"]) if said["onnx"] else ("onnx/", f"not written: {said['no_onnx']}"))
        facts = {
            "title": f"{data['data']['name']}: a detector at {self.choices.scale} of the resolution",
            "detector": "the given model's architecture" if given else self.choices.detector,
            "backbone": "its own backbone" if given else self.choices.backbone,
            "method": self.choices.method, "scale": self.choices.scale,
            "teacher": f"Teacher: {given}." if given else "",
            "data": {
                "name": data["data"]["name"], "train": data["data"]["images_train"], "val": data["data"]["images_val"],
                "objects": self.objects.per_class, "licences": read_licences(self.entries[0]["JSON"]),
            },
            "sizes": {"H": self.short, "student": cfg.INPUT.MIN_SIZE_TEST},
            "results": metrics, "cost": data["cost"],
            "weights": {"start": start or "random numbers", "licence": licence},
            "files": files,
            "made_with": [f"msad {__version__}, {engine_name()}, torch {torch.__version__}",
                          f"machine: {machine(cfg.MODEL.DEVICE)['device']}, {torch.get_num_threads()} threads",
                          f"`{data['command']}`"],
        }  # fmt: skip
        path = student / "README.md"
        path.write_text(model_card(facts), encoding="utf-8")
        return path


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def all_metrics(data: dict, first: str) -> dict[str, dict]:
    """{model: {task: {metric: value}}} of a report's data, ``first`` first."""
    found = {name: result for run in data["runs"] for name, result in run.get("results", {}).items()}
    return {name: found[name] for name in sorted(found, key=lambda name: name != first)}


def distill(
    data: str | Path, output: str | Path, *, detector: str = "fcos", backbone: str = "efficientnet_lite0",
    scale: str = "1/2", method: str = "msad", checkpoint: str | Path = "", config: str | Path = "",
    short_side: int | None = None, iterations: int | None = None, controls: bool = False, seed: int = 0,
    jobs: int = 1, threads: int = 0, devices: Sequence[str] = (), opts: Sequence = (),
    confirm: Callable[[Plan], bool] = lambda plan: True, say: Callable[[str], None] = print, steps: int = STEPS,
) -> Result | None:  # fmt: skip
    """Train a detector that runs at a half or a quarter of the resolution, evaluate it, and write what ships.

    The same call again goes on where it was interrupted, and makes again only what depends on what has changed.

    Args:
        data: folder in one of :data:`msad.data.layouts.LAYOUTS`, or a data.yaml of YOLO.
        output: folder of everything that is made.
        detector: fcos, retinanet, faster_rcnn, mask_rcnn or keypoint_rcnn.
        backbone: a name in :data:`msad.product.backbones.BACKBONES`.
        scale: "1/2" or "1/4": the student's input relative to H.
        method: msad, scalekd, progressive, or none for the student's architecture without distillation.
        checkpoint, config: a trained detectron2 model, whose student is made; without them the teacher is trained.
        short_side: of H in pixels; None: as recommended for the data.
        iterations: of every training; None: 24 passes over the data, at least 1500.
        controls: also train the student without distillation and conventional detectors at H, L and the same cost.
        jobs, threads, devices: runs at a time on a CPU, threads of each, GPUs ("cuda:0", ...).
        opts: KEY, VALUE, ... overrides of every config.
        confirm: is asked with the plan before anything is trained; nothing is trained if it says no.
        say: is told what happens.
        steps: iterations of each training that are measured for the plan.

    Returns:
        paths and metrics; None if ``confirm`` said no.

    Raises:
        FileNotFoundError, ValueError: something is wrong with data or choices, or a training failed; names the culprit.
    """
    choices = Choices(detector, backbone, scale, method, str(checkpoint), str(config), short_side, iterations, controls,
                      tuple(opts))  # fmt: skip
    output = Path(output)
    project = Project(Path(data), output, choices, seed, devices)
    if project.pending():
        plan = project.plan(steps)
        say(plan.text())
        if plan.bytes > plan.free:
            raise ValueError(f"{output}: not enough room on the disk for the checkpoints; see the last line")
        if not confirm(plan):
            return None
    failed = project.study.run(make_slots(jobs, threads, devices), say)
    if failed:
        folders = {run: project.study.folder(run) for run in failed}
        raise ValueError("; ".join(f"{run}: {error_of(folder)} (see {folder / 'log.txt'})" for run, folder in
                                   folders.items()))  # fmt: skip
    report = project.report()
    said = project.export()
    card = project.card(report, said)
    onnx = output / "student" / "onnx"
    for text in (said["detectron2"], said["onnx"] or f"no ONNX file: {said['no_onnx']}"):
        say(text)
    return Result(
        output / "student/detectron2/config.yaml", output / "student/detectron2/model.pth",
        onnx / "model.onnx" if said["onnx"] else None, onnx / "run.py" if said["onnx"] else None, card,
        output / "report/report.html", all_metrics(report, project.student), report["cost"],
    )  # fmt: skip



