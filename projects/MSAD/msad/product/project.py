"""One call of ``msad distill``: its data, configs, comparison and folders."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from detectron2.config import CfgNode

from ..config import load_config
from ..data.checks import check_data
from ..data.layouts import entries_of, find_splits, read_contents
from ..data.register import registered
from ..data.tally import raise_errors
from ..experiments.comparison import Comparison
from ..experiments.jobs import Run, take_devices
from ..experiments.variants import Variant, at_equal_time, equal_cost
from ..finding import WARNING
from .advice import describe, measure_objects, recommend
from .choices import Choices
from .inference_cost import expected_cost
from .methods import BASELINE, STUDENT
from .plan import Measured, Plan, measured_once
from .recipe import base_config, make_configs, write_configs


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
        names = [(entry["NAME"],) for entry in self.entries]
        # What loading finds out about the data is known as long as they are registered.
        with registered(CfgNode({"DATASETS": {"REGISTER": self.entries, "TRAIN": names[0], "TEST": names[1]}})):
            content, loaded = read_contents(self.entries)
            self._measure(data, content["classes"], *loaded.values())
            self.content = content
            self.configs = self._configs(devices)
            findings = check_data(self.configs[STUDENT], known=loaded)[1]
        raise_errors(findings)
        self.warnings = [str(finding) for finding in findings if finding.level == WARNING]
        self.files = write_configs(self.configs, output / "configs")
        self.study = Comparison(self._variants(), output / "runs", [], (seed,), teacher_weights=choices.checkpoint)

    @property
    def divisor(self) -> int:
        """H over the student's input."""
        return int(self.choices.scale[2:])

    def _measure(self, data: Path, classes: list[str], train: list[dict], val: list[dict]) -> None:
        try:
            self.objects = measure_objects(train, classes, "the training images")
            measure_objects(val, classes, "the validation images")
        except ValueError as error:
            raise ValueError("; ".join([f"{data}: {error}", *self.changes])) from None
        self.test_images = len(val)

    def _detector(self, choices: Choices, short: int) -> CfgNode:
        """That at H, where all is trained."""
        cfg = base_config(choices, self.entries, self.content, self.objects, short)
        cfg.MODEL.DEVICE = self.configs[STUDENT].MODEL.DEVICE
        return cfg

    def _configs(self, devices: Sequence[str]) -> dict[str, CfgNode]:
        choices = self.choices
        short = choices.short_side or (load_config(choices.config).INPUT.MIN_SIZE_TEST if choices.config else
                                       recommend(self.objects))  # fmt: skip
        data = self.entries, self.content, self.objects, short
        self.short = base_config(choices, *data).INPUT.MIN_SIZE_TEST
        configs = make_configs(choices, *data)
        device = take_devices(devices) or ["MODEL.DEVICE", "cuda" if torch.cuda.is_available() else "cpu"]
        for cfg in configs.values():
            if "MODEL.DEVICE" not in choices.opts[::2]:
                cfg.MODEL.DEVICE = device[1]
        return configs

    def _variants(self) -> dict[str, Variant]:
        student = Variant(self.files[STUDENT], title=f"student ({self.choices.method})")
        variants = {self.student: student}
        if self.choices.controls:
            no_kd = ("DISTILL.LOSSES", [], "DISTILL.ASSISTANTS", [])
            if self.configs[STUDENT].DISTILL.LOSSES:
                variants[f"{self.student}_no_kd"] = Variant(self.files[STUDENT], no_kd, title="student, not distilled")
            titles = {BASELINE: "full resolution", self.choices.conventional: "the student's input, stock levels"}
            for name, title in titles.items():
                if name != BASELINE or not self.choices.checkpoint:
                    variants[name] = Variant(self.files[name], title=title)
            if self.choices.alone in self.files:
                text = "the student's architecture alone"
                alone = Variant(self.files[self.choices.alone], title=text)
                timed = replace(alone, title=f"{text}, as long as teacher and student")
                variants |= {self.choices.alone: alone}
                variants |= at_equal_time(self.choices.alone, timed, self.student, count_teachers=True)
            if not self.choices.checkpoint:
                variants |= equal_cost(self.files[BASELINE], self.student)
        return variants

    def config(self, name: str) -> CfgNode:
        return self.study.config(Run(name, self.seed))

    def weights(self, name: str) -> Path:
        return self.study.weights(Run(name, self.seed))

    def pending(self) -> list[Run]:
        done = {(run["variant"], run["seed"]) for run in self.study.collect()["runs"] if "results" in run}
        return [run for run in self.study.runs() if run not in done]

    def plan(self, steps: int) -> Plan:
        """Measure a few steps of every training; what is finished is not counted."""
        of = {v.file.stem for v in self.study.variants.values()}
        configs = {name: load_config(file) for name, file in self.files.items() if name in of}
        measured = measured_once(configs, self.output / "measured.json", steps)
        data = describe(self.objects, self.short, self.divisor)
        data += [f"warning: {text}" for text in self.warnings]
        cost = expected_cost(self.choices, self.short, self.objects, self._detector)
        runs = {run.name: self._expected(run.name, measured, cost.share) for run in self.pending()}
        return Plan(data, self.changes, runs, self.test_images, shutil.disk_usage(self.output).free, cost)

    def _expected(self, name: str, measured: Mapping[str, Measured], share: float) -> Measured:
        """What a variant will take.

        One of equal time takes as many steps as fit into those that it is compared with; the detector at equal cost,
        whose input size is found later, ``share`` of what it takes at H.
        """
        variant = self.study.variants[name]
        one = measured[variant.file.stem]
        if variant.budget == "equal_cost":
            return one._replace(step=share * one.step, image=share * one.image)
        if variant.budget != "equal_time":
            return one
        both = [*self.study.all_teachers(variant.reference), variant.reference]
        seconds = sum(m.iterations * m.step for m in (self._expected(other, measured, share) for other in both))
        return one._replace(iterations=max(1, round(seconds / one.step)))

    def given(self) -> CfgNode:
        cfg = load_config(self.files[BASELINE], ["OUTPUT_DIR", str(self.output / "given")])
        cfg.freeze()
        return cfg

    def models(self) -> dict[str, tuple[CfgNode, Path]]:
        """name -> (config, weights) of all that is finished, and of the user's own model."""
        found = self.study.models()
        if self.choices.checkpoint:
            found[BASELINE] = self.given(), Path(self.choices.checkpoint)
        return found
