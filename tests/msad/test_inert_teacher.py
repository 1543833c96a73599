"""A frozen teacher does nothing but give features: what published distillation code gets wrong is tested one by one."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.solver.build import get_default_optimizer_params
from detectron2.utils.events import EventStorage
from torch import nn
from torchvision.ops import StochasticDepth

from msad.distill.teachers import FrozenTeacher
from msad.resolution import downsample_batch

SIZES = [(64, 96), (90, 128)]


@pytest.fixture
def noisy_teacher(tiny_model):
    """A teacher that is random in train mode: dropout and drop-path behind its last stage."""
    teacher = tiny_model(resolutions=["H", "L"])
    bottom_up = teacher.detector.backbone.bottom_up
    bottom_up.res5 = nn.Sequential(bottom_up.res5, nn.Dropout(0.5), StochasticDepth(0.5, "row"))
    # detectron2's ResNet runs its stages from a list of its own.
    if isinstance(getattr(bottom_up, "stages", None), list):
        bottom_up.stages[-1] = bottom_up.res5
    return teacher


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def train(distiller, batches, lr=0.05):
    optimizer = torch.optim.SGD(get_default_optimizer_params(distiller), lr=lr, momentum=0.9)
    for iteration, batch in enumerate(batches):
        with EventStorage(iteration):
            losses = distiller.train()(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("batch_norm", ["eval", "batch"])
def test_nothing_of_the_teacher_changes_in_training(make_distiller, noisy_teacher, make_batch, batch_norm):
    """Parameters and buffers bit for bit; peers let BatchNorm statistics drift."""
    distiller = make_distiller(teacher=noisy_teacher, batch_norm=batch_norm)
    before, student = snapshot(noisy_teacher), snapshot(distiller.student)
    train(distiller, [make_batch(SIZES, seed=i) for i in range(3)])
    after = noisy_teacher.state_dict()
    assert before.keys() == after.keys() and any("running_var" in name for name in before)
    assert [name for name, value in before.items() if not torch.equal(value, after[name])] == []
    assert all(p.grad is None and not p.requires_grad for p in noisy_teacher.parameters())
    changed = [name for name, value in student.items() if not torch.equal(value, distiller.student.state_dict()[name])]
    assert any("running_mean" in name for name in changed) and any("head" in name for name in changed)


def test_teacher_stays_in_evaluation_mode(make_distiller, noisy_teacher, make_batch):
    """Peers call eval() once, and the wrapper's next train() undoes it."""
    distiller = make_distiller(teacher=noisy_teacher.train())
    for _ in range(2):
        distiller.train()
        train(distiller, [make_batch(SIZES)])
        assert [name for name, m in noisy_teacher.named_modules() if m.training] == []
        assert all(m.training for m in distiller.student.modules())
        distiller.eval()
    assert not any(m.training for m in noisy_teacher.modules())


def test_only_batchnorm_trains_under_batch_statistics(tiny_model, noisy_teacher):
    FrozenTeacher(noisy_teacher.train(), "batch")
    training = {type(m) for m in noisy_teacher.modules() if m.training}
    evaluating = {type(m) for m in noisy_teacher.modules() if not m.training}
    assert training and all(issubclass(t, nn.modules.batchnorm._BatchNorm) for t in training)
    assert {nn.Dropout, StochasticDepth} <= evaluating and not training & evaluating


@pytest.mark.parametrize("batch_norm", ["eval", "batch"])
def test_features_are_deterministic(noisy_teacher, make_batch, batch_norm):
    with torch.no_grad():
        first, second = (noisy_teacher.train().neck_features(make_batch(SIZES)) for _ in range(2))
    assert not torch.equal(first["p5"], second["p5"]), "in train mode it is random"
    frozen = FrozenTeacher(noisy_teacher.train(), batch_norm)
    first, second = (frozen.features(make_batch(SIZES), 1) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("batch_norm", ["eval", "batch"])
def test_features_use_the_statistics_asked_for(tiny_model, make_batch, batch_norm):
    """ "batch" is what the released code does: BatchNorm in train mode, everything else in evaluation mode."""
    teacher = tiny_model(resolutions=["H", "L"])
    reference = copy.deepcopy(teacher).eval()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d) and batch_norm == "batch":
            module.train()
    found = FrozenTeacher(teacher, batch_norm).features(make_batch(SIZES), 1)
    with torch.no_grad():
        expected = reference.neck_features(make_batch(SIZES), 1)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    other = FrozenTeacher(copy.deepcopy(teacher), {"eval": "batch", "batch": "eval"}[batch_norm])
    if batch_norm == "eval":
        assert (other.features(make_batch(SIZES), 1)["p3"] - found["p3"]).abs().max() > 0.01


