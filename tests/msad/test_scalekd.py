"""ScaleKD as a whole: both parts in training, over a resume, in several processes, and the yaml files."""

from __future__ import annotations

import itertools
import re
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from helpers import load_narrow
from runs import SAVED, Trace, assert_equal_weights, config, left_by_a_killed_run, train
from torch.utils.flop_counter import FlopCounterMode

from msad import load_config
from msad.distill.losses.chen import direct_regression
from msad.distill.schedules import distillation_factor
from msad.distill.teachers import FrozenTeacher
from msad.engine import DistillTrainer
from msad.engine.build import build_distiller, teacher_entries
from msad.export import export
from msad.modeling.ignored_regions import IgnoredRegions

NAME = "CrossScaleAssistant"
FOLDER = Path(__file__).parents[2] / "configs" / "ScaleKD"
CONFIGS = sorted(path for path in FOLDER.glob("*.yaml") if re.search(r"_S(_|$)", path.stem))
SCALEKD = {
    "ASSISTANTS": [
        {"NAME": NAME, "BASE_LR": 3e-4, "WEIGHT_DECAY": 1e-4, "SCHEDULE": "constant", "HEADS": 4, "RATIO": 4}
    ],
    "LOSSES": [
        {"NAME": "SDF", "TAP": "bottom_up", "MATCH": "by_index", "LEVELS": ["res5"], "EMBEDDING": 8},
        {"NAME": "Chen", "SOURCE": NAME, "BBOX": "direct", "WEIGHT": 0.2},
    ],
}


def scalekd(project, teacher_weights, folder, scale=2.0, **options):
    cfg = config(project, teacher_weights, "student", folder, **options)
    cfg.DISTILL.STUDENT_RESOLUTION = "H"
    cfg.MODEL.FPN.LEVELS = cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    cfg.DISTILL.INIT_STUDENT = "none"
    cfg.DISTILL.TEACHERS = [{**teacher_entries(cfg)[0], "SCALE": scale}]
    cfg.DISTILL.ASSISTANTS, cfg.DISTILL.LOSSES = SCALEKD["ASSISTANTS"], SCALEKD["LOSSES"]
    return cfg


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_two_steps(project, teacher_weights, tmp_path, scale, make_batch):
    cfg = scalekd(project, teacher_weights, tmp_path, scale)
    distiller = DistillTrainer.build_model(cfg).train()
    (step,) = distiller.assistants
    before = {name: p.clone() for name, p in step.assistant.state_dict().items()}
    for iteration, boxes in enumerate((2, 0)):  # also without objects
        with EventStorage(iteration):
            losses = distiller(make_batch([(64, 64)] * 2, boxes=boxes))
        assert {k for k in losses if "distill" in k} == {
            "loss_distill/SDF@teacher", f"loss_distill/Chen@{NAME}/dense_cls", f"loss_distill/Chen@{NAME}/dense_reg"
        }  # fmt: skip
        assert all(value.isfinite() for value in losses.values())
        distiller.zero_grad()
        sum(losses.values()).backward()
    assert all(p.grad is not None for p in distiller.student.parameters() if p.requires_grad)
    assert any(not torch.equal(p, before[name]) for name, p in step.assistant.state_dict().items())


HEADS = {
    **dict.fromkeys(("FCOS", "RetinaNet", "GFL", "RepPoints"), ("dense",)),
    **dict.fromkeys(("FasterRCNN", "MaskRCNN", "KeypointRCNN"), ("rpn", "roi")),
    **dict.fromkeys(("CascadeRCNN", "CascadeMask"), ("rpn", "roi0", "roi1", "roi2")),
}


BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture
def make_scalekd(tiny_cfg, tiny_model):
    """``make_scalekd(arch, scale, **options)``: a tiny student and a teacher of the kind, as training builds them."""

    def make(arch, scale=2.0, student_options=(), assistant=SCALEKD["ASSISTANTS"][0], losses=None, **options):
        cfg = tiny_cfg(arch, **{"DISTILL__STUDENT_RESOLUTION": "H", "DISTILL__WARMUP_ITERS": 0, **options})
        cfg.DISTILL.ASSISTANTS, cfg.DISTILL.LOSSES = [assistant], losses or SCALEKD["LOSSES"]
        teacher = FrozenTeacher(tiny_model(arch, seed=1), scale=scale)
        return build_distiller(cfg, tiny_model(arch, **dict(student_options)), [teacher]).train()

    return make


