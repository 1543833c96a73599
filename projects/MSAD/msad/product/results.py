"""What is made of finished trainings: report, exports, model card."""

from __future__ import annotations

import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch

from .. import __version__
from ..data.register import registered
from ..engine.provenance import about_report, fingerprint, machine
from ..engine.setup import engine_name, evaluate, load_model
from ..experiments.costs import costs_of_trained
from ..experiments.data_facts import describe_data
from ..experiments.judgement import alone_as_long
from ..experiments.panels import draw_pictures
from ..experiments.report import PANELS, write_report
from ..experiments.rows import counted
from ..experiments.run import log_to
from ..export import export
from ..export.onnx import export_onnx
from .backbones import choose_backbone
from .card import model_card, read_licences
from .methods import BASELINE, STUDENT, TEACHER
from .project import Project
from .steps import kept


def _given_results(project: Project) -> dict[str, dict]:
    """{task: {metric: value}} of the user's own model, under BASELINE; {} without one."""
    if not project.choices.checkpoint:
        return {}
    cfg = project.given()
    folder = project.output / "given"

    def make() -> dict:
        folder.mkdir(parents=True, exist_ok=True)
        with registered(cfg), log_to(folder / "log.txt"):
            return evaluate(cfg, load_model(cfg))

    return {BASELINE: kept(folder / "result.json", fingerprint(cfg, project.choices.checkpoint), make)}


def all_metrics(data: dict, first: str) -> dict[str, dict]:
    """{model: {task: {metric: value}}} of a report's data, ``first`` first; the AP of no detections is 0."""
    found = {name: counted(result) for run in data["runs"] for name, result in run.get("results", {}).items()}
    return {name: found[name] for name in sorted(found, key=lambda name: name != first)}


def report(project: Project) -> dict:
    """Measure costs, draw pictures, write the report; returns its data."""
    folder = project.output / "report"
    data = {**about_report(), **project.study.collect()}
    for name, result in _given_results(project).items():
        for variant in data["variants"].values():
            if variant["file"] == str(project.files[STUDENT]):
                variant["teachers"] = [name]
        data["runs"].append({"variant": name, "seed": project.seed, "results": {name: result}})
        data["variants"][name] = {"file": project.choices.checkpoint, "title": "the given model", "teacher": False}

    def make() -> dict:
        models = project.models()
        roles = {"teacher": TEACHER if TEACHER in models else BASELINE, "student": project.student,
                 "conventional": project.choices.conventional}  # fmt: skip
        draw_pictures(folder, models, roles)
        return {"cost": costs_of_trained(models), "data": describe_data(project.config(project.student))}

    key = [data["runs"], data["variants"], machine(project.config(project.student).MODEL.DEVICE)]
    data |= kept(folder / "made.json", key, make, [folder / PANELS])
    curves = {name: weights.with_name("metrics.json") for name, (_, weights) in project.study.models().items()}
    write_report(data, folder, "A low-resolution detector by distillation", curves=curves)
    return data


def export_student(project: Project) -> dict[str, str]:
    """Write the student for detectron2 and as ONNX; returns what each says of itself, "" for no ONNX."""
    cfg, weights = project.config(project.student), project.weights(project.student)
    folder = project.output / "student"

    def make() -> dict[str, str]:
        shutil.rmtree(folder / "onnx", ignore_errors=True)  # that of an earlier student
        said = {"detectron2": export(cfg, str(weights), folder / "detectron2"), "onnx": "", "no_onnx": ""}
        try:
            said["onnx"] = export_onnx(cfg, str(weights), folder / "onnx")
        except (RuntimeError, ValueError) as error:  # no packages, no such form, or other detections than the model's
            said["no_onnx"] = str(error)
        return said

    packages = [name for name in ("onnx", "onnxruntime") if find_spec(name)]
    key = [fingerprint(cfg, weights), engine_name(), __version__, torch.__version__, packages]
    return kept(folder / "made.json", key, make, [folder / "detectron2" / "model.pth", folder / "onnx" / "model.onnx"])


def _from_folder(folder: Path, text: str) -> str:
    """A sentence with the paths of files below ``folder`` as they are from there; quoted ones lose their quotes."""
    for file in folder.rglob("*"):
        text = text.replace(shlex.quote(str(file)) + " ", f"{file.relative_to(folder)} ")
    return text.replace(f"{folder}/", "")


def write_card(project: Project, data: dict, said: dict[str, str]) -> Path:
    """Write README.md of the student."""
    cfg, student = project.config(project.student), project.output / "student"
    metrics = all_metrics(data, project.student)
    choice = choose_backbone(project.choices.backbone)
    given = project.choices.checkpoint
    first = project.configs.get(TEACHER) or project.configs.get(BASELINE) or cfg  # from which the student starts
    start = given or cfg.MODEL.WEIGHTS or first.MODEL.WEIGHTS
    licence = (choice.licence or "none used") if start == choice.weights else "not known here; that of this file"
    # The folder of the card may be moved: paths are relative to it.
    texts = [said["detectron2"], said["onnx"] or f"not written: {said['no_onnx']}"]
    files = [(name, _from_folder(student, text)) for name, text in zip(("detectron2/", "onnx/"), texts)]
    facts = {
        "title": f"{data['data']['name']}: a detector at {project.choices.scale} of the resolution",
        "detector": "the given model's architecture" if given else project.choices.detector,
        "backbone": "its own backbone" if given else project.choices.backbone,
        "method": project.choices.method, "scale": project.choices.scale,
        "teacher": f"Teacher: {given}." if given else "",
        "data": {
            "name": data["data"]["name"], "train": data["data"]["images_train"], "val": data["data"]["images_val"],
            "objects": project.objects.per_class, "changes": project.changes,
            "licences": read_licences([entry["JSON"] for entry in project.entries]),
        },
        "sizes": {"H": project.short, "student": cfg.INPUT.MIN_SIZE_TEST},
        "results": metrics, "verdict": alone_as_long(data), "cost": data["cost"],
        "weights": {"start": start or "random numbers", "licence": licence},
        "files": files,
        "made_with": [f"msad {__version__}, {engine_name()}, torch {torch.__version__}",
                      f"machine: {machine(cfg.MODEL.DEVICE)['device']}, {torch.get_num_threads()} threads",
                      f"`{data['command']}`"],
    }  # fmt: skip
    path = student / "README.md"
    path.write_text(model_card(facts), encoding="utf-8")
    return path
