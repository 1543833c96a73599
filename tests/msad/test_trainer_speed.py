"""channels_last, compiled models and mixed precision train on the losses of ordinary runs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from runs import train
from torch import nn

from msad import load_config
from msad.engine import DistillTrainer


def losses_of(cfg) -> list[dict[str, float]]:
    return [step["losses"] for step in train(cfg)[1].steps]


def test_channels_last_gives_the_same_losses(student_config):
    expected = losses_of(student_config())
    run, trace, _ = train(student_config(SOLVER__CHANNELS_LAST=True))
    for model in (run.distiller.student, run.distiller.teacher.model):
        kernels = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        assert kernels and all(w.is_contiguous(memory_format=torch.channels_last) for w in kernels)
    for step, reference in zip(trace.steps, expected):
        assert step["losses"] == pytest.approx(reference, rel=1e-3)


@pytest.fixture
def compiled(monkeypatch) -> list:
    """The graphs that torch.compile makes, run as they are: code generation for the CPU takes minutes."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


def compare_compiled(student_config, name="student", rel=1e-4, **options):
    expected = losses_of(student_config(name, **options))
    run, trace, before = train(student_config(name, SOLVER__COMPILE=True, **options))
    assert before.keys() == build_model(run.cfg).state_dict().keys()
    for step, reference in zip(trace.steps, expected):
        assert step["losses"] == pytest.approx(reference, rel=rel)


def test_compiled_student_and_teacher_give_the_same_losses(student_config, compiled, project, tmp_path):
    # A teacher with one branch: less to compile.
    teacher = {"CONFIG": str(project / "fcos.yaml"), "WEIGHTS": str(tmp_path / "fcos.pth")}
    torch.save({"model": build_model(load_config(teacher["CONFIG"])).state_dict()}, teacher["WEIGHTS"])
    options = {"SOLVER__MAX_ITER": 2, "DATASETS__TEST": (), "DISTILL__WARMUP_ITERS": 0}
    compare_compiled(student_config, DISTILL__TEACHERS=[teacher], **options)
    assert len(compiled) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["student", "teacher", "retinanet_student"])
def test_compiled_runs_with_evaluation_give_the_same_losses(student_config, compiled, name):
    compare_compiled(student_config, name)
    assert len(compiled) >= 3


@pytest.mark.slow
def test_compiled_with_the_default_backend(student_config):
    torch._dynamo.reset()
    compare_compiled(student_config, rel=1e-3, SOLVER__MAX_ITER=2, DATASETS__TEST=(), DISTILL__WARMUP_ITERS=0)


# For autocast: torch's bfloat16 convolutions on CPU read memory that nobody has written when they differentiate a
# stride-2 convolution of a 1x1 map, which C5 of the small images is.
TWICE_THE_SIZE = {"INPUT__MIN_SIZE_TRAIN": (128,), "INPUT__MAX_SIZE_TRAIN": 128}


def test_distillation_under_autocast(student_config):
    run = DistillTrainer(student_config(**TWICE_THE_SIZE))
    distiller = run.distiller
    distiller.factor = lambda iteration: 1.0
    batch = next(iter(run.data_loader))
    results = {}
    for enabled in (False, True):
        distiller.zero_grad()
        distiller.student.loss_normalizer = 100
        with EventStorage(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = distiller(batch)
            sum(losses.values()).backward()
        results[enabled] = {k: v.item() for k, v in losses.items()}
        gradients = [p.grad for p in distiller.student.parameters() if p.requires_grad]
        assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in gradients)
    assert results[True] == pytest.approx(results[False], rel=0.05)
    assert results[True] != results[False]


def test_amp_trains_where_the_engine_supports_it(student_config):
    expected = losses_of(student_config(**TWICE_THE_SIZE))
    try:
        trace = losses_of(student_config(SOLVER__AMP__ENABLED=True, **TWICE_THE_SIZE))
    except AssertionError as error:
        assert "CUDA" in str(error)  # an engine whose AMP needs a GPU says so
    else:
        for losses, reference in zip(trace, expected[:2]):
            assert losses == pytest.approx(reference, rel=0.05)