@pytest.mark.parametrize("arch", HEADS)
def test_every_detector(make_scalekd, make_batch, arch):
    """Steps with, without and with some objects: everything of the student learns, and the assistant does."""
    distiller = make_scalekd(arch)
    (step,) = distiller.assistants
    for iteration, boxes in enumerate(([2, 3], [0, 0], [0, 2])):
        before = {name: p.clone() for name, p in step.assistant.state_dict().items()}
        with EventStorage(iteration):
            losses = distiller(make_batch([(64, 96)] * 2, boxes=boxes))
        compared = {name.split("/")[-1] for name in losses if f"Chen@{NAME}" in name}
        assert compared == {f"{head}_{kind}" for head in HEADS[arch] for kind in ("cls", "reg")}
        assert all(value.isfinite() for value in losses.values())
        distiller.zero_grad()
        sum(losses.values()).backward()
        assert any(not torch.equal(p, before[name]) for name, p in step.assistant.state_dict().items())
    assert [name for name, p in distiller.student.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("arch", ["RepPoints", "CascadeRCNN", "CascadeMask"])
def test_equal_features_have_equal_predictions(make_scalekd, make_batch, arch):
    """The student's own features through its heads again: nothing differs, and boxes are coded as targets."""
    distiller = make_scalekd(arch)
    distiller.assistants = []
    with EventStorage(0):
        context = distiller.observe(make_batch([(64, 96)] * 2))
    context.sources["itself"] = {name: x.detach() for name, x in context.student.items()}
    for pair in context.heads("itself"):
        torch.testing.assert_close(pair.student_logits, pair.teacher_logits)
        torch.testing.assert_close(pair.student_boxes, pair.teacher_boxes)
        s, t, target = pair.matched_deltas()
        image, anchor = pair.positives
        assert len(image) > 0 and s.requires_grad and not t.requires_grad
        boxes = pair.decode(target, pair.anchors[anchor])
        torch.testing.assert_close(boxes, pair.targets[image, anchor], rtol=1e-4, atol=1e-2)


def test_localization_distillation_from_the_assistant(make_scalekd, make_batch):
    """LD in the place of Chen's losses, on a detector whose box sides are distributions."""
    distiller = make_scalekd("GFL", losses=[{"NAME": "LD", "SOURCE": NAME}])
    with EventStorage(0):
        losses = distiller(make_batch([(64, 96)] * 2))
    terms = [value for name, value in losses.items() if name.startswith(f"loss_distill/LD@{NAME}")]
    assert terms and all(value.isfinite() for value in terms) and sum(terms) > 0
    sum(terms).backward()
    assert all(p.grad is not None for p in distiller.student.backbone.parameters())


def test_neither_trains_the_other(make_scalekd, make_batch):
    """The assistant's losses leave no gradient in the student, and the student's none in the assistant."""
    distiller = make_scalekd("RetinaNet")
    (step,) = distiller.assistants
    seen, step_optimizer = [], step.optimizer.step
    step.optimizer.step = lambda *a, **k: (seen.append([p.grad is not None for p in distiller.student.parameters()]),
                                           step_optimizer(*a, **k))  # fmt: skip
    with EventStorage(0):
        losses = distiller(make_batch([(64, 96)] * 2))
    assert len(seen) == 1 and not any(seen[0]) and all(p.grad is not None for p in step.assistant.parameters())
    before = [p.grad.clone() for p in step.assistant.parameters()]
    sum(losses.values()).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(step.assistant.parameters(), before))
    assert all(p.grad is not None for p in distiller.student.parameters())


def test_the_assistants_features_leave_no_trace_in_the_students_statistics(make_scalekd, make_batch):
    """BatchNorms of a head see them when predictions are compared; at inference they do not occur."""
    found = []
    for losses in ([{"NAME": "AlignedL1", "SOURCE": NAME, "MATCH": "by_index"}], [{"NAME": "Chen", "SOURCE": NAME}]):
        distiller = make_scalekd("FCOS", losses=losses, student_options={"MODEL__FCOS__NORM": "BN"})
        with EventStorage(0):
            distiller(make_batch([(64, 96)] * 2))
        state = distiller.student.state_dict()
        found.append({k: v for k, v in state.items() if "head." in k and k.split(".")[-1] in BUFFERS})
        assert found[-1] and all((v != 0).any() for v in found[-1].values())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("arch", ["FCOS", "FasterRCNN"])
