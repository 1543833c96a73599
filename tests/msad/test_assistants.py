"""Assistants: sources that are trained beside the student, with an optimizer of their own."""

from __future__ import annotations

import copy
import functools
import inspect

import pytest
import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from runs import SAVED, assert_equal_weights, config, in_two_processes, left_by_a_killed_run, on_cpu, train
from torch import nn

from msad import load_config
from msad.distill.assistants import DISTILL_ASSISTANT_REGISTRY, Assistant
from msad.distill.context import DistillContext
from msad.distill.distiller import AssistantCall
from msad.engine import DistillTrainer
from msad.engine.assistants import AssistantStep, untouched
from msad.engine.divergence import LossRecorder

NAME = "ToyAssistant"
ENTRY = {"NAME": NAME, "BASE_LR": 0.01, "WEIGHT_DECAY": 1e-4}
LOSSES = [{"NAME": "AlignedL1", "SOURCE": "teacher"}, {"NAME": "NaiveL2", "SOURCE": NAME}]


@DISTILL_ASSISTANT_REGISTRY.register()
class ToyAssistant(Assistant):
    """A 1x1 convolution on the mean of teacher and student, trained by the student's heads."""

    def __init__(self, student, sources, init=0.1):
        super().__init__()
        (teacher,) = sources.values()
        self._shapes = {name: teacher[name] for name in teacher if name in student}
        channels = next(iter(teacher.values())).channels
        self.mix = nn.Conv2d(channels, channels, 1)
        nn.init.normal_(self.mix.weight, std=init)

    def shapes(self):
        return self._shapes

    def _mixed(self, context):
        (teacher,) = (features for name, features in context.sources.items() if name == "teacher")
        return {name: self.mix((teacher[name] + context.student[name]) / 2) for name in self._shapes}

    def losses(self, context):
        return context.run_losses(self._mixed(context))

    def features(self, context):
        return self._mixed(context)


def assisted(cfg, **entry):
    cfg.DISTILL.ASSISTANTS = [{**ENTRY, **entry}]
    cfg.DISTILL.LOSSES = LOSSES
    return cfg


@pytest.fixture
def cfg(project, teacher_weights, tmp_path):
    return assisted(config(project, teacher_weights, "student", tmp_path / "run"))



@pytest.mark.parametrize(("schedule", "factors"), [("solver", [1 / 3, 5 / 9, 7 / 9, 1.0]), ("constant", [1.0] * 4)])
def test_learning_rate_follows_the_solver_or_stays(cfg, make_batch, schedule, factors):
    """Warm-up of three iterations from a third: linear in between, whatever the student's own rate is."""
    cfg.SOLVER.WARMUP_FACTOR, cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.STEPS = 1 / 3, 3, ()
    cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.MAX_ITER = "WarmupMultiStepLR", 6
    distiller = DistillTrainer.build_model(assisted(cfg, SCHEDULE=schedule)).train()
    (step,) = distiller.assistants
    rates = []
    with EventStorage(0):
        for _ in factors:
            rates.append(step.optimizer.param_groups[0]["lr"])
            distiller(make_batch([(64, 64)] * 2))
    assert rates == pytest.approx([ENTRY["BASE_LR"] * factor for factor in factors])


