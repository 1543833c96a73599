#!/usr/bin/env python
"""Distillation without a trainer and without hooks: every step of it in one file, to read, to change, to copy.

    tools/plain_distill.py configs/nuclei/losses/cwd.yaml --output output/plain
    tools/plain_distill.py STUDENT.yaml DISTILL.TEACHERS "[{'CONFIG': 'T.yaml', 'WEIGHTS': 't.pth'}]"

It trains what tools/train_net.py trains from the same yaml, on one device, with the same losses in every iteration
(tests/tools/test_plain_distill.py). Left out: resuming, evaluation, several GPUs, mixed precision, automatic weights,
fusion students, losses between head predictions, MATCH: by_index, ignored regions of the data.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import nn
from tqdm import tqdm

from msad import cli, load_config
from msad.data import register_datasets
from msad.data.loader import build_train_loader
from msad.distill.context import DistillContext
from msad.distill.distiller import student_shapes
from msad.distill.init import init_student
from msad.distill.losses.registry import COMMON_OPTIONS, build_losses, compares_heads, lower_keys
from msad.distill.schedules import distillation_factor
from msad.engine.build import load_teacher, teacher_entries
from msad.engine.checkpoint import CheckedCheckpointer
from msad.engine.scaling import scale_to_batch
from msad.engine.solver import build_lr_scheduler, build_optimizer
from msad.modeling.adapters import adapt
from msad.modeling.features import freeze_unused_levels
from msad.resolution import downsample_batch, get_resolution, shift_levels


def distill(cfg: CfgNode, student: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Train ``student`` as ``cfg`` says, in place; yields the weighted loss terms of every iteration."""
    device = cfg.MODEL.DEVICE
    # 1. The teacher: frozen, in evaluation mode. It sees H; the student sees H downsampled by 2^shift.
    (entry,) = teacher_entries(cfg)
    teacher = load_teacher(entry, cfg)
    resolution = get_resolution(cfg.DISTILL.STUDENT_RESOLUTION)

    # 2. The student starts from pretrained weights, then from the teacher's, wherever names and shapes agree.
    freeze_unused_levels(student)
    if cfg.MODEL.WEIGHTS:
        CheckedCheckpointer(student).load(cfg.MODEL.WEIGHTS)
    init_student(student, teacher.model, cfg.DISTILL.INIT_STUDENT)

    # 3. The losses know which levels they compare. Some have parameters (adaptation layers), which are trained along.
    shapes = student_shapes(student, resolution)
    losses = build_losses(cfg.DISTILL.LOSSES, lambda tap: shapes, {teacher.name: teacher.shapes}, seed=cfg.SEED)

    # 4. detectron2's optimizer and schedule, and a loader of H images.
    trained = nn.ModuleList([student, losses.to(device)]).train()
    optimizer = build_optimizer(cfg, trained)
    scheduler = build_lr_scheduler(cfg, optimizer)
    loader = iter(build_train_loader(cfg, seed=cfg.SEED))

    with EventStorage() as storage:  # the detectors log into it
        for iteration in range(cfg.SOLVER.MAX_ITER):
            batch = next(loader)
            # What is random in a step (masks of MGD, sampled proposals) is a function of seed and iteration.
            seed_all_rng(int(np.random.SeedSequence((cfg.SEED, iteration, 0)).generate_state(1)[0]))

            # 5. The teacher's pyramid (levels of H), the student's pyramid, and the student's detection losses on it.
            inputs = [dict(item, image=item["image"].to(device)) for item in batch]
            theirs = teacher.features(inputs, resolution.shift)
            small = downsample_batch(inputs, resolution.shift, torch.device(device), cfg.MSAD.DOWNSAMPLE)
            images, targets = student.preprocess_image(small), adapt(student).targets(small)
            pyramid = student.backbone(images.tensor)
            detection = adapt(student).losses(images, pyramid, targets)
            terms = {name: cfg.DISTILL.W_DET * value for name, value in detection.items()}

            # 6. P2 of the small image is P3 of H: rename the student's levels, and cut the teacher's padding to theirs.
            maps = shift_levels(pyramid, resolution.shift)
            pairs = [(name, theirs[name], x.shape) for name, x in maps.items() if name in theirs]
            on_grid = {name: x[..., : shape[-2], : shape[-1]] for name, x, shape in pairs}

            # 7. The distillation losses, phased in and out over training.
            context = DistillContext(inputs, iteration, student=maps, sources={teacher.name: on_grid})
            phases = [cfg.DISTILL[key] for key in ("WARMUP_ITERS", "DECAY_FROM", "DECAY_TO", "START_ITER")]
            factor = distillation_factor(iteration, cfg.SOLVER.MAX_ITER, *phases)
            terms |= {name: factor * value for loss in losses for name, value in loss(context).items()}
            # 8. An ordinary step. While the losses do not count, what they train rests.
            optimizer.zero_grad()
            sum(terms.values()).backward()
            for parameter in () if factor else losses.parameters():
                parameter.grad = None
            for part in (optimizer, scheduler, storage):
                part.step()
            yield {name: value.detach() for name, value in terms.items()}


