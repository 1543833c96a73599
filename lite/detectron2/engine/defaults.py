"""A trainer and a predictor made from a config."""

import logging
import weakref
from collections import OrderedDict

import numpy as np
import torch

import detectron2.data.transforms as T
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader, build_detection_train_loader
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format, verify_results
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from detectron2.utils.logger import log_first_n, setup_logger

from . import hooks
from .loop import HookBase, TrainerBase
from .startup import create_ddp_model, default_argument_parser, default_setup, default_writers  # noqa: F401
from .train_loop import AMPTrainer, SimpleTrainer

__all__ = ["DefaultPredictor", "DefaultTrainer"]


class DefaultPredictor:
    """The model of a config with its weights, for single images.

    Attributes:
        metadata: of the first data set in `cfg.DATASETS.TEST`, where there is one.
        aug: the resizing that the config prescribes for tests.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg.clone()
        self.input_format = self.cfg.INPUT.FORMAT
        if self.input_format not in ("RGB", "BGR"):
            raise ValueError(f"INPUT.FORMAT is {self.input_format!r}; the predictor reads RGB or BGR.")
        self.model = build_model(self.cfg).eval()
        DetectionCheckpointer(self.model).load(self.cfg.MODEL.WEIGHTS)
        if len(self.cfg.DATASETS.TEST):
            self.metadata = MetadataCatalog.get(self.cfg.DATASETS.TEST[0])
        short_side = [self.cfg.INPUT.MIN_SIZE_TEST] * 2
        self.aug = T.ResizeShortestEdge(short_side, self.cfg.INPUT.MAX_SIZE_TEST)

    def __call__(self, original_image: np.ndarray) -> dict:
        """Detect in one image.

        Args:
            original_image: (H, W, 3) in BGR order, as OpenCV reads it.

        Returns:
            The output of the model for the image; coordinates are pixels of `original_image`.
        """
        height, width = original_image.shape[:2]
        pixels = original_image[:, :, ::-1] if self.input_format == "RGB" else original_image
        pixels = self.aug.get_transform(pixels).apply_image(pixels)
        tensor = torch.from_numpy(np.ascontiguousarray(pixels.astype("float32").transpose(2, 0, 1)))
        item = {"image": tensor.to(self.cfg.MODEL.DEVICE), "height": height, "width": width}
        with torch.no_grad():
            return self.model([item])[0]


def _of_step_maker(name: str) -> property:
    """An attribute of `DefaultTrainer` that lives in its `_trainer`, readable and writable."""

    def read(self):
        return getattr(self._trainer, name)

    def write(self, value) -> None:
        setattr(self._trainer, name, value)

    return property(read, write)


class DefaultTrainer(TrainerBase):
    """Training as a config describes it. Subclasses replace single `build_*` methods.

    The steps themselves are made by `self._trainer`, a `SimpleTrainer` or (`SOLVER.AMP.ENABLED`) an
    `AMPTrainer`; hooks, iteration and storage are those of this object.

    Attributes:
        cfg: the config, scaled to the number of processes.
        checkpointer: a `DetectionCheckpointer` of model and trainer state.
        scheduler: the learning rate scheduler.
        start_iter, max_iter: the iterations of `train`.
        model, optimizer, data_loader: those of `self._trainer`; the model is wrapped for DDP, if need be.
    """

    model = _of_step_maker("model")
    optimizer = _of_step_maker("optimizer")
    data_loader = _of_step_maker("data_loader")

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        self.cfg = cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER

        bare_model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, bare_model)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        loader = self.build_train_loader(cfg)
        # Buffers (running statistics of batch norm) stay those of each process, as in a single one.
        model = create_ddp_model(bare_model, broadcast_buffers=False)
        step_maker = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = step_maker(model, loader, optimizer)
        # The checkpointer must not keep the trainer, which owns it, alive.
        self.checkpointer = DetectionCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Continue from the last checkpoint in `cfg.OUTPUT_DIR`, or start from `cfg.MODEL.WEIGHTS`.

        The latter loads the model alone and happens if `resume` is false or there is no checkpoint.
        """
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if resume and self.checkpointer.has_checkpoint():
            # The stored iteration is a finished one.
            self.start_iter = self.iter + 1

    def build_hooks(self) -> list[HookBase | None]:
        """Timer, learning rate, precise batch norm, checkpoints, evaluation, writers, in this order.

        Checkpoints come before the evaluation, which may fail, and writers last, to write its results.
        """
        cfg = self.cfg
        main = comm.is_main_process()

        def evaluate() -> dict:
            self._last_eval_results = self.test(self.cfg, self.model)
            return self._last_eval_results

        return [
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            self._build_precise_bn(),
            hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD) if main else None,
            hooks.EvalHook(cfg.TEST.EVAL_PERIOD, evaluate),
            hooks.PeriodicWriter(self.build_writers(), period=20) if main else None,
        ]

    def _build_precise_bn(self) -> HookBase | None:
        settings = self.cfg.TEST.PRECISE_BN
        if not settings.ENABLED or not hooks.get_bn_modules(self.model):
            return None
        loader_cfg = self.cfg.clone()
        loader_cfg.defrost()
        # A second set of worker processes would cost more than it gives.
        loader_cfg.DATALOADER.NUM_WORKERS = 0
        loader = self.build_train_loader(loader_cfg)
        return hooks.PreciseBN(self.cfg.TEST.EVAL_PERIOD, self.model, loader, settings.NUM_ITER)

    def build_writers(self) -> list[EventWriter]:
        return default_writers(self.cfg.OUTPUT_DIR, self.max_iter)

    def train(self) -> OrderedDict | None:
        """Train from `start_iter` to `max_iter`.

        Returns:
            The results of the last evaluation, if `TEST.EXPECTED_RESULTS` asks to verify them.
        """
        super().train(self.start_iter, self.max_iter)
        if not (len(self.cfg.TEST.EXPECTED_RESULTS) and comm.is_main_process()):
            return None
        if not hasattr(self, "_last_eval_results"):
            raise RuntimeError("TEST.EXPECTED_RESULTS is set, but the training ended without an evaluation.")
        verify_results(self.cfg, self._last_eval_results)
        return self._last_eval_results

    def run_step(self) -> None:
        self._trainer.iter = self.iter
        self._trainer.run_step()

    def state_dict(self) -> dict:
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])

    @classmethod
    def build_model(cls, cfg: CfgNode) -> torch.nn.Module:
        model = build_model(cfg)
        logging.getLogger(__name__).info("Model:\n%s", model)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer):
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        return build_detection_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        return build_detection_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """The evaluator of a data set; there is no default, because it depends on the data."""
        raise NotImplementedError(
            f"No evaluator for {dataset_name!r}: override {cls.__name__}.build_evaluator() "
            "or pass evaluators to test()."
        )

    @classmethod
    def test(cls, cfg: CfgNode, model: torch.nn.Module, evaluators=None) -> OrderedDict:
        """Evaluate `model` on every data set in `cfg.DATASETS.TEST`.

        Args:
            evaluators: one for each data set (or a single evaluator for a single data set); by default
                made by `build_evaluator`. A data set without an evaluator is skipped with a warning.

        Returns:
            Results of the data set, if there is one; else results by data set. Empty in processes other
            than the main one.
        """
        names = cfg.DATASETS.TEST
        if isinstance(evaluators, DatasetEvaluator):
            evaluators = [evaluators]
        if evaluators is not None and len(evaluators) != len(names):
            raise ValueError(f"{len(evaluators)} evaluators for {len(names)} data sets in DATASETS.TEST.")
        logger = logging.getLogger(__name__)
        if cfg.TEST.AUG.ENABLED:
            log_first_n(logging.WARNING, "TEST.AUG.ENABLED: this engine has no test-time augmentation; not augmented.")
        results: OrderedDict = OrderedDict((name, {}) for name in names)
        for index, name in enumerate(names):
            loader = cls.build_test_loader(cfg, name)
            try:
                evaluator = cls.build_evaluator(cfg, name) if evaluators is None else evaluators[index]
            except NotImplementedError as error:
                logger.warning("%s is not evaluated. %s", name, error)
                continue
            results[name] = inference_on_dataset(model, loader, evaluator)
            if comm.is_main_process():
                logger.info("Results on %s, ready to paste as csv:", name)
                print_csv_format(results[name])
        return results[names[0]] if len(names) == 1 else results

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """Adapt the schedule to `num_workers` processes by the linear scaling rule.

        Where `SOLVER.REFERENCE_WORLD_SIZE` (the number of processes the config was written for) is neither
        0 nor `num_workers`, batch size and learning rate grow with the number of processes, and all
        numbers of iterations shrink. The result is a copy; otherwise `cfg` itself is returned.
        """
        reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
        if reference in (0, num_workers):
            return cfg
        if cfg.SOLVER.IMS_PER_BATCH % reference:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} is no multiple of "
                f"SOLVER.REFERENCE_WORLD_SIZE {reference}."
            )
        scaled = cfg.clone()
        scaled.defrost()
        factor = num_workers / reference
        solver = scaled.SOLVER
        solver.REFERENCE_WORLD_SIZE = num_workers
        solver.IMS_PER_BATCH = round(solver.IMS_PER_BATCH * factor)
        solver.BASE_LR = solver.BASE_LR * factor
        solver.STEPS = tuple(round(step / factor) for step in solver.STEPS)
        for key in ("MAX_ITER", "WARMUP_ITERS", "CHECKPOINT_PERIOD"):
            solver[key] = round(solver[key] / factor)
        scaled.TEST.EVAL_PERIOD = round(scaled.TEST.EVAL_PERIOD / factor)
        if cfg.is_frozen():
            scaled.freeze()
        logging.getLogger(__name__).info(
            f"Schedule scaled from {reference} to {num_workers} processes: batch {solver.IMS_PER_BATCH}, "
            f"learning rate {solver.BASE_LR:g}, {solver.MAX_ITER} iterations, warm-up {solver.WARMUP_ITERS}"
        )
        return scaled