def test_batch_statistics_are_those_of_the_batch(tiny_model, make_batch):
    """Hand computation for the first BatchNorm."""
    teacher = tiny_model()
    stem = teacher.backbone.bottom_up.stem.conv1
    seen = []
    stem.norm.register_forward_hook(lambda _module, args, out: seen.append((args[0].clone(), out.clone())))
    FrozenTeacher(teacher, "batch").features(make_batch([(64, 64)] * 2), 0)
    ((x, normalised),) = seen
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
    weight, bias = stem.norm.weight[:, None, None], stem.norm.bias[:, None, None]
    torch.testing.assert_close(normalised, (x - mean) / (var + stem.norm.eps).sqrt() * weight + bias)


class OwnUpdates(nn.BatchNorm2d):
    """As synchronised BatchNorms do it: updates its running statistics by itself whenever it trains."""

    def forward(self, x):
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        if self.training:
            self.running_mean += self.momentum * (mean.detach() - self.running_mean)
            self.running_var += self.momentum * (var.detach() - self.running_var)
        return (x - mean[:, None, None]) * (var + self.eps).rsqrt()[:, None, None]


def test_batchnorm_with_updates_of_its_own_does_not_drift(tiny_model, make_batch):
    teacher = tiny_model()
    teacher.backbone.bottom_up.stem.conv1.norm = OwnUpdates(4)
    frozen, before = FrozenTeacher(teacher, "batch"), snapshot(teacher)
    frozen.features(make_batch(SIZES), 0)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_unknown_batchnorm_mode_names_the_key(tiny_model):
    with pytest.raises(ValueError, match=r"DISTILL\.TEACHER_BN.*'train'"):
        FrozenTeacher(tiny_model(), "train")


@pytest.mark.parametrize("resolutions", [None, ["H", "L"]])
def test_teacher_sees_its_own_channel_order(tiny_model, make_batch, resolutions):
    """Of images in the other order, and of those that were reduced for the student already."""
    teacher, batch = tiny_model(resolutions=resolutions), make_batch(SIZES)
    expected = FrozenTeacher(teacher).features(batch, 1)
    turned = [dict(item, image=item["image"].flip(0)) for item in batch]
    for item, small in zip(turned, downsample_batch(turned, 1, "cpu")):
        item["downsampled_images"] = {(1, "antialias"): small["image"]}
    for name, value in FrozenTeacher(teacher, reverse_channels=True).features(turned, 1).items():
        torch.testing.assert_close(value, expected[name])
        assert not torch.allclose(FrozenTeacher(teacher).features(turned, 1)[name], value)
    assert all(torch.equal(a["image"], b["image"].flip(0)) for a, b in zip(turned, batch))


def test_teacher_is_invisible_to_the_module_tree(make_distiller, tiny_model, make_batch):
    """Not in checkpoints, optimizers, DistributedDataParallel, apply() or casts."""
    teacher = tiny_model(resolutions=["H", "L"])
    distiller = make_distiller(teacher=teacher)
    train(distiller, [make_batch(SIZES)])
    student = {f"student.{name}" for name in distiller.student.state_dict()}
    assert set(distiller.state_dict()) == student
    assert {name for name, _ in distiller.named_parameters()} <= student
    assert not {id(m) for m in distiller.modules()} & {id(m) for m in teacher.modules()}
    in_optimizer = {id(p) for group in get_default_optimizer_params(distiller) for p in group["params"]}
    assert in_optimizer == {id(p) for p in distiller.student.parameters()}
    before = snapshot(teacher)
    distiller.apply(lambda m: nn.init.zeros_(m.weight) if isinstance(m, nn.Conv2d) else None).double()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}