def check(cfg: CfgNode) -> None:
    """Raise ValueError if ``cfg`` asks for something that is left out here."""
    refused = {
        "needs one DISTILL.TEACHERS entry": len(cfg.DISTILL.TEACHERS) != 1,
        "knows no DISTILL.WEIGHTING or BALANCE": cfg.DISTILL.WEIGHTING or cfg.DISTILL.BALANCE.RATIO,
        "knows no SOLVER.AMP or REFERENCE_WORLD_SIZE": cfg.SOLVER.AMP.ENABLED or cfg.SOLVER.REFERENCE_WORLD_SIZE > 1,
        "knows no ignored regions": any(MetadataCatalog.get(x).get("has_ignored_regions") for x in cfg.DATASETS.TRAIN),
        "knows no DISTILL.FREEZE_BACKBONE_ITERS": cfg.DISTILL.FREEZE_BACKBONE_ITERS,
        "knows no fusion students": cfg.MODEL.META_ARCHITECTURE == "FusionStudent",
        "knows no DISTILL.ASSISTANTS or STAGES": cfg.DISTILL.ASSISTANTS or cfg.DISTILL.STAGES,
    }
    for entry in map(lower_keys, (*cfg.DISTILL.LOSSES, *cfg.DISTILL.TEACHERS)):
        name = entry.get("name", "teacher")
        refused[f"compares no head predictions, as {name} does"] = compares_heads(name)
        for key, usual in {key: COMMON_OPTIONS.get(key, 1.0) for key in ("match", "tap", "scale")}.items():
            refused[f"knows no {key.upper()}: {entry.get(key)}, as {name} has"] = entry.get(key, usual) != usual
    if found := [what for what, wrong in refused.items() if wrong]:
        raise ValueError(f"plain_distill.py {found[0]}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="YAML", help="of a student with DISTILL.TEACHERS")
    parser.add_argument("--output", type=Path, default=Path("output/plain"), help="default: %(default)s")
    args = cli.parse(parser, argv)
    result = args.output / "model_final.pth"

    def work() -> None:
        cfg = load_config(args.config, args.opts)
        cli.require_device(cfg.MODEL.DEVICE)
        cli.refuse_overwriting([result], [cfg.MODEL.WEIGHTS, *(t.get("WEIGHTS", "") for t in cfg.DISTILL.TEACHERS)])
        if cfg.SEED < 0:
            cfg.SEED = np.random.randint(2**31)
            print(f"SEED is not set; this run uses {cfg.SEED}")
        register_datasets(cfg)
        check(cfg := scale_to_batch(cfg))
        seed_all_rng(cfg.SEED)
        student = build_model(cfg)
        bar = tqdm(distill(cfg, student), total=cfg.SOLVER.MAX_ITER, unit="it", dynamic_ncols=True, disable=None)
        for number, terms in enumerate(bar):
            if number % 20 == 0:
                bar.set_postfix_str(", ".join(f"{name} {value:.3f}" for name, value in terms.items()), refresh=False)
        args.output.mkdir(parents=True, exist_ok=True)
        torch.save({"model": student.state_dict()}, result)
        print(f"Student: {result}; evaluate it with tools/train_net.py --eval-only")

    return cli.run("plain_distill.py", work, "interrupted; nothing is saved")


if __name__ == "__main__":
    sys.exit(main())