class OneLayer(Assistant):
    """A linear layer on vectors, trained by what ``context.run_losses`` says."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def shapes(self):
        return {}

    def losses(self, context):
        return context.run_losses(self.features(context))

    def features(self, context):
        return {"p3": self.layer(context.student["p3"])}


def step_alone(*opts, **entry):
    """An AssistantStep of OneLayer, and the context of a step whose heads report a scalar."""
    entry = {"OPTIMIZER": "SGD", "BASE_LR": 1.0, "SCHEDULE": "constant", **entry}
    step = AssistantStep("A", OneLayer(), load_config("", ["MODEL.DEVICE", "cpu", *opts]), entry, nn.Linear(1, 1))

    def run_losses(features):
        get_event_storage().put_scalar("fast_rcnn/accuracy", 0.25)
        with get_event_storage().name_scope("stage0"):
            get_event_storage().put_scalar("accuracy", 0.5, smoothing_hint=False)
        return {"loss_x": features["p3"].square().mean()}

    return step, DistillContext([], 19, {"p3": torch.randn(2, 4)}, run_losses=run_losses)


def test_numbers_that_yaml_reads_as_text():
    step, _ = step_alone(BASE_LR="1e-3", WEIGHT_DECAY="1e-4")
    (group,) = step.optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (1e-3, 1e-4)


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "SGD"])
def test_one_kernel_steps_all_parameters_on_cpus(kind):
    step, context = step_alone(OPTIMIZER=kind, BASE_LR=0.1, WEIGHT_DECAY=0.01)
    alone = OneLayer()
    alone.load_state_dict(step.assistant.state_dict())
    plain = getattr(torch.optim, kind)(alone.parameters(), lr=0.1, weight_decay=0.01, foreach=False, fused=False)
    with EventStorage(0):
        for _ in range(3):
            step(context)
            plain.zero_grad()
            alone.losses(context)["loss_x"].backward()
            plain.step()
    assert step.optimizer.defaults["fused"]
    torch.testing.assert_close(step.assistant.state_dict(), alone.state_dict())


def test_poly_schedule_of_the_solver():
    poly = ["SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR", "SOLVER.MAX_ITER", 4, "SOLVER.POLY_LR_POWER", 1.0]

    def rates(*opts):
        step, context = step_alone(*poly, "SOLVER.POLY_LR_END", 0.0, *opts, SCHEDULE="solver")
        found = []
        with EventStorage(0):
            for _ in range(4):
                found.append(step.optimizer.param_groups[0]["lr"])
                step(context)
        return found

    assert rates("SOLVER.WARMUP_ITERS", 0) == pytest.approx([1.0, 0.75, 0.5, 0.25])
    warm = ["SOLVER.WARMUP_ITERS", 2, "SOLVER.WARMUP_FACTOR", 0.5]
    assert rates(*warm)[2:] == pytest.approx([0.5, 0.25])
    assert rates(*warm, "SOLVER.RESCALE_INTERVAL", True)[2:] == pytest.approx([1.0, 0.5])


def test_an_assistant_that_diverges_is_named():
    step, context = step_alone(BASE_LR=0.5)
    recorder = LossRecorder(nn.Identity())
    with EventStorage(0):
        step(context)
        recorder.called = True
        assert recorder.explain(ValueError("wrong shape"), 0, 0.1, [step]) is None
        recorder.losses = {"loss_distill/Chen": torch.tensor(float("nan"))}
        assert "lower SOLVER.BASE_LR" in str(recorder.explain(ValueError("x"), 0, 0.1, [step]))
        context.student["p3"].fill_(float("nan"))
        step(context)
        said = str(recorder.explain(ValueError("x"), 0, 0.1, [step]))
    assert "(assistant A)" in said and "(now 0.1) or BASE_LR of its DISTILL.ASSISTANTS entry (now 0.5)" in said
    recorder.losses["loss_cls"] = torch.tensor(float("nan"))  # the student's own: the assistant only sees its maps
    said = str(recorder.explain(ValueError("x"), 0, 0.1, [step]))
    assert "loss_cls" in said and "ASSISTANTS" not in said


@pytest.mark.parametrize("mixed", [False, True])
def test_features_are_those_of_the_new_weights(mixed):
    """Autocast keeps the casts of the weights that the losses were computed with."""
    step, context = step_alone()
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=mixed)
    with torch.no_grad(), autocast():
        before = step.assistant.features(context)["p3"]
    with EventStorage(19), autocast():
        step(context)
    with torch.no_grad(), autocast():
        after = step.assistant.features(context)["p3"]
    assert torch.equal(context.sources["A"]["p3"], after) and not torch.equal(before, after)


@pytest.mark.parametrize("learns", [False, True])
def test_features_that_nobody_reads_are_not_made(learns):
    step, context = step_alone(HEAD_LEARNS=learns)
    before = copy.deepcopy(step.assistant.state_dict())
    with EventStorage(19):
        step(context, read=False)
    assert ("A" in context.sources) == learns  # the student's heads read them
    assert not torch.equal(step.assistant.state_dict()["layer.weight"], before["layer.weight"])


def test_what_its_heads_report_stays_apart():
    step, context = step_alone()
    with EventStorage(19) as storage:
        storage.put_scalar("fast_rcnn/accuracy", 0.75)  # the student's
        storage.put_scalar("stage0/accuracy", 0.125, smoothing_hint=False)
        step(context)
    found = {name: value for name, (value, _) in storage.latest().items()}
    assert found.pop("assistant/A/loss_x") > 0
    assert found == {
        "fast_rcnn/accuracy": 0.75, "stage0/accuracy": 0.125,
        "assistant/A/fast_rcnn/accuracy": 0.25, "assistant/A/stage0/accuracy": 0.5,
    }  # fmt: skip
    assert len(storage.history("fast_rcnn/accuracy").values()) == 1
    assert not storage.smoothing_hints()["assistant/A/stage0/accuracy"]


def test_what_heads_learn_from_it_has_the_weight_of_detection():
    step, context = step_alone("DISTILL.W_DET", 0.5, HEAD_LEARNS=True)
    with EventStorage(0):
        step(context)
        expected = 0.5 * context.run_losses(context.sources["A"])["loss_x"]
    torch.testing.assert_close(context.detection["loss_x@A"], expected)


def test_neither_trains_the_other(cfg, make_batch):
    distiller = DistillTrainer.build_model(cfg).train()
    (step,) = distiller.assistants
    start = {name: p.clone() for name, p in distiller.student.state_dict().items() if "running" not in name}
    before = step.assistant.mix.weight.detach().clone()
    with EventStorage(0):
        losses = distiller(make_batch([(64, 64)] * 2))
    # The assistant has stepped, on gradients that went through the student's heads and not to them.
    assert not torch.equal(before, step.assistant.mix.weight)
    assert all(p.grad is None for p in distiller.student.parameters())
    own = step.assistant.mix.weight.grad.clone()
    sum(losses.values()).backward()
    assert torch.equal(own, step.assistant.mix.weight.grad), "the student's losses do not reach the assistant"
    assert sum(p.grad is not None for p in distiller.student.parameters()) > 10
    for name, value in distiller.student.state_dict().items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(value, start[name])
    assert all(p.requires_grad for p in distiller.student.head.parameters())


def test_its_features_are_a_source_after_its_own_step(cfg, make_batch):
    distiller, seen = DistillTrainer.build_model(cfg).train(), []
    distiller.on_context.append(seen.append)
    with EventStorage(0):
        found = distiller(make_batch([(64, 64)] * 2))
    (context,) = seen
    (step,) = distiller.assistants
    for name, x in context.sources[NAME].items():
        mixed = step.assistant.mix((context.sources["teacher"][name] + context.student[name]) / 2)
        torch.testing.assert_close(x, mixed)
        assert not x.requires_grad
    assert f"loss_distill/NaiveL2@{NAME}" in found and "loss_distill/AlignedL1@teacher" in found


def test_the_step_is_adams(cfg, make_batch):
    """The first step of Adam by hand: the sign of the gradient (with weight decay) times the rate."""
    cfg.SOLVER.WARMUP_ITERS = 0
    distiller = DistillTrainer.build_model(assisted(cfg, WEIGHT_DECAY=0.0)).train()
    (step,) = distiller.assistants
    before = step.assistant.mix.weight.detach().clone()
    with EventStorage(0):
        distiller(make_batch([(64, 64)] * 2))
    gradient = step.assistant.mix.weight.grad
    expected = before - 0.01 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(step.assistant.mix.weight.detach(), expected)


def test_targets_are_assigned_once_for_both(cfg, make_batch, monkeypatch):
    distiller = DistillTrainer.build_model(cfg).train()
    calls, kind = [], type(distiller.student)
    original = kind.label_anchors
    monkeypatch.setattr(kind, "label_anchors", lambda self, *args: calls.append(1) or original(self, *args))
    with EventStorage(0):
        distiller(make_batch([(64, 64)] * 2))
    assert calls == [1]


def test_a_step_of_ones_own_is_called_as_the_protocol_says(cfg, make_batch):
    distiller, calls = DistillTrainer.build_model(cfg).train(), []

    def step(*args, **named):
        calls.append(inspect.signature(AssistantCall.__call__).bind(step, *args, **named).arguments["read"])
        original(*args, **named)

    (original,), distiller.assistants = distiller.assistants, [step]
    with EventStorage(0):
        distiller(make_batch([(64, 64)] * 2))
    assert calls == [True]


def test_it_rests_when_distillation_is_over(cfg, make_batch):
    distiller = DistillTrainer.build_model(cfg).train()
    distiller.factor = lambda iteration: 0.0
    distiller.assistants = [lambda context, read: pytest.fail("stepped")]
    with EventStorage(5):
        assert not any("distill" in name for name in distiller(make_batch([(64, 64)] * 2)))


def test_one_that_waits_learns_when_distillation_begins(cfg, make_batch):
    cfg.DISTILL.START_ITER, cfg.DISTILL.WARMUP_ITERS = 2, 0
    distiller = DistillTrainer.build_model(assisted(cfg, WAITS=True, SCHEDULE="constant")).train()
    (step,) = distiller.assistants
    weight, moved, given = step.assistant.mix.weight, [], []
    distiller.on_context.append(lambda context: given.append(NAME in context.sources))
    for iteration in range(4):
        before = weight.detach().clone()
        with EventStorage(iteration):
            losses = distiller(make_batch([(64, 64)] * 2))
        moved.append(not torch.equal(weight, before))
        assert all(value.isfinite() for value in losses.values())
    assert moved == [False, False, True, True]
    assert given == [True, False, True, True]  # the first step tries what will be compared
    assert step.is_finite()


@pytest.mark.parametrize("warmup", [0, 3])
def test_one_that_does_not_wait_learns_in_every_step(cfg, make_batch, warmup):
    """Also in that of START_ITER, where a warm-up begins with a factor of 0."""
    cfg.DISTILL.START_ITER, cfg.DISTILL.WARMUP_ITERS = 2, warmup
    distiller = DistillTrainer.build_model(assisted(cfg)).train()
    (step,) = distiller.assistants
    weight, features, made = step.assistant.mix.weight, step.assistant.features, []
    step.assistant.features = lambda context: made.append(context.iteration) or features(context)
    for iteration in range(4):
        before = weight.detach().clone()
        with EventStorage(iteration):
            distiller(make_batch([(64, 64)] * 2))
        assert not torch.equal(weight, before), iteration
    assert made.count(1) == made.count(0) - 1 == made.count(2) - 1  # no loss reads them; iteration 0 tries all losses


def test_heads_that_learn_from_it_keep_the_statistics_of_the_students_maps(cfg, make_batch):
    """Its maps do not occur at inference."""
    cfg.MODEL.FCOS.NORM = "BN"
    found = []
    for learns in (False, True):
        torch.manual_seed(0)
        distiller = DistillTrainer.build_model(assisted(cfg, HEAD_LEARNS=learns)).train()
        with EventStorage(0):
            distiller(make_batch([(64, 64)] * 2))
        found.append({k: v for k, v in distiller.student.state_dict().items() if "head" in k and "running" in k})
    assert found[0] and all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_nothing_runs_without_losses(cfg, make_batch):
    """DISTILL.LOSSES [] is the baseline without distillation, also before START_ITER."""
    cfg.DISTILL.START_ITER = 2
    distiller = DistillTrainer.build_model(assisted(cfg, HEAD_LEARNS=True)).train()
    distiller.losses = nn.ModuleList()
    distiller.assistants = [lambda context, read: pytest.fail("stepped")]
    distiller.teachers[0].features = lambda *args: pytest.fail("a teacher ran")
    for iteration in range(3):
        with EventStorage(iteration):
            losses = distiller(make_batch([(64, 64)] * 2))
        assert not any("distill" in name or NAME in name for name in losses)


def test_mixed_precision(cfg, make_batch):
    distiller = DistillTrainer.build_model(cfg).train()
    with EventStorage(0), torch.autocast("cpu", torch.bfloat16):
        losses = distiller(make_batch([(64, 64)] * 2))
    sum(losses.values()).backward()
    (step,) = distiller.assistants
    assert step.assistant.mix.weight.grad.isfinite().all() and step.assistant.mix.weight.grad.abs().sum() > 0


def test_float16_scales_an_assistants_losses_on_every_device():
    """lite trains in float16 on a CPU, too; a state from before mixed precision was turned on is empty."""
    (step, context), (plain, _) = step_alone("SOLVER.AMP.ENABLED", True), step_alone()
    assert step.scaler.is_enabled() and not plain.scaler.is_enabled()
    step.load_state_dict(plain.state_dict())
    with EventStorage(19):
        step(context)
    assert step.scaler.get_scale() > 1 and step.is_finite()


@pytest.mark.parametrize("kind", ["Adam", "SGD"])
def test_scaled_gradients_step_like_unscaled_ones(kind):
    """Half precision scales losses by a power of two, so the step is the same; after an overflow there is none."""
    (step, context), (plain, same) = step_alone(OPTIMIZER=kind), step_alone(OPTIMIZER=kind)
    plain.assistant.load_state_dict(step.assistant.state_dict())
    same.student["p3"].copy_(context.student["p3"])
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=2)
    for _ in range(2):
        with EventStorage(19):
            step(context)
            plain(same)
    assert_equal_weights(step.assistant.state_dict(), plain.assistant.state_dict())
    assert step.scaler.get_scale() == 2.0**15  # two good steps
    before = {name: p.clone() for name, p in step.assistant.state_dict().items()}
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    context.student["p3"].mul_(1000.0)
    with EventStorage(19):
        step(context)
    assert_equal_weights(step.assistant.state_dict(), before)
    assert step.is_finite() and step.scaler.get_scale() == 2.0**126
    again, _ = step_alone(OPTIMIZER=kind)
    again.scaler = torch.amp.GradScaler("cpu")
    again.load_state_dict(step.state_dict())
    assert again.scaler.get_scale() == 2.0**126


def test_a_resumed_assistant_repeats_the_uninterrupted_one(project, teacher_weights, tmp_path):
    def run(folder, resume=False):
        return train(assisted(config(project, teacher_weights, "student", tmp_path / folder)), resume)

    whole, expected, _ = run("whole")
    left_by_a_killed_run(tmp_path / "whole", tmp_path / "killed")
    again, resumed, _ = run("killed", resume=True)
    assert resumed.steps == expected.steps[SAVED:]
    (a,), (b,) = whole.distiller.assistants, again.distiller.assistants
    assert_equal_weights(a.assistant.state_dict(), b.assistant.state_dict())
    assert a.optimizer.state_dict()["state"][0]["step"] == b.optimizer.state_dict()["state"][0]["step"] == 6
    saved = torch.load(tmp_path / "whole" / "model_final.pth", weights_only=True)
    assert set(saved[f"assistant/{NAME}"]) == {"module", "optimizer", "scheduler", "scaler"}
    assert not [key for key in saved["model"] if "mix" in key]
    assert saved["model"].keys() == whole.checkpointer.model.state_dict().keys()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"NAME": "ToyAssistent"}], "unknown assistant 'ToyAssistent'; did you mean ToyAssistant"),
        ([ENTRY, ENTRY], "there is a source named ToyAssistant already"),
        ([{**ENTRY, "INITT": 3}], "ToyAssistant has no option INITT; did you mean INIT"),
        ([{**ENTRY, "OPTIMIZER": "LBFGS"}], "OPTIMIZER must be one of Adam"),
        ([{**ENTRY, "INIT": "wide"}], "ASSISTANTS: ToyAssistant: INIT must be a number, not 'wide'"),
        ([{**ENTRY, "BASE_LR": "much"}], "BASE_LR must be a number, not 'much'"),
        ([{**ENTRY, "WEIGHT_DECAY": -1}], "WEIGHT_DECAY must be at least 0, not -1"),
        ([{**ENTRY, "HEAD_LEARNS": "False"}], "HEAD_LEARNS must be True or False, without quotation marks"),
        ([{**ENTRY, "OPTIMIZER": 3}], "OPTIMIZER must be a text, not 3"),
        ([{**ENTRY, "WAITS": 1, "SCHEDULE": "constant"}], "WAITS must be True or False"),
        ([{**ENTRY, "WAITS": True}], "ToyAssistant: WAITS needs SCHEDULE: constant"),
        ([{"BASE_LR": 1.0}], r"DISTILL\.ASSISTANTS\[0\].*needs NAME"),
    ],
)
def test_wrong_entries(cfg, entries, message):
    cfg.DISTILL.ASSISTANTS = entries
    with pytest.raises(ValueError, match=message):
        if "NAME" not in entries[0]:
            load_config("", ["DISTILL.ASSISTANTS", entries])
        DistillTrainer.build_model(cfg)


def test_untouched_keeps_statistics(tiny_model, make_batch):
    model = tiny_model()
    norm = next(m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d))
    norm.running_mean.fill_(3.0)
    with EventStorage(0), untouched(model):
        model(make_batch([(64, 64)] * 2))
    assert torch.equal(norm.running_mean, torch.full_like(norm.running_mean, 3.0))
    assert norm.momentum == 0.1 and all(p.requires_grad for p in model.head.parameters())


# --- two processes ----------------------------------------------------------------------------------------------------


def gradient_of_the_assistant(batch, project):
    cfg = load_config(project / "student.yaml")
    cfg.DISTILL.TEACHERS[0]["WEIGHTS"] = str(project / "teacher.pth")
    cfg.MODEL.RESNETS.NORM = "FrozenBN"
    torch.manual_seed(3)
    distiller = DistillTrainer.build_model(assisted(cfg)).train()
    distiller.student.loss_normalizer = 8.0 if comm.get_world_size() > 1 else 16.0
    model = on_cpu(distiller, broadcast_buffers=False)
    with EventStorage(0):
        sum(model(batch).values()).backward()
    (step,) = distiller.assistants
    return step.assistant.mix.weight.grad.clone(), step.assistant.mix.weight.detach().clone()


@pytest.mark.skipif(torch.cuda.is_available(), reason="detectron2 would use the GPUs")
def test_two_processes_are_one_with_the_joint_batch(project, teacher_weights, tmp_path, make_batch):
    batch = make_batch([(64, 64)] * 2)
    batch[1]["instances"] = batch[0]["instances"]  # equal counts of positives, by which each process divides
    (first, weight), (second, other) = in_two_processes(gradient_of_the_assistant, tmp_path, batch, project)
    assert torch.equal(first, second) and torch.equal(weight, other)
    joint, _ = gradient_of_the_assistant(batch, project)
    torch.testing.assert_close(first, joint, rtol=1e-4, atol=1e-6 * joint.abs().max().item())
