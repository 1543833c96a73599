"""One trainer for baselines, teachers and students."""

from __future__ import annotations

import logging
import os
import weakref

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch import nn

from ..config_values import copy_with
from ..data.loader import build_train_loader
from ..data.low_res import build_test_loader
from ..data.tally import raise_errors
from ..distill.distiller import Distiller
from ..distill.init import init_student
from ..distill.schedules import paper_weights
from ..evaluation.detection_loss import validation_loss
from ..evaluation.evaluators import build_evaluator, check_evaluators
from ..modeling.adapters import detector_of
from ..modeling.features import freeze_unused_levels
from ..modeling.ignored_regions import IgnoredRegions
from ..modeling.teacher import MultiScaleTeacher
from . import preflight
from .build import build_distillation, compile_backbone
from .checkpoint import CheckedCheckpointer, load_branches
from .divergence import LossRecorder
from .evaluating import guard_hooks, share_statistics
from .gates import gate_loggers
from .hooks import BalanceLogger, ExactResume, FeatureAnalysis, LossRatioLogger, SkippedImages
from .precise_bn import NormsRunOnce
from .resting import frozen_backbone, resting_losses
from .run_folder import check_iterations
from .scaling import scale_to_batch, scale_to_processes
from .solver import build_lr_scheduler, build_optimizer

logger = logging.getLogger(__name__)


def apply_weighting(cfg: CfgNode) -> CfgNode:
    """If DISTILL.WEIGHTING is set, write the weights that it stands for over W_FUSE, W_DET and the losses' WEIGHT."""
    if not cfg.DISTILL.WEIGHTING:
        return cfg
    w_fuse, w_det, w_distill = paper_weights(cfg.DISTILL.WEIGHTING, cfg.DISTILL.LAMBDA, cfg.DISTILL.GAMMA)
    losses = [dict(entry, WEIGHT=w_distill) for entry in cfg.DISTILL.LOSSES]
    cfg = copy_with(cfg, {"MSAD.W_FUSE": w_fuse, "DISTILL.W_DET": w_det, "DISTILL.LOSSES": losses})
    logger.info("Weights of %s: w_fuse %g, w_det %g, w_distill %g", cfg.DISTILL.WEIGHTING, w_fuse, w_det, w_distill)
    return cfg


def check_training(cfg: CfgNode) -> None:
    """Raise ValueError for a curriculum, and for values with which detectron2's hooks would fail in mid-training."""
    if cfg.DISTILL.STAGES:
        raise ValueError(
            "a trainer runs one stage, and DISTILL.STAGES has several: call msad.engine.setup.train(cfg), or "
            "msad.engine.stages.train_stages with a function that trains by your own trainer"
        )
    if cfg.SOLVER.CHECKPOINT_PERIOD < 1:
        raise ValueError(f"SOLVER.CHECKPOINT_PERIOD must be at least 1, not {cfg.SOLVER.CHECKPOINT_PERIOD}")
    if cfg.TEST.PRECISE_BN.ENABLED and cfg.DISTILL.TEACHERS:
        raise ValueError("TEST.PRECISE_BN cannot be used with DISTILL.TEACHERS: it would run teachers and losses, too")