def test_mixed_precision(make_scalekd, make_batch, arch):
    distiller = make_scalekd(arch)
    (step,) = distiller.assistants
    with EventStorage(0), torch.autocast("cpu", dtype=torch.bfloat16):
        losses = distiller(make_batch([(64, 96)] * 2))
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    parameters = [*distiller.student.parameters(), *distiller.losses.parameters(), *step.assistant.parameters()]
    trained = [p for p in parameters if p.requires_grad]
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in trained)


def test_inference_costs_what_the_student_costs(make_scalekd, tiny_model, make_batch):
    """A distilled student has the tensors, multiply-adds and detections of a model that was never in a distiller."""
    distiller, plain = make_scalekd("FCOS"), tiny_model("FCOS").eval()
    batch = make_batch([(64, 96)] * 2)
    with EventStorage(0):
        sum(distiller(batch).values()).backward()
    distiller.eval()
    assert distiller.student.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(distiller.student.state_dict())
    inside, alone = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with torch.no_grad():
        with inside:
            found = distiller(batch)
        with alone:
            expected = plain(batch)
    assert inside.get_total_flops() == alone.get_total_flops() > 0
    assert torch.equal(found[0]["instances"].scores, expected[0]["instances"].scores)


def test_a_larger_map_of_the_teacher_is_averaged_to_the_students_grid(make_scalekd, make_batch):
    # At twice the input bilinear interpolation would be the same.
    distiller, contexts, compared = make_scalekd("FCOS", 4.0), [], []
    distiller.on_context.append(contexts.append)
    (sdf,) = (entry.loss for entry in distiller.losses if entry.name.startswith("SDF"))
    sdf.register_forward_pre_hook(lambda module, args: compared.append(args[1]["res5"]))
    with EventStorage(0):
        distiller(make_batch([(64, 96)] * 2))
    ((context,), (reached,)) = contexts, compared
    # What no loss reads is not kept: finer maps of a large image are the largest tensors of a step.
    assert {name: list(maps) for name, maps in context.taps["bottom_up"].items()} == {
        "teacher": ["res5"], "student": ["res5"]
    }  # fmt: skip
    whole = context.taps["bottom_up"]["teacher"]["res5"]
    assert whole.shape[-2:] == (8, 12) and context.taps["bottom_up"]["student"]["res5"].shape[-2:] == (2, 3)
    torch.testing.assert_close(reached, torch.nn.functional.avg_pool2d(whole, 4))


def test_the_assistant_learns_nothing_inside_of_an_ignored_region(make_scalekd, make_batch):
    """Its features pass the student's head, and what regions do there holds for them too."""
    distiller, taken = make_scalekd("FCOS", 1.0), []
    IgnoredRegions(distiller.student)

    def keep(_module, _args, output):
        for scores in output[0]:
            if scores.requires_grad:
                scores.retain_grad()
                taken.append(scores)

    distiller.student.head.register_forward_hook(keep)
    batch = make_batch([(64, 96)], boxes=1)
    batch[0]["instances"].gt_boxes.tensor[:] = torch.tensor([[4.0, 4.0, 20.0, 28.0]])
    batch[0]["ignored_regions"] = torch.tensor([[0.5, 0.0, 1.0, 1.0]])
    with EventStorage(0):
        losses = distiller(batch)
    of_assistant = [scores for scores in taken if scores.grad is not None]
    assert of_assistant and len(of_assistant) < len(taken)
    sum(losses.values()).backward()
    fine = [scores for scores in taken if scores.shape[-1] >= 6]  # p3, p4: the object is more than a stride away
    assert {scores.shape[-1] for scores in fine} == {12, 6} and len(fine) >= 4
    for scores in fine:
        half = scores.shape[-1] // 2
        assert (scores.grad[..., half:] == 0).all() and (scores.grad[..., :half] != 0).any()


@pytest.mark.parametrize(
    ("arch", "match", "first"),
    [("FCOS", "by_index", 3), ("FCOS", "by_stride", 2), ("MaskRCNN", "by_index", 2), ("KeypointRCNN", "by_index", 2)],
)
def test_students_at_half_the_input(make_scalekd, make_batch, arch, match, first):
    """Table 4's students with stock levels, and those whose levels are moved down by one, under a teacher at H."""
    entry = {**SCALEKD["ASSISTANTS"][0], "MATCH": match}
    levels = {"levels": range(first, first + 5)}
    distiller = make_scalekd(arch, 1.0, levels, DISTILL__STUDENT_RESOLUTION="L", assistant=entry)
    (step,) = distiller.assistants
    strides = {pair.strides[0] / pair.strides[1] for pair in step.assistant.pairs}
    assert len(step.assistant.pairs) == 5 and strides == ({2.0} if match == "by_index" else {1.0})
    with EventStorage(0):
        losses = distiller(make_batch([(96, 128)] * 2))
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(p.grad is not None for p in distiller.student.parameters())