def test_hooked_activations_leave_no_trace(make_distiller, make_batch):
    """Peers register them as buffers, which then are in every checkpoint."""
    distiller = make_distiller()
    keys, attributes = list(distiller.state_dict()), {name: set(vars(m)) for name, m in distiller.named_modules()}
    train(distiller, [make_batch(SIZES)])
    assert list(distiller.state_dict()) == keys
    # loss_normalizer is detectron2's own running number.
    assert {name: set(vars(m)) - {"loss_normalizer"} for name, m in distiller.named_modules()} == attributes


def hooks_of(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)


def test_no_hook_is_left(make_distiller, make_batch):
    distiller = make_distiller()
    with EventStorage(0):
        distiller(make_batch(SIZES))
    assert hooks_of(distiller) == hooks_of(distiller.teacher.model) == 0
    distiller.student.head.forward = None  # the student fails after its backbone has run
    with EventStorage(0), pytest.raises(TypeError):
        distiller(make_batch(SIZES))
    assert hooks_of(distiller) == 0


def test_features_carry_no_graph_and_are_ordinary_tensors(make_distiller, make_batch, monkeypatch):
    """no_grad, not inference_mode: losses that square a teacher's tensor fail on inference tensors."""
    distiller = make_distiller()
    seen, recording = {}, []
    distiller.teacher.detector.backbone.register_forward_pre_hook(lambda *_: recording.append(torch.is_grad_enabled()))
    original = FrozenTeacher.features
    monkeypatch.setattr(FrozenTeacher, "features", lambda self, *args: seen.update(original(self, *args)) or dict(seen))
    with EventStorage(0):
        distiller(make_batch(SIZES))
    assert len(seen) == 5 and recording == [False, False]
    for value in seen.values():
        assert not value.requires_grad and value.grad_fn is None and not value.is_inference()
    scale = torch.ones(1, requires_grad=True)
    (scale * seen["p3"]).square().sum().backward()
    assert scale.grad is not None


@pytest.mark.parametrize("multi_resolution", [True, False])
def test_teacher_runs_its_necks_and_nothing_else(make_distiller, tiny_model, make_batch, monkeypatch, multi_resolution):
    """Not the head, no losses, no targets (peers run mode="loss"), once a step."""
    teacher = tiny_model(resolutions=["H", "L"]) if multi_resolution else tiny_model()
    distiller = make_distiller(teacher=teacher)
    detector = distiller.teacher.detector
    monkeypatch.setattr(type(teacher), "forward", None if multi_resolution else type(teacher).forward)
    for name in ("forward_training", "forward_inference", "label_anchors", "losses"):
        setattr(detector, name, None)
    heads, necks = [], []
    detector.head.register_forward_pre_hook(lambda *_: heads.append(1))
    detector.backbone.register_forward_pre_hook(lambda _m, args: necks.append(tuple(args[0].shape[-2:])))
    with EventStorage(0):
        distiller(make_batch([(64, 128)]))
    assert heads == [] and necks == ([(64, 128), (32, 64)] if multi_resolution else [(64, 128)])


def test_without_losses_the_teacher_never_runs(make_distiller, make_batch):
    distiller = make_distiller(losses=[])
    distiller.teacher.features = None
    with EventStorage(0):
        assert not any(name.startswith("loss_distill") for name in distiller(make_batch(SIZES)))


def test_student_inference_is_the_student_alone(make_distiller, make_batch, same_detections):
    """The released code ran the teacher twice at test time, and kept one image of a batch."""
    distiller = make_distiller()
    distiller.teacher.features = None
    batch = make_batch([(32, 48), (45, 64), (64, 40)])
    with torch.no_grad():
        found = distiller.eval()(batch)
        expected = distiller.student(batch)
    assert len(found) == 3
    same_detections(found, expected, tolerance=0)


def test_train_mode_of_the_given_model_does_not_matter(tiny_model, make_batch):
    features = [
        FrozenTeacher(tiny_model(resolutions=["H", "L"]).train(mode)).features(make_batch(SIZES), 1)
        for mode in (True, False)
    ]
    assert all(torch.equal(features[0][name], features[1][name]) for name in features[0])