class DistillTrainer(DefaultTrainer):
    """detectron2's DefaultTrainer that also distils.

    Without DISTILL.TEACHERS it trains any model of the config: a baseline or a teacher. With teachers, the model of
    the config is the student: it alone is evaluated and checkpointed, under the parameter names it has by itself, so
    its checkpoints load into plain detectron2. Interrupted runs resume exactly, unless a subclass has a loader without
    ``seed`` and ``start_iter``. A trainer seeds the process with SEED: initial weights do not depend on what ran
    before.
    """

    def __init__(self, cfg: CfgNode) -> None:
        check_training(cfg)
        if cfg.SEED < 0:
            cfg = copy_with(cfg, {"SEED": comm.shared_random_seed() % 2**31})
            logger.info("SEED is not set; this run uses %d", cfg.SEED)
        seed_all_rng(cfg.SEED + comm.get_rank())
        super().__init__(scale_to_processes(scale_to_batch(apply_weighting(cfg)), comm.get_world_size()))
        if getattr(self.build_evaluator, "__func__", None) is DistillTrainer.build_evaluator.__func__:
            raise_errors(check_evaluators(cfg))
        self._recorder = LossRecorder(self._trainer.model)

    @property
    def distiller(self) -> Distiller | None:
        """The distiller if this run has a teacher."""
        model = getattr(self._trainer.model, "module", self._trainer.model)
        return model if isinstance(model, Distiller) else None

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The model of ``cfg``, inside a Distiller if DISTILL.TEACHERS is not empty."""
        model = super().build_model(cfg)
        if not isinstance(model, MultiScaleTeacher):
            frozen = freeze_unused_levels(model)
            if frozen:
                logger.info("Not trained, because no head reads their level: %s", ", ".join(frozen))
        if any(MetadataCatalog.get(name).get("has_ignored_regions") for name in cfg.DATASETS.TRAIN):
            IgnoredRegions(model)
        if cfg.SOLVER.CHANNELS_LAST:
            model = model.to(memory_format=torch.channels_last)
        if cfg.SOLVER.COMPILE:
            compile_backbone(detector_of(model))
        if not cfg.DISTILL.TEACHERS:
            if cfg.DISTILL.LOSSES:
                raise ValueError("DISTILL.LOSSES need a teacher: DISTILL.TEACHERS is empty")
            return model
        return build_distillation(cfg, model)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer):
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        """That of the checked data, see :mod:`msad.data.loader`."""
        return build_train_loader(cfg, seed=cfg.SEED)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        """detectron2's, of the images that the model sees, see :mod:`msad.data.low_res`."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
        """The evaluator of the data set's ``evaluator_type``, see :mod:`msad.evaluation.evaluators`.

        Its files are in OUTPUT_DIR/inference, of a teacher in a folder a branch below it, and of several data sets in
        a folder each.
        """
        branch = cfg.MSAD.EVAL_BRANCH if cfg.MODEL.META_ARCHITECTURE == "MultiScaleTeacher" else ""
        own = dataset_name if len(cfg.DATASETS.TEST) > 1 else ""
        folder = os.path.join(cfg.OUTPUT_DIR, "inference", branch, own).rstrip(os.sep)
        return build_evaluator(cfg, dataset_name, output_folder or folder)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None) -> dict:
        """detectron2's evaluation, of the model that a checkpoint has, whatever the BatchNorms of other processes saw.

        With TEST.LOSS_IMAGES the results have {"validation": {"L_detect": ...}}, too.
        """
        share_statistics(model)
        results = super().test(cfg, model, evaluators)
        if cfg.TEST.LOSS_IMAGES > 0:
            model = getattr(model, "module", model)
            detector = model.student if isinstance(model, Distiller) else model
            for name in cfg.DATASETS.TEST:  # in every process: losses may average over them
                loss = validation_loss(cfg, detector, name)
                if comm.is_main_process():
                    of_set = results[name] if len(cfg.DATASETS.TEST) > 1 else results
                    of_set["validation"] = {"L_detect": loss}
        return results

    def build_hooks(self) -> list:
        """detectron2's hooks, writing the student alone, and ours."""
        distiller = self.distiller
        model, extra = self._trainer.model, {}
        if distiller is not None:
            model = distiller.student
            if any(True for _ in distiller.losses.parameters()):
                extra["distill_losses"] = distiller.losses
            if distiller.balance is not None:
                extra["distill_balance"] = distiller.balance
            extra.update({f"assistant/{step.name}": step for step in distiller.assistants})
        self.checkpointer = CheckedCheckpointer(model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self), **extra)
        hooks = super().build_hooks()
        guard_hooks(hooks, model)
        loader, period = self._trainer.data_loader, self.cfg.SOLVER.CHECKPOINT_PERIOD
        if not _begins_anywhere(loader):
            logger.warning(
                "%s.build_train_loader makes a %s, which has no seed and start_iter to set: a resumed run sees other "
                "images than an uninterrupted one", type(self).__name__, type(loader).__name__,
            )  # fmt: skip
        exact = loader if _begins_anywhere(loader) else None
        ours: list[HookBase] = [ExactResume(self.cfg.SEED, self.checkpointer.model, exact, period)]
        if hasattr(loader, "skipped"):
            ours.append(SkippedImages(loader, (20, period)))
        if self.cfg.TEST.PRECISE_BN.ENABLED:
            ours.append(NormsRunOnce(model))
        ours += gate_loggers(getattr(model, "module", model))
        if distiller is not None and len(distiller.losses):
            ours.append(resting_losses(distiller))
            # DISTILL.BALANCE looks at gradients, and need not care for the losses' ratio.
            ours.append(LossRatioLogger(patience=3 if distiller.balance is None else 0))
            if distiller.balance is not None:
                ours.append(BalanceLogger(distiller.balance))
        if self.cfg.DISTILL.FREEZE_BACKBONE_ITERS > 0:
            if distiller is None:
                logger.warning("DISTILL.FREEZE_BACKBONE_ITERS has no effect without DISTILL.TEACHERS")
            else:
                ours.append(frozen_backbone(distiller.student, self.cfg.DISTILL.FREEZE_BACKBONE_ITERS))
        if distiller is not None and self.cfg.DISTILL.ANALYSIS_PERIOD > 0:
            ours.append(FeatureAnalysis(distiller, self.cfg.DISTILL.ANALYSIS_PERIOD, self.cfg.OUTPUT_DIR))
        return ours + hooks

    def run_step(self) -> None:
        """One iteration; FloatingPointError that names losses and learning rate if training has diverged."""
        self._recorder.forget()
        try:
            super().run_step()
        except (AssertionError, FloatingPointError, RuntimeError, ValueError) as error:
            assistants = self.distiller.assistants if self.distiller is not None else ()
            explained = self._recorder.explain(error, self.iter, self.cfg.SOLVER.BASE_LR, assistants)
            if explained is None:
                raise
            raise explained from error

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume the last checkpoint of OUTPUT_DIR if asked and there; otherwise load weights and start the student.

        A resumed student keeps its weights: the teacher initialises it only at the very beginning.
        """
        super().resume_or_load(resume)
        resumed = resume and self.checkpointer.has_checkpoint()
        check_iterations(self.start_iter, self.max_iter, self.cfg.OUTPUT_DIR)
        student, loaded = self.checkpointer.model, set()
        if self.cfg.MODEL.WEIGHTS:
            loaded = student.state_dict().keys() - set(self.checkpointer.missing_or_mismatched)
        elif self.cfg.MODEL.META_ARCHITECTURE == "FusionStudent" and not resumed:
            loaded = load_branches(student, self.cfg.MSAD.FUSION_STUDENT.BRANCHES)
        preflight.report(preflight.check_test_size(self.cfg, student))
        if not resumed and self.distiller is None:
            preflight.report(preflight.check_frozen(student, loaded, self.cfg.MODEL.BACKBONE.FREEZE_AT))
        elif not resumed:
            preflight.report(preflight.preflight(self.cfg, student, self.distiller.teachers, loaded))
            init_student(student, self.distiller.teacher.model, self.cfg.DISTILL.INIT_STUDENT)
        if _begins_anywhere(self._trainer.data_loader):
            self._trainer.data_loader.start_iter = self.start_iter


def _begins_anywhere(loader) -> bool:
    """Whether a loader can be set to yield what an uninterrupted run would see, as ours can."""
    return hasattr(loader, "seed") and hasattr(loader, "start_iter")