def test_the_head_learns_from_the_assistant_if_asked(project, teacher_weights, tmp_path, make_batch):
    cfg = scalekd(project, teacher_weights, tmp_path)
    cfg.DISTILL.ASSISTANTS = [{**SCALEKD["ASSISTANTS"][0], "HEAD_LEARNS": True}]
    distiller = DistillTrainer.build_model(cfg).train()
    with EventStorage(0):
        losses = distiller(make_batch([(64, 64)] * 2))
    taught = sum(value for key, value in losses.items() if key.startswith("loss_fcos") and key.endswith(f"@{NAME}"))
    taught.backward()
    assert all(p.grad is not None for p in distiller.student.head.parameters())
    assert all(p.grad is None for p in distiller.student.backbone.parameters())


def test_no_trace_in_what_is_exported(project, teacher_weights, tmp_path):
    cfg = scalekd(project, teacher_weights, tmp_path / "run")
    trainer, _, _ = train(cfg)
    export(cfg, str(tmp_path / "run" / "model_final.pth"), tmp_path / "out")
    texts = {file.name: file.read_text() for file in (tmp_path / "out").iterdir() if file.suffix != ".pth"}
    assert "META_ARCHITECTURE" in texts["config.yaml"]
    assert not [name for name, text in texts.items() if NAME in text or "SDF" in text]
    saved = torch.load(tmp_path / "out" / "model.pth", weights_only=True)
    assert not [key for key in saved if "assistant" in key]
    assert saved["model"].keys() == trainer.distiller.student.state_dict().keys()


def test_no_trace_in_the_students_checkpoint_and_exact_resume(project, teacher_weights, tmp_path):
    def run(folder, resume=False):
        cfg = scalekd(project, teacher_weights, tmp_path / folder, **{"DISTILL.START_ITER": 2})
        sdf, *others = SCALEKD["LOSSES"]
        cfg.DISTILL.LOSSES = [{**sdf, "TEACHER_SIDE": "trainable"}, *others]
        return train(cfg, resume)

    whole, expected, _ = run("whole")
    left_by_a_killed_run(tmp_path / "whole", tmp_path / "killed")
    again, resumed, _ = run("killed", resume=True)
    assert resumed.steps == expected.steps[SAVED:]
    assert [s["factor"] for s in expected.steps[:2]] == [0.0, 0.0] and expected.steps[-1]["factor"] > 0
    (a,), (b,) = whole.distiller.assistants, again.distiller.assistants
    assert_equal_weights(a.assistant.state_dict(), b.assistant.state_dict())
    states = [run.distiller.losses.state_dict() for run in (whole, again)]
    assert_equal_weights(*states)
    assert states[0]["0.loss.first_spread"].isfinite().all()
    saved = torch.load(tmp_path / "whole" / "model_final.pth", weights_only=True)
    alone = DistillTrainer.build_model(config(project, teacher_weights, "fcos", tmp_path)).state_dict()
    assert saved["model"].keys() == alone.keys()


class Watched(HookBase):
    """After each step, the weights of the backbone in front of the neck, and of the rest."""

    def __init__(self, student):
        self.student, self.steps = student, [self.look(student)]

    @staticmethod
    def look(student):
        sides = [{}, {}]
        for name, p in student.named_parameters():
            sides["backbone.bottom_up." not in name][name] = p.detach().clone()
        return sides

    def after_step(self):
        self.steps.append(self.look(self.student))


def test_the_backbone_rests_first_and_every_phase_resumes_exactly(project, teacher_weights, tmp_path):
    """Frozen for two of six iterations, distilled from the fifth: saved after each of the phases' steps."""
    phases = {"DISTILL.FREEZE_BACKBONE_ITERS": 2, "DISTILL.START_ITER": 4}
    phases |= {"DISTILL.WARMUP_ITERS": 0, "SOLVER.CHECKPOINT_PERIOD": 1}

    def run(folder, resume=False):
        trainer = DistillTrainer(scalekd(project, teacher_weights, tmp_path / folder, **phases))
        trainer.resume_or_load(resume)
        watched, trace = Watched(trainer.distiller.student), Trace(trainer)
        trainer.register_hooks([watched, trace])
        trainer.train()
        return watched.steps, trace.steps

    weights, steps = run("whole")
    moved = [
        [any(not torch.equal(p, later[name]) for name, p in side.items()) for side, later in zip(before, after)]
        for before, after in itertools.pairwise(weights)
    ]
    assert moved == [[False, True]] * 2 + [[True, True]] * 4
    assert [step["factor"] for step in steps] == [0.0] * 4 + [1.0] * 2
    for done in (1, 3, 5):
        killed = tmp_path / f"killed{done}"
        killed.mkdir()
        shutil.copy(tmp_path / "whole" / f"model_{done - 1:07d}.pth", killed)
        (killed / "last_checkpoint").write_text(f"model_{done - 1:07d}.pth")
        again, resumed = run(killed.name, resume=True)
        assert resumed == steps[done:]
        for mine, theirs in zip(again[-1], weights[-1]):
            assert_equal_weights(mine, theirs)


