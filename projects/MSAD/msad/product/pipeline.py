"""From a folder of data to a student that ships, in steps that go on where they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..experiments.jobs import error_of, make_slots
from ..experiments.judgement import alone_as_long
from .choices import Choices
from .plan import STEPS, Plan
from .project import Project
from .results import all_metrics, export_student, report, write_card


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
        iterations: of every training; None: 24 passes over the data, at least 600, from scratch 1500.
        controls: also train the student without distillation, its architecture alone for as long as teacher and
            student, and conventional detectors at H, L and the same cost.
        jobs, threads, devices: runs at a time on a CPU, threads of each, GPUs ("cuda:0", ...).
        opts: KEY, VALUE, ... overrides, see :class:`msad.product.choices.Choices`.
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
    slots = make_slots(jobs, threads, devices)
    project = Project(Path(data), output, choices, seed, devices)
    if project.pending():
        plan = project.plan(steps)
        say(plan.text())
        if plan.bytes > plan.free:
            raise ValueError(f"{output}: not enough room on the disk for the checkpoints; see the last line")
        if not confirm(plan):
            return None
    failed = project.study.run(slots, say)
    if failed:
        folders = {run: project.study.folder(run) for run in failed}
        raise ValueError("; ".join(f"{run}: {error_of(folder)} (see {folder / 'log.txt'})" for run, folder in
                                   folders.items()))  # fmt: skip
    data_of_report = report(project)
    said = export_student(project)
    card = write_card(project, data_of_report, said)
    onnx = output / "student" / "onnx"
    onnx_text = said["onnx"] or f"no ONNX file: {said['no_onnx']}"
    for text in filter(None, [said["detectron2"], onnx_text, alone_as_long(data_of_report)]):
        say(text)
    return Result(
        output / "student/detectron2/config.yaml", output / "student/detectron2/model.pth",
        onnx / "model.onnx" if said["onnx"] else None, onnx / "run.py" if said["onnx"] else None, card,
        output / "report/report.html", all_metrics(data_of_report, project.student), data_of_report["cost"],
    )  # fmt: skip