def test_distillation_begins_late():
    factor = [distillation_factor(i, 100, warmup_iters=10, start_iter=20) for i in (0, 19, 20, 25, 30, 99)]
    assert factor == [0, 0, 0, 0.5, 1, 1]


def test_direct_regression_by_hand():
    s, t = torch.tensor([[0.5, 2.0, 0.0, 0.0]]), torch.zeros(1, 4)
    assert direct_regression(s, t, t).tolist() == [0.5 * 0.25 + 1.5]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_yaml_files(path):
    cfg = load_config(path)
    (teacher,) = teacher_entries(cfg)
    theirs = load_config(teacher["CONFIG"])
    low = path.stem.endswith("_S_L_1x")  # Table 4: the teacher's images are twice as large
    one_x = "retinanet_R_50_S_" in path.stem and not path.stem.startswith("visdrone") and path.stem[-3:] != "_1x"
    assert (50 if low else 101) == theirs.MODEL.RESNETS.DEPTH
    assert ("L" if low else "H") == cfg.DISTILL.STUDENT_RESOLUTION
    expected = 1.0 if low or one_x or "teacher_1x_input" in path.stem else 2.0
    assert teacher.get("SCALE", 1.0) == expected
    # The phases are a third and a ninth of the schedule.
    assert pytest.approx(cfg.SOLVER.MAX_ITER / 3, abs=1) == cfg.DISTILL.START_ITER
    assert pytest.approx(cfg.SOLVER.MAX_ITER / 9, abs=1) == cfg.DISTILL.FREEZE_BACKBONE_ITERS
    alpha, beta, gamma = (0.07, 0.5, 0.2) if "rcnn" in path.stem else (0.01, 0.2, 0.05)  # of eq. (7)
    for entry in cfg.DISTILL.LOSSES:
        assert entry["WEIGHT"] == (alpha if entry["NAME"] == "SDF" else beta)
        assert entry.get("NU", gamma / beta) * beta == pytest.approx(gamma)
    assert {entry.get("RATIO", 8) for entry in cfg.DISTILL.ASSISTANTS} <= {16 if "rcnn" in path.stem else 8}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_yaml_files_train(path, make_batch):
    """A step of narrow networks of each file: stages, levels, channels and heads of all of its parts exist."""
    cfg = load_narrow(path)
    (entry,) = teacher_entries(cfg)
    models = []
    for one in (cfg, load_narrow(entry["CONFIG"])):
        torch.manual_seed(0)
        models.append(build_model(one))
    teacher = FrozenTeacher(models[1], name=entry["NAME"], scale=entry.get("SCALE", 1.0))
    distiller = build_distiller(cfg, models[0], [teacher]).train()
    with EventStorage(0):
        losses = distiller(make_batch([(64, 96)] * 2))
    compared = {name.split("/")[1].split("@")[0] for name in losses if name.startswith("loss_distill/")}
    assert compared == {loss["NAME"] for loss in cfg.DISTILL.LOSSES}
    assert all(value.isfinite() for value in losses.values())


@pytest.mark.parametrize("pixels", [0, 6, 12])
def test_table_1(pixels):
    """Chen's losses under the raw teacher; nothing but the place of its boxes differs."""
    cfg = load_config(FOLDER / f"retinanet_R_50_moved_{pixels}px.yaml")
    (entry,) = cfg.DISTILL.LOSSES
    assert entry == {
        "NAME": "Chen", "SOURCE": "teacher", "BBOX": "direct", "BOX_SHIFT": float(pixels), "WEIGHT": 0.2, "NU": 0.25
    }  # fmt: skip
    assert not cfg.DISTILL.ASSISTANTS and cfg.DISTILL.START_ITER == cfg.DISTILL.FREEZE_BACKBONE_ITERS == 0
